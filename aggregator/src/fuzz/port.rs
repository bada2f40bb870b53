//! What comes to the operator's port (`../fuzz.rs`).

#[path = "../../../fuzz/exchange.rs"]
mod exchange;

use std::cell::LazyCell;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use axum::Router;
use tokio::runtime::{Builder, Runtime};

use super::stored::Aggregator;
use crate::admin::{self, Token};
use crate::observe::{Counts, Observer, Recent, View};
use crate::receive::Receiver;
use exchange::exchange;

const TOKEN: &str = "the tests' token";

struct Port {
    runtime: Runtime,
    app: Router,
}

thread_local! {
    static PORT: LazyCell<Port> = LazyCell::new(|| {
        let aggregator = Aggregator::new(false);
        let parts = aggregator.parts().expect("an empty store has a round");
        let observer = Observer::new(View {
            receiver: Arc::new(Receiver::new(parts.clone())),
            counts: Arc::new(Counts::new()),
            recent: Arc::new(Recent::new(parts.clock.clone())),
            connections: Arc::new(|| 0),
            stopping: Arc::new(AtomicBool::new(false)),
            directory: "/nowhere".into(),
            parts,
        });
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        Port { runtime, app: admin::router(Arc::new(observer), Token::new(TOKEN)) }
    });
}

/// Whatever comes on a connection, what is answered is HTTP; nobody is told of rounds, devices or figures who does not name
/// the token, and an answer is never a failure of the aggregator's.
pub fn admin(bytes: &[u8]) {
    let answer = PORT.with(|port| exchange(&port.runtime, &port.app, bytes));
    assert!(!answer.contains("HTTP/1.1 500"), "{answer}");
    let names_token = bytes.windows(TOKEN.len()).any(|said| said == TOKEN.as_bytes());
    let tells = answer.contains("content-type: application/json") || answer.contains("commonweal_rounds");
    assert!(names_token || !tells, "told without the token: {answer}");
}
