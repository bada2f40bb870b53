//! The aggregator's signing keys: a file on a disk that may be damaged.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aggregator::fuzz::signing(data));
