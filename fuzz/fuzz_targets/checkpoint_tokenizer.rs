//! A published checkpoint's tokenizer.
#![no_main]

// libFuzzer's own hook ends the process at any panic, also at one of the library's that the reader turns into an error. One
// that gets out of the target ends it all the same.
libfuzzer_sys::fuzz_target!(
    init: std::panic::set_hook(Box::new(|_| ())),
    |data: &[u8]| commonweal_compiler::fuzz::checkpoint_tokenizer(data)
);
