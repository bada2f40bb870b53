//! Spans of an update on its way through the device, for an owner who asked for them: one trace an update, a span a stage.
//!
//! Told by `pipeline.rs` at the end of each stage; `commonweal-traces` sends. A span says which stage, when, and of which
//! round; no count, no size, nothing of the samples. The place of `upload` goes with the update, so that whoever runs
//! both collector and aggregator can go from a release to this. Off unless an endpoint is set.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use commonweal_protocol::{AggregatorKey, DeviceId, RoundId, TraceContext};
use commonweal_traces::{Endpoint, Headers, Span, Traces, TracesError, context};

use crate::events::Done;

/// How long the end of the program waits for what was not delivered.
const END: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub struct Tracer {
    traces: Traces,
    aggregator: AggregatorKey,
    device: DeviceId,
    /// The round under way, and when this process began with it.
    begun: Mutex<Option<(RoundId, SystemTime)>>,
}

impl Tracer {
    /// Spans of this device's updates for the aggregator that it enrolled with under this key.
    pub fn start(
        endpoint: &Endpoint,
        aggregator: AggregatorKey,
        device: DeviceId,
    ) -> Result<Self, TracesError> {
        let traces = Traces::start(endpoint, "commonweal-device", Headers::Own)?;
        Ok(Self { traces, aggregator, device, begun: Mutex::default() })
    }

    /// The place of the update's delivery, which goes with it.
    pub(crate) fn upload(&self, round: RoundId) -> TraceContext {
        self.of_update(round, b"upload")
    }

    /// A stage has ended, now.
    pub(crate) fn stage(&self, round: RoundId, begun: Instant, done: &Done) {
        let Some((name, failed)) = name(done) else { return };
        let ended = SystemTime::now();
        let begun = ended.checked_sub(begun.elapsed()).unwrap_or(ended);
        let first = self.first(round, begun);
        let root = self.of_update(round, b"update");
        let span = |name, context, parent, begun, failed| Span {
            name,
            context,
            parent,
            begun,
            ended,
            says: vec![("commonweal.round", i64::try_from(round.0).unwrap_or(i64::MAX).into())],
            links: Vec::new(),
            failed,
        };
        let context = self.of_update(round, name.as_bytes());
        self.traces.tell(span(name, context, Some(root.span), begun, failed.clone()));
        if name == "upload" {
            self.traces.tell(span("update", root, None, first, failed));
        }
    }

    /// When this process began with the round.
    fn first(&self, round: RoundId, begun: SystemTime) -> SystemTime {
        let mut first = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        match *first {
            Some((of, first)) if of == round => first,
            _ => first.insert((round, begun)).1,
        }
    }

    fn of_update(&self, round: RoundId, stage: &[u8]) -> TraceContext {
        context(&[b"update", &self.aggregator.0.0, &self.device.0, &round.0.to_le_bytes()], &[stage])
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.traces.end(END);
    }
}

/// A stage of an update by its name in code and docs, and why it failed if it did.
fn name(done: &Done) -> Option<(&'static str, Option<String>)> {
    Some(match done {
        Done::Sample { .. } => ("sample", None),
        Done::Filter { .. } => ("filter", None),
        Done::Revise { .. } => ("revise", None),
        Done::Train { .. } => ("train", None),
        Done::Compress { .. } => ("compress", None),
        Done::Upload { .. } => ("upload", None),
        Done::Refused { reason } => ("upload", Some(reason.clone())),
        // Of a release, not of an update.
        Done::Install { .. } => return None,
    })
}
