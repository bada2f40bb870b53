//! HTTP for the object store: hyper over rustls. The `object_store` crate signs, retries and reads; this only carries.

use std::time::Duration;

use async_trait::async_trait;
use http_body_util::BodyExt as _;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector as Connector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::ClientOptions;
use object_store::client::{
    ClientConfigKey, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
    HttpResponse, HttpResponseBody, HttpService,
};

const CONNECT: Duration = Duration::from_secs(5);
/// How long the answer's head may take; a body is bounded by the whole call.
const ANSWER: Duration = Duration::from_secs(30);
const IDLE: Duration = Duration::from_secs(60);

/// Makes clients that trust these authorities.
#[derive(Clone, Debug)]
pub(super) struct Carrier {
    pub(super) tls: rustls::ClientConfig,
}

impl HttpConnector for Carrier {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        // In clear to an endpoint of this machine, and to where a machine learns its role.
        let is_clear = options.get_config_value(&ClientConfigKey::AllowHttp).as_deref() == Some("true");
        let mut connector = Connector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT));
        let builder = HttpsConnectorBuilder::new().with_tls_config(self.tls.clone());
        let builder = if is_clear { builder.https_or_http() } else { builder.https_only() };
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .build(builder.enable_http1().wrap_connector(connector));
        Ok(HttpClient::new(Carried { client }))
    }
}

#[derive(Debug)]
struct Carried {
    client: Client<HttpsConnector<Connector>, HttpRequestBody>,
}

#[async_trait]
impl HttpService for Carried {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answered = tokio::time::timeout(ANSWER, self.client.request(request)).await;
        let answer = answered.map_err(|late| HttpError::new(HttpErrorKind::Timeout, late))?;
        let answer = answer.map_err(|error| {
            let kind = if error.is_connect() { HttpErrorKind::Connect } else { HttpErrorKind::Request };
            HttpError::new(kind, error)
        })?;
        Ok(answer.map(|body| {
            HttpResponseBody::new(body.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error)))
        }))
    }
}
