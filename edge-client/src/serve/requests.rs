//! What a body asks for: the parameters of OpenAI's chat and text completions, checked. A parameter that would change the
//! answer is obeyed or refused by name; one that nobody knows is refused too; those that concern another place are passed
//! over (`fields.rs`). Pure; `routes.rs` reads the bodies, `answers.rs` writes what is answered.

use std::collections::BTreeMap;

use commonweal_runtime::{GenerateOptions, Message};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    fields::{Content, Fields, PASSED_OVER, Part},
    messages,
    refusals::Refusal,
};

/// Answers to one request: rows that wait for the same reader.
pub(super) const ANSWERS_MAX: usize = 8;
/// Prompts of one request for text.
const PROMPTS_MAX: usize = 8;
/// As OpenAI's.
const STOPS_MAX: usize = 4;
/// Bytes of a text that ends an answer: as much of it is held back while it may be one.
const STOP_BYTES_MAX: usize = 256;
/// As OpenAI's, for chats and for text.
const CHAT_ALTERNATIVES_MAX: usize = 20;
const TEXT_ALTERNATIVES_MAX: usize = 5;
/// Tokens of an answer where the request names no number; OpenAI's for text.
const CHAT_TOKENS: usize = 256;
const TEXT_TOKENS: usize = 16;
/// Far above any context; where the context ends, so does the answer.
const TOKENS_MAX: usize = 1 << 20;

/// What either kind of request asks for, but for the prompt.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Wish {
    pub(super) model: Option<String>,
    /// Without a seed; that of the request, if it has one.
    pub(super) options: GenerateOptions,
    pub(super) seed: Option<u64>,
    /// Answers to each prompt.
    pub(super) answers: usize,
    /// With the tokens, each with so many others.
    pub(super) alternatives: Option<usize>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

/// The next turn of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ChatWish {
    pub(super) messages: Vec<Message>,
    pub(super) wish: Wish,
}

/// How texts go on.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TextWish {
    pub(super) prompts: Vec<TextPrompt>,
    pub(super) wish: Wish,
}

/// A text, or the tokens of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TextPrompt {
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    ManyTokens(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Stops {
    One(String),
    Many(Vec<String>),
}

impl Fields {
    /// What both kinds of requests have; `tokens` is the length of an answer that names none.
    fn wish(&mut self, tokens: Option<usize>, default_tokens: usize) -> Result<Wish, Refusal> {
        let temperature = self.number("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32;
        let top_p = self.number("top_p", 0.0, 1.0)?.unwrap_or(1.0) as f32;
        if top_p <= 0.0 {
            return Err(Refusal::value("top_p", "top_p: expected a number above 0"));
        }
        let stop = match self.take("stop", "a text or a list of texts")? {
            None => Vec::new(),
            Some(Stops::One(stop)) => vec![stop],
            Some(Stops::Many(stops)) => stops,
        };
        if stop.len() > STOPS_MAX || stop.iter().any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
            let expected = format!("stop: expected at most {STOPS_MAX} texts of 1 to {STOP_BYTES_MAX} bytes");
            return Err(Refusal::value("stop", expected));
        }
        // OpenAI's seeds are signed; the bits are what counts.
        let seed = self.take::<i64>("seed", "a whole number")?.map(|seed| seed as u64);
        let answers = self.count("n", 1, ANSWERS_MAX)?.unwrap_or(1);
        let stream = self.take("stream", "true or false")?.unwrap_or(false);
        let include_usage = self.include_usage(stream)?;
        let is_zero = |value: &Value| value.as_f64() == Some(0.0);
        self.only("frequency_penalty", "0", is_zero)?;
        self.only("presence_penalty", "0", is_zero)?;
        self.only("logit_bias", "none", |value| value.as_object().is_some_and(Map::is_empty))?;
        let options = GenerateOptions {
            max_new_tokens: tokens.unwrap_or(default_tokens),
            temperature,
            top_p,
            stop,
            ..GenerateOptions::default()
        };
        let model = self.take("model", "the name of a model")?;
        Ok(Wish { model, options, seed, answers, alternatives: None, stream, include_usage })
    }

    fn include_usage(&mut self, stream: bool) -> Result<bool, Refusal> {
        let Some(mut options) = self.take::<BTreeMap<String, Value>>("stream_options", "an object")? else {
            return Ok(false);
        };
        if !stream {
            return Err(Refusal::value(
                "stream_options",
                "stream_options: expected only where stream is true",
            ));
        }
        options.remove("include_obfuscation");
        let include = match options.remove("include_usage") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(include)) => include,
            Some(_) => {
                let name = "stream_options.include_usage";
                return Err(Refusal::value(name, format!("{name}: expected true or false")));
            }
        };
        match options.keys().next() {
            Some(name) => {
                let name: String = name.chars().take(100).collect();
                Err(Refusal::unknown_parameter(&format!("stream_options.{name}")))
            }
            None => Ok(include),
        }
    }
}

