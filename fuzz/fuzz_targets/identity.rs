//! Keys and certificates in the files of either side.
#![no_main]

#[path = "../../shared/transport/tests/fuzz/targets.rs"]
#[expect(dead_code, reason = "one of the crate's targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::identity(data));
