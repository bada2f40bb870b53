//! What an HTTP service answers to whatever bytes come on a connection, for the targets of both programs:
//! `#[path = "../../../fuzz/exchange.rs"] mod exchange;`.

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::Runtime,
};

/// Says these bytes and hears until the service closes; an answer is HTTP.
pub(crate) fn exchange(runtime: &Runtime, app: &Router, bytes: &[u8]) -> String {
    let answer = runtime.block_on(async {
        let (mut ours, theirs) = tokio::io::duplex(1 << 20);
        let service = TowerToHyperService::new(app.clone());
        let served = http1::Builder::new().half_close(true).serve_connection(TokioIo::new(theirs), service);
        let spoken = async {
            // It may close before it has heard all.
            let _ = ours.write_all(bytes).await;
            let _ = ours.shutdown().await;
            let mut answer = Vec::new();
            let _ = ours.read_to_end(&mut answer).await;
            answer
        };
        tokio::join!(served, spoken).1
    });
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1."), "{answer}");
    answer
}
