//! Counters and durations, moved by events and by the records of finished rounds. Before `expose.rs`.

use std::sync::{Mutex, PoisonError};

use commonweal_protocol::{Fault, RoundId};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::desk::{self, DeskError};
use crate::events::{Event, Figures};
use crate::store::Coord;

/// Records read at once.
const RECORDS_PAGE: usize = 1_000;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stage {
    stage: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    request: &'static str,
    refusal: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failed {
    fault: String,
}

/// All that there are.
const FAULTS: [Fault; 6] =
    [Fault::Signature, Fault::Base, Fault::Damaged, Fault::Layout, Fault::Missing, Fault::Room];

/// What happened: rounds since the first, everything else since this start.
#[derive(Debug)]
pub struct Counts {
    registry: Registry,
    enrolments: Counter,
    tasks: Counter,
    updates: Family<Outcome, Counter>,
    update_bytes: Counter,
    rounds: Family<Outcome, Counter>,
    left_out: Counter,
    releases: Counter,
    trials: Family<Outcome, Counter>,
    install_failures: Family<Failed, Counter>,
    stage_seconds: Family<Stage, Histogram>,
    retries: Counter,
    refusals: Family<Refused, Counter>,
    next_round: Mutex<RoundId>,
}

impl Default for Counts {
    fn default() -> Self {
        Self::new()
    }
}

impl Counts {
    /// All at nothing.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("commonweal");
        let (enrolments, tasks) = (Counter::default(), Counter::default());
        registry.register("enrolments", "Devices that got their first certificate", enrolments.clone());
        registry.register("tasks_assigned", "Tasks handed to devices", tasks.clone());
        let updates = Family::<Outcome, Counter>::default();
        registry.register(
            "updates_received",
            "Updates that were accepted, and requests of an upload that were refused",
            updates.clone(),
        );
        let update_bytes = Counter::default();
        registry.register_with_unit(
            "updates_received",
            "Bytes of accepted updates",
            Unit::Bytes,
            update_bytes.clone(),
        );
        let left_out = Counter::default();
        let help = "Accepted updates that were not merged, for their devices were revoked";
        registry.register("updates_left_out", help, left_out.clone());
        let rounds = Family::<Outcome, Counter>::default();
        registry.register("rounds", "Rounds that ended, since the first one", rounds.clone());
        let releases = Counter::default();
        let help = "Releases that rounds made; what a roll-back brings back is none";
        registry.register("releases_published", help, releases.clone());
        let trials = Family::<Outcome, Counter>::default();
        registry.register("trials", "Trials that ended by themselves", trials.clone());
        let install_failures = Family::<Failed, Counter>::default();
        let help = "Times that a device said it cannot install a release";
        registry.register("install_failures", help, install_failures.clone());
        // From a tenth of a second to two hours.
        let stage_seconds = Family::<Stage, Histogram>::new_with_constructor(|| {
            Histogram::new(exponential_buckets(0.1, 3.0, 11))
        });
        registry.register_with_unit(
            "round_stage_duration",
            "Time that a round's stage took",
            Unit::Seconds,
            stage_seconds.clone(),
        );
        let retries = Counter::default();
        registry.register("stage_retries", "Stages that will be tried again", retries.clone());
        let refusals = Family::<Refused, Counter>::default();
        registry.register(
            "refusals",
            "Requests of devices and strangers that were refused",
            refusals.clone(),
        );
        // A series that is there from the start can be watched for its first step.
        for outcome in ["accepted", "refused"] {
            drop(updates.get_or_create(&Outcome { outcome: outcome.to_owned() }));
        }
        for outcome in ["published", "rejected", "abandoned"] {
            drop(rounds.get_or_create(&Outcome { outcome: outcome.to_owned() }));
        }
        for outcome in ["promoted", "rolled_back"] {
            drop(trials.get_or_create(&Outcome { outcome: outcome.to_owned() }));
        }
        for fault in FAULTS {
            drop(install_failures.get_or_create(&Failed { fault: name(fault) }));
        }
        let next_round = Mutex::new(RoundId(1));
        Self {
            registry,
            enrolments,
            tasks,
            updates,
            update_bytes,
            rounds,
            left_out,
            releases,
            trials,
            install_failures,
            stage_seconds,
            retries,
            refusals,
            next_round,
        }
    }

    /// Counts an event.
    pub fn hear(&self, event: &Event) {
        match event {
            Event::Enrolled { .. } => {
                self.enrolments.inc();
            }
            Event::Assigned { .. } => {
                self.tasks.inc();
            }
            Event::Received { bytes, .. } => {
                self.update("accepted", 1);
                self.update_bytes.inc_by(*bytes);
            }
            Event::Refused { request, refusal, untold, .. } => {
                let count = untold.saturating_add(1);
                if ["open", "chunk", "finish"].contains(request) {
                    self.update("refused", count);
                }
                self.refusals.get_or_create(&Refused { request, refusal: name(*refusal) }).inc_by(count);
            }
            Event::Stage { seconds, figures, .. } => {
                let stage = match figures {
                    Figures::Merge(_) => "merge",
                    Figures::Align(_) => "align",
                    Figures::Evaluate(_) => "evaluate",
                    Figures::Publish { .. } => "publish",
                };
                self.stage_seconds.get_or_create(&Stage { stage }).observe(*seconds);
            }
            Event::Published { .. } => {
                self.releases.inc();
            }
            Event::Retrying { .. } => {
                self.retries.inc();
            }
            Event::LeftOut { .. } => {
                self.left_out.inc();
            }
            Event::Promoted { .. } => self.trial("promoted"),
            Event::RolledBack { .. } => self.trial("rolled_back"),
            Event::Troubled { fault, .. } => {
                self.install_failures.get_or_create(&Failed { fault: name(*fault) }).inc();
            }
            // What these tell is looked at (`standing.rs`), is of a round's record, or is no matter of counts.
            Event::Listening { .. }
            | Event::Drives { .. }
            | Event::StandsBy
            | Event::RoundOpened { .. }
            | Event::RoundClosed { .. }
            | Event::Trial { .. }
            | Event::Uncounted { .. }
            | Event::Rejected { .. }
            | Event::Paused { .. }
            | Event::Reloaded { .. }
            | Event::Stopped { .. } => {}
        }
    }

    fn trial(&self, outcome: &str) {
        self.trials.get_or_create(&Outcome { outcome: outcome.to_owned() }).inc();
    }

    fn update(&self, outcome: &str, count: u64) {
        self.updates.get_or_create(&Outcome { outcome: outcome.to_owned() }).inc_by(count);
    }

    /// Counts the rounds that have ended since it was last called; their records outlive the process, and so do the
    /// counts.
    pub(crate) fn take_up(&self, coord: &dyn Coord) -> Result<(), DeskError> {
        let mut next = self.next_round.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let page = desk::records(coord, *next, RECORDS_PAGE)?;
            let Some(last) = page.last() else { return Ok(()) };
            for record in &page {
                self.rounds.get_or_create(&Outcome { outcome: record.outcome.clone() }).inc();
            }
            *next = RoundId(last.round.0.saturating_add(1));
        }
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }
}

