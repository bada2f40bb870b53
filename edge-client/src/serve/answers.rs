//! What is answered, in OpenAI's forms: whole or in chunks, for chats and for text. Pure; `batch.rs` says what came,
//! `routes.rs` sends what is made of it here.

use commonweal_runtime::{Spoken, StopReason};
use serde_json::{Map, Value, json};

/// An answer as it was given.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Answer {
    pub(super) text: String,
    /// Where they were asked for.
    pub(super) tokens: Option<Vec<Spoken>>,
    /// Number of tokens, those that end it included.
    pub(super) length: usize,
    pub(super) reason: Option<Reason>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Stop(StopReason),
    /// The guard found it unsafe; the text is the refusal in its place.
    Filtered,
}

impl Reason {
    fn name(self) -> &'static str {
        match self {
            Self::Stop(reason) => finish_reason(reason),
            Self::Filtered => "content_filter",
        }
    }
}

/// OpenAI's word for why an answer ended.
pub(crate) fn finish_reason(stop: StopReason) -> &'static str {
    match stop {
        StopReason::EndToken | StopReason::StopText => "stop",
        StopReason::Length | StopReason::Context => "length",
    }
}

/// Which kind of answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Text,
}

/// What all parts of one answer have in common.
#[derive(Clone, Debug)]
pub(super) struct Form {
    pub(super) kind: Kind,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
    /// Whether the last chunk tells the usage, and the others that they do not.
    pub(super) include_usage: bool,
}

impl Form {
    fn envelope(&self, is_chunk: bool, choices: &[Value]) -> Value {
        let object = match (self.kind, is_chunk) {
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Text, _) => "text_completion",
        };
        let mut envelope = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        });
        if is_chunk && self.include_usage {
            envelope["usage"] = Value::Null;
        }
        envelope
    }

    /// The whole answer.
    pub(super) fn whole(&self, answers: &[Answer], prompt_tokens: usize) -> Value {
        let choice = |(index, answer): (usize, &Answer)| {
            let reason = answer.reason.map(Reason::name);
            let logprobs = self.logprobs(answer.tokens.as_deref(), 0);
            match self.kind {
                Kind::Chat => {
                    let refusal = is_filtered(answer).then_some(&answer.text);
                    let message = json!({"role": "assistant", "content": answer.text, "refusal": refusal});
                    json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
                }
                Kind::Text => {
                    json!({"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": reason})
                }
            }
        };
        let mut whole = self.envelope(false, &answers.iter().enumerate().map(choice).collect::<Vec<_>>());
        whole["usage"] = usage(prompt_tokens, answers.iter().map(|answer| answer.length).sum());
        whole
    }

    /// The chunk that begins an answer; text has none.
    pub(super) fn begins(&self, index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": "", "refusal": null});
        (self.kind == Kind::Chat).then(|| self.chunk(index, delta, &Value::Null, None))
    }

    /// More text, and the tokens behind it. `at` is the text's place in the answer, in characters.
    pub(super) fn goes_on(&self, index: usize, text: &str, tokens: Option<&[Spoken]>, at: usize) -> Value {
        let logprobs = self.logprobs(tokens, at);
        match self.kind {
            Kind::Chat => self.chunk(index, json!({"content": text}), &logprobs, None),
            Kind::Text => self.chunk(index, json!(text), &logprobs, None),
        }
    }

    /// The chunk that ends an answer.
    pub(super) fn ends(&self, index: usize, reason: Reason) -> Value {
        let delta = if self.kind == Kind::Chat { json!({}) } else { json!("") };
        self.chunk(index, delta, &Value::Null, Some(reason))
    }

    /// The chunk that tells the usage, if it was asked for.
    pub(super) fn usage(&self, prompt_tokens: usize, answer_tokens: usize) -> Option<Value> {
        let mut chunk = self.envelope(true, &[]);
        chunk["usage"] = usage(prompt_tokens, answer_tokens);
        self.include_usage.then_some(chunk)
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: &Value, reason: Option<Reason>) -> Value {
        let delta_name = if self.kind == Kind::Chat { "delta" } else { "text" };
        let mut choice =
            json!({"index": index, "logprobs": logprobs, "finish_reason": reason.map(Reason::name)});
        choice[delta_name] = delta;
        self.envelope(true, &[choice])
    }

    fn logprobs(&self, tokens: Option<&[Spoken]>, at: usize) -> Value {
        match (tokens, self.kind) {
            (None, _) => Value::Null,
            (Some(tokens), Kind::Chat) => {
                let content: Vec<Value> = tokens.iter().map(chat_logprob).collect();
                json!({"content": content, "refusal": null})
            }
            (Some(tokens), Kind::Text) => text_logprobs(tokens, at),
        }
    }
}

