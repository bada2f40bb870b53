//! Counters and durations, moved by events and by the records of finished rounds. Before `expose.rs`.

use std::sync::{Mutex, PoisonError};

use commonweal_protocol::RoundId;
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

/// What happened: rounds since the first, everything else since this start.
#[derive(Debug)]
pub struct Counts {
    registry: Registry,
    enrolments: Counter,
    tasks: Counter,
    updates: Family<Outcome, Counter>,
    update_bytes: Counter,
    rounds: Family<Outcome, Counter>,
    releases: Counter,
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
        let rounds = Family::<Outcome, Counter>::default();
        registry.register("rounds", "Rounds that ended, since the first one", rounds.clone());
        let releases = Counter::default();
        registry.register("releases_published", "Releases that became the head", releases.clone());
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
        let next_round = Mutex::new(RoundId(1));
        Self {
            registry,
            enrolments,
            tasks,
            updates,
            update_bytes,
            rounds,
            releases,
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
                self.refusals
                    .get_or_create(&Refused { request, refusal: refusal_name(*refusal) })
                    .inc_by(count);
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
            _ => {}
        }
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

/// The name that a refusal has in events, logs and metrics.
fn refusal_name(refusal: commonweal_protocol::Refusal) -> String {
    match serde_json::to_value(refusal) {
        Ok(serde_json::Value::String(name)) => name,
        _ => "unnamed".to_owned(),
    }
}
