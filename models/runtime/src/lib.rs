//! Runs packages through ONNX Runtime: generates, scores and trains adapters on a frozen base, on one device.
//!
//! In the order of the flow: a [`library`] is loaded and a [`device`] chosen ([`choose`]), a package is opened as a [`model`], an adapter is prepared for it
//! ([`adapt`]), text becomes tokens ([`template`], [`conversation`], [`texts`], [`tokenize`]), which are run ([`generate`],
//! [`together`], [`score`], with a shared [`prefix`]) or learned from ([`train`], [`preference`], [`train_state`]). Every long call takes a [`cancel`] handle,
//! and so does the wait for a session to open; a program ends with [`settle`]. [`network`] runs a graph that belongs to no package. An encoder's package is opened and run by [`classify`] alone. What does not fit is read in [`windows`].
//!
//! It opens no socket, and writes no file but the [`profile`] that somebody asked for. It never logs a person's text.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::float_cmp, reason = "a failed test may panic"))]

mod copy;
mod frozen;
mod opening;
pub mod library;
pub mod device;
pub mod choose;
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
mod row;
pub mod generate;
pub mod together;
pub mod score;
pub mod schedule;
pub mod optimizer;
mod gradient;
pub mod train;
pub mod preference;
pub mod train_state;
pub mod memory;
pub mod network;
pub mod measure;
pub mod profile;
pub mod windows;
pub mod classify;

pub use adapt::{AdaptError, PreparedAdapter};
pub use cancel::Cancel;
pub use choose::{Choice, DeviceError, Offer};
pub use classify::{Classifier, ClassifyError, ClassifyOptions};
pub use conversation::{Chat, ConversationError, Prompt, TrainingRow};
pub use device::{Device, Devices, ParseDeviceError};
pub use generate::{GenerateOptions, Generated, StopReason};
pub use infer::InferError;
pub use library::{Library, LibraryError};
pub use measure::{Memory, memory};
pub use memory::MemoryError;
pub use model::{Asking, Model, OpenError, OpenOptions};
pub use network::{Network, NetworkError};
pub use opening::settle;
pub use optimizer::AdamW;
pub use preference::{Preference, PreferenceReport, ReferredPreference};
pub use prefix::{SharedPrefix, common_prefix};
pub use schedule::Schedule;
pub use score::{RowScore, mean_loss};
pub use template::{ChatTemplate, Message, Role, SpecialTokens, TemplateError};
pub use texts::{Texts, TextsError};
pub use together::{Alternative, Said, Spoken, Ticket, Together};
pub use tokenize::{TokenizeError, Tokenizer};
pub use train::{StepReport, TrainError, TrainOptions, Trainer};
