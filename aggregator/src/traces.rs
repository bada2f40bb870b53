//! Spans of what the aggregator does, made of the events that it tells: a trace for each round, with `receive` for each update,
//! then `merge`, `align`, `evaluate`, `publish`.
//!
//! `serve` has it hear the events, `commonweal-traces` sends. Each span's place is computed from what it is about, so that a
//! merge can link to the `receive` of every update it took, also of those that came before a restart; that one links to
//! the device's own span, if the device sent its place. From a release: the span `publish` that says its version, in whose trace
//! is `merge`, whose links lead to each update and so to its device.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use commonweal_protocol::{AggregatorKey, DeviceId, Digest, RoundId, TraceContext};
use commonweal_traces::{Span, Traces, context};
use commonweal_transport::Clock;

use crate::events::{Event, Figures, Origin};

/// Requests that are a part of bringing an update.
const UPLOADING: [&str; 3] = ["open", "chunk", "finish"];

/// See the module.
#[derive(Debug)]
pub(crate) struct Tracer {
    traces: Traces,
    /// Tells this aggregator's rounds from those of another with the same collector.
    aggregator: AggregatorKey,
    clock: Clock,
}

impl Tracer {
    /// Spans of the aggregator whose first signing key this is.
    pub(crate) fn new(traces: Traces, aggregator: AggregatorKey, clock: Clock) -> Self {
        Self { traces, aggregator, clock }
    }

    /// Makes a span of an event, if it is the end of something.
    pub(crate) fn hear(&self, event: &Event) {
        let now_ms = self.clock.unix_ms();
        match event {
            Event::Received { round, device, bytes, digest, task_round, opened_ms, trace, .. } => {
                self.traces.tell(Span {
                    name: "receive",
                    context: self.receive(*task_round, device, digest),
                    parent: Some(self.round(*task_round).span),
                    begun: at(opened_ms.unwrap_or(now_ms)),
                    ended: at(now_ms),
                    says: vec![
                        ("commonweal.outcome", "accepted".into()),
                        ("commonweal.round", number(round.0)),
                        ("commonweal.device", device.to_string().into()),
                        ("commonweal.update.digest", digest.to_string().into()),
                        ("commonweal.update.bytes", number(*bytes)),
                    ],
                    links: trace.iter().copied().collect(),
                    failed: None,
                });
            }
            Event::Refused { device: Some(device), request, round, refusal, update, .. }
                if UPLOADING.contains(request) =>
            {
                self.refused(*round, (device, *request), &refusal.to_string(), *update, now_ms);
            }
            Event::Stage { round, opened_ms, seconds, figures } => {
                self.stage(*round, *seconds, figures, now_ms);
                if let Figures::Publish { .. } = figures {
                    self.end(*round, (*opened_ms, now_ms), None);
                }
            }
            Event::Rejected { round, opened_ms, reason } => {
                self.end(*round, (*opened_ms, now_ms), Some(reason.clone()));
            }
            _ => {}
        }
    }

    /// Delivers what waits, for so long at most.
    pub(crate) fn finish(&self, within: Duration) {
        self.traces.end(within);
    }

    fn refused(
        &self,
        round: RoundId,
        (device, request): (&DeviceId, &str),
        why: &str,
        update: Option<Digest>,
        now_ms: u64,
    ) {
        let trace = self.round(round);
        // One device can be refused often: each refusal is a span of its own.
        let matter: [&[u8]; 3] = [b"refused", &device.0, &rand::random::<[u8; 8]>()];
        let span = context(&[b"refusal"], &matter).span;
        let mut says = vec![
            ("commonweal.outcome", "refused".into()),
            ("commonweal.request", request.to_owned().into()),
            ("commonweal.round", number(round.0)),
            ("commonweal.device", device.to_string().into()),
        ];
        says.extend(update.map(|digest| ("commonweal.update.digest", digest.to_string().into())));
        self.traces.tell(Span {
            name: "receive",
            context: TraceContext { span, ..trace },
            parent: Some(trace.span),
            begun: at(now_ms),
            ended: at(now_ms),
            says,
            links: Vec::new(),
            failed: Some(why.to_owned()),
        });
    }

    fn stage(&self, round: RoundId, seconds: f64, figures: &Figures, now_ms: u64) {
        let (name, mut says, mut links) =
            (name(figures), vec![("commonweal.round", number(round.0))], Vec::new());
        match figures {
            Figures::Merge(merge) => {
                says.push(("commonweal.updates", number(merge.lineage.len() as u64)));
                let received = |origin: &Origin| self.receive(origin.round, &origin.device, &origin.digest);
                links = merge.lineage.iter().map(received).collect();
            }
            Figures::Publish { version } => says.push(("commonweal.release.version", number(version.0))),
            Figures::Align(_) | Figures::Evaluate(_) => {}
        }
        let ended = at(now_ms);
        self.traces.tell(Span {
            name,
            context: self.of_round(round, &[name.as_bytes()]),
            parent: Some(self.round(round).span),
            begun: ended
                .checked_sub(Duration::try_from_secs_f64(seconds).unwrap_or_default())
                .unwrap_or(ended),
            ended,
            says,
            links,
            failed: None,
        });
    }

    /// The round is over.
    fn end(&self, round: RoundId, (opened_ms, now_ms): (u64, u64), failed: Option<String>) {
        let outcome = if failed.is_some() { "rejected" } else { "published" };
        self.traces.tell(Span {
            name: "round",
            context: self.round(round),
            parent: None,
            begun: at(opened_ms),
            ended: at(now_ms),
            says: vec![("commonweal.round", number(round.0)), ("commonweal.outcome", outcome.into())],
            links: Vec::new(),
            failed,
        });
    }

    fn round(&self, round: RoundId) -> TraceContext {
        self.of_round(round, &[b"round"])
    }

    fn receive(&self, round: RoundId, device: &DeviceId, digest: &Digest) -> TraceContext {
        self.of_round(round, &[b"receive", &device.0, &digest.0])
    }

    fn of_round(&self, round: RoundId, matter: &[&[u8]]) -> TraceContext {
        context(&[b"round", &self.aggregator.0.0, &round.0.to_le_bytes()], matter)
    }
}

fn name(figures: &Figures) -> &'static str {
    match figures {
        Figures::Merge(_) => "merge",
        Figures::Align(_) => "align",
        Figures::Evaluate(_) => "evaluate",
        Figures::Publish { .. } => "publish",
    }
}

fn at(unix_ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(unix_ms)
}

fn number(value: u64) -> commonweal_traces::Value {
    i64::try_from(value).unwrap_or(i64::MAX).into()
}