/// The name that a refusal or a fault has in events, logs and metrics.
fn name(reason: impl serde::Serialize) -> String {
    match serde_json::to_value(reason) {
        Ok(serde_json::Value::String(name)) => name,
        _ => "unnamed".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use commonweal_protocol::{DeviceId, Version};
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn how_trials_end_and_what_devices_cannot_install_moves_counts() {
        let counts = Counts::new();
        let version = Version(3);
        let told = |event: &Event| {
            counts.hear(event);
            let mut text = String::new();
            encode(&mut text, counts.registry()).unwrap();
            text
        };
        let (device, fault) = (DeviceId([1; 16]), Fault::Room);
        let text = told(&Event::Troubled { device, version, fault });
        assert!(text.contains("commonweal_install_failures_total{fault=\"room\"} 1"), "{text}");
        assert!(text.contains("commonweal_install_failures_total{fault=\"damaged\"} 0"), "{text}");
        let text = told(&Event::Promoted { version, reason: String::new() });
        assert!(text.contains("commonweal_trials_total{outcome=\"promoted\"} 1"), "{text}");
        assert!(text.contains("commonweal_trials_total{outcome=\"rolled_back\"} 0"), "{text}");
        let (to, now, reason) = (Version(2), Version(4), String::new());
        let text = told(&Event::RolledBack { version, to, now, reason });
        assert!(text.contains("commonweal_trials_total{outcome=\"rolled_back\"} 1"), "{text}");
        assert!(text.contains("commonweal_releases_published_total 0"), "a roll-back is none: {text}");
        let text = told(&Event::LeftOut { round: RoundId(1), device });
        assert!(text.contains("commonweal_updates_left_out_total 1"), "{text}");
    }
}
