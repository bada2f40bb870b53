//! Whether the network is paid for by the byte, looked at whenever much is about to be moved.
//!
//! Between the link, which asks before each transfer, and `spend.rs`, which keeps the account; `sensors.rs` has the word
//! on the network. A device can change its network between a visit's poll and the update, hours later.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use commonweal_transport::{Meter, PutOff};

use crate::{budget::BudgetPolicy, sensors::Sensors, spend::Spending};

/// The account of a link, with a look at the network before each transfer.
pub struct Metered {
    /// The account.
    pub spending: Arc<Spending>,
    network: Mutex<Box<dyn Sensors>>,
    /// Where nobody knows.
    unknown: AtomicBool,
}

impl Metered {
    /// What these sensors say; where they do not know, what is `unknown`.
    pub fn new(spending: Arc<Spending>, network: Box<dyn Sensors>, unknown: bool) -> Self {
        Self { spending, network: Mutex::new(network), unknown: unknown.into() }
    }

    /// The owner's word from now on.
    pub(crate) fn set(&self, budget: BudgetPolicy, unknown: bool) {
        self.spending.set_budget(budget);
        self.unknown.store(unknown, Ordering::Relaxed);
    }

    /// What is moved from now on counts as what the network is now.
    pub fn look(&self) {
        let metered = self.network.lock().unwrap_or_else(PoisonError::into_inner).metered();
        self.spending.set_metered(metered.unwrap_or_else(|| self.unknown.load(Ordering::Relaxed)));
    }
}

impl Meter for Metered {
    fn moved(&self, bytes: u64) {
        self.spending.moved(bytes);
    }

    fn count(&self) -> u64 {
        self.spending.count()
    }

    fn may_begin(&self, bytes: u64) -> Result<(), PutOff> {
        self.look();
        self.spending.may_begin(bytes)
    }

    fn may_go_on(&self, bytes: u64) -> Result<(), PutOff> {
        self.spending.may_go_on(bytes)
    }
}

impl fmt::Debug for Metered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metered").field("spending", &self.spending).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use commonweal_transport::Clock;

    use super::*;
    use crate::{
        budget::{BudgetPolicy, Used},
        spend,
        store::Store,
        units::Limit,
        when::Readings,
    };

    const NOON_MS: u64 = 1_767_268_800_000; // 1 January 2026

    struct Told(Arc<Mutex<Option<bool>>>);

    impl Sensors for Told {
        fn read(&mut self) -> Readings {
            Readings { metered: *self.0.lock().unwrap(), ..Readings::default() }
        }
    }

    #[test]
    fn a_network_that_changes_while_a_round_is_worked_on_counts_as_what_it_is_then() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let metered_bytes_per_day = Limit::of(16_000_000);
        let budget = BudgetPolicy { metered_bytes_per_day, ..BudgetPolicy::default() };
        let zone = jiff::tz::TimeZone::UTC;
        let spending = Arc::new(Spending::open(&store, budget, Clock::manual(NOON_MS), zone).unwrap());
        let told = Arc::new(Mutex::new(Some(false)));
        let meter = Metered::new(Arc::clone(&spending), Box::new(Told(Arc::clone(&told))), false);
        let transfer = |bytes| {
            meter.may_begin(bytes)?;
            meter.may_go_on(bytes)?;
            meter.moved(bytes);
            Ok::<(), PutOff>(())
        };
        meter.look();
        transfer(1_000).unwrap();
        // The visit goes on, on another network.
        *told.lock().unwrap() = Some(true);
        transfer(10_000_000).unwrap();
        assert!(transfer(10_000_000).unwrap_err().reason.contains("for metered networks"));
        // Nobody knows any more.
        *told.lock().unwrap() = None;
        transfer(100_000).unwrap();
        assert_eq!(meter.count(), 10_101_000);
        spending.end();
        let used = Used::of(&spend::read(&store).unwrap().unwrap(), jiff::civil::date(2026, 1, 1));
        assert_eq!((used.bytes_today, used.metered_bytes_today), (10_101_000, 10_000_000));
    }
}
