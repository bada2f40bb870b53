//! The socket: connections up to a bound, each with a bound on how long a request's head may take, until told to stop;
//! then what is under way may end. `routes.rs` answers what comes through it.

use std::{io, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};

/// Connections at once; a further one waits in the system's own queue.
const CONNECTIONS_MAX: usize = 64;
/// A request's head must come within this, also on a connection that was used before.
const HEAD_WAIT: Duration = Duration::from_secs(30);
/// What is under way at the end may take so long.
const END_WAIT: Duration = Duration::from_secs(10);
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
                    tracing::warn!("no connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        // A chunk of an answer is small and wanted at once.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(app.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WAIT)
            .serve_connection(TokioIo::new(stream), service);
        let connection = under_way.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("connection ended: {error}");
            }
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(END_WAIT, under_way.shutdown()).await.is_err() {
        tracing::warn!("some answers took too long to end, and are cut off");
    }
}
