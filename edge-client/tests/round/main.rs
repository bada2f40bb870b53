//! A round as the device lives it, on the bundled model, with the aggregator's answers written by the test: what a kill,
//! a refusal, a change of mind or a damaged file costs.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

mod control;
mod delivering;
mod going_on;
mod screening;
mod troubles;
mod watching;
mod world;
