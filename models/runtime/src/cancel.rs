//! Stops a long call from another thread. Every call of this crate that runs the network takes a [`Cancel`];
//! `infer.rs` and `gradient.rs` run under it, `opening.rs` opens sessions under it.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use ort::session::RunOptions;

/// A handle that stops the calls it was given to, within about one operator of the network (50 ms on a phone). A call that
/// waits for a session to open stops at once.
/// Clones are the same handle. Once cancelled it stays cancelled: make a new one for new work.
#[derive(Clone, Default)]
pub struct Cancel {
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    cancelled: AtomicBool,
    running: Mutex<Vec<Weak<RunOptions>>>,
}

impl Cancel {
    /// A handle that nobody has cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops every call that runs with this handle, and every later one before it starts.
    pub fn cancel(&self) {
        // The flag is set before the list is read, and `watch` reads it after it joined the list: one of the two
        // always sees the other.
        self.state.cancelled.store(true, Ordering::SeqCst);
        for run in self.running().iter().filter_map(Weak::upgrade) {
            stop(&run);
        }
    }

    /// Whether the handle was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.state.cancelled.load(Ordering::SeqCst)
    }

    /// Whether a call runs with this handle.
    pub fn is_running(&self) -> bool {
        self.running().iter().any(|run| run.strong_count() > 0)
    }

    /// Options for the runs of one call; they stop when the handle is cancelled.
    fn watch(&self) -> Result<Arc<RunOptions>, ort::Error> {
        let run = Arc::new(RunOptions::new()?);
        let mut running = self.running();
        running.retain(|other| other.strong_count() > 0);
        running.push(Arc::downgrade(&run));
        drop(running);
        if self.is_cancelled() {
            stop(&run);
        }
        Ok(run)
    }

    fn running(&self) -> std::sync::MutexGuard<'_, Vec<Weak<RunOptions>>> {
        self.state.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stop(run: &RunOptions) {
    if let Err(error) = run.terminate() {
        // The flag of the handle still stops the call between two runs.
        tracing::warn!(%error, "run does not take its stop flag");
    }
}

impl fmt::Debug for Cancel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Cancel").field("cancelled", &self.is_cancelled()).finish()
    }
}

/// One call's permission to run: ends when its handle is cancelled.
pub(crate) struct Run {
    options: Arc<RunOptions>,
    cancel: Cancel,
}

/// How a run ends without a result.
pub(crate) enum RunError {
    Cancelled,
    Engine(ort::Error),
}

impl Run {
    pub(crate) fn new(cancel: &Cancel) -> Result<Self, RunError> {
        let run = Self { options: cancel.watch().map_err(RunError::Engine)?, cancel: cancel.clone() };
        run.check()?;
        Ok(run)
    }

    /// To be asked between two runs.
    pub(crate) fn check(&self) -> Result<(), RunError> {
        if self.cancel.is_cancelled() { Err(RunError::Cancelled) } else { Ok(()) }
    }

    pub(crate) fn options(&self) -> &RunOptions {
        &self.options
    }

    /// The handle that ends it.
    pub(crate) fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// A run that fails after its handle was cancelled failed for that reason.
    pub(crate) fn explain<T>(&self, result: Result<T, ort::Error>) -> Result<T, RunError> {
        result.map_err(
            |error| if self.cancel.is_cancelled() { RunError::Cancelled } else { RunError::Engine(error) },
        )
    }
}
