//! What tells the time before a `forget --all` from the time after it. Whoever holds a person's words in memory, to write
//! them later, remembers the era in which they were said and writes them in no other: `serve` does. `forget.rs` ends an
//! era.

use crate::{
    kept,
    rows::Parsed,
    sample::Sample,
    store::{Store, StoreError},
};

/// A number drawn anew whenever everything was forgotten, and again when the key goes; read without the key.
const FILE: &str = "forgotten";

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Era(Option<blake3::Hash>);

impl Era {
    /// The one that it is.
    pub fn now(store: &Store) -> Result<Self, StoreError> {
        Ok(Self(store.read(FILE)?.map(|number| blake3::hash(&number))))
    }

    /// Another one from now on. While samples are held ([`kept::hold`]), so that whoever holds them knows which it is.
    pub(crate) fn end(store: &Store) -> Result<(), StoreError> {
        store.write(FILE, &rand::random::<[u8; 16]>())
    }
}

/// Adds samples that were said in an era, as far as they are new, and tells how many were; `None`, and none is added, once
/// it is over.
pub fn keep(
    store: &Store,
    era: Era,
    parsed: &Parsed<Sample>,
    source: &str,
    now_ms: u64,
) -> Result<Option<usize>, StoreError> {
    let held = kept::hold(store)?;
    if Era::now(store)? != era {
        return Ok(None);
    }
    kept::add(store, &held, parsed, source, now_ms).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forget;

    #[test]
    fn what_was_said_before_everything_was_forgotten_is_kept_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let said = |text: &str| Parsed {
            good: vec![(0, Sample::from_pair(text.into(), "r".into()).unwrap())],
            bad: Vec::new(),
        };
        let keep = |era, text: &str| keep(&store, era, &said(text), "serve", 1).unwrap();
        let first = Era::now(&store).unwrap();
        assert_eq!(keep(first, "a"), Some(1));
        // To forget one sample ends no era.
        forget::wish(&store, &[said("a").good[0].1.id()].into()).unwrap();
        forget::carry_out(&store).unwrap();
        assert_eq!(keep(first, "b"), Some(1));
        let mut before = first;
        for _ in 0..2 {
            forget::wish_all(&store).unwrap();
            forget::carry_out(&store).unwrap();
            assert_eq!(keep(before, "c"), None);
            assert!(kept::all(&store).unwrap().is_empty());
            before = Era::now(&store).unwrap();
        }
        assert_eq!(keep(before, "d"), Some(1));
    }
}
