//! A package's chat template: a program in Jinja that whoever published the checkpoint wrote.
#![no_main]

#[path = "../../models/runtime/tests/fuzz/targets.rs"]
#[expect(dead_code, reason = "one of the crate's targets")]
mod targets;

// libFuzzer's own hook ends the process at any panic, also at one of the engine's that the reader turns into an error. One
// that gets out of the target ends it all the same.
libfuzzer_sys::fuzz_target!(
    init: std::panic::set_hook(Box::new(|_| ())),
    |data: &[u8]| targets::template(data)
);
