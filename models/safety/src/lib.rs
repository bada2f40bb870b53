//! Safety over one base: what is unsafe, why, what to write instead, and how well that works.
//!
//! Flow: `guard.toml` ([`GuardConfig`]) + an adapter → [`Guard::judge`] gives each [`Pair`] a calibrated
//! [`Judgement`], by the model and by the text's words ([`Words`]) → a flagged pair goes to [`Reviser::revise`] with a [`Constitution`] → [`Revision`].
//! [`refusal`] and [`SafetyReport`] measure answers; [`calibrate`] turns raw scores into probabilities.
//!
//! Works on `&str` only. It keeps no person's text, and neither its errors nor its logs contain any.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed"))]

mod problem;
mod category;
mod config;
mod validate;
mod preset;
mod frame;
mod question;
mod form;
mod asked;
mod classified;
mod words;
mod add_words;
mod guard;
mod constitution;
mod revise;
mod open;
pub mod refusal;
pub mod calibrate;
mod report;

pub use category::{AskedAbout, Category, CategoryId, InvalidCategoryId};
pub use classified::LabelError;
pub use config::{ConfigError, GuardConfig, Kind, Layout, WordsUse};
pub use constitution::{Constitution, ConstitutionError, Principle, PrincipleId};
pub use guard::{Guard, GuardError, Judgement, Pair};
pub use open::OpenError;
pub use problem::{Place, Problem};
pub use question::{QuestionError, Questions};
pub use report::{Confusion, GuardReport, Rate, SafetyReport};
pub use revise::{
    Flagged, ReviseError, ReviseOptions, Reviser, Revision, critique_messages, revision_messages,
};
pub use words::{
    BUCKETS, CLUSTERED_MAX, Clusters, Head, LEVELS, Sparse, Spoken, Vocabulary, Words, WordsError,
    WordsFileError,
};
