//! The constitution: principles in plain words, by which `revise.rs` criticises and rewrites.
//!
//! A TOML file that an operator reads and edits (`constitution.toml`; the default is beside this crate). Validation
//! lists every problem with its place. Constitutional AI: Bai et al. 2022, arXiv 2212.08073.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::{
    category::{CategoryId, is_identifier},
    problem::{Problem, Problems, list},
};

/// Principles are short texts; a file beyond this is not a constitution.
const FILE_BYTES_MAX: usize = 256 * 1024;
/// A person must be able to read them all.
const PRINCIPLES_MAX: usize = 64;
/// Each request is put to the model with the pair: it has to leave room for it.
const REQUEST_BYTES_MAX: usize = 1_000;

/// The constitution that comes with the crate.
const DEFAULT: &str = include_str!("../constitution.toml");

/// Identifies a principle, for example `law`. The same characters as a category's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PrincipleId(String);

impl PrincipleId {
    /// The identifier as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PrincipleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One principle, and what to ask the model in its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Principle {
    /// Identifier, for logs and training rows.
    pub id: PrincipleId,
    /// The principle, for people.
    pub text: String,
    /// The categories it is drawn for; every category when empty.
    #[serde(default)]
    pub categories: Vec<CategoryId>,
    /// Asks the model to criticise its reply.
    pub critique: String,
    /// Asks the model to rewrite it; the constitution's own where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// What to answer when nothing else is safe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// The category it is for.
    pub category: CategoryId,
    /// The answer.
    pub text: String,
}

/// The file `constitution.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constitution {
    /// 1.
    pub format: u32,
    /// For people.
    pub name: String,
    /// Asks the model to rewrite its reply, for principles without their own request.
    pub revision: String,
    /// The answer when nothing else is safe, for categories without their own.
    pub refusal: String,
    /// The principles.
    pub principles: Vec<Principle>,
    /// Refusals by category.
    #[serde(default)]
    pub refusals: Vec<Refusal>,
}

/// Why a constitution cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConstitutionError {
    /// Larger than anybody reads.
    #[error("constitution has {bytes} bytes, expected at most {FILE_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// Not TOML, or a field is missing, unknown or of another type.
    #[error("constitution does not parse")]
    Parse(#[source] toml::de::Error),
    /// Every value that cannot be used.
    #[error("constitution is not valid: {}", list(.0))]
    Invalid(Vec<Problem>),
}

impl Constitution {
    /// Parses and validates `constitution.toml`.
    pub fn from_toml(text: &str) -> Result<Self, ConstitutionError> {
        if text.len() > FILE_BYTES_MAX {
            return Err(ConstitutionError::TooLarge { bytes: text.len() });
        }
        let constitution: Self = toml::from_str(text).map_err(ConstitutionError::Parse)?;
        constitution.validate().map_err(ConstitutionError::Invalid)?;
        Ok(constitution)
    }

