//! Lists of devices, as a person writes them.
#![no_main]

#[path = "../../models/runtime/tests/fuzz/targets.rs"]
#[expect(dead_code, reason = "one of the crate's targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::devices(data));
