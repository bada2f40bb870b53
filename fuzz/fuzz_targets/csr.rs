//! Signing requests: what whoever holds a token asks to be certified.
#![no_main]

#[path = "../../shared/transport/tests/fuzz/targets.rs"]
#[expect(dead_code, reason = "one of the crate's targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::csr(data));
