//! Spans of one update or one round, on their way to an OpenTelemetry collector: OTLP over plain HTTP, as protobuf.
//!
//! `aggregator` and `edge-client` say what was done and when ([`Span`]); nothing is collected by itself, from the log least
//! of all. A span's place in its trace is computed from what it is about ([`context`]), so that a process that was killed goes
//! on with the trace, and a span can be linked to by whoever knows what it is about. A collector that is away stops nobody:
//! so many spans wait, the rest is dropped.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed"))]

mod endpoint;
mod collector;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use commonweal_protocol::TraceContext;
use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor,
};

pub use endpoint::Endpoint;
pub use opentelemetry::Value;

/// Spans that wait for the collector at most; what comes beyond them is dropped.
const WAITING_MAX: usize = 2_048;
/// How long one delivery may take, its repetitions included.
const DELIVERY: Duration = Duration::from_secs(5);
/// How long spans wait for others to go with them.
const GATHER: Duration = Duration::from_secs(2);

/// Why spans cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The system refused.
    #[error("traces: the system refused a runtime")]
    System(#[from] std::io::Error),
    /// The exporter's own settings, such as those of the environment.
    #[error("traces: the exporter cannot be made")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// What goes with a delivery beside the spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Headers {
    /// What OTLP needs and nothing else.
    Own,
    /// Also those of `OTEL_EXPORTER_OTLP_HEADERS`, as any program with OpenTelemetry sends them.
    Environment,
}

/// Something that was done.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// What: a stage's name.
    pub name: &'static str,
    /// Its place.
    pub context: TraceContext,
    /// The span that it was a part of, in the same trace.
    pub parent: Option<[u8; 8]>,
    /// When it began.
    pub begun: SystemTime,
    /// When it ended.
    pub ended: SystemTime,
    /// What else is said of it.
    pub says: Vec<(&'static str, Value)>,
    /// Other spans that it came of, in other traces or in this one.
    pub links: Vec<TraceContext>,
    /// Why it failed, if it did.
    pub failed: Option<String>,
}

/// The place of a span about `span` in the trace about `trace`: whoever knows what both are about computes the same.
pub fn context(trace: &[&[u8]], span: &[&[u8]]) -> TraceContext {
    let derive = |label: &str, parts: &[&[u8]]| {
        let mut hasher = blake3::Hasher::new_derive_key(label);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        *hasher.finalize().as_bytes()
    };
    let trace_bytes = derive("commonweal trace v1", trace);
    let span_bytes =
        derive("commonweal span v1", &[&trace_bytes, &derive("commonweal span's matter v1", span)]);
    let (mut trace, mut span) = ([0; 16], [0; 8]);
    trace.copy_from_slice(&trace_bytes[..16]);
    span.copy_from_slice(&span_bytes[..8]);
    // None of zeros is valid.
    trace[0] |= 1;
    span[0] |= 1;
    TraceContext { trace, span }
}

/// Where spans go. Clones share it.
#[derive(Clone, Debug)]
pub struct Traces {
    processor: Arc<BatchSpanProcessor>,
    scope: InstrumentationScope,
}

impl Traces {
    /// Spans of `service` go to this collector from now on.
    pub fn start(endpoint: &Endpoint, service: &'static str, headers: Headers) -> Result<Self, TracesError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(collector::Collector::new(endpoint.clone(), headers, DELIVERY)?)
            .with_endpoint(endpoint.traces())
            .with_timeout(DELIVERY)
            .build()?;
        let waiting = BatchConfigBuilder::default()
            .with_max_queue_size(WAITING_MAX)
            .with_scheduled_delay(GATHER)
            .build();
        let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(waiting).build();
        // Not the system's, not the machine's name, nor what else an SDK finds by itself.
        let resource =
            Resource::builder_empty().with_attribute(KeyValue::new("service.name", service)).build();
        processor.set_resource(&resource);
        let scope =
            InstrumentationScope::builder("commonweal").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self { processor: Arc::new(processor), scope })
    }

    /// Sends a span, sooner or later. Never waits.
    pub fn tell(&self, span: Span) {
        let says = span.says.into_iter().map(|(name, value)| KeyValue::new(name, value));
        let mut links = SpanLinks::default();
        links.links = span.links.iter().map(|to| Link::new(placed(to, true), Vec::new(), 0)).collect();
        self.processor.on_end(SpanData {
            span_context: placed(&span.context, false),
            parent_span_id: span.parent.map_or(SpanId::INVALID, SpanId::from_bytes),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: span.name.into(),
            start_time: span.begun,
            end_time: span.ended.max(span.begun),
            attributes: says.collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status: span.failed.map_or(Status::Unset, Status::error),
            instrumentation_scope: self.scope.clone(),
        });
    }

    /// Delivers what waits, for so long at most. Nothing is sent after that.
    pub fn end(&self, within: Duration) {
        if let Err(error) = self.processor.shutdown_with_timeout(within) {
            tracing::warn!("traces: the last spans were not delivered: {error}");
        }
    }
}

fn placed(context: &TraceContext, is_remote: bool) -> SpanContext {
    let (trace, span) = (TraceId::from_bytes(context.trace), SpanId::from_bytes(context.span));
    SpanContext::new(trace, span, TraceFlags::SAMPLED, is_remote, TraceState::NONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_computed_from_what_it_is_about_and_from_nothing_else() {
        let place = context(&[b"round", b"1"], &[b"merge"]);
        assert_eq!(context(&[b"round", b"1"], &[b"merge"]), place);
        let other = context(&[b"round", b"1"], &[b"align"]);
        assert_eq!((other.trace, other.span == place.span), (place.trace, false));
        // Where one part ends and the next begins counts, too.
        for trace in [&[b"round1".as_slice(), b""], &[b"round".as_slice(), b"2"]] {
            let other = context(trace, &[b"merge"]);
            assert!(other.trace != place.trace && other.span != place.span);
        }
    }
}
