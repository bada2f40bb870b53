//! Who drives: of all processes that share the stores one has the lead at a time. It ticks the rounds and carries out their
//! stages; the others receive, and stand by.
//!
//! The lead is a lease that its holder prolongs long before it ends. Who takes it begins a term (`desk`), and what an earlier
//! holder does that was stopped for longer than its lease is refused: heads have moved, and its term is over. Only deletions
//! cannot be refused so: they have to be over when the lease is, and are of nothing that was stored lately (`drive`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::receive::chain;
use crate::store::{Lead, StoreError};

/// A lease is prolonged, or asked for, so often in its time.
const PROLONGED: u32 = 5;
/// What a holder may still begin has a third of the lease to arrive.
const MARGIN: u32 = 3;

/// One process's part in it.
pub struct Leadership {
    lead: Arc<dyn Lead>,
    owner: String,
    lease: Duration,
    until: Mutex<Option<Until>>,
}

/// Until when a process has the lead.
#[derive(Clone, Copy, Debug)]
struct Until {
    /// By the clock that never goes back, and may stand while the machine sleeps.
    steady: Instant,
    /// By the clock on the wall, which does not, and may be set.
    wall: SystemTime,
}

impl Until {
    fn after(lease: Duration) -> Self {
        Self { steady: Instant::now() + lease, wall: SystemTime::now() + lease }
    }

    /// Whether neither clock has come so far, or will have in this time.
    fn lasts(&self, time: Duration) -> bool {
        Instant::now() + time < self.steady && SystemTime::now() + time < self.wall
    }
}

impl std::fmt::Debug for Leadership {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Leadership").field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl Leadership {
    /// Without the lead, if there are others. It lasts for `lease`: so long nothing is decided after its holder died.
    pub fn new(lead: Arc<dyn Lead>, lease: Duration) -> Self {
        let owner = format!("{:032x}", rand::random::<u128>());
        Self { lead, owner, lease, until: Mutex::new(None) }
    }

    /// Whether others could have it.
    pub fn is_shared(&self) -> bool {
        self.lead.is_shared()
    }

    /// Whether this process has it now, and long enough to begin something.
    pub fn is_held(&self) -> bool {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        !self.is_shared() || until.is_some_and(|until| until.lasts(self.lease / MARGIN))
    }

    /// Until when it has it; none where there are no others.
    pub fn held_until(&self) -> Option<Instant> {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.map(|until| until.steady)
    }

    /// Takes or prolongs it. A store that does not answer leaves it as long as it lasts.
    pub fn prolong(&self) -> Result<(), StoreError> {
        // From before the question: the store counts from when it hears it.
        let until = Until::after(self.lease);
        let is_held = self.lead.lead(&self.owner, self.lease)?;
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = is_held.then_some(until);
        Ok(())
    }

    /// Another was seen to have taken it: what was known of it no longer holds, and it has to be asked for again.
    pub fn doubt(&self) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Prolongs it, or waits for it, until somebody says stop; then gives it up, so that nobody has to wait. Whatever is
    /// done with it has to have ended by then.
    pub fn keep(&self, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            if let Err(error) = self.prolong() {
                tracing::warn!(error = chain(&error), "the lead cannot be asked for");
            }
            std::thread::park_timeout(self.lease / PROLONGED);
        }
        self.resign();
    }

    /// Gives it up.
    pub fn resign(&self) {
        self.doubt();
        if let Err(error) = self.lead.resign(&self.owner) {
            tracing::info!(error = chain(&error), "the lead ends by itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStorage;

    /// Of a machine that slept the steady clock may know nothing; the other may have been set back.
    #[test]
    fn a_lease_is_over_when_either_clock_says_so() {
        let (lease, margin) = (Duration::from_secs(3600), Duration::from_secs(1200));
        let (until, over) = (Until::after(lease), Until::after(Duration::ZERO));
        assert!(until.lasts(margin) && !until.lasts(lease));
        assert!(!Until { wall: over.wall, ..until }.lasts(margin));
        assert!(!Until { steady: over.steady, ..until }.lasts(margin));
        assert!(!Until { wall: until.wall + lease, ..over }.lasts(margin));
    }

    #[test]
    fn one_of_several_has_it_and_another_after_it() {
        let memory = MemoryStorage::default().shared();
        let lease = Duration::from_secs(3600);
        let [one, other] = [(); 2].map(|()| Leadership::new(memory.storage().lead, lease));
        assert!(!one.is_held());
        one.prolong().unwrap();
        other.prolong().unwrap();
        assert!(one.is_held() && !other.is_held());
        one.resign();
        other.prolong().unwrap();
        one.prolong().unwrap();
        assert!(!one.is_held() && other.is_held());
        // Whoever is the only one has it always.
        assert!(Leadership::new(MemoryStorage::default().storage().lead, lease).is_held());
    }
}
