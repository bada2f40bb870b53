//! What can be wrong with a message whose bytes decode: the one error of all the checks. Neighbours: every message's
//! `check`, run by `frame` on the way in and on the way out.

/// A message's value is out of its bounds.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Invalid {
    /// A number above its limit.
    #[error("{field}: expected at most {limit}, got {got}")]
    TooLarge {
        /// Which value.
        field: &'static str,
        /// Largest allowed.
        limit: u64,
        /// Value given.
        got: u64,
    },
    /// A number below its limit.
    #[error("{field}: expected at least {limit}, got {got}")]
    TooSmall {
        /// Which value.
        field: &'static str,
        /// Smallest allowed.
        limit: u64,
        /// Value given.
        got: u64,
    },
    /// A number that is not finite, or outside its range.
    #[error("{field}: expected a number from {low} to {high}, got {got}")]
    OutOfRange {
        /// Which value.
        field: &'static str,
        /// Smallest allowed.
        low: f64,
        /// Largest allowed.
        high: f64,
        /// Value given.
        got: f64,
    },
    /// A value that is not one of those allowed.
    #[error("{field}: got {got}, which is not one of the values allowed")]
    NotAllowed {
        /// Which value.
        field: &'static str,
        /// Value given.
        got: u64,
    },
    /// Two values that contradict each other.
    #[error("{field}: contradicts the values beside it")]
    Contradiction {
        /// Which value.
        field: &'static str,
    },
}

impl Invalid {
    pub(crate) fn unless_at_most(
        field: &'static str,
        got: impl Into<u64>,
        limit: impl Into<u64>,
    ) -> Result<(), Self> {
        let (got, limit) = (got.into(), limit.into());
        if got > limit { Err(Self::TooLarge { field, limit, got }) } else { Ok(()) }
    }

    pub(crate) fn unless_at_least(
        field: &'static str,
        got: impl Into<u64>,
        limit: impl Into<u64>,
    ) -> Result<(), Self> {
        let (got, limit) = (got.into(), limit.into());
        if got < limit { Err(Self::TooSmall { field, limit, got }) } else { Ok(()) }
    }

    pub(crate) fn unless_within(field: &'static str, got: f64, low: f64, high: f64) -> Result<(), Self> {
        // A NaN is in no range.
        if (low..=high).contains(&got) { Ok(()) } else { Err(Self::OutOfRange { field, low, high, got }) }
    }
}
