//! What the network has cost, on disk, and the link's question whether it may cost more.
//!
//! Of `budget.rs`, which decides; the link asks and counts (`commonweal_transport::Meter`). `spent.json` says of the next
//! bytes that they were moved before they are, a slice at a time: a kill makes the account say up to a slice too much, and
//! too little only of what a lossy link sends again within one chunk. It holds dates and numbers, and is not sealed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use commonweal_transport::{Clock, Meter, PutOff};
use jiff::{Timestamp, ZonedDateTime, civil::Date, tz::TimeZone};

use crate::{
    budget::{self, BudgetPolicy, Ledger, Wait, Wish},
    store::{self, Store, StoreError},
};

pub(crate) const FILE: &str = "spent.json";
/// Written down at a time, so that the questions of some dozen visits cost the disk one write.
const SLICE_BYTES: u64 = 1 << 20;
/// A whole account has less.
const FILE_BYTES_MAX: usize = 64 * 1024;
/// What cannot be written down is not moved; it is tried again so soon.
const WRITE_AGAIN_MS: u64 = 10 * 60_000;

/// The account of this process's link.
#[derive(Debug)]
pub struct Spending {
    path: PathBuf,
    clock: Clock,
    zone: TimeZone,
    /// Since there is this meter.
    moved: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    budget: BudgetPolicy,
    ledger: Ledger,
    /// As far as the account knows of what was moved.
    counted: u64,
    /// Since the account was last written.
    unwritten: u64,
    /// Written down and not moved yet; on which date, and whether on a metered network.
    ahead: u64,
    ahead_on: (Date, bool),
    is_metered: bool,
}

/// The account on disk, for whoever only looks; none if nothing was moved yet.
pub fn read(store: &Store) -> Result<Option<Ledger>, StoreError> {
    let Some(bytes) = store.read(FILE)? else { return Ok(None) };
    parse(&bytes).map(Some).map_err(|reason| StoreError::Damaged { path: store.path(FILE), reason })
}

fn parse(bytes: &[u8]) -> Result<Ledger, String> {
    if bytes.len() > FILE_BYTES_MAX {
        return Err(format!("it has {} bytes, expected at most {FILE_BYTES_MAX}", bytes.len()));
    }
    serde_json::from_slice::<Ledger>(bytes).map_err(|error| error.to_string()).and_then(Ledger::check)
}

