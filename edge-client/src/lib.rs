//! The device: sample → filter → revise → train → compress → upload → install.
//!
//! One file a stage, declared in the order in which data passes them, each with a type that only it can make;
//! `pipeline.rs` decides what runs when, `store.rs` keeps results, sealed, so that a kill costs little, `cli.rs` is what a person
//! types. Types that hold a person's text live in this crate only.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed"))]

pub mod units;
pub mod settings;
pub mod when;
pub mod budget;
pub mod policy;
pub mod keys;
pub mod seal;
mod vault;
pub mod store;
pub mod spend;
pub mod trust;
pub mod events;
pub mod doing;
pub mod traces;
mod notify;
pub mod rows;
pub mod forms;
pub mod sample;
pub mod kept;
pub mod filter;
pub mod revise;
pub mod train;
pub mod compress;
pub mod upload;
pub mod install;
pub mod personal;
pub mod era;
pub mod forget;
pub mod serve;
pub mod control;
mod pipeline_error;
mod task;
mod trouble;
mod begun;
mod owed;
mod chunks;
mod work;
pub mod pipeline;
mod bus;
mod returns;
pub mod sensors;
pub mod metered;
pub mod watch;
pub mod priority;
pub mod cli;
#[cfg(any(test, fuzzing))]
pub mod fuzz;

pub use pipeline_error::PipelineError;
