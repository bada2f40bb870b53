//! The threads beside the runtime's: one drives the rounds, one keeps the lead for it, one follows what other processes do.
//! How they end, in their order and in bounded time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use commonweal_transport::Clock;

use super::ServeError;
use crate::drive::{Driver, ModelStages, Stages, Step};
use crate::lead::Leadership;
use crate::receive::{Parts, Receiver};
use crate::store::Watch;

/// How often the driver looks without a hint.
const LOOK: Duration = Duration::from_secs(1);
/// How often, at most, a process looks at what the others do.
const FOLLOW_APART: Duration = Duration::from_millis(50);
/// How long the end waits for what they are at: a call to a store that does not answer is given up later than that.
pub(super) const LAST_STEP: Duration = Duration::from_secs(25);
/// The same for the lead to be given up; else it ends by itself.
const LAST_WORD: Duration = Duration::from_secs(5);

/// The threads beside the runtime's, and how they end.
pub(super) struct Threads {
    stop: Arc<AtomicBool>,
    running: Vec<std::thread::JoinHandle<()>>,
    /// Keeps the lead, and is told to stop when the others have: what they end with is still this process's to do.
    lead: Option<(Arc<AtomicBool>, std::thread::JoinHandle<()>)>,
}

impl Threads {
    pub(super) fn of(stop: Arc<AtomicBool>) -> Self {
        Self { stop, running: Vec::new(), lead: None }
    }

    fn start(
        &mut self,
        name: &str,
        work: impl FnOnce(&AtomicBool) + Send + 'static,
    ) -> Result<(), ServeError> {
        self.running.push(spawn(name, self.stop.clone(), work)?);
        Ok(())
    }

    fn keep(&mut self, lead: Arc<Leadership>) -> Result<(), ServeError> {
        let stop = Arc::new(AtomicBool::new(false));
        self.lead = Some((stop.clone(), spawn("lead", stop, move |stop| lead.keep(stop))?));
        Ok(())
    }

    /// The stages, and the lead that they need.
    pub(super) fn drive(
        &mut self,
        driver: Driver<ModelStages>,
        parts: &Parts,
        finished: tokio::sync::oneshot::Sender<()>,
    ) -> Result<(), ServeError> {
        let lead = driver.lead();
        if lead.is_shared() {
            self.keep(lead)?;
        }
        let (watch, clock) = (parts.storage.watch.clone(), parts.clock.clone());
        self.start("drive", move |stop| {
            drive(driver, watch.as_ref(), &clock, stop);
            if finished.send(()).is_err() {
                tracing::debug!("ended by a signal");
            }
        })
    }

    /// What others do, and what no device comes back for after it.
    pub(super) fn follow(&mut self, parts: &Parts, receiver: &Arc<Receiver>) -> Result<(), ServeError> {
        let (receiver, watch) = (receiver.clone(), parts.storage.watch.clone());
        self.start("follow", move |stop| follow(&receiver, watch.as_ref(), stop))
    }

    /// Waits for all of them, so long at most. Whoever takes longer ends with the process, as if it had been killed; and the
    /// lead is not given up while a stage may be at work.
    pub(super) async fn join(self, last_step: Duration) -> Result<(), ServeError> {
        let running = async {
            let mut ended = Ok(());
            for thread in self.running {
                thread.thread().unpark();
                ended = ended.and(join(thread).await);
            }
            ended
        };
        let Ok(ended) = tokio::time::timeout(last_step, running).await else {
            tracing::warn!(
                "a stage or a store takes too long to end: what it is at is taken up at the next start"
            );
            return Ok(());
        };
        let Some((stop, thread)) = self.lead else { return ended };
        stop.store(true, Ordering::SeqCst);
        thread.thread().unpark();
        match tokio::time::timeout(LAST_WORD, join(thread)).await {
            Ok(kept) => ended.and(kept),
            Err(_) => ended,
        }
    }
}

fn spawn(
    name: &str,
    stop: Arc<AtomicBool>,
    work: impl FnOnce(&AtomicBool) + Send + 'static,
) -> Result<std::thread::JoinHandle<()>, ServeError> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&stop));
    thread.map_err(|source| ServeError::System { what: "a thread", source })
}

/// The end of a thread.
async fn join(thread: std::thread::JoinHandle<()>) -> Result<(), ServeError> {
    match tokio::task::spawn_blocking(move || thread.join()).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(ServeError::Driver),
    }
}

/// Looks at what other processes do until somebody says stop and wakes the watch.
pub fn follow(receiver: &Receiver, watch: &dyn Watch, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        let mark = watch.mark();
        if let Err(error) = receiver.follow() {
            tracing::warn!(error = crate::receive::chain(&error), "the round's state cannot be read");
        }
        watch.wait(mark, LOOK);
        // Hints come by the dozen while devices come.
        std::thread::sleep(FOLLOW_APART);
    }
}

/// Carries out stages until the last wanted round is over or somebody says stop and wakes the watch.
pub fn drive<S: Stages>(mut driver: Driver<S>, watch: &dyn Watch, clock: &Clock, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        let mark = watch.mark();
        match driver.step() {
            Step::Worked => {}
            Step::Stop => return,
            Step::Wait(at_ms) => {
                let until = at_ms.map_or(LOOK, |at_ms| {
                    Duration::from_millis(at_ms.saturating_sub(clock.unix_ms())).min(LOOK)
                });
                watch.wait(mark, until);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStorage;

    #[tokio::test]
    async fn what_does_not_end_is_not_waited_for_and_keeps_its_lead() {
        let store = MemoryStorage::default().shared().storage().lead;
        let lease = Duration::from_secs(3600);
        let lead = Arc::new(Leadership::new(store.clone(), lease));
        lead.prolong().unwrap();
        let mut threads = Threads::of(Arc::new(AtomicBool::new(true)));
        threads.keep(lead).unwrap();
        let keeper = threads.lead.as_ref().map(|(stop, _)| stop.clone()).unwrap();
        let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
        // Until the sender is gone.
        threads.start("drive", move |_| assert!(held.recv().is_err())).unwrap();
        threads.join(Duration::from_millis(10)).await.unwrap();
        assert!(!store.lead("other", lease).unwrap(), "a stage may be at work");
        keeper.store(true, Ordering::SeqCst);
        drop(release);
    }

    #[tokio::test]
    async fn a_driver_that_panics_is_no_success() {
        join(std::thread::spawn(|| {})).await.unwrap();
        let panicked = std::thread::spawn(|| panic!("a stage's bug"));
        assert!(matches!(join(panicked).await, Err(ServeError::Driver)));
    }

    #[tokio::test]
    async fn the_lead_is_given_up_after_the_last_stage_ended() {
        let memory = MemoryStorage::default().shared();
        let store = memory.storage().lead;
        let lease = Duration::from_secs(3600);
        let lead = Arc::new(Leadership::new(store.clone(), lease));
        lead.prolong().unwrap();
        let mut threads = Threads::of(Arc::default());
        threads.keep(lead).unwrap();
        let other = store.clone();
        let (say, was_held) = std::sync::mpsc::sync_channel(1);
        threads
            .start("drive", move |stop| {
                while !stop.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                // A stage that goes on for a while after the signal.
                std::thread::sleep(Duration::from_millis(200));
                say.send(!other.lead("other", lease).unwrap()).unwrap();
            })
            .unwrap();
        threads.stop.store(true, Ordering::SeqCst);
        threads.join(LAST_STEP).await.unwrap();
        assert!(was_held.recv().unwrap(), "another could drive while a stage went on");
        assert!(store.lead("other", lease).unwrap(), "nobody has to wait for it");
    }
}