fn is_filtered(answer: &Answer) -> bool {
    answer.reason == Some(Reason::Filtered)
}

fn usage(prompt_tokens: usize, answer_tokens: usize) -> Value {
    json!({"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens})
}

fn chat_logprob(token: &Spoken) -> Value {
    let one = |text: &str, logprob: f32| json!({"token": text, "bytes": text.as_bytes(), "logprob": logprob});
    let others = token.alternatives.iter().map(|other| one(&other.text, other.logprob));
    let mut all = one(&token.text, token.logprob);
    all["top_logprobs"] = others.collect();
    all
}

fn text_logprobs(tokens: &[Spoken], at: usize) -> Value {
    let mut offset = at;
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(offset);
        offset += token.text.chars().count();
    }
    let others = |token: &Spoken| -> Map<String, Value> {
        // The first of two that read the same is the more probable.
        let pairs = token.alternatives.iter().rev().map(|other| (other.text.clone(), json!(other.logprob)));
        pairs.collect()
    };
    json!({
        "tokens": tokens.iter().map(|token| &token.text).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(others).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonweal_runtime::Alternative;

    fn form(kind: Kind) -> Form {
        let text = |text: &str| text.to_owned();
        let (id, model, fingerprint) = (text("id-1"), text("m"), text("fp"));
        Form { kind, id, created: 5, model, fingerprint, include_usage: true }
    }

    fn spoken(text: &str) -> Spoken {
        let alternatives = vec![Alternative { text: text.to_owned(), logprob: -0.5 }];
        Spoken { text: text.to_owned(), logprob: -0.5, alternatives }
    }

    fn answer(reason: Reason) -> Answer {
        let tokens = Some(vec![spoken("é"), spoken("b")]);
        Answer { text: "éb".into(), tokens, length: 3, reason: Some(reason) }
    }

    #[test]
    fn a_whole_chat_has_openais_fields() {
        let got = form(Kind::Chat).whole(&[answer(Reason::Stop(StopReason::EndToken))], 4);
        let logprob = json!({"token": "é", "bytes": [195, 169], "logprob": -0.5,
            "top_logprobs": [{"token": "é", "bytes": [195, 169], "logprob": -0.5}]});
        assert_eq!(got["choices"][0]["logprobs"]["content"][0], logprob);
        assert_eq!(
            got["choices"][0]["message"],
            json!({"role": "assistant", "content": "éb", "refusal": null})
        );
        assert_eq!(got["choices"][0]["finish_reason"], "stop");
        assert_eq!(got["usage"], json!({"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}));
        assert_eq!((&got["object"], &got["system_fingerprint"]), (&json!("chat.completion"), &json!("fp")));
        let filtered = form(Kind::Chat).whole(&[answer(Reason::Filtered)], 4);
        assert_eq!(filtered["choices"][0]["finish_reason"], "content_filter");
        assert_eq!(filtered["choices"][0]["message"]["refusal"], "éb");
    }

    #[test]
    fn whole_text_has_openais_fields() {
        let got = form(Kind::Text).whole(&[answer(Reason::Stop(StopReason::Length))], 4);
        assert_eq!(
            got["choices"][0],
            json!({"index": 0, "text": "éb", "finish_reason": "length", "logprobs": {
                "tokens": ["é", "b"], "token_logprobs": [-0.5, -0.5],
                "top_logprobs": [{"é": -0.5}, {"b": -0.5}], "text_offset": [0, 1]}})
        );
    }

    #[test]
    fn chunks_begin_go_on_end_and_tell_the_usage() {
        let chat = form(Kind::Chat);
        assert_eq!(chat.begins(1).unwrap()["choices"][0]["delta"]["role"], "assistant");
        let piece = chat.goes_on(1, "x", None, 0);
        assert_eq!(piece["choices"][0]["delta"], json!({"content": "x"}));
        assert_eq!((&piece["usage"], &piece["choices"][0]["index"]), (&Value::Null, &json!(1)));
        assert_eq!(piece["object"], "chat.completion.chunk");
        let end = chat.ends(1, Reason::Stop(StopReason::StopText));
        assert_eq!(
            (&end["choices"][0]["delta"], &end["choices"][0]["finish_reason"]),
            (&json!({}), &json!("stop"))
        );
        let last = chat.usage(2, 3).unwrap();
        assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &json!(5)));
        let text = Form { include_usage: false, ..form(Kind::Text) };
        assert!(text.begins(0).is_none() && text.usage(1, 1).is_none());
        let piece = text.goes_on(0, "x", Some(&[spoken("x")]), 7);
        assert_eq!((&piece["choices"][0]["text"], piece.get("usage")), (&json!("x"), None));
        assert_eq!(piece["choices"][0]["logprobs"]["text_offset"], json!([7]));
    }
}
