//! An OpenTelemetry collector for tests: takes OTLP over HTTP, decodes the protobuf with OpenTelemetry's own definitions, and
//! keeps the spans.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::Span,
};
use prost::Message as _;

use crate::program::PATIENCE;

/// A span and the service that it is of.
pub type Taken = (String, Span);

/// See the module. Listens until the process ends.
#[derive(Debug)]
pub struct Collector {
    /// To set as an endpoint.
    pub endpoint: String,
    taken: Arc<Mutex<Vec<Taken>>>,
    headers: Arc<Mutex<Vec<String>>>,
}

impl Collector {
    /// Listens on a free port of the loopback.
    ///
    /// # Panics
    /// When there is none.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|error| panic!("no port: {error}"));
        let address = listener.local_addr().unwrap_or_else(|error| panic!("no address: {error}"));
        let taken: Arc<Mutex<Vec<Taken>>> = Arc::default();
        let headers: Arc<Mutex<Vec<String>>> = Arc::default();
        let (keep, keep_headers) = (taken.clone(), headers.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (spans, came) = take(stream);
                keep_headers.lock().unwrap_or_else(PoisonError::into_inner).extend(came);
                keep.lock().unwrap_or_else(PoisonError::into_inner).extend(spans);
            }
        });
        Self { endpoint: format!("http://{address}"), taken, headers }
    }

    /// The headers of all requests so far, a line each.
    pub fn headers(&self) -> Vec<String> {
        self.headers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All that came so far.
    pub fn spans(&self) -> Vec<Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What came, once it has what is wanted.
    ///
    /// # Panics
    /// When it never comes.
    pub fn wait_for<T>(&self, what: &str, wanted: impl Fn(&[Taken]) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            let spans = self.spans();
            if let Some(found) = wanted(&spans) {
                return found;
            }
            let names: Vec<&str> = spans.iter().map(|(_, span)| span.name.as_str()).collect();
            assert!(Instant::now() < end, "waited for {what}; what came: {names:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// One request of a client that closes its connection after the answer: its spans and its headers.
fn take(stream: TcpStream) -> (Vec<Taken>, Vec<String>) {
    let mut reader = BufReader::new(stream);
    let (mut line, mut length, mut is_traces, mut is_protobuf) = (String::new(), 0, false, false);
    let mut headers = Vec::new();
    while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
        let lower = line.to_ascii_lowercase();
        is_traces |= line.starts_with("POST /v1/traces HTTP/1.1");
        is_protobuf |= lower.starts_with("content-type: application/x-protobuf");
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        headers.push(line.trim().to_owned());
        line.clear();
    }
    assert!(is_traces && is_protobuf, "not OTLP over HTTP as protobuf");
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap_or_else(|error| panic!("a request that ends early: {error}"));
    let request = ExportTraceServiceRequest::decode(body.as_slice());
    let request = request.unwrap_or_else(|error| panic!("not an export of spans: {error}"));
    let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n";
    drop(reader.get_mut().write_all(answer.as_bytes()));
    let of_service = |resource: &opentelemetry_proto::tonic::trace::v1::ResourceSpans| {
        let attributes =
            resource.resource.as_ref().map(|resource| resource.attributes.clone()).unwrap_or_default();
        assert_eq!(attributes.len(), 1, "what a resource says beyond its service: {attributes:?}");
        text(&attributes, "service.name")
    };
    let spans = request
        .resource_spans
        .iter()
        .flat_map(|resource| {
            let service = of_service(resource);
            let spans = resource.scope_spans.iter().flat_map(|scope| scope.spans.clone());
            spans.map(move |span| (service.clone(), span))
        })
        .collect();
    (spans, headers)
}

/// An attribute as a text; empty if there is none.
pub fn text(attributes: &[KeyValue], name: &str) -> String {
    let value =
        attributes.iter().find(|attribute| attribute.key == name).and_then(|found| found.value.clone());
    match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        _ => String::new(),
    }
}
