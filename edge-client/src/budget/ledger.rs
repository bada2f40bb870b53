//! The account of the network: what was moved on which date, and what a limit counts of it as used.
//!
//! Of `budget.rs`, which decides by it; `spend.rs` keeps it on disk. Pure. A clock that goes back gives no date's bytes
//! twice: what was moved while it showed a later date counts for the date it shows now, what is beyond that one's limit for
//! those that follow, and the later date stays used up.

use std::str::FromStr;

use jiff::civil::Date;
use serde::{Deserialize, Serialize};

use crate::budget::BudgetPolicy;

/// Dates in an account. Two months, and the ones that a clock gone wrong has shown; of those before, a date a month.
pub(super) const DATES_MAX: usize = 70;
/// As far ahead as it is looked for a date on which there is room again.
const PERIODS_AHEAD_MAX: i64 = 40;

/// What a limit of the network is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) period: Period,
    pub(super) of_metered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Period {
    Day,
    Month,
}

const FIRST: Date = Date::constant(1970, 1, 1);

impl Period {
    /// Counts them.
    fn of(self, date: Date) -> i64 {
        match self {
            Self::Day => date.duration_since(FIRST).as_hours() / 24,
            Self::Month => i64::from(date.year()) * 12 + i64::from(date.month()) - 1,
        }
    }

    /// The first date of one; none beyond the calendar.
    fn first(self, period: i64) -> Option<Date> {
        match self {
            Self::Day => FIRST.checked_add(jiff::SignedDuration::from_hours(period.checked_mul(24)?)).ok(),
            Self::Month => {
                let (year, month) = (period.div_euclid(12), period.rem_euclid(12) + 1);
                Date::new(i16::try_from(year).ok()?, i8::try_from(month).ok()?, 1).ok()
            }
        }
    }
}

/// A date as an account writes it: `2026-11-29`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Day(Date);

impl TryFrom<String> for Day {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Date::from_str(&text)
            .map(Self)
            .map_err(|_| format!("expected a date such as 2026-11-29, got {text:?}"))
    }
}

impl From<Day> for String {
    fn from(Day(date): Day) -> Self {
        date.to_string()
    }
}

/// Bytes, and those of them on metered networks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Moved {
    pub(super) all: u64,
    metered: u64,
}

impl Moved {
    fn of(self, kind: Kind) -> u64 {
        if kind.of_metered { self.metered } else { self.all }
    }

    fn plus(self, other: Self) -> Self {
        Self { all: self.all.saturating_add(other.all), metered: self.metered.saturating_add(other.metered) }
    }

    fn minus(self, other: Self) -> Self {
        Self { all: self.all.saturating_sub(other.all), metered: self.metered.saturating_sub(other.metered) }
    }
}

/// One date of an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    date: Day,
    /// Moved while the clock showed this date.
    pub(super) moved: Moved,
    /// Of that, what an earlier date has taken over, which the clock went back to.
    #[serde(default, skip_serializing_if = "is_none")]
    left: Moved,
    /// What this date has taken over from later ones.
    #[serde(default, skip_serializing_if = "is_none")]
    taken: Moved,
}

fn is_none(moved: &Moved) -> bool {
    *moved == Moved::default()
}

impl Entry {
    fn new(date: Day) -> Self {
        Self { date, moved: Moved::default(), left: Moved::default(), taken: Moved::default() }
    }

    fn add(&mut self, other: &Self) {
        self.moved = self.moved.plus(other.moved);
        self.left = self.left.plus(other.left);
        self.taken = self.taken.plus(other.taken);
    }
}

/// What was moved on which date; by date.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ledger {
    pub(super) dates: Vec<Entry>,
}

impl Ledger {
    /// Writes down bytes on a date that the clock shows.
    pub(crate) fn charge(&mut self, today: Date, bytes: u64, is_metered: bool) {
        let entry = self.entry(today);
        entry.moved = entry.moved.plus(Moved { all: bytes, metered: if is_metered { bytes } else { 0 } });
    }

    /// Takes back what was written down before it was moved, and was not.
    pub(crate) fn give_back(&mut self, day: Date, bytes: u64, is_metered: bool) {
        let entry = self.entry(day);
        entry.moved = entry.moved.minus(Moved { all: bytes, metered: if is_metered { bytes } else { 0 } });
    }

    /// Lets a date that the clock shows take over what was moved while it showed later ones.
    pub(crate) fn look(&mut self, today: Date) {
        let mut taken = Moved::default();
        for later in self.dates.iter_mut().filter(|entry| entry.date.0 > today) {
            taken = taken.plus(later.moved.minus(later.left));
            later.left = later.moved;
        }
        if !is_none(&taken) {
            let entry = self.entry(today);
            entry.taken = entry.taken.plus(taken);
        }
    }

