//! A key of a configuration file whose absence is another thing than null: absent, it has a default of `transformers`'s;
//! null, it is none. `architecture.rs`, `gemma.rs` and `encoder/modernbert.rs` read such keys.

use serde::Deserialize;

/// What a file says of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(from = "Option<T>", bound = "T: Deserialize<'de>")]
pub(crate) enum Said<T> {
    /// The key is not there.
    #[default]
    Nothing,
    /// Null.
    None,
    /// A value.
    Value(T),
}

impl<T> From<Option<T>> for Said<T> {
    fn from(said: Option<T>) -> Self {
        said.map_or(Self::None, Self::Value)
    }
}

impl<T> Said<T> {
    /// What holds where `default` does for a file that says nothing.
    pub(crate) fn or(self, default: Option<T>) -> Option<T> {
        match self {
            Self::Nothing => default,
            Self::None => None,
            Self::Value(value) => Some(value),
        }
    }
}
