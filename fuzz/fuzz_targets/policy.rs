//! Policies and settings: what a device's owner writes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge_client::fuzz::policy(data));
