//! Runs packages through ONNX Runtime: generates, scores and trains adapters on a frozen base, on one device.
//!
//! In the order of the flow: a [`library`] is loaded, a package is opened as a [`model`], an adapter is prepared for it
//! ([`adapt`]), text becomes tokens ([`template`], [`conversation`], [`texts`], [`tokenize`]), which are run ([`generate`],
//! [`score`], with a shared [`prefix`]) or learned from ([`train`], [`preference`], [`train_state`]). [`network`] runs a
//! graph that belongs to no package. Every long call takes a [`cancel`] handle.
//!
//! It opens no socket and writes no file. It never logs a person's text.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::float_cmp, reason = "a failed test may panic"))]

pub mod library;
pub mod cancel;
pub mod tokenize;
pub mod template;
pub mod conversation;
pub mod texts;
pub mod adapt;
pub mod model;
mod cache;
mod infer;
pub mod prefix;
mod sample_token;
pub mod generate;
pub mod score;
pub mod schedule;
pub mod optimizer;
mod gradient;
pub mod train;
pub mod preference;
pub mod train_state;
pub mod network;
pub mod measure;

pub use adapt::{AdaptError, PreparedAdapter};
pub use cancel::Cancel;
pub use conversation::{Chat, ConversationError, Prompt, TrainingRow};
pub use generate::{GenerateOptions, Generated, StopReason};
pub use infer::InferError;
pub use library::{Library, LibraryError};
pub use measure::{Memory, memory};
pub use model::{Model, OpenError, OpenOptions};
pub use network::{Network, NetworkError};
pub use optimizer::AdamW;
pub use preference::{Preference, PreferenceReport, ReferredPreference};
pub use prefix::{SharedPrefix, common_prefix};
pub use schedule::Schedule;
pub use score::{RowScore, mean_loss};
pub use template::{ChatTemplate, Message, Role, SpecialTokens, TemplateError};
pub use texts::{Texts, TextsError};
pub use tokenize::{TokenizeError, Tokenizer};
pub use train::{StepReport, TrainError, TrainOptions, Trainer};
