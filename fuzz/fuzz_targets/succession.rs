//! The steps from one signing key of the aggregator to the next: what devices go by after a rotation.
#![no_main]

#[path = "../../shared/protocol/tests/fuzz/targets.rs"]
#[expect(dead_code, reason = "one of the crate's targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::succession(data));
