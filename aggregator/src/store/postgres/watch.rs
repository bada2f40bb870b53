//! `Watch` among processes: `LISTEN` and `NOTIFY` on a connection of its own, which is opened again when it is lost.
//!
//! Hints get lost with a connection; whoever waits looks without one too. What several threads want to tell at once is told
//! once.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_postgres::{AsyncMessage, Client, Connection, Error, Socket};

use super::connect::Way;
use crate::store::bridge::Bridge;
use crate::store::{LocalWatch, Watch};

/// Between two attempts to listen.
const AGAIN: Duration = Duration::from_secs(1);
/// Hints are told so far apart at least; those of the time between are one.
const TOLD_APART: Duration = Duration::from_millis(5);

/// Wakes threads of every process that has the database open.
#[derive(Debug)]
pub struct PostgresWatch {
    local: Arc<LocalWatch>,
    wanted: Arc<Notify>,
    task: Option<JoinHandle<()>>,
}

impl PostgresWatch {
    pub(super) fn start(way: &Way, bridge: &Bridge) -> Self {
        let (local, wanted) = (Arc::new(LocalWatch::default()), Arc::new(Notify::new()));
        let task = bridge.handle().map(|handle| {
            let (way, local, wanted) = (way.clone(), local.clone(), wanted.clone());
            handle.spawn(async move {
                loop {
                    if let Err(error) = listen(&way, &local, &wanted).await {
                        tracing::debug!(%error, "hints of the database are looked for again");
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            })
        });
        Self { local, wanted, task }
    }
}

/// Hears and tells until the connection is lost.
async fn listen(way: &Way, local: &LocalWatch, wanted: &Notify) -> Result<(), Error> {
    let (client, connection) = way.config.connect(way.tls.clone()).await?;
    tokio::select! {
        ended = hear(connection, local) => ended,
        ended = tell(&client, local, wanted) => ended,
    }
}

async fn hear<T>(mut connection: Connection<Socket, T>, local: &LocalWatch) -> Result<(), Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
        if let AsyncMessage::Notification(_) = message? {
            local.notify();
        }
    }
    Ok(())
}

async fn tell(client: &Client, local: &LocalWatch, wanted: &Notify) -> Result<(), Error> {
    client.batch_execute("LISTEN commonweal").await?;
    // What happened while nobody listened.
    local.notify();
    loop {
        wanted.notified().await;
        client.batch_execute("NOTIFY commonweal").await?;
        tokio::time::sleep(TOLD_APART).await;
    }
}

impl Watch for PostgresWatch {
    fn notify(&self) {
        self.local.notify();
        self.wanted.notify_one();
    }

    fn mark(&self) -> u64 {
        self.local.mark()
    }

    fn wait(&self, mark: u64, timeout: Duration) {
        self.local.wait(mark, timeout);
    }
}

impl Drop for PostgresWatch {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}
