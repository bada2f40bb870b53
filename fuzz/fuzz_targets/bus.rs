//! The system's bus: what the programs print that are asked for it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge_client::fuzz::bus(data));