/// A request of `/v1/chat/completions`.
pub(super) fn chat(body: &[u8]) -> Result<ChatWish, Refusal> {
    let mut fields = Fields::of(body)?;
    let old = fields.count("max_tokens", 1, TOKENS_MAX)?;
    let tokens = fields.count("max_completion_tokens", 1, TOKENS_MAX)?.or(old);
    let mut wish = fields.wish(tokens, CHAT_TOKENS)?;
    let with_tokens = fields.take("logprobs", "true or false")?.unwrap_or(false);
    let alternatives = fields.count("top_logprobs", 0, CHAT_ALTERNATIVES_MAX)?;
    if alternatives.is_some() && !with_tokens {
        return Err(Refusal::value("top_logprobs", "top_logprobs: expected only where logprobs is true"));
    }
    wish.alternatives = with_tokens.then(|| alternatives.unwrap_or(0));
    let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    fields.only("tools", "none", is_empty)?;
    fields.only("functions", "none", is_empty)?;
    fields.only("tool_choice", "none", |value| value == "none" || value == "auto")?;
    fields.only("function_call", "none", |value| value == "none" || value == "auto")?;
    fields.only("parallel_tool_calls", "no tools", Value::is_boolean)?;
    fields.only("response_format", "{\"type\": \"text\"}", |value| value["type"] == "text")?;
    // What happens here anyway: no thoughts, and as many words as there are.
    fields.only("reasoning_effort", "\"none\"", |value| value == "none")?;
    fields.only("verbosity", "\"medium\"", |value| value == "medium")?;
    fields.only("modalities", "[\"text\"]", |value| *value == serde_json::json!(["text"]))?;
    for name in ["audio", "prediction", "web_search_options"] {
        fields.only(name, "none", |_| false)?;
    }
    let said: Vec<Map<String, Value>> =
        fields.take("messages", "a list of messages, each with a role and content")?.unwrap_or_default();
    if said.is_empty() {
        return Err(Refusal::value("messages", "messages: expected at least one message"));
    }
    let said = said.into_iter().enumerate().map(|(index, said)| Fields::of_message(index, said));
    let messages = said.map(messages::message).collect::<Result<_, _>>()?;
    fields.end(&PASSED_OVER)?;
    Ok(ChatWish { messages, wish })
}

