//! Adapter files: what releases contain and devices read.
#![no_main]

#[path = "../../shared/adapter/tests/fuzz/targets.rs"]
#[expect(dead_code, reason = "one of the crate's targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::adapter_safetensors(data));
