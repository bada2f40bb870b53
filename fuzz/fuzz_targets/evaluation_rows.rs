//! Files of labelled rows: what `filter --evaluate` measures a guard by.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge_client::fuzz::evaluation_rows(data));
