//! A package's manifest: what whoever made the package says of it.
#![no_main]

#[path = "../../models/package/tests/fuzz/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::manifest(data));
