//! A published checkpoint's configuration.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| commonweal_compiler::fuzz::checkpoint_config(data));
