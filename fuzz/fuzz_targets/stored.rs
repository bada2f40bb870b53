//! Entries of the aggregator's store on a damaged disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aggregator::fuzz::stored(data));
