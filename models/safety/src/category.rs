//! What kind of harm: the identifiers that guard, constitution, policy and reports share.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The longest identifier: a word or two, fit for a log line and a table column.
pub(crate) const ID_BYTES_MAX: usize = 32;

/// Identifies one category of harm, for example `violence`. One to 32 of `a-z 0-9 - _`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CategoryId(String);

/// An identifier that is empty, too long, or has a character outside `a-z 0-9 - _`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("identifier of {bytes} bytes is not valid: expected 1 to {ID_BYTES_MAX} of a-z 0-9 - _")]
pub struct InvalidCategoryId {
    bytes: usize,
}

pub(crate) fn is_identifier(text: &str) -> bool {
    (1..=ID_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
}

impl CategoryId {
    /// The identifier as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CategoryId {
    type Err = InvalidCategoryId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if is_identifier(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidCategoryId { bytes: text.len() })
        }
    }
}

impl TryFrom<String> for CategoryId {
    type Error = InvalidCategoryId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<CategoryId> for String {
    fn from(id: CategoryId) -> Self {
        id.0
    }
}

impl fmt::Display for CategoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A category that a guard can answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Category {
    /// Identifier, shared with the constitution and the device's policy. Two of a guard's categories may be one of
    /// ours: they share an identifier, and each has a code.
    pub id: CategoryId,
    /// The guard's own short name for it, such as `S5`; the label where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// For people, and for templates.
    pub name: String,
    /// What the guard writes after `category_lead`. Its first token must differ from every other label's. Absent
    /// where the guard is asked about each category.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// What it covers, for templates that say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Where the guard knows it only of prompts, or only of pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only: Option<AskedAbout>,
    /// Unsafe from this calibrated probability on; the guard's own `threshold` where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f64>,
}

/// What a guard is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AskedAbout {
    /// A prompt alone.
    Prompt,
    /// A prompt with its response.
    Pair,
}

impl AskedAbout {
    /// Whether something that is meant for `only` one of them, or for both, applies.
    pub(crate) fn applies(only: Option<Self>, with_response: bool) -> bool {
        only.is_none_or(|only| (only == Self::Pair) == with_response)
    }
}

impl Category {
    /// The guard's own name for it.
    pub fn code(&self) -> &str {
        self.code.as_deref().unwrap_or_else(|| self.label.trim())
    }

    /// A template's text with this category written into it.
    pub(crate) fn fill(&self, text: &str) -> String {
        let description = self.description.as_deref().unwrap_or_default();
        text.replace("{code}", self.code())
            .replace("{name}", &self.name)
            .replace("{description}", description)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_is_short_lower_case_and_not_empty() {
        assert_eq!("self_harm-2".parse::<CategoryId>().unwrap().as_str(), "self_harm-2");
        let long = "a".repeat(33);
        for bad in ["", "Violence", "a b", "é", long.as_str()] {
            assert!(bad.parse::<CategoryId>().is_err(), "{bad:?} was accepted");
        }
        assert!(serde_json::from_str::<CategoryId>("\"A\"").is_err());
    }
}