    /// The bytes that a limit counts as used on a date: those of its period, and what earlier ones had too many because
    /// the clock went back.
    pub(super) fn used(&self, kind: Kind, limit: u64, today: Date) -> u64 {
        let now = kind.period.of(today);
        let mut debt = 0u64;
        let mut dates = self.dates.iter().take_while(|entry| kind.period.of(entry.date.0) <= now).peekable();
        while let Some(first) = dates.peek() {
            let period = kind.period.of(first.date.0);
            let [mut moved, mut left, mut taken] = [0u64; 3];
            while let Some(entry) = dates.next_if(|entry| kind.period.of(entry.date.0) == period) {
                moved = moved.saturating_add(entry.moved.of(kind));
                left = left.saturating_add(entry.left.of(kind));
                taken = taken.saturating_add(entry.taken.of(kind));
            }
            debt = debt.saturating_add(taken);
            let used = moved.max(debt.saturating_add(moved.saturating_sub(left)));
            if period == now {
                return used;
            }
            debt = debt.min(used.saturating_sub(limit));
            // The periods up to the next one in the account have nothing but this to count.
            let next = dates.peek().map_or(now, |entry| kind.period.of(entry.date.0)).min(now);
            let between = u64::try_from(next - period - 1).unwrap_or(0);
            debt = debt.saturating_sub(limit.saturating_mul(between));
        }
        debt
    }

    /// The first date after today on which what is used leaves room.
    pub(super) fn room_again(&self, kind: Kind, limit: u64, today: Date, fits: impl Fn(u64) -> bool) -> Date {
        let now = kind.period.of(today);
        let mut last = today;
        for ahead in 1..=PERIODS_AHEAD_MAX {
            let Some(first) = kind.period.first(now + ahead) else { break };
            last = first;
            if fits(self.used(kind, limit, first)) {
                break;
            }
        }
        last
    }

    /// What was moved on a date, and in its month.
    pub(super) fn told(&self, today: Date, of_metered: bool) -> [u64; 2] {
        [Period::Day, Period::Month].map(|period| self.used(Kind { period, of_metered }, u64::MAX, today))
    }

    /// What may still be moved, whatever it is; as much as there is where nothing bounds it.
    pub(crate) fn left(&self, budget: &BudgetPolicy, today: Date, is_metered: bool) -> u64 {
        let limits = budget.limits(is_metered);
        let left = limits.map(|(kind, limit)| limit.saturating_sub(self.used(kind, limit, today)));
        left.min().unwrap_or(u64::MAX)
    }

    /// An account in the place of one that cannot be read: today's bytes are used up, and this month's as far as the
    /// month has come. Any less might let the device move more than its owner allows.
    pub(crate) fn unknown(budget: &BudgetPolicy, today: Date) -> Self {
        let [of, days] = [today.day(), today.days_in_month()].map(|day| u64::from(day.unsigned_abs()));
        let mut ledger = Self::default();
        for (day, month, is_metered) in [
            (budget.bytes_per_day, budget.bytes_per_month, false),
            (budget.metered_bytes_per_day, budget.metered_bytes_per_month, true),
        ] {
            let day = day.count().unwrap_or(0);
            let before = month.count().map_or(0, |limit| limit / days * of).saturating_sub(day);
            ledger.charge(today.first_of_month(), before, is_metered);
            ledger.charge(today, day, is_metered);
        }
        ledger
    }

    fn entry(&mut self, date: Date) -> &mut Entry {
        let date = Day(date);
        let at = self.dates.binary_search_by_key(&date, |entry| entry.date).unwrap_or_else(|_| {
            if self.dates.len() >= DATES_MAX {
                self.make_room(date);
            }
            let at = self.dates.partition_point(|entry| entry.date < date);
            self.dates.insert(at, Entry::new(date));
            at
        });
        &mut self.dates[at]
    }

    /// Leaves a date less: of the two neighbours in one month that are farthest from this date, the later one has what both
    /// had, so that no month has less than was moved in it. Where every month but this date's has one date left, the
    /// farthest date goes. A clock gone wrong cannot push out what the month has used, however long it shows other dates.
    fn make_room(&mut self, Day(today): Day) {
        let month = |entry: &Entry| Period::Month.of(entry.date.0);
        let away = |entry: &Entry| (Period::Day.of(entry.date.0) - Period::Day.of(today)).abs();
        let this = Period::Month.of(today);
        let neighbours = self.dates.windows(2).enumerate().filter_map(|(at, pair)| match pair {
            [one, next] if month(one) == month(next) && month(one) != this => {
                Some((away(one).max(away(next)), at))
            }
            _ => None,
        });
        if let Some((_, at)) = neighbours.max() {
            let earlier = self.dates.remove(at);
            if let Some(later) = self.dates.get_mut(at) {
                later.add(&earlier);
            }
        } else if let Some((_, at)) = self.dates.iter().map(away).zip(0..).max() {
            self.dates.remove(at);
        }
    }

    /// As it was read, in the order and the number that is relied on.
    pub(crate) fn check(self) -> Result<Self, String> {
        if self.dates.len() > DATES_MAX {
            return Err(format!("it has {} dates, expected at most {DATES_MAX}", self.dates.len()));
        }
        if !self.dates.is_sorted_by(|one, next| one.date < next.date) {
            return Err("its dates are not in order".into());
        }
        Ok(self)
    }
}
