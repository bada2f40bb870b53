//! What the device's owner lets it take: bytes of the network, of the disk, of memory. Here is the account of the network
//! and the decision over it; `spend.rs` keeps the account on disk and is asked by the link, `store.rs` has the disk's
//! bound, `open.rs` of the command line and `watch.rs` the memory's.
//!
//! Pure. A day is a date of the device's clock where it is. A clock that goes back gives no date's bytes twice: what was
//! moved while it showed a later date counts for the date it shows now, what is beyond that one's limit for those that
//! follow, and the later date stays used up.

use std::{fmt, str::FromStr};

use jiff::{ZonedDateTime, civil::Date};
use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Limit};

/// Below this, a connection and the windows of a transfer leave no room for a chunk a day (docs/devices.md).
const NETWORK_BYTES_MIN: u64 = 16_000_000;
/// An adapter, the round's files and the account itself need some.
const DISK_BYTES_MIN: u64 = 16_000_000;
/// Below this no program of ours starts.
const MEMORY_BYTES_MIN: u64 = 64_000_000;
/// Dates in an account. Two months, and the ones that a clock gone wrong has shown; of those before, a date a month.
const DATES_MAX: usize = 70;
/// As far ahead as it is looked for a date on which there is room again.
const PERIODS_AHEAD_MAX: i64 = 40;

/// `[budget]` of the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BudgetPolicy {
    /// Of the network, both directions, on one date.
    pub bytes_per_day: Limit,
    /// In one month.
    pub bytes_per_month: Limit,
    /// Of those, on networks that are paid for by the byte.
    pub metered_bytes_per_day: Limit,
    /// In one month.
    pub metered_bytes_per_month: Limit,
    /// Of the state directory.
    pub disk: Limit,
    /// Of the process.
    pub memory: Limit,
}

impl Default for BudgetPolicy {
    fn default() -> Self {
        Self {
            bytes_per_day: Limit::of(2_000_000_000),
            bytes_per_month: Limit::of(20_000_000_000),
            metered_bytes_per_day: Limit::of(50_000_000),
            metered_bytes_per_month: Limit::of(500_000_000),
            disk: Limit::of(20_000_000_000),
            memory: Limit::OFF,
        }
    }
}

impl BudgetPolicy {
    /// Whether it says nothing of its own.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Values out of their range.
    pub(crate) fn problems(&self) -> Vec<String> {
        let least = [
            ("bytes_per_day", self.bytes_per_day, NETWORK_BYTES_MIN),
            ("bytes_per_month", self.bytes_per_month, NETWORK_BYTES_MIN),
            ("metered_bytes_per_day", self.metered_bytes_per_day, NETWORK_BYTES_MIN),
            ("metered_bytes_per_month", self.metered_bytes_per_month, NETWORK_BYTES_MIN),
            ("disk", self.disk, DISK_BYTES_MIN),
            ("memory", self.memory, MEMORY_BYTES_MIN),
        ];
        let is_low = |limit: Limit, min: u64| limit.count().is_some_and(|count| count < min);
        let low = least.into_iter().filter(|&(_, limit, min)| is_low(limit, min));
        low.map(|(name, limit, min)| {
            let min = Bytes::of(min);
            format!("budget.{name}: expected at least {min}, or off, got {}", String::from(limit))
        })
        .collect()
    }

    /// The limits of the network that hold now.
    fn limits(&self, is_metered: bool) -> impl Iterator<Item = (Kind, u64)> + use<> {
        use Period::{Day, Month};
        let all = [
            (Day, false, self.bytes_per_day),
            (Month, false, self.bytes_per_month),
            (Day, true, self.metered_bytes_per_day),
            (Month, true, self.metered_bytes_per_month),
        ];
        let holding = all.into_iter().filter(move |(_, of_metered, _)| is_metered || !of_metered);
        holding.filter_map(|(period, of_metered, limit)| Some((Kind { period, of_metered }, limit.count()?)))
    }
}

