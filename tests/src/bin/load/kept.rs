//! Connections that devices keep between visits, with `--reuse`: as many at once as the aggregator has seats for beside the
//! visits under way. Of `devices.rs`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use commonweal_transport::{LinkLimits, QuicLink, ServeLimits};

/// A visit has so many at most: one that it asks over, and one that it fetches or delivers over.
const CONNECTIONS_OF_A_VISIT: usize = 2;
/// One that was idle for nearly its time-out may end before it is used.
const IDLE_MARGIN: Duration = Duration::from_secs(5);

/// How many connections may be kept, and how many are.
#[derive(Debug, Default)]
pub(super) struct Room {
    max: AtomicUsize,
    held: AtomicUsize,
}

/// Leave to keep one connection; free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Room>);

/// A connection between two visits.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) link: QuicLink,
    pub(super) place: Place,
    since: Instant,
}

impl Room {
    /// Makes room for what is left of the aggregators' seats while so many visit at once.
    pub(super) fn resize(&self, aggregators: usize, visits_at_once: u32) {
        let seats = aggregators * ServeLimits::default().connections_max;
        let max = seats.saturating_sub(visits_at_once as usize * CONNECTIONS_OF_A_VISIT);
        self.max.store(max, Ordering::SeqCst);
    }

    /// A place, if one is free.
    pub(super) fn take(self: &Arc<Self>) -> Option<Place> {
        let max = self.max.load(Ordering::SeqCst);
        let more = |held| (held < max).then_some(held + 1);
        self.held.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok().map(|_| Place(self.clone()))
    }

    /// How many are kept.
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    /// Whether more are kept than there is room for now.
    pub(super) fn is_over(&self) -> bool {
        self.held() > self.max.load(Ordering::SeqCst)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Kept {
    pub(super) fn new(link: QuicLink, place: Place) -> Self {
        Self { link, place, since: Instant::now() }
    }

    /// Whether it has not been idle for so long that it has ended: twice the time of a stall (docs/wire.md).
    pub(super) fn is_fresh(&self) -> bool {
        let idle_max = Duration::from_millis(LinkLimits::default().stall_ms) * 2;
        self.since.elapsed() + IDLE_MARGIN < idle_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_are_kept_than_fit_beside_the_visits() {
        let room = Arc::new(Room::default());
        assert!(room.take().is_none(), "nothing is kept unless it is asked for");
        let seats = ServeLimits::default().connections_max;
        room.resize(1, seats as u32 / 2 - 1);
        let mut places = vec![room.take(), room.take()];
        assert!(places.iter().all(Option::is_some) && room.take().is_none());
        places.pop();
        assert_eq!((room.held(), room.take().is_some()), (1, true));
        room.resize(1, seats as u32);
        assert!(room.is_over() && room.take().is_none());
        places.clear();
        assert!(room.held() == 0 && !room.is_over());
        room.resize(3, seats as u32);
        assert!(room.take().is_some(), "each aggregator has its own");
    }
}
