//! What a process took of the machine, as Linux tells it.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// Time and memory of a process.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Used {
    /// Seconds of processor time, all threads together.
    pub(super) cpu_seconds: f64,
    /// The same of the database's processes, where there are such.
    pub(super) database_seconds: f64,
    /// The most memory that it held so far, in MB (10⁶ bytes).
    pub(super) peak_mb: f64,
}

/// Ticks of a second in `/proc`: 100 wherever Linux runs, whatever the kernel's own.
const TICKS_PER_SECOND: f64 = 100.0;

impl Used {
    /// Since the process began.
    pub(super) fn of(process: u32) -> Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).context("the aggregator is gone")?;
        // The name, in parentheses, may hold anything; user and system time are the 12th and 13th word behind it.
        let words: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |index: usize| words.get(index).and_then(|word| word.parse::<f64>().ok());
        let ticks = ticks(11).zip(ticks(12)).context("/proc does not tell processor times")?;
        let status = fs::read_to_string(format!("/proc/{process}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        Ok(Self {
            cpu_seconds: (ticks.0 + ticks.1) / TICKS_PER_SECOND,
            database_seconds: 0.0,
            peak_mb: kilobytes.context("/proc does not tell the memory")? * 1024.0 / 1e6,
        })
    }

    /// Time since an earlier look; the peak stays that of the whole life.
    pub(super) fn since(self, before: &Self) -> Self {
        Self {
            cpu_seconds: self.cpu_seconds - before.cpu_seconds,
            // A session that ended takes its time with it.
            database_seconds: (self.database_seconds - before.database_seconds).max(0.0),
            ..self
        }
    }

    /// Both together.
    pub(super) fn and(self, other: &Self) -> Self {
        Self {
            cpu_seconds: self.cpu_seconds + other.cpu_seconds,
            database_seconds: self.database_seconds + other.database_seconds,
            peak_mb: self.peak_mb + other.peak_mb,
        }
    }
}
