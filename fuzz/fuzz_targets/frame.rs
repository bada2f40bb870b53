//! Frames: what a peer says, either way, on either ALPN.
#![no_main]

#[path = "../../shared/protocol/tests/fuzz/targets.rs"]
#[expect(dead_code, reason = "one of the crate's targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::frame(data));
