//! Sealed files: what a disk, or whoever had it, made of a device's files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| edge_client::fuzz::sealed(data));
