//! A device's files behind the seal, and those that have none.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge_client::fuzz::kept_file(data));
