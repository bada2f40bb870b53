//! Files of conversations: what a person, or whoever published it, gives to `edge-client add`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge_client::fuzz::samples(data));
