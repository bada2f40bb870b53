//! The seam between a judgement and what scores the text. `guard.rs` calibrates findings and applies thresholds, and
//! knows nothing of models; a form finds. `asked.rs` is the form of causal models; `add_words.rs` adds
//! to what any of them finds. Another kind of model, such as an
//! encoder that classifies, is another file with this trait, a [`Kind`](crate::Kind) and a line in `open.rs`; it must
//! hold what `tests/contract/` holds every form to.

use std::fmt;

use commonweal_runtime::Cancel;

use crate::{
    category::CategoryId,
    guard::{GuardError, Pair},
};

/// What a form says about a pair: about the whole, or about one category that it scores apart.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Finding {
    /// ln(p(unsafe) / p(safe)) before calibration; of the worst window where a text is longer than one. Never NaN:
    /// what cannot be scored is an error, since no comparison with it would hold.
    pub(crate) log_odds: f64,
    /// The kind of harm. `None` where the form does not tell kinds apart, or was not asked to.
    pub(crate) category: Option<CategoryId>,
}

/// When a form opens what it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Start<'c> {
    /// At once, unless the handle ends it.
    Now(&'c Cancel),
    /// With the first pair.
    AtRest,
}

/// Whether the pair of this index can reach a threshold with this log-odds, so that its category matters.
pub(crate) type Near<'n> = &'n dyn Fn(usize, f64) -> bool;

/// A way to score pairs. It reads every token of both texts, and gives a pair the same findings alone and in company.
pub(crate) trait Form: fmt::Debug + Send + Sync {
    /// For every pair, in their order, at least one finding. A form that names categories at a cost of its own does
    /// so only where `near` holds.
    fn find(
        &self,
        pairs: &[Pair<'_>],
        near: Near<'_>,
        cancel: &Cancel,
    ) -> Result<Vec<Vec<Finding>>, GuardError>;

    /// Gives back the memory of inference until the next call.
    fn close_inference(&self);

    /// Gives back all that was opened until the next call.
    fn close(&self);
}
