//! Connections to `edge-client serve`: whatever a program, or a page in a browser, sends.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge_client::fuzz::door(data));