/// A request of `/v1/completions`.
pub(super) fn text(body: &[u8]) -> Result<TextWish, Refusal> {
    let mut fields = Fields::of(body)?;
    let tokens = fields.count("max_tokens", 1, TOKENS_MAX)?;
    let mut wish = fields.wish(tokens, TEXT_TOKENS)?;
    wish.alternatives = fields.count("logprobs", 0, TEXT_ALTERNATIVES_MAX)?;
    fields.only("echo", "false", |value| *value == false)?;
    fields.only("suffix", "none", |value| value == "")?;
    fields.only("best_of", "n", |value| value.as_u64() == Some(wish.answers as u64))?;
    let prompts: Option<Prompts> =
        fields.take("prompt", "a text, a list of texts, tokens, or a list of lists of tokens")?;
    let tokens = |tokens: Vec<Vec<u32>>| tokens.into_iter().map(TextPrompt::Tokens).collect();
    let prompts: Vec<TextPrompt> = match prompts {
        None => return Err(Refusal::value("prompt", "prompt: expected a text")),
        Some(Prompts::Text(text)) => vec![TextPrompt::Text(text)],
        Some(Prompts::Texts(texts)) => texts.into_iter().map(TextPrompt::Text).collect(),
        Some(Prompts::Tokens(one)) if one.is_empty() => Vec::new(),
        Some(Prompts::Tokens(one)) => tokens(vec![one]),
        Some(Prompts::ManyTokens(many)) => tokens(many),
    };
    if !(1..=PROMPTS_MAX).contains(&prompts.len()) || prompts.len() * wish.answers > ANSWERS_MAX {
        let expected =
            format!("prompt: expected 1 to {PROMPTS_MAX} prompts, and with n at most {ANSWERS_MAX} answers");
        return Err(Refusal::value("prompt", expected));
    }
    fields.end(&PASSED_OVER)?;
    Ok(TextWish { prompts, wish })
}

