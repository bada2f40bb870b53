//! A published checkpoint's tensors and index.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| commonweal_compiler::fuzz::checkpoint_tensors(data));
