//! Bodies: what any program on the machine asks of `edge-client serve`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge_client::fuzz::request(data));
