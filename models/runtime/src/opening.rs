//! Opens the session of a graph so that whoever waits for it can go: on a thread of its own, one at a time in a process.
//!
//! ONNX Runtime looks between two steps of an opening whether it was called off. To pack weights for the kernels is many
//! short steps; a pass of the optimizers over a gradient graph is a long one. So whoever waits goes at once, and the thread
//! ends at the next look and keeps nothing. `model.rs` and `classify.rs` open theirs here, over the weights of `frozen.rs`.

use std::{
    panic,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use ort::session::{
    Session,
    builder::{GraphOptimizationLevel, LoadCanceler, SessionBuilder},
};

use crate::{
    cancel::Cancel,
    device::Device,
    frozen::{Frozen, LendError},
    library::Library,
    model::OpenError,
    profile,
};

/// ONNX Runtime's key for optimizers that a session goes without.
const DISABLED_OPTIMIZERS: &str = "optimization.disable_specified_optimizers";

/// Whoever waits looks so often whether its handle was cancelled.
const LOOK: Duration = Duration::from_millis(2);

/// Whether a session is being opened. The next one waits for its end, so that a person who comes and goes never has two
/// of them that nobody waits for.
static UNDER_WAY: Mutex<bool> = Mutex::new(false);
static ENDED: Condvar = Condvar::new();

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Shapes that repeat: memory is planned once.
    Inference,
    /// Shapes that do not, for which a plan would take twice the memory. Equal computations stay apart: those of the
    /// backward are there so that the forward's results need not be kept.
    Training,
}

/// A graph that is to be opened.
pub(crate) struct Graph {
    pub(crate) library: Library,
    /// Devices with memory of their own load the weights themselves.
    pub(crate) frozen: Option<Arc<Frozen>>,
    pub(crate) path: PathBuf,
    pub(crate) purpose: Use,
    /// What it must have.
    pub(crate) inputs: Vec<String>,
    pub(crate) outputs: &'static [&'static str],
}

/// An open session with the weights that it reads, which are dropped after it.
pub(crate) struct OpenSession {
    pub(crate) session: Session,
    _frozen: Option<Arc<Frozen>>,
}

impl Graph {
    /// Opens it. A handle that is cancelled meanwhile ends the waiting at once.
    pub(crate) fn open(self, cancel: &Cancel) -> Result<OpenSession, OpenError> {
        aside(cancel, move |opening| self.open_here(opening))
    }

    fn open_here(self, opening: &Opening) -> Result<OpenSession, OpenError> {
        let Self { library, frozen, path, purpose, inputs, outputs } = self;
        let graph = || path.display().to_string();
        let failed = |source| OpenError::Graph { graph: graph(), source };
        let builder = || {
            let builder = library
                .session()?
                .with_optimization_level(GraphOptimizationLevel::All)?
                .with_memory_pattern(purpose == Use::Inference)?;
            let builder = match profile::prefix(&path) {
                Some(file) => builder.with_profiling(file)?,
                None => builder,
            };
            Ok::<_, ort::Error>(match purpose {
                Use::Inference => builder,
                Use::Training => {
                    builder.with_config_entry(DISABLED_OPTIMIZERS, "CommonSubexpressionElimination")?
                }
            })
        };
        let mut builder = builder().map_err(failed)?;
        if let (Some(frozen), Device::Cpu) = (&frozen, library.device()) {
            builder = frozen.lend(&path, builder).map_err(|error| match error {
                LendError::Frozen(source) => OpenError::Frozen { graph: graph(), source },
                LendError::Engine(source) => failed(source),
            })?;
        }
        let committed = opening.commit(builder, &path);
        if let Some(frozen) = &frozen {
            frozen.rest();
        }
        let session = committed?;
        require(&session, &path, &inputs, outputs)?;
        Ok(OpenSession { session, _frozen: frozen })
    }
}

fn require(session: &Session, path: &Path, inputs: &[String], outputs: &[&str]) -> Result<(), OpenError> {
    let missing =
        |name: &str| OpenError::Interface { graph: path.display().to_string(), name: name.to_owned() };
    for name in inputs {
        if !session.inputs().iter().any(|input| input.name() == name) {
            return Err(missing(name));
        }
    }
    for &name in outputs {
        if !session.outputs().iter().any(|output| output.name() == name) {
            return Err(missing(name));
        }
    }
    Ok(())
}

/// What whoever opens and whoever waits have in common.
#[derive(Default)]
struct Opening {
    is_left: AtomicBool,
    load: Mutex<Option<LoadCanceler>>,
}