/// Gives a file a second name, which needs no room; a copy where there are no such.
fn lay_aside(path: &Path, aside: &Path) -> io::Result<()> {
    match fs::remove_file(aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::hard_link(path, aside).or_else(|_| fs::copy(path, aside).map(|_| ()))
}

/// The time of a clock, where it is.
pub(crate) fn time(clock: &Clock, zone: &TimeZone) -> ZonedDateTime {
    let ms = i64::try_from(clock.unix_ms()).unwrap_or(i64::MAX);
    // A clock beyond the calendar counts as one that was never set.
    Timestamp::from_millisecond(ms).unwrap_or(Timestamp::UNIX_EPOCH).to_zoned_datetime(zone.clone())
}

impl Spending {
    /// The account of a directory that this process holds. One that is damaged is laid aside, and its place is taken by
    /// one that says that this date's bytes are used up. Where that cannot be written, nothing is moved until it can.
    pub fn open(
        store: &Store,
        budget: BudgetPolicy,
        clock: Clock,
        zone: TimeZone,
    ) -> Result<Self, StoreError> {
        let today = time(&clock, &zone).date();
        let path = store.path(FILE);
        let mut is_damaged = false;
        let ledger = match read(store) {
            Ok(ledger) => ledger.unwrap_or_default(),
            Err(error @ StoreError::Damaged { .. }) => {
                let aside = store.path(&format!("{FILE}.damaged"));
                tracing::warn!("{error}; it is {} now, and today's bytes count as used up", aside.display());
                // It stays in its place until the new one takes it: without either, today's bytes would not be used up.
                if let Err(error) = lay_aside(&path, &aside) {
                    tracing::warn!("{} cannot be kept: {error}", aside.display());
                }
                is_damaged = true;
                Ledger::unknown(&budget, today)
            }
            Err(error) => return Err(error),
        };
        let ahead_on = (today, false);
        let state = State { budget, ledger, counted: 0, unwritten: 0, ahead: 0, ahead_on, is_metered: false };
        let spending = Self { path, clock, zone, moved: AtomicU64::new(0), state: Mutex::new(state) };
        if is_damaged && let Err(error) = spending.write(&mut spending.state()) {
            tracing::warn!("the account of the network is not written yet: {error}");
        }
        Ok(spending)
    }

    /// What may be moved from now on.
    pub(crate) fn set_budget(&self, budget: BudgetPolicy) {
        self.state().budget = budget;
    }

    /// Says whether the network is paid for by the byte.
    pub fn set_metered(&self, is_metered: bool) {
        let mut state = self.state();
        let today = time(&self.clock, &self.zone).date();
        self.settle(&mut state, today);
        state.is_metered = is_metered;
    }

    /// After a visit. The account on disk says how it is, give or take a slice.
    pub fn rest(&self) {
        let mut state = self.state();
        let today = time(&self.clock, &self.zone).date();
        self.settle(&mut state, today);
        if state.unwritten >= SLICE_BYTES || state.ahead > SLICE_BYTES {
            state.take_back();
            if let Err(error) = self.write(&mut state) {
                tracing::warn!("the account of the network says more than was moved: {error}");
            }
        }
    }

    /// At the end, while the directory is still held: the account on disk says how it is.
    pub fn end(&self) {
        let mut state = self.state();
        let today = time(&self.clock, &self.zone).date();
        self.settle(&mut state, today);
        state.take_back();
        if let Err(error) = self.write(&mut state) {
            tracing::warn!("the account of the network says more than was moved: {error}");
        }
    }

    fn may(&self, wish: Wish) -> Result<(), PutOff> {
        let mut state = self.state();
        let now = time(&self.clock, &self.zone);
        let today = now.date();
        self.settle(&mut state, today);
        if matches!(wish, Wish::GoOn(bytes) if bytes <= state.ahead) {
            return Ok(());
        }
        let is_metered = state.is_metered;
        let mut ledger = state.ledger.clone();
        ledger.give_back(state.ahead_on.0, state.ahead, state.ahead_on.1);
        budget::decide(&state.budget, &ledger, &now, is_metered, wish)?;
        if let Wish::GoOn(bytes) = wish {
            let ahead = bytes.max(SLICE_BYTES).min(ledger.left(&state.budget, today, is_metered));
            state.ledger = ledger;
            state.go_ahead(today, ahead);
            if let Err(error) = self.write(&mut state) {
                state.take_back();
                let until_ms = now.timestamp().as_millisecond().max(0) as u64 + WRITE_AGAIN_MS;
                let reason = format!("for ten minutes: what it moves cannot be written down: {error}");
                return Err(PutOff { reason, until_ms });
            }
        }
        Ok(())
    }

    /// Takes what was moved into the account, and the clock's word on the date.
    fn settle(&self, state: &mut State, today: Date) {
        let moved = self.moved.load(Ordering::Relaxed);
        let new = moved.saturating_sub(std::mem::replace(&mut state.counted, moved));
        state.unwritten = state.unwritten.saturating_add(new);
        let beyond = new.saturating_sub(state.ahead);
        state.ahead = state.ahead.saturating_sub(new);
        if beyond > 0 {
            state.ledger.charge(today, beyond, state.is_metered);
        }
        if state.ahead_on != (today, state.is_metered) {
            state.take_back();
            state.ahead_on = (today, state.is_metered);
        }
        state.ledger.look(today);
    }

    fn write(&self, state: &mut State) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(&state.ledger).map_err(|error| StoreError::Damaged {
            path: self.path.clone(),
            reason: format!("account does not encode: {error}"),
        })?;
        store::replace(&self.path, &bytes)?;
        state.unwritten = 0;
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn go_ahead(&mut self, today: Date, bytes: u64) {
        self.ledger.charge(today, bytes, self.is_metered);
        (self.ahead, self.ahead_on) = (bytes, (today, self.is_metered));
    }

    fn take_back(&mut self) {
        let (date, is_metered) = self.ahead_on;
        self.ledger.give_back(date, std::mem::take(&mut self.ahead), is_metered);
    }
}

impl Meter for Spending {
    fn moved(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    fn may_begin(&self, bytes: u64) -> Result<(), PutOff> {
        self.may(Wish::Begin(bytes))
    }

    fn may_go_on(&self, bytes: u64) -> Result<(), PutOff> {
        self.may(Wish::GoOn(bytes))
    }
}

impl From<Wait> for PutOff {
    fn from(Wait { until_ms, reason }: Wait) -> Self {
        Self { reason, until_ms }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{budget::Used, units::Limit};

    const NOON_MS: u64 = 1_767_268_800_000; // 1 January 2026
    const DAY_MS: u64 = 24 * 3_600_000;
    const LIMIT: u64 = 16_000_000;

    fn budget() -> BudgetPolicy {
        let metered_bytes_per_day = Limit::of(LIMIT);
        BudgetPolicy { bytes_per_day: Limit::of(2 * LIMIT), metered_bytes_per_day, ..BudgetPolicy::default() }
    }

    fn open(store: &Store, clock: &Clock) -> Spending {
        Spending::open(store, budget(), clock.clone(), TimeZone::UTC).unwrap()
    }

    fn on_disk(store: &Store, clock: &Clock) -> Used {
        let ledger = read(store).unwrap().unwrap_or_default();
        Used::of(&ledger, time(clock, &TimeZone::UTC).date())
    }

    #[test]
    fn what_is_moved_is_written_down_before_and_given_back_after() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let clock = Clock::manual(NOON_MS);
        let spending = open(&store, &clock);
        spending.may_go_on(5_000).unwrap();
        assert_eq!(on_disk(&store, &clock).bytes_today, SLICE_BYTES);
        spending.moved(3_000);
        // Of the slice: nothing is written for it.
        let stamp = store.stamp(FILE).unwrap();
        spending.may_go_on(5_000).unwrap();
        spending.rest();
        assert_eq!(store.stamp(FILE).unwrap(), stamp);
        spending.moved(2 * SLICE_BYTES);
        spending.rest();
        assert_eq!(on_disk(&store, &clock).bytes_today, 3_000 + 2 * SLICE_BYTES);
        spending.may_go_on(1).unwrap();
        spending.end();
        assert_eq!(on_disk(&store, &clock).bytes_today, 3_000 + 2 * SLICE_BYTES);
        // A kill leaves the slice in the account.
        let spending = open(&store, &clock);
        spending.may_go_on(7).unwrap();
        drop(spending);
        assert_eq!(on_disk(&store, &clock).bytes_today, 3_000 + 3 * SLICE_BYTES);
    }

    #[test]
    fn midnight_and_another_network_end_what_was_written_ahead() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let clock = Clock::manual(NOON_MS);
        let spending = open(&store, &clock);
        spending.may_go_on(10).unwrap();
        spending.moved(10);
        spending.set_metered(true);
        spending.may_go_on(20).unwrap();
        spending.moved(20);
        clock.set(NOON_MS + DAY_MS);
        spending.may_go_on(30).unwrap();
        spending.moved(30);
        spending.end();
        let used = on_disk(&store, &clock);
        assert_eq!((used.bytes_today, used.metered_bytes_today), (30, 30));
        assert_eq!((used.bytes_month, used.metered_bytes_month), (60, 50));
    }

    #[test]
    fn the_last_bytes_can_be_used_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let clock = Clock::manual(NOON_MS);
        let spending = open(&store, &clock);
        spending.set_metered(true);
        spending.may_go_on(LIMIT).unwrap();
        spending.moved(LIMIT - 100);
        spending.may_go_on(100).unwrap();
        let put_off = spending.may_go_on(101).unwrap_err();
        assert!(
            put_off.reason.starts_with("until tomorrow: 15MB of today's 16MB for metered"),
            "{put_off:?}"
        );
        assert_eq!(put_off.until_ms, NOON_MS + DAY_MS / 2);
        assert!(spending.may_begin(101).is_err());
        spending.set_metered(false);
        spending.may_go_on(101).unwrap();
        clock.set(put_off.until_ms);
        spending.set_metered(true);
        spending.may_begin(LIMIT).unwrap();
    }

    #[test]
    fn a_damaged_account_is_laid_aside_and_the_day_counts_as_used_up() {
        for damage in ["{", "{\"dates\":[{\"date\":\"someday\"}]}", &" ".repeat(FILE_BYTES_MAX + 1)] {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(directory.path()).unwrap();
            let clock = Clock::manual(NOON_MS);
            store.write(FILE, damage.as_bytes()).unwrap();
            assert!(read(&store).unwrap_err().to_string().contains("spent.json is damaged"));
            let spending = open(&store, &clock);
            assert_eq!(store.read("spent.json.damaged").unwrap().unwrap(), damage.as_bytes());
            assert!(spending.may_go_on(1).is_err());
            drop(spending);
            // Nor does starting again help.
            assert!(open(&store, &clock).may_go_on(1).is_err());
            clock.set(NOON_MS + DAY_MS);
            open(&store, &clock).may_go_on(1).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_written_down_is_not_moved() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let clock = Clock::manual(NOON_MS);
        let spending = open(&store, &clock);
        // The part's name is taken by a directory: the write fails as on a full disk.
        fs::create_dir(store.path("spent.json.part")).unwrap();
        let put_off = spending.may_go_on(1).unwrap_err();
        assert!(put_off.reason.contains("cannot be written down"), "{put_off:?}");
        fs::remove_dir(store.path("spent.json.part")).unwrap();
        spending.may_go_on(1).unwrap();
    }

    #[test]
    fn a_full_disk_ends_no_start_and_a_damaged_account_stays_the_days_end() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let clock = Clock::manual(NOON_MS);
        // The part's name is taken by a directory: the write fails as on a full disk.
        fs::create_dir(store.path("spent.json.part")).unwrap();
        let spending = open(&store, &clock);
        assert!(spending.may_go_on(1).unwrap_err().reason.contains("cannot be written down"));
        drop(spending);
        fs::write(store.path(FILE), b"damaged").unwrap();
        for _ in 0..2 {
            let put_off = open(&store, &clock).may_go_on(1).unwrap_err();
            assert!(put_off.reason.starts_with("until tomorrow"), "{put_off:?}");
            assert_eq!(store.read("spent.json.damaged").unwrap().unwrap(), b"damaged");
        }
        fs::remove_dir(store.path("spent.json.part")).unwrap();
        assert!(open(&store, &clock).may_go_on(1).is_err());
        clock.set(NOON_MS + DAY_MS);
        open(&store, &clock).may_go_on(1).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Visits, kills and days in any order: whoever moves no more than was allowed is never above a day's limit, the account on
        /// disk never says less than was moved, and too much by no more than each kill's slice.
        #[test]
        fn the_account_never_says_less_than_was_moved(
            steps in prop::collection::vec((0u8..8, 1u64..3_000_000, 0u64..=100), 1..50),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(directory.path()).unwrap();
            let clock = Clock::manual(NOON_MS);
            let mut spending = open(&store, &clock);
            spending.set_metered(true);
            let (mut moved, mut today, mut lost) = (0, 0, 0);
            for (what, bytes, share) in steps {
                match what {
                    0 => {
                        spending = open(&store, &clock);
                        spending.set_metered(true);
                        lost += SLICE_BYTES.max(3_000_000);
                    }
                    1 => {
                        clock.set(clock.unix_ms() + DAY_MS);
                        today = 0;
                    }
                    2 => spending.rest(),
                    _ if spending.may_go_on(bytes).is_ok() => {
                        let bytes = bytes * share / 100;
                        spending.moved(bytes);
                        (moved, today) = (moved + bytes, today + bytes);
                    }
                    _ => {}
                }
                prop_assert!(today <= LIMIT);
                let told = on_disk(&store, &clock);
                prop_assert!(told.bytes_today >= today, "{} of {today}", told.bytes_today);
                prop_assert!(told.bytes_today <= today + lost + 3_000_000);
            }
            spending.end();
            let ledger = serde_json::to_value(read(&store).unwrap().unwrap()).unwrap();
            let all: u64 = ledger["dates"].as_array().unwrap().iter().map(|date| date["moved"]["all"].as_u64().unwrap()).sum();
            prop_assert!((moved..=moved + lost).contains(&all), "{all} of {moved}, {lost} lost");
        }
    }
}
