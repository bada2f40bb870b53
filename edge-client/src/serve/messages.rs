//! One message of a chat, checked. What clients name and leave empty is passed over, what they set and nobody here obeys is
//! refused by its name. `requests.rs` takes them from a body.

use commonweal_runtime::{Message, Role};
use serde_json::Value;

use super::{
    fields::{Content, Fields},
    refusals::Refusal,
};

/// The message of these fields.
pub(super) fn message(mut fields: Fields) -> Result<Message, Refusal> {
    let role = match fields.take::<String>("role", "a text")?.as_deref() {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        _ => {
            let param = fields.name("role");
            let expected = format!("{param}: expected system, developer, user or assistant");
            return Err(Refusal::value(&param, expected));
        }
    };
    let param = fields.name("content");
    let content = fields.take::<Content>("content", "a text or a list of parts of type text")?;
    // What a client sends back of an answer of ours.
    let refusal = fields.take::<String>("refusal", "a text")?;
    // Tells the model nothing.
    fields.take::<String>("name", "a text")?;
    let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    for name in ["tool_calls", "annotations"] {
        fields.only(name, "none", is_empty)?;
    }
    for name in ["function_call", "audio", "tool_call_id"] {
        fields.only(name, "none", |_| false)?;
    }
    fields.end(&[])?;
    let content = match (content, refusal) {
        (Some(content), _) => content.text(&param)?,
        (None, Some(refusal)) => refusal,
        (None, None) => return Err(Refusal::value(&param, format!("{param}: expected a text"))),
    };
    Ok(Message { role, content })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(message: Value) -> Result<Message, Refusal> {
        super::message(Fields::of_message(3, serde_json::from_value(message).unwrap()))
    }

    #[test]
    fn a_message_may_name_what_it_has_not() {
        // As the official client gives an answer of ours back.
        let dumped = json!({"role": "assistant", "content": "b", "refusal": null, "annotations": null, "audio": null,
            "function_call": null, "tool_calls": null});
        let emptied = json!({"role": "assistant", "content": "b", "refusal": null, "annotations": [],
            "tool_calls": [], "of_another_year": null});
        for answer in [dumped, emptied] {
            assert_eq!(said(answer).unwrap(), Message::assistant("b"));
        }
        for (name, value, code) in [
            ("tool_calls", json!([{"id": "x"}]), "unsupported_parameter"),
            ("annotations", json!([{"type": "url_citation"}]), "unsupported_parameter"),
            ("function_call", json!({"name": "f"}), "unsupported_parameter"),
            ("audio", json!({"id": "x"}), "unsupported_parameter"),
            ("surprise", json!(1), "unknown_parameter"),
            ("user", json!("u"), "unknown_parameter"),
            ("content", json!(7), "invalid_value"),
            ("content", Value::Null, "invalid_value"),
            ("role", json!(7), "invalid_value"),
            ("name", json!(7), "invalid_value"),
        ] {
            let mut answer = json!({"role": "assistant", "content": "b"});
            answer[name] = value;
            let error = said(answer).unwrap_err().body_json()["error"].clone();
            let param = format!("messages[3].{name}");
            assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{error}");
        }
    }
}
