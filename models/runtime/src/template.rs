//! Renders a conversation with the package's `chat_template.jinja`, as Hugging Face's `apply_chat_template` does.
//! `conversation.rs` turns the rendered text into tokens.

use std::{
    fmt,
    panic::{self, AssertUnwindSafe},
    path::Path,
};

use minijinja::{
    Environment, Error, ErrorKind, State, Value, context, filters,
    value::{Kwargs, Rest},
};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter};

/// Who speaks in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that stand above the conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of the system.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: Role::System, content: content.into() }
    }

    /// A turn of the person.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }

    /// A turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: Role::Assistant, content: content.into() }
    }
}

/// The texts of the special tokens that templates print.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SpecialTokens {
    /// Begins a sequence; empty where the model has none.
    pub bos_token: String,
    /// Ends a sequence.
    pub eos_token: String,
    /// Fills a row.
    pub pad_token: String,
}

/// A chat template in the form Hugging Face publishes (Jinja, trimmed blocks, Python methods, `raise_exception`).
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
}

/// Why a template could not be read or rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The file could not be read.
    #[error("chat template {path} does not read")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The template is no valid Jinja.
    #[error("chat template does not parse")]
    Parse(#[source] Error),
    /// The template failed on these messages, or refused them with `raise_exception`.
    #[error("chat template does not render {messages} messages")]
    Render {
        /// Number of messages.
        messages: usize,
        /// What the template said.
        #[source]
        source: Error,
    },
}

const NAME: &str = "chat";

/// Steps that a template may take. One over 128 turns takes some ten thousand; one that loops for ever stops here,
/// within a second.
const STEPS_MAX: u64 = 10_000_000;

/// Elements or columns that a template may ask for at once.
const COUNT_MAX: f64 = 10_000.0;

impl ChatTemplate {
    /// Reads a template file.
    pub fn open(path: &Path, special: SpecialTokens) -> Result<Self, TemplateError> {
        let read = std::fs::read_to_string(path);
        let source =
            read.map_err(|source| TemplateError::Read { path: path.display().to_string(), source })?;
        Self::parse(&source, special)
    }

    /// Parses a template.
    pub fn parse(source: &str, special: SpecialTokens) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(STEPS_MAX));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(bounded_method);
        bound_filters(&mut environment);
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_filter("tojson", to_python_json);
        environment.add_template_owned(NAME, source.to_owned()).map_err(TemplateError::Parse)?;
        Ok(Self { environment, special })
    }

    /// The text of a conversation. With `add_generation_prompt` it ends where the assistant's next turn begins.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let SpecialTokens { bos_token, eos_token, pad_token } = &self.special;
        let failed = |source| TemplateError::Render { messages: messages.len(), source };
        // minijinja 2.24 panics where an empty list is read backwards (`[][::-1]`), as templates do.
        let rendered = panic::catch_unwind(AssertUnwindSafe(|| {
            self.environment.get_template(NAME).and_then(|template| {
                template.render(context! { messages, add_generation_prompt, bos_token, eos_token, pad_token })
            })
        }));
        let panicked = |_| Err(Error::new(ErrorKind::InvalidOperation, "the template makes its engine fail"));
        rendered.unwrap_or_else(panicked).map_err(failed)
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ChatTemplate").field("special", &self.special).finish_non_exhaustive()
    }
}

/// What these filters make is as large as the number that they are given, and memory for it is reserved at once: a larger
/// number than anybody needs is refused.
fn bound_filters(environment: &mut Environment<'static>) {
    // A template can call nothing by such a name.
    environment.add_filter("batch, of any size", filters::batch);
    environment.add_filter("slice, of any size", filters::slice);
    environment.add_filter("indent, of any size", filters::indent);
    environment.add_filter("format, of any size", filters::format);
    for name in ["batch", "slice", "indent"] {
        environment.add_filter(name, move |state: &State, arguments: Rest<Value>| {
            arguments.iter().skip(1).try_for_each(check_count)?;
            state.apply_filter(&format!("{name}, of any size"), &arguments)
        });
    }
    environment.add_filter("format", |state: &State, arguments: Rest<Value>| {
        arguments.first().map_or(Ok(()), check_format)?;
        state.apply_filter("format, of any size", &arguments)
    });
}

fn bounded_method(state: &State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    if method == "format" {
        check_format(value)?;
    }
    unknown_method_callback(state, value, method, arguments)
}

/// A number, or one that is given by name.
fn check_count(value: &Value) -> Result<(), Error> {
    if value.is_kwargs() {
        return value.try_iter()?.try_for_each(|name| check_count(&value.get_item(&name)?));
    }
    match f64::try_from(value.clone()) {
        Ok(count) if value.is_number() && count > COUNT_MAX => {
            let text = format!("expected a number of at most {COUNT_MAX}, got {count}");
            Err(Error::new(ErrorKind::InvalidOperation, text))
        }
        _ => Ok(()),
    }
}

