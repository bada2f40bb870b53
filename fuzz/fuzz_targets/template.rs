//! A package's chat template: a program in Jinja that whoever published the checkpoint wrote.
#![no_main]

#[path = "../../models/runtime/tests/fuzz/targets.rs"]
#[expect(dead_code, reason = "one of the crate's targets")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::template(data));