    /// The text of the constitution that comes with the crate.
    pub fn default_text() -> &'static str {
        DEFAULT
    }

    /// Checks every value; all problems come back at once.
    pub fn validate(&self) -> Result<(), Vec<Problem>> {
        let mut problems = Problems::default();
        problems.require(self.format == 1, "format", format!("expected 1, got {}", self.format));
        check_text(&mut problems, "revision", &self.revision);
        check_text(&mut problems, "refusal", &self.refusal);
        problems.require(
            (1..=PRINCIPLES_MAX).contains(&self.principles.len()),
            "principles",
            format!("expected 1 to {PRINCIPLES_MAX}, got {}", self.principles.len()),
        );
        let mut ids = BTreeSet::new();
        for (i, principle) in self.principles.iter().enumerate() {
            let place = |field: &str| format!("principles[{i}].{field}");
            let id = principle.id.as_str();
            problems.require(is_identifier(id), place("id"), "expected 1 to 32 of a-z 0-9 - _");
            problems.require(ids.insert(id), place("id"), format!("{id:?} occurs twice"));
            check_text(&mut problems, place("text"), &principle.text);
            check_text(&mut problems, place("critique"), &principle.critique);
            if let Some(revision) = &principle.revision {
                check_text(&mut problems, place("revision"), revision);
            }
        }
        let mut refused = BTreeSet::new();
        for (i, refusal) in self.refusals.iter().enumerate() {
            let place = |field: &str| format!("refusals[{i}].{field}");
            let category = &refusal.category;
            problems.require(refused.insert(category), place("category"), format!("{category} occurs twice"));
            check_text(&mut problems, place("text"), &refusal.text);
        }
        problems.into_result()
    }

    /// The principles that apply to a category, in the file's order. All of them where none names it: something
    /// flagged is never left without a principle.
    pub fn principles_for(&self, category: Option<&CategoryId>) -> Vec<&Principle> {
        let applies = |p: &&Principle| {
            p.categories.is_empty() || category.is_some_and(|category| p.categories.contains(category))
        };
        let chosen: Vec<&Principle> = self.principles.iter().filter(applies).collect();
        if chosen.is_empty() { self.principles.iter().collect() } else { chosen }
    }

    /// What asks for the rewriting, in the name of a principle.
    pub fn revision_request<'t>(&'t self, principle: &'t Principle) -> &'t str {
        principle.revision.as_deref().unwrap_or(&self.revision)
    }

    /// The answer when nothing else is safe.
    pub fn refusal_for(&self, category: Option<&CategoryId>) -> &str {
        let own = category.and_then(|category| self.refusals.iter().find(|r| r.category == *category));
        own.map_or(&self.refusal, |refusal| &refusal.text)
    }
}

impl Default for Constitution {
    /// The constitution that comes with the crate; a test shows that it is valid.
    fn default() -> Self {
        match Self::from_toml(DEFAULT) {
            Ok(constitution) => constitution,
            Err(error) => unreachable!("the built-in constitution is tested: {error}"),
        }
    }
}

fn check_text(problems: &mut Problems, place: impl Into<String>, text: &str) {
    let fits = !text.trim().is_empty() && text.len() <= REQUEST_BYTES_MAX;
    problems.require(
        fits,
        place,
        format!("expected 1 to {REQUEST_BYTES_MAX} bytes of text, got {}", text.len()),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::is_refusal;

    fn id(text: &str) -> CategoryId {
        text.parse().unwrap()
    }

    #[test]
    fn the_default_is_valid_and_its_refusals_refuse() {
        let constitution = Constitution::default();
        assert!(constitution.principles.len() >= 5);
        assert!(is_refusal(&constitution.refusal));
        for refusal in &constitution.refusals {
            assert!(is_refusal(&refusal.text), "{}", refusal.category);
            assert!(!constitution.principles_for(Some(&refusal.category)).is_empty());
        }
    }

    #[test]
    fn a_category_without_a_principle_gets_all() {
        let constitution = Constitution::default();
        let all = constitution.principles.len();
        assert_eq!(constitution.principles_for(Some(&id("unheard-of"))).len(), all);
        assert!(constitution.principles_for(Some(&id("fraud"))).len() < all);
        assert_eq!(constitution.refusal_for(None), constitution.refusal);
        assert_ne!(constitution.refusal_for(Some(&id("self_harm"))), constitution.refusal);
    }

    #[test]
    fn every_problem_is_listed_with_its_place() {
        let mut constitution = Constitution { format: 2, ..Constitution::default() };
        constitution.principles[0].critique = " ".into();
        constitution.principles[1].id = constitution.principles[0].id.clone();
        constitution.refusals[0].text = "x".repeat(REQUEST_BYTES_MAX + 1);
        constitution.refusals[1].category = constitution.refusals[0].category.clone();
        let places: Vec<String> =
            constitution.validate().unwrap_err().into_iter().map(|problem| problem.place.0).collect();
        assert_eq!(
            places,
            [
                "format",
                "principles[0].critique",
                "principles[1].id",
                "refusals[0].text",
                "refusals[1].category"
            ]
        );
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let text = format!("{DEFAULT}\nsurprise = 1\n");
        assert!(matches!(Constitution::from_toml(&text), Err(ConstitutionError::Parse(_))));
    }
}
