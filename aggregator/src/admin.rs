//! The operator's port: health, metrics, the dashboard and what it shows, over HTTP on an address of its own.
//!
//! `listen.rs` bounds connections and waits; `door.rs` lets in whoever names the token; `routes.rs` asks `observe` and
//! answers, `interface.rs` in JSON; `page.rs` has the dashboard's files. It listens on the loopback unless the configuration says otherwise, and serves no device: those come over
//! QUIC (`receive`). It only reads.

mod listen;
mod routes;
mod door;
mod interface;
mod page;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::observe::Observer;

pub use door::Token;

/// Where it listens if nothing is said.
pub const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 4434);

/// What the port needs.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Knows how things stand.
    pub observer: Arc<Observer>,
    /// Opens everything but `/healthz` and `/readyz`.
    pub token: Token,
    /// Whether it is needed for `/metrics` as well.
    pub metrics_token: bool,
}

/// What answers requests, without the socket.
#[cfg(any(test, fuzzing))]
pub(crate) fn router(observer: Arc<Observer>, token: Token) -> axum::Router {
    routes::routes(Admin { observer, token, metrics_token: true })
}

impl Admin {
    /// Answers on a socket until `stop` is done.
    pub async fn serve(self, listener: TcpListener, stop: impl Future<Output = ()>) {
        listen::listen(listener, routes::routes(self), stop).await;
    }
}
