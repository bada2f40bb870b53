//! The aggregator's settings: file, environment and `--set`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aggregator::fuzz::settings(data));
