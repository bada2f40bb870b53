//! Updates on their way in: chunks, cuts and new beginnings of devices.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| aggregator::fuzz::partial(data));
