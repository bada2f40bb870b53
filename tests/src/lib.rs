//! Everything that crosses crates: the hostile device (`bin/hostile-device.rs`, over `attack.rs`) and what the tests
//! share to run the real programs (`program.rs`) against each other (`federation.rs`) and to ask them (`http.rs`).

pub mod attack;
pub mod program;
pub mod federation;
pub mod http;
