//! One line on standard error a finished round and federation, with the time that is left at the pace so far.

use std::time::Instant;

use aggregator::desk::Record;

use crate::measure::Measures;

/// Counts rounds and measurements, which take about as long.
pub(crate) struct Progress {
    /// Of each federation that is to come or under way, first first.
    parts: std::collections::VecDeque<u64>,
    begun: Instant,
    done: u64,
    in_this: u64,
}

impl Progress {
    /// Parts of each federation, in order.
    pub(crate) fn new(parts: impl Iterator<Item = u64>) -> Self {
        Self { parts: parts.collect(), begun: Instant::now(), done: 0, in_this: 0 }
    }

    /// A federation that an earlier run ended.
    pub(crate) fn skip(&mut self) {
        self.parts.pop_front();
    }

    pub(crate) fn round(&mut self, arm: &str, seed: u64, record: &Record) {
        (self.done, self.in_this) = (self.done + 1, self.in_this + 1);
        let reason = record.reason.as_deref().unwrap_or_default();
        let text = format!("round {} {} {reason}", record.round, record.outcome);
        self.tell(arm, seed, text.trim());
    }

    pub(crate) fn end(&mut self, arm: &str, seed: u64, measures: &Measures) {
        self.parts.pop_front();
        (self.done, self.in_this) = (self.done + 1, 0);
        let safe: Vec<String> = measures
            .safe
            .iter()
            .map(|safe| format!("{} {:.1}/{:.1} %", safe.set, safe.rules * 100.0, safe.classifier * 100.0))
            .collect();
        let text = format!(
            "safe {}, over-refusal {:.1} %, held-out loss {:.3}, preference {:.1} %, in {:.0} s",
            safe.join(", "),
            measures.over_refusal * 100.0,
            measures.held_out_loss,
            measures.preference * 100.0,
            measures.seconds
        );
        self.tell(arm, seed, &text);
    }

    fn tell(&self, arm: &str, seed: u64, text: &str) {
        let seconds = self.begun.elapsed().as_secs_f64();
        let left = self.parts.iter().sum::<u64>().saturating_sub(self.in_this) as f64;
        let left_minutes = seconds / (self.done.max(1) as f64) * left / 60.0;
        eprintln!("{:6.1} min, {left_minutes:.0} left  {arm}, seed {seed}: {text}", seconds / 60.0);
    }
}
