//! A package's guard.toml.
#![no_main]

#[path = "../../models/safety/tests/fuzz/targets.rs"]
#[expect(dead_code, reason = "one of the crate's targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::guard(data));
