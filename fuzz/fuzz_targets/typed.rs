//! Lines of a chat: what a person types or pipes in.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge_client::fuzz::typed(data));
