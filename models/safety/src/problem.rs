//! What is wrong with a file that a person wrote, all of it at once: `guard.toml`, `constitution.toml`.

/// Where in a file a problem is, for example `categories[3].label`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(pub String);

/// One thing that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// What was expected, and what was got.
    pub message: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place.0, self.message)
    }
}

/// Collects every problem of a file, so that a person corrects it once.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<Problem>);

impl Problems {
    pub(crate) fn require(&mut self, holds: bool, place: impl Into<String>, message: impl Into<String>) {
        if !holds {
            self.0.push(Problem { place: Place(place.into()), message: message.into() });
        }
    }

    pub(crate) fn into_result(self) -> Result<(), Vec<Problem>> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0) }
    }
}

pub(crate) fn list(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
