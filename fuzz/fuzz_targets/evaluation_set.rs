//! Sets of prompts and conversations: what the operator evaluates and aligns by.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aggregator::fuzz::evaluation_set(data));
