//! Asynchronous clients for callers that block: a small runtime of its own, on which the work runs while the caller's
//! thread waits. Used by `postgres` and `objects`, which are called from threads inside and outside of another runtime.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};

/// Threads of the runtime: it only moves bytes, the work is the servers'.
const WORKERS: usize = 2;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unanswered {
    #[error("there was no answer within {} s", .0.as_secs())]
    Late(Duration),
    #[error("the work ended with a panic")]
    Panicked,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Bridge {
    runtime: Option<Runtime>,
}

impl Bridge {
    pub(super) fn start() -> io::Result<Arc<Self>> {
        let runtime =
            Builder::new_multi_thread().worker_threads(WORKERS).thread_name("store").enable_all().build()?;
        Ok(Arc::new(Self { runtime: Some(runtime) }))
    }

    /// The runtime's handle; none once it is being dropped.
    pub(super) fn handle(&self) -> Option<&Handle> {
        self.runtime.as_ref().map(Runtime::handle)
    }

    /// Runs `work` and waits for it, but no longer than `patience`. Whoever is inside of a runtime may call this: their
    /// thread blocks, as it does on a disk.
    pub(super) fn wait<T: Send + 'static>(
        &self,
        patience: Duration,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Unanswered> {
        let (answer, answered) = sync_channel(1);
        let handle = self.handle().ok_or(Unanswered::Panicked)?;
        handle.spawn(async move {
            // A caller that went away needs no answer.
            drop(answer.send(tokio::time::timeout(patience, work).await));
        });
        match answered.recv() {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) => Err(Unanswered::Late(patience)),
            Err(_) => Err(Unanswered::Panicked),
        }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // Waits for nothing, so that it may also be dropped inside of a runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_waited_for_from_anywhere_and_not_for_ever() {
        let bridge = Bridge::start().unwrap();
        let answer = || bridge.wait(Duration::from_secs(60), async { 7 });
        assert_eq!(answer().unwrap(), 7);
        let runtime = Builder::new_current_thread().build().unwrap();
        assert_eq!(runtime.block_on(async { answer() }).unwrap(), 7, "within another runtime");
        let late = bridge.wait(Duration::from_millis(1), std::future::pending::<()>());
        assert!(matches!(late, Err(Unanswered::Late(_))));
        let panicked = bridge.wait(Duration::from_secs(60), async { panic!("a bug") });
        assert!(matches!(panicked, Err::<(), _>(Unanswered::Panicked)));
        runtime.block_on(async move { drop(bridge) });
    }
}