/// What a limit of the network is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    period: Period,
    of_metered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Period {
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
struct Moved {
    all: u64,
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
struct Entry {
    date: Day,
    /// Moved while the clock showed this date.
    moved: Moved,
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
    dates: Vec<Entry>,
}

/// A no: the date from which on there is room, and why not today.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Wait {
    /// Ms since 1970.
    pub until_ms: u64,
    /// After "waits ".
    pub reason: String,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// What the device wants of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// A transfer as a whole. One that is larger than three quarters of a limit begins when so much is left, and ends on
    /// another date; any other waits until it fits.
    Begin(u64),
    /// So much at once.
    GoOn(u64),
}

impl Wish {
    fn under(self, limit: u64) -> u64 {
        match self {
            Self::Begin(bytes) => bytes.min(limit / 4 * 3),
            Self::GoOn(bytes) => bytes,
        }
    }
}

/// Go, or wait until when and why.
pub(crate) fn decide(
    budget: &BudgetPolicy,
    ledger: &Ledger,
    now: &ZonedDateTime,
    is_metered: bool,
    wish: Wish,
) -> Result<(), Wait> {
    let today = now.date();
    let waits = budget.limits(is_metered).filter_map(|(kind, limit)| {
        let wanted = wish.under(limit);
        let used = ledger.used(kind, limit, today);
        let fits = |used: u64| used.saturating_add(wanted) <= limit;
        if fits(used) {
            return None;
        }
        let until = ledger.room_again(kind, limit, today, fits);
        Some((until, kind, used, limit, wanted))
    });
    let Some((until, kind, used, limit, wanted)) = waits.max_by_key(|(until, ..)| *until) else {
        return Ok(());
    };
    let reason = reason(today, until, kind, [used, limit, wanted]);
    let midnight = until.to_zoned_datetime(now.time_zone().clone());
    let until_ms = midnight.map_or(u64::MAX, |at| at.timestamp().as_millisecond().max(0) as u64);
    Err(Wait { until_ms, reason })
}

/// "until tomorrow: 198MB of today's 200MB are used".
fn reason(today: Date, until: Date, kind: Kind, [used, limit, wanted]: [u64; 3]) -> String {
    let when = match today.tomorrow() {
        Ok(tomorrow) if tomorrow == until => "tomorrow".to_owned(),
        _ => until.to_string(),
    };
    let whose = match kind.period {
        Period::Day => "today's",
        Period::Month => "this month's",
    };
    let network = if kind.of_metered { " for metered networks" } else { "" };
    let (shown, limit, wanted_shown) = (Bytes::of(used), Bytes::of(limit), Bytes::of(wanted));
    let rest = if used < limit.count() { format!(", {wanted_shown} more are needed") } else { String::new() };
    format!("until {when}: {shown} of {whose} {limit}{network} are used{rest}")
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
    fn used(&self, kind: Kind, limit: u64, today: Date) -> u64 {
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
    fn room_again(&self, kind: Kind, limit: u64, today: Date, fits: impl Fn(u64) -> bool) -> Date {
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
    fn told(&self, today: Date, of_metered: bool) -> [u64; 2] {
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

/// Why the device cannot even ask for work now, if it cannot.
pub fn wait(budget: &BudgetPolicy, ledger: &Ledger, now: &ZonedDateTime, is_metered: bool) -> Option<Wait> {
    decide(budget, ledger, now, is_metered, Wish::GoOn(1)).err()
}

/// What `status` says of the network's bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Used {
    /// Moved today, in bytes, both directions.
    pub bytes_today: u64,
    /// In this month.
    pub bytes_month: u64,
    /// Of those, on metered networks.
    pub metered_bytes_today: u64,
    /// In this month.
    pub metered_bytes_month: u64,
}

impl Used {
    /// From an account, on a date.
    pub fn of(ledger: &Ledger, today: Date) -> Self {
        let [bytes_today, bytes_month] = ledger.told(today, false);
        let [metered_bytes_today, metered_bytes_month] = ledger.told(today, true);
        Self { bytes_today, bytes_month, metered_bytes_today, metered_bytes_month }
    }

    /// "12MB of 2GB today, 300MB of 20GB this month".
    pub fn sentence(&self, budget: &BudgetPolicy) -> String {
        let of = |used: u64, limit: Limit| match limit.0 {
            Some(limit) => format!("{} of {limit}", Bytes::of(used)),
            None => Bytes::of(used).to_string(),
        };
        let [today, month] =
            [of(self.bytes_today, budget.bytes_per_day), of(self.bytes_month, budget.bytes_per_month)];
        let metered = if self.metered_bytes_month > 0 {
            let [today, month] = [
                of(self.metered_bytes_today, budget.metered_bytes_per_day),
                of(self.metered_bytes_month, budget.metered_bytes_per_month),
            ];
            format!("; on metered networks {today} today, {month} this month")
        } else {
            String::new()
        };
        format!("{today} today, {month} this month{metered}")
    }
}

#[cfg(test)]
mod tests {
    use jiff::{civil::date, tz::TimeZone};
    use proptest::prelude::*;

    use super::*;

    const MB: u64 = 1_000_000;

    fn budget(day: u64, month: u64) -> BudgetPolicy {
        let of = |mb: u64| if mb == 0 { Limit::OFF } else { Limit::of(mb * MB) };
        BudgetPolicy {
            bytes_per_day: of(day),
            bytes_per_month: of(month),
            metered_bytes_per_day: Limit::OFF,
            metered_bytes_per_month: Limit::OFF,
            ..BudgetPolicy::default()
        }
    }

    /// At noon.
    fn noon(day: Date) -> ZonedDateTime {
        day.at(12, 0, 0, 0).to_zoned_datetime(TimeZone::UTC).unwrap()
    }

    fn ms(day: Date) -> u64 {
        day.to_zoned_datetime(TimeZone::UTC).unwrap().timestamp().as_millisecond() as u64
    }

    fn of(dates: &[(Date, u64)]) -> Ledger {
        let mut ledger = Ledger::default();
        for &(day, mb) in dates {
            ledger.look(day);
            ledger.charge(day, mb * MB, false);
        }
        ledger
    }

    fn waits(budget: &BudgetPolicy, ledger: &Ledger, today: Date, wish: Wish) -> Option<Wait> {
        decide(budget, ledger, &noon(today), false, wish).err()
    }

    #[test]
    fn a_day_that_is_used_up_is_waited_for_and_told_in_a_sentence() {
        let (today, budget) = (date(2026, 11, 30), budget(200, 0));
        let ledger = of(&[(date(2026, 11, 29), 200), (today, 198)]);
        assert_eq!(waits(&budget, &ledger, today, Wish::GoOn(2 * MB)), None);
        let wait = waits(&budget, &ledger, today, Wish::Begin(5 * MB)).unwrap();
        let text = "until tomorrow: 198MB of today's 200MB are used, 5MB more are needed";
        assert_eq!((wait.reason.as_str(), wait.until_ms), (text, ms(date(2026, 12, 1))));
        let spent = of(&[(today, 200)]);
        let wait = waits(&budget, &spent, today, Wish::GoOn(1)).unwrap();
        assert_eq!(wait.reason, "until tomorrow: 200MB of today's 200MB are used");
        assert_eq!(waits(&budget, &spent, date(2026, 12, 1), Wish::GoOn(200 * MB)), None);
    }

    #[test]
    fn a_months_end_is_waited_for_over_a_days() {
        let budget = budget(200, 500);
        let ledger = of(&[(date(2026, 11, 1), 200), (date(2026, 11, 2), 200), (date(2026, 11, 3), 100)]);
        let wait = waits(&budget, &ledger, date(2026, 11, 4), Wish::GoOn(1)).unwrap();
        assert_eq!(wait.reason, "until 2026-12-01: 500MB of this month's 500MB are used");
        assert_eq!(wait.until_ms, ms(date(2026, 12, 1)));
        assert_eq!(waits(&budget, &ledger, date(2026, 12, 1), Wish::GoOn(MB)), None);
    }

    #[test]
    fn metered_networks_have_their_own_limit_beside_the_common_one() {
        let (today, mut budget) = (date(2026, 2, 28), budget(200, 0));
        budget.metered_bytes_per_day = Limit::of(20 * MB);
        let mut ledger = of(&[(today, 100)]);
        ledger.charge(today, 20 * MB, true);
        let on = |is_metered| decide(&budget, &ledger, &noon(today), is_metered, Wish::GoOn(MB)).err();
        assert_eq!(on(false), None);
        let text = "until tomorrow: 20MB of today's 20MB for metered networks are used";
        assert_eq!(on(true).unwrap().reason, text);
        let used = Used::of(&ledger, today);
        assert_eq!((used.bytes_today, used.metered_bytes_month), (120 * MB, 20 * MB));
        let told = used.sentence(&budget);
        assert!(
            told.starts_with("120MB of 200MB today, 120MB this month; on metered networks 20MB of 20MB"),
            "{told}"
        );
    }

    #[test]
    fn what_no_day_has_room_for_begins_when_most_of_one_is_left() {
        let (today, budget) = (date(2026, 6, 1), budget(200, 0));
        let begins = |used| waits(&budget, &of(&[(today, used)]), today, Wish::Begin(900 * MB)).is_none();
        assert!(begins(50) && !begins(51));
    }

    #[test]
    fn a_day_ends_at_midnight_where_the_device_is() {
        let tokyo = TimeZone::get("Asia/Tokyo").unwrap_or_else(|_| jiff::tz::offset(9).to_time_zone());
        let now = date(2026, 6, 1).at(23, 0, 0, 0).to_zoned_datetime(tokyo).unwrap();
        let wait =
            decide(&budget(200, 0), &of(&[(now.date(), 200)]), &now, false, Wish::GoOn(1)).unwrap_err();
        assert_eq!(wait.until_ms, now.timestamp().as_millisecond() as u64 + 3_600_000);
    }

    /// 2099 by mistake, and back: what was moved then counts for today, what is too much of that for tomorrow, and the day
    /// of 2099 gives nothing twice.
    #[test]
    fn a_clock_that_goes_back_gives_no_bytes_twice() {
        let (today, far, budget) = (date(2026, 11, 29), date(2099, 1, 1), budget(200, 0));
        let mut ledger = of(&[(today, 200)]);
        assert_eq!(waits(&budget, &ledger, far, Wish::GoOn(200 * MB)), None, "nobody can know");
        ledger.charge(far, 200 * MB, false);
        for _ in 0..2 {
            ledger.look(today);
            for day in [today, today.tomorrow().unwrap(), far] {
                assert!(waits(&budget, &ledger, day, Wish::GoOn(1)).is_some(), "{day}");
            }
            let later = date(2026, 12, 1);
            assert_eq!(waits(&budget, &ledger, later, Wish::GoOn(200 * MB)), None);
            ledger.look(far);
        }
        // A westward flight: the same date again, then the next is used up and the one after is not.
        let next = today.tomorrow().unwrap();
        let mut ledger = of(&[(today, 200), (next, 200)]);
        ledger.look(today);
        let is_free = |day| waits(&budget, &ledger, day, Wish::GoOn(200 * MB)).is_none();
        assert!(!is_free(today) && !is_free(next) && is_free(date(2026, 12, 1)));
    }

    #[test]
    fn an_owner_who_lowers_a_limit_is_owed_nothing_of_the_days_before() {
        let ledger = of(&[(date(2026, 11, 28), 900), (date(2026, 11, 29), 10)]);
        assert_eq!(waits(&budget(50, 0), &ledger, date(2026, 11, 29), Wish::GoOn(40 * MB)), None);
    }

    #[test]
    fn an_account_that_cannot_be_read_leaves_nothing_of_today() {
        let (today, budget) = (date(2026, 11, 15), budget(200, 600));
        let ledger = Ledger::unknown(&budget, today);
        assert!(waits(&budget, &ledger, today, Wish::GoOn(1)).is_some());
        let tomorrow = date(2026, 11, 16);
        assert_eq!(waits(&budget, &ledger, tomorrow, Wish::GoOn(200 * MB)), None);
        assert_eq!(ledger.left(&budget, tomorrow, false), 200 * MB);
        let used = Used::of(&ledger, today);
        assert_eq!((used.bytes_today, used.bytes_month), (200 * MB, 300 * MB));
        assert!(
            waits(&budget, &Ledger::unknown(&budget, date(2026, 11, 1)), date(2026, 11, 1), Wish::GoOn(1))
                .is_some()
        );
    }

    #[test]
    fn an_account_is_read_as_it_was_written_and_has_a_bound() {
        let mut ledger = of(&[(date(2026, 11, 28), 1), (date(2026, 12, 1), 2)]);
        ledger.look(date(2026, 11, 29));
        let text = serde_json::to_string(&ledger).unwrap();
        assert!(text.contains(r#"{"date":"2026-11-28","moved":{"all":1000000,"metered":0}}"#), "{text}");
        assert_eq!(serde_json::from_str::<Ledger>(&text).unwrap().check().unwrap(), ledger);
        let swapped = Ledger { dates: ledger.dates.iter().rev().copied().collect() };
        assert!(swapped.check().unwrap_err().contains("order"));
        let mut day = date(2026, 1, 1);
        for _ in 0..400 {
            ledger.charge(day, 1, false);
            day = day.tomorrow().unwrap();
        }
        assert_eq!(ledger.dates.len(), DATES_MAX);
        assert!(serde_json::to_string(&ledger).unwrap().len() < 16 * 1024);
        let many = Ledger { dates: vec![ledger.dates[0]; DATES_MAX + 1] };
        assert!(many.check().is_err());
    }

    #[test]
    fn a_clock_that_was_wrong_for_long_does_not_empty_the_month() {
        let budget = budget(100, 300);
        let dates = [10, 11, 12].map(|day| (date(2026, 11, day), 100));
        for wrong in [date(2099, 1, 1), date(2026, 12, 1), date(2001, 5, 5)] {
            let mut ledger = of(&dates);
            let mut day = wrong;
            for _ in 0..400 {
                ledger.look(day);
                ledger.charge(day, 1, false);
                day = day.tomorrow().unwrap();
            }
            assert!(ledger.dates.len() <= DATES_MAX);
            for day in 13..=30 {
                let today = date(2026, 11, day);
                ledger.look(today);
                let wait = waits(&budget, &ledger, today, Wish::GoOn(MB)).unwrap();
                assert!(wait.reason.contains("this month's 300MB are used"), "{wrong}: {wait}");
                ledger.charge(today, 1, false);
            }
        }
    }

    /// The limits by hand: of each date that the clock has shown, and of each month.
    fn moved_on(moves: &[(Date, u64)], is_it: impl Fn(Date) -> bool) -> u64 {
        moves.iter().filter(|(day, _)| is_it(*day)).map(|(_, bytes)| bytes).sum()
    }

    proptest! {
        /// Whatever is wanted and however the clock jumps, no date and no month that it shows has more than its limit, and
        /// all that was moved is in the account.
        #[test]
        fn no_date_has_more_than_its_limit(
            steps in prop::collection::vec((0i64..40, 0u64..250 * MB, any::<bool>()), 1..60),
            (day, month) in (16u64..300, 16u64..900),
        ) {
            let budget = budget(day, month);
            let (mut ledger, mut moves) = (Ledger::default(), Vec::new());
            for (ahead, bytes, is_whole) in steps {
                let today = date(2026, 11, 10).checked_add(jiff::SignedDuration::from_hours(24 * ahead)).unwrap();
                ledger.look(today);
                let wish = if is_whole { Wish::Begin(bytes) } else { Wish::GoOn(bytes) };
                let bytes = bytes.min(ledger.left(&budget, today, false));
                if decide(&budget, &ledger, &noon(today), false, wish).is_ok() {
                    ledger.charge(today, bytes, false);
                    moves.push((today, bytes));
                }
                prop_assert!(moved_on(&moves, |one| one == today) <= day * MB);
                prop_assert!(moved_on(&moves, |one| one.first_of_month() == today.first_of_month()) <= month * MB);
                let kept: u64 = ledger.dates.iter().map(|entry| entry.moved.all).sum();
                prop_assert_eq!(kept, moved_on(&moves, |_| true));
                let text = serde_json::to_string(&ledger).unwrap();
                prop_assert_eq!(&serde_json::from_str::<Ledger>(&text).unwrap().check().unwrap(), &ledger);
            }
        }

        /// A clock that goes back and back, past more dates than an account has: no date and no month that it shows has more
        /// than its limit, and nothing that was moved is forgotten.
        #[test]
        fn a_clock_that_goes_back_for_long_empties_no_month(
            steps in prop::collection::vec((-3i64..=1, 0u64..250 * MB), 80..160),
            (day, month) in (16u64..300, 16u64..900),
        ) {
            let budget = budget(day, month);
            let (mut ledger, mut moves) = (Ledger::default(), Vec::<(Date, u64)>::new());
            let mut today = date(2026, 11, 10);
            for (ahead, bytes) in steps {
                today = today.checked_add(jiff::SignedDuration::from_hours(24 * ahead)).unwrap();
                ledger.look(today);
                let bytes = bytes.min(ledger.left(&budget, today, false));
                ledger.charge(today, bytes, false);
                moves.push((today, bytes));
                prop_assert!(moved_on(&moves, |one| one == today) <= day * MB);
                prop_assert!(moved_on(&moves, |one| one.first_of_month() == today.first_of_month()) <= month * MB);
                let kept: u64 = ledger.dates.iter().map(|entry| entry.moved.all).sum();
                prop_assert_eq!(kept, moved_on(&moves, |_| true));
                prop_assert!(ledger.dates.len() <= DATES_MAX);
                prop_assert!(ledger.clone().check().is_ok());
            }
        }

        /// A clock that went wrong for a while and then runs as it should: what it gave too much is taken from the days that
        /// follow, all of it, and then the days are whole again.
        #[test]
        fn what_a_wrong_clock_gave_is_taken_back(jumps in prop::collection::vec(1i64..2000, 1..6)) {
            let budget = budget(200, 0);
            let mut ledger = Ledger::default();
            let mut today = date(2026, 1, 1);
            let whole = |ledger: &mut Ledger, day| {
                ledger.look(day);
                let bytes = ledger.left(&budget, day, false);
                ledger.charge(day, bytes, false);
                bytes
            };
            let mut moved = 0;
            for jump in jumps.iter().copied() {
                moved += whole(&mut ledger, today);
                let wrong = today.checked_add(jiff::SignedDuration::from_hours(24 * jump)).unwrap();
                moved += whole(&mut ledger, wrong);
            }
            let mut days = 1;
            // No more than the wrong dates that were shown in the meantime: then there is nothing left to take back.
            for _ in 0..=2 * jumps.len() {
                today = today.tomorrow().unwrap();
                days += 1;
                moved += whole(&mut ledger, today);
            }
            prop_assert!(moved <= days * 200 * MB, "{moved} in {days} days");
            prop_assert!(moved >= (days - 2 * jumps.len() as u64) * 200 * MB, "{moved} in {days} days");
        }
    }
}
