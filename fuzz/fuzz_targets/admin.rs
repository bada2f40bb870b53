//! Connections to the operator's port: whatever anybody who reaches it sends.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aggregator::fuzz::admin(data));
