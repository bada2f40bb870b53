//! The parameters of a body, or of a message in it, taken one by one by their names; what is wrong with one is a refusal
//! that names it. Null is the same as absent, whatever the name: clients send all that they know.
//! `requests.rs` says which there are.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::refusals::Refusal;

/// What concerns accounts and other places, and no answer.
pub(super) const PASSED_OVER: [&str; 6] =
    ["user", "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key"];

/// The parameters of a body, taken one by one; what is left at the end nobody knows.
pub(super) struct Fields {
    left: Map<String, Value>,
    /// What stands before their names: nothing, or the message that they are of.
    of: String,
}

impl Fields {
    /// Those of a body, which must be a JSON object.
    pub(super) fn of(body: &[u8]) -> Result<Self, Refusal> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(left)) => Ok(Self { left, of: String::new() }),
            Ok(_) => Err(Refusal::body("expected a JSON object")),
            Err(error) => Err(Refusal::body(format!("body is not JSON: {error}"))),
        }
    }

    /// Those of the message of this number.
    pub(super) fn of_message(index: usize, left: Map<String, Value>) -> Self {
        Self { left, of: format!("messages[{index}].") }
    }

    /// A parameter's name for a person.
    pub(super) fn name(&self, name: &str) -> String {
        format!("{}{name}", self.of)
    }

    /// A parameter, if it is there; null is the same as absent.
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, Refusal> {
        match self.left.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value).map(Some).map_err(|_| {
                let name = self.name(name);
                Refusal::value(&name, format!("{name}: expected {expected}"))
            }),
        }
    }

    /// A number within bounds.
    pub(super) fn number(&mut self, name: &str, min: f64, max: f64) -> Result<Option<f64>, Refusal> {
        let expected = format!("a number from {min} to {max}");
        let number: Option<f64> = self.take(name, &expected)?;
        match number {
            Some(number) if !(min..=max).contains(&number) => {
                Err(Refusal::value(name, format!("{name}: expected {expected}, got {number}")))
            }
            number => Ok(number),
        }
    }

    /// A whole number within bounds.
    pub(super) fn count(&mut self, name: &str, min: usize, max: usize) -> Result<Option<usize>, Refusal> {
        let expected = format!("a whole number from {min} to {max}");
        let number: Option<u64> = self.take(name, &expected)?;
        match number.map(|number| usize::try_from(number).unwrap_or(usize::MAX)) {
            Some(number) if !(min..=max).contains(&number) => {
                Err(Refusal::value(name, format!("{name}: expected {expected}, got {number}")))
            }
            number => Ok(number),
        }
    }

    /// Refuses a parameter unless it says what happens here anyway.
    pub(super) fn only(
        &mut self,
        name: &str,
        expected: &str,
        harmless: impl Fn(&Value) -> bool,
    ) -> Result<(), Refusal> {
        match self.left.remove(name) {
            Some(value) if !value.is_null() && !harmless(&value) => {
                Err(Refusal::unsupported(&self.name(name), expected))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what is left, but for these.
    pub(super) fn end(self, passed_over: &[&str]) -> Result<(), Refusal> {
        let unknown =
            |(name, value): &(&String, &Value)| !value.is_null() && !passed_over.contains(&name.as_str());
        match self.left.iter().find(unknown) {
            // As much of a stranger's name as a person reads.
            Some((name, _)) => {
                let name: String = name.chars().take(100).collect();
                Err(Refusal::unknown_parameter(&self.name(&name)))
            }
            None => Ok(()),
        }
    }
}

/// Text, as a whole or in parts.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Content {
    Whole(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
pub(super) struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
}

impl Content {
    /// The text; parts of other kinds are refused by name.
    pub(super) fn text(self, param: &str) -> Result<String, Refusal> {
        match self {
            Self::Whole(text) => Ok(text),
            Self::Parts(parts) => parts.into_iter().map(|part| part.text(param)).collect(),
        }
    }
}

impl Part {
    fn text(self, param: &str) -> Result<String, Refusal> {
        match self.text {
            Some(text) if self.kind == "text" => Ok(text),
            _ => {
                let kind: String = self.kind.chars().take(100).collect();
                Err(Refusal::value(param, format!("{param}: expected parts of type text, got {kind:?}")))
            }
        }
    }
}
