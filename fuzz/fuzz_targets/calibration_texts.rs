//! Files of texts by which a package is calibrated.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| commonweal_compiler::fuzz::calibration_texts(data));
