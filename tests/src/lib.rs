//! Everything that crosses crates: the hostile device (`bin/hostile-device.rs`, over `attack.rs`), what the tests share to
//! run the real programs (`program.rs`) against each other (`federation.rs`) and to ask them (`http.rs`), and what the
//! programs of measuring and of harming share: what must hold afterwards (`verdict.rs`), an aggregator without a model (`modelless.rs`), devices without one (`visitor.rs`), each
//! in a process of its own (`child.rs`), servers that keep its state (`postgres.rs`, `bucket.rs`).

pub mod attack;
pub mod child;
pub mod collector;
pub mod modelless;
pub mod visitor;
pub mod verdict;
pub mod program;
pub mod federation;
pub mod port;
pub mod http;
pub mod postgres;
pub mod bucket;