impl Opening {
    /// Opens the session, unless nobody waits for it any more.
    fn commit(&self, mut builder: SessionBuilder, path: &Path) -> Result<Session, OpenError> {
        *lock(&self.load) = Some(builder.canceler());
        // `leave` sets the flag before it looks for a load: one of the two always sees the other.
        if self.is_left() {
            return Err(OpenError::Cancelled);
        }
        builder.commit_from_file(path).map_err(|source| {
            if self.is_left() {
                OpenError::Cancelled
            } else {
                OpenError::Graph { graph: path.display().to_string(), source }
            }
        })
    }

    fn is_left(&self) -> bool {
        self.is_left.load(Ordering::SeqCst)
    }

    /// Nobody waits any more.
    fn leave(&self) {
        self.is_left.store(true, Ordering::SeqCst);
        let load = lock(&self.load).clone();
        if let Some(Err(error)) = load.map(|load| load.cancel()) {
            tracing::warn!(%error, "a session that nobody waits for is opened to its end");
        }
    }
}

/// Works on a thread of its own and waits for what comes of it. Once the handle is cancelled it waits no longer, and what
/// comes is dropped over there.
fn aside<T: Send + 'static>(
    cancel: &Cancel,
    work: impl FnOnce(&Opening) -> Result<T, OpenError> + Send + 'static,
) -> Result<T, OpenError> {
    let turn = Turn::take(cancel)?;
    let opening = Arc::new(Opening::default());
    let (sender, receiver) = mpsc::sync_channel(1);
    let theirs = Arc::clone(&opening);
    let thread = thread::Builder::new().name("opening".into()).spawn(move || {
        // Before the turn ends: what was opened for somebody who has left is closed by then.
        drop(sender.send(work(&theirs)));
        drop(turn);
    });
    let thread = thread.map_err(OpenError::Thread)?;
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(done) => return done,
            Err(RecvTimeoutError::Timeout) if cancel.is_cancelled() => {
                opening.leave();
                return Err(OpenError::Cancelled);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    // It sent nothing, so it panicked.
    thread.join().map_or_else(|panic| panic::resume_unwind(panic), |()| Err(OpenError::Cancelled))
}

/// Waits until no session is being opened any more, those included that nobody waits for. A program calls it before it
/// ends: the library must not be taken down under a thread that is in it.
pub fn settle() {
    let mut is_under_way = lock(&UNDER_WAY);
    while *is_under_way {
        is_under_way = ENDED.wait(is_under_way).unwrap_or_else(PoisonError::into_inner);
    }
}

/// The right to open a session; ends when it is dropped, also by a panic.
struct Turn;

impl Turn {
    fn take(cancel: &Cancel) -> Result<Self, OpenError> {
        let mut is_under_way = lock(&UNDER_WAY);
        loop {
            if cancel.is_cancelled() {
                return Err(OpenError::Cancelled);
            }
            if !*is_under_way {
                *is_under_way = true;
                return Ok(Self);
            }
            let waited = ENDED.wait_timeout(is_under_way, LOOK);
            is_under_way = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *lock(&UNDER_WAY) = false;
        ENDED.notify_all();
    }
}

/// What is behind these locks is whole between any two instructions.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ends when it is left, and says so when it is dropped.
    struct Told(mpsc::SyncSender<&'static str>);

    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send("dropped").unwrap();
        }
    }

    #[test]
    fn whoever_is_cancelled_leaves_and_the_next_one_waits_for_what_was_left() {
        let (cancel, (tell, told)) = (Cancel::new(), mpsc::sync_channel(1));
        let (ends, end) = mpsc::sync_channel::<()>(1);
        let handle = cancel.clone();
        let left = aside(&cancel, move |opening| {
            handle.cancel();
            while !opening.is_left() {
                thread::yield_now();
            }
            // As long as a pass of an optimizer takes.
            let _ = end.recv();
            Ok(Told(tell))
        });
        assert!(matches!(left.map(drop), Err(OpenError::Cancelled)));
        // It is still at it, so nobody else begins; whoever is cancelled does not wait for that either.
        assert!(told.try_recv().is_err());
        let cancelled = aside(&cancel, |_| -> Result<(), OpenError> { unreachable!() });
        assert!(matches!(cancelled, Err(OpenError::Cancelled)));
        let waits = thread::spawn(|| aside(&Cancel::new(), |_| Ok(())));
        thread::sleep(10 * LOOK);
        assert!(!waits.is_finished(), "two at a time");
        drop(ends);
        waits.join().unwrap().unwrap();
        assert_eq!(told.try_recv(), Ok("dropped"), "what nobody waited for was kept");
        settle();
    }

    #[test]
    fn a_panic_over_there_is_one_here_and_leaves_the_next_its_turn() {
        let panicked =
            panic::catch_unwind(|| aside(&Cancel::new(), |_| -> Result<(), _> { panic!("a bug") }));
        assert_eq!(panicked.unwrap_err().downcast_ref::<&str>(), Some(&"a bug"));
        aside(&Cancel::new(), |_| Ok(())).unwrap();
    }
}