/// The texts of a request of `/v1/moderations`, and the model it names.
pub(super) fn moderation(body: &[u8], inputs_max: usize) -> Result<(Vec<String>, Option<String>), Refusal> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Inputs {
        One(String),
        Many(Vec<String>),
        Parts(Vec<Part>),
    }
    let mut fields = Fields::of(body)?;
    let model = fields.take("model", "the name of a model")?;
    let texts = match fields.take("input", "a text, a list of texts, or a list of parts of type text")? {
        None => Vec::new(),
        Some(Inputs::One(text)) => vec![text],
        Some(Inputs::Many(texts)) => texts,
        Some(Inputs::Parts(parts)) => vec![Content::Parts(parts).text("input")?],
    };
    if !(1..=inputs_max).contains(&texts.len()) {
        return Err(Refusal::value(
            "input",
            format!("input: expected 1 to {inputs_max} texts, got {}", texts.len()),
        ));
    }
    fields.end(&PASSED_OVER)?;
    Ok((texts, model))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn asked(body: &Value) -> Result<ChatWish, Value> {
        chat(body.to_string().as_bytes()).map_err(|refusal| refusal.body_json()["error"].clone())
    }

    fn with(name: &str, value: Value) -> Value {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        body[name] = value;
        body
    }

    #[test]
    fn what_is_asked_is_what_is_done() {
        let body = json!({
            "model": "m", "messages": [
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
                {"role": "assistant", "content": null, "refusal": "no"},
                {"role": "user", "content": "c"},
            ],
            "max_tokens": 9, "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": "END", "seed": -1,
            "n": 2, "logprobs": true, "top_logprobs": 3, "stream": true, "stream_options": {"include_usage": true},
            "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "user": "u",
            "response_format": {"type": "text"}, "parallel_tool_calls": true, "metadata": null,
            "reasoning_effort": "none", "verbosity": "medium", "of_another_year": null,
        });
        let ChatWish { messages, wish } = asked(&body).unwrap();
        assert_eq!(
            messages,
            [Message::system("be brief"), Message::user("ab"), Message::assistant("no"), Message::user("c")]
        );
        let GenerateOptions { max_new_tokens, temperature, top_p, stop, .. } = wish.options;
        assert_eq!((max_new_tokens, temperature, top_p, stop), (7, 0.5, 0.9, vec!["END".to_owned()]));
        assert_eq!((wish.seed, wish.answers, wish.alternatives), (Some(u64::MAX), 2, Some(3)));
        assert!(wish.stream && wish.include_usage && wish.model.as_deref() == Some("m"));
    }

    #[test]
    fn what_is_not_named_has_its_default() {
        let ChatWish { wish, .. } = asked(&with("seed", Value::Null)).unwrap();
        assert_eq!((wish.options.max_new_tokens, wish.answers, wish.seed), (CHAT_TOKENS, 1, None));
        assert_eq!((wish.options.temperature, wish.options.top_p), (1.0, 1.0));
        let wish = text(br#"{"prompt": "a"}"#).unwrap().wish;
        assert_eq!((wish.options.max_new_tokens, wish.alternatives), (TEXT_TOKENS, None));
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_name() {
        for (name, value, code) in [
            ("frequency_penalty", json!(0.5), "unsupported_parameter"),
            ("presence_penalty", json!(-1), "unsupported_parameter"),
            ("logit_bias", json!({"5": 1}), "unsupported_parameter"),
            ("tools", json!([{"type": "function"}]), "unsupported_parameter"),
            ("response_format", json!({"type": "json_object"}), "unsupported_parameter"),
            ("modalities", json!(["audio"]), "unsupported_parameter"),
            ("reasoning_effort", json!("low"), "unsupported_parameter"),
            ("verbosity", json!("high"), "unsupported_parameter"),
            ("surprise", json!(1), "unknown_parameter"),
            ("temperature", json!(2.1), "invalid_value"),
            ("temperature", json!("hot"), "invalid_value"),
            ("top_p", json!(0), "invalid_value"),
            ("n", json!(9), "invalid_value"),
            ("max_tokens", json!(0), "invalid_value"),
            ("max_tokens", json!(1 << 21), "invalid_value"),
            ("seed", json!(1.5), "invalid_value"),
            ("stop", json!(["a", "b", "c", "d", "e"]), "invalid_value"),
            ("stop", json!(""), "invalid_value"),
            ("top_logprobs", json!(2), "invalid_value"),
            ("stream_options", json!({"include_usage": true}), "invalid_value"),
            ("messages", json!([]), "invalid_value"),
        ] {
            let error = asked(&with(name, value)).unwrap_err();
            assert_eq!((&error["param"], &error["code"]), (&json!(name), &json!(code)), "{error}");
            assert_eq!(error["type"], "invalid_request_error");
        }
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
        assert_eq!(asked(&with("messages", image)).unwrap_err()["param"], "messages[0].content");
        let tool = json!([{"role": "tool", "content": "x"}]);
        assert_eq!(asked(&with("messages", tool)).unwrap_err()["param"], "messages[0].role");
        assert!(asked(&json!([])).unwrap_err()["message"].as_str().unwrap().contains("object"));
    }

    #[test]
    fn prompts_come_as_texts_or_tokens_and_not_too_many() {
        let prompts =
            |prompt: Value| text(json!({"prompt": prompt}).to_string().as_bytes()).map(|wish| wish.prompts);
        let words = |text: &str| TextPrompt::Text(text.to_owned());
        assert_eq!(prompts(json!("a")).unwrap(), [words("a")]);
        assert_eq!(prompts(json!(["a", "b"])).unwrap(), [words("a"), words("b")]);
        assert_eq!(prompts(json!([5, 6])).unwrap(), [TextPrompt::Tokens(vec![5, 6])]);
        assert_eq!(prompts(json!([[5], [6]])).unwrap().len(), 2);
        for bad in [json!(null), json!(7), json!([]), json!(vec!["a"; 9])] {
            assert!(prompts(bad.clone()).is_err(), "{bad}");
        }
        assert!(text(br#"{"prompt": ["a", "b", "c"], "n": 3}"#).is_err());
        let refused = text(br#"{"prompt": "a", "echo": true}"#).unwrap_err();
        assert_eq!(refused.body_json()["error"]["param"], "echo");
        assert!(text(br#"{"prompt": "a", "best_of": 1, "echo": false}"#).is_ok());
    }

    #[test]
    fn moderations_take_texts_and_parts() {
        let inputs = |body: &str| moderation(body.as_bytes(), 2).map(|(texts, _)| texts);
        assert_eq!(inputs(r#"{"input": "a"}"#).unwrap(), ["a"]);
        assert_eq!(inputs(r#"{"input": ["a", "b"]}"#).unwrap(), ["a", "b"]);
        assert_eq!(inputs(r#"{"input": [{"type": "text", "text": "a"}]}"#).unwrap(), ["a"]);
        for bad in [r#"{"input": ["a", "b", "c"]}"#, r#"{"input": []}"#, "{}", r#"{"input": "a", "n": 1}"#] {
            assert!(inputs(bad).is_err(), "{bad}");
        }
    }
}