/// The widths and precisions of a format: no `*`, which takes one from elsewhere, and four digits at most.
fn check_format(format: &Value) -> Result<(), Error> {
    let Some(format) = format.as_str() else { return Ok(()) };
    // What stands behind a `%` and a name up to its letter, and what stands in braces; the rest is text.
    let directive = |rest: &str| {
        let name_end = rest.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let rest = name_end.map_or(rest, |(_, rest)| rest);
        rest.chars().take_while(|one| !one.is_ascii_alphabetic() && *one != '%').collect::<String>()
    };
    let in_braces = |rest: &str| rest.split('}').next().unwrap_or_default().to_owned();
    let of_percent = format.split('%').skip(1).map(directive);
    let of_braces = format.split('{').skip(1).map(in_braces);
    let is_wide = |field: String| {
        field.contains('*') || field.as_bytes().windows(5).any(|five| five.iter().all(u8::is_ascii_digit))
    };
    if of_percent.chain(of_braces).any(is_wide) {
        let text = "expected a format whose widths are numbers of at most four digits";
        return Err(Error::new(ErrorKind::InvalidOperation, text));
    }
    Ok(())
}

/// `tojson` as Hugging Face defines it: Python's `json.dumps(…, ensure_ascii=False)`. Jinja's own escapes HTML.
#[expect(clippy::needless_pass_by_value, reason = "a filter owns its arguments")]
fn to_python_json(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let failed = |error| Error::new(ErrorKind::BadSerialization, "value has no JSON form").with_source(error);
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let pretty = PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, pretty))
                .map_err(failed)?;
        }
        None => {
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced))
                .map_err(failed)?;
        }
    }
    String::from_utf8(bytes)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, "not utf-8").with_source(error))
}

/// Python's separators: a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The form of TinyLlama-1.1B-Chat's template: roles by branches, `eos_token` after each turn, `loop.last`.
    const ZEPHYR: &str = "{% for message in messages %}\n{% if message['role'] == 'user' %}\n\
        {{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n\
        {{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n\
        {{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n\
        {% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}";

    /// The form of Qwen2.5's template: a default system turn, `tools` that may be undefined, `-` trimming.
    const CHATML: &str = "{%- if tools %}\n    {{- '# Tools' }}\n{%- else %}\n    {%- if messages[0]['role'] == 'system' %}\n\
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n\
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n\
        {%- for message in messages %}\n    {%- if (message.role == \"user\") or (message.role == \"system\" and not loop.first) or (message.role == \"assistant\" and not message.tool_calls) %}\n\
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor %}\n\
        {%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n";

    fn template(source: &str) -> ChatTemplate {
        let special =
            SpecialTokens { bos_token: "<s>".into(), eos_token: "</s>".into(), pad_token: String::new() };
        ChatTemplate::parse(source, special).unwrap()
    }

    // The expected texts are those of Jinja2 3.1.6 with Hugging Face's settings (trim_blocks, lstrip_blocks).
    #[test]
    fn zephyr_form_renders_as_published() {
        let messages = [Message::system("Be kind."), Message::user("Hi"), Message::assistant("Hello")];
        assert_eq!(
            template(ZEPHYR).render(&messages[..2], true).unwrap(),
            "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
        );
        assert_eq!(
            template(ZEPHYR).render(&messages, false).unwrap(),
            "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
        );
    }

    #[test]
    fn chatml_form_renders_as_published() {
        let messages = [Message::user("Hi"), Message::assistant("Hello")];
        assert_eq!(
            template(CHATML).render(&messages[..1], true).unwrap(),
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
             <|im_start|>assistant\n"
        );
        assert_eq!(
            template(CHATML).render(&[Message::system("S"), messages[0].clone()], false).unwrap(),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        );
    }

    #[test]
    fn python_methods_and_tojson_work_as_in_hugging_face() {
        let source = "{{ bos_token }}{% for m in messages %}{{ m['content'].strip().split(',')[0].upper() }}\
            {{ {'a': [1, 'é<b>'], 'c': none} | tojson }}{% endfor %}";
        let text = template(source).render(&[Message::user("  x,y ")], false).unwrap();
        assert_eq!(text, "<s>X{\"a\": [1, \"é<b>\"], \"c\": null}");
    }

    #[test]
    fn raise_exception_is_an_error_with_its_text() {
        let source =
            "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}";
        let error = template(source).render(&[Message::assistant("x")], false).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("roles must alternate"), "{cause}");
    }

    #[test]
    fn a_template_that_does_not_end_is_stopped() {
        let endless =
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ a * b }}{% endfor %}{% endfor %}";
        let error = template(endless).render(&[Message::user("x")], false).unwrap_err();
        assert!(matches!(error, TemplateError::Render { messages: 1, .. }), "{error}");
        let messages = vec![Message::user("x"); 128];
        template(CHATML).render(&messages, true).unwrap();
    }

    #[test]
    fn broken_template_is_an_error() {
        let error = ChatTemplate::parse("{% for %}", SpecialTokens::default()).unwrap_err();
        assert!(matches!(error, TemplateError::Parse(_)), "{error}");
    }
}
