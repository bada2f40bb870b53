//! The parameters of a body, taken one by one by their names; what is wrong with one is a refusal that names it.
//! `requests.rs` says which there are.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::refusals::Refusal;

/// What concerns accounts and other places, and no answer.
const PASSED_OVER: [&str; 8] = [
    "user",
    "metadata",
    "service_tier",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "verbosity",
    "reasoning_effort",
];

/// The parameters of a body, taken one by one; what is left at the end nobody knows.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Those of a body, which must be a JSON object.
    pub(super) fn of(body: &[u8]) -> Result<Self, Refusal> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(Refusal::body("expected a JSON object")),
            Err(error) => Err(Refusal::body(format!("body is not JSON: {error}"))),
        }
    }

    /// A parameter, if it is there; null is the same as absent.
    pub(super) fn take<T: DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, Refusal> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value)
                .map(Some)
                .map_err(|_| Refusal::value(name, format!("{name}: expected {expected}"))),
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
        match self.0.remove(name) {
            Some(value) if !value.is_null() && !harmless(&value) => Err(Refusal::unsupported(name, expected)),
            _ => Ok(()),
        }
    }

    /// Refuses what is left, but for what concerns other places.
    pub(super) fn end(mut self) -> Result<(), Refusal> {
        for name in PASSED_OVER {
            self.0.remove(name);
        }
        match self.0.keys().next() {
            // As much of a stranger's name as a person reads.
            Some(name) => Err(Refusal::unknown_parameter(&name.chars().take(100).collect::<String>())),
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
