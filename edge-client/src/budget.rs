//! What the device's owner lets it take: bytes of the network, of the disk, of memory. Here is the decision over the
//! network, by its account (`budget/ledger.rs`); `spend.rs` keeps the account on disk and is asked by the link, `store.rs`
//! has the disk's bound, `open.rs` of the command line and `watch.rs` the memory's.
//!
//! Pure. A day is a date of the device's clock where it is.

mod ledger;
#[cfg(test)]
mod tests;

use std::fmt;

use jiff::{ZonedDateTime, civil::Date};
use serde::{Deserialize, Serialize};

pub use ledger::Ledger;
use ledger::{Kind, Period};

use crate::units::{Bytes, Limit};

/// Below this, a connection and the windows of a transfer leave no room for a chunk a day (docs/devices.md).
const NETWORK_BYTES_MIN: u64 = 16_000_000;
/// An adapter, the round's files and the account itself need some.
const DISK_BYTES_MIN: u64 = 16_000_000;
/// Below this no program of ours starts.
const MEMORY_BYTES_MIN: u64 = 64_000_000;

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
