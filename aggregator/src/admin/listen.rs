//! The socket: connections up to a bound, each with a bound on a request's head and on its life, until told to stop;
//! then what is under way may end. `routes.rs` answers what comes through it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections at once; a further one waits in the system's own queue.
const CONNECTIONS_MAX: usize = 32;
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// A request's head must come within this, also on a connection that was used before.
const HEAD_WAIT: Duration = Duration::from_secs(30);
/// A connection ends after this, so that whoever reads no answer holds no place for good.
const CONNECTION_LIFE: Duration = Duration::from_secs(600);
/// What is under way at the end may take so long.
const END_WAIT: Duration = Duration::from_secs(3);
/// Pause after the system had no connection to give, for want of files or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers connections until `stop` is done.
pub(super) async fn listen(listener: TcpListener, app: Router, stop: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let under_way = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        let accept = async {
            let place = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((listener.accept().await?.0, place))
        };
        let (stream, place) = tokio::select! {
            () = &mut stop => break,
            accepted = accept => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("no connection on the admin port: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WAIT)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app.clone()));
        let connection = under_way.watch(connection);
        tokio::spawn(async move {
            if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_LIFE, connection).await {
                tracing::debug!("connection to the admin port ended: {error}");
            }
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(END_WAIT, under_way.shutdown()).await.is_err() {
        tracing::warn!("some answers of the admin port took too long to end, and are cut off");
    }
}
