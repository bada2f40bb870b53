//! A published checkpoint's tokenizer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| commonweal_compiler::fuzz::checkpoint_tokenizer(data));
