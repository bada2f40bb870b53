//! One POST to the collector, over a connection of its own: what `opentelemetry-otlp` sends by. Says once that the
//! collector is away, and once that it is there again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use opentelemetry_http::{HttpClient, HttpError};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};

use crate::{Endpoint, Headers};

/// Bytes of an answer that are read; a collector says little.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// See the module. Called on the thread that gathers spans, which has no runtime.
#[derive(Debug)]
pub(crate) struct Collector {
    endpoint: Endpoint,
    headers: Headers,
    within: Duration,
    runtime: Runtime,
    is_away: AtomicBool,
}

impl Collector {
    pub(crate) fn new(endpoint: Endpoint, headers: Headers, within: Duration) -> std::io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build()?;
        Ok(Self { endpoint, headers, within, runtime, is_away: AtomicBool::new(false) })
    }

    async fn post(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        // The exporter adds what the environment names, which may be a secret for somebody else's collector.
        if self.headers == Headers::Own {
            let own = [header::CONTENT_TYPE, header::CONTENT_ENCODING];
            let own = own.map(|name| request.headers_mut().remove(&name).map(|value| (name, value)));
            *request.headers_mut() = own.into_iter().flatten().collect();
        }
        let (host, port) = self.endpoint.address();
        let host_header =
            HeaderValue::from_str(request.uri().authority().map_or(host, |whole| whole.as_str()))?;
        request.headers_mut().insert(header::HOST, host_header);
        let path = request.uri().path_and_query().map_or("/", |path| path.as_str()).parse()?;
        *request.uri_mut() = path;
        let stream = TcpStream::connect((host, port)).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let (parts, body) = sender.send_request(request.map(Full::new)).await?.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await?.to_bytes();
        connection.abort();
        Ok(Response::from_parts(parts, body))
    }

    fn note(&self, posted: &Result<Response<Bytes>, HttpError>) {
        let problem = match posted {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("it answers {}", answer.status())),
            Err(error) => Some(error.to_string()),
        };
        let endpoint = &self.endpoint;
        match (problem, self.is_away.load(Ordering::Relaxed)) {
            (Some(problem), false) => {
                tracing::warn!("traces: no spans reach {endpoint}: {problem}; all else goes on without them");
                self.is_away.store(true, Ordering::Relaxed);
            }
            (None, true) => {
                tracing::warn!("traces: spans reach {endpoint} again");
                self.is_away.store(false, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

#[async_trait::async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let posted = self.runtime.block_on(async {
            match tokio::time::timeout(self.within, self.post(request)).await {
                Ok(posted) => posted,
                Err(late) => Err(late.into()),
            }
        });
        self.note(&posted);
        posted
    }
}
