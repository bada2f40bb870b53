//! What a request is told that gets no answer, in OpenAI's form: a message, a type, a code, and the parameter that is to
//! blame. Every other file here makes [`Refusal`]s; `routes.rs` sends them.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

/// Seconds after which a request that found no room may come again.
const RETRY_SECONDS: u64 = 1;

/// Why a request gets no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> Self {
        Self { status, kind, code, param: None, message }
    }

    fn invalid(status: StatusCode, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", code, message.into())
    }

    /// The parameter that is to blame.
    fn of(self, param: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    /// A parameter has a value that it cannot have.
    pub(super) fn value(param: &str, message: impl Into<String>) -> Self {
        Self::invalid(StatusCode::BAD_REQUEST, Some("invalid_value"), message).of(param)
    }

    /// A parameter that would change the answer, and that this endpoint does not have.
    pub(super) fn unsupported(param: &str, expected: &str) -> Self {
        let message = format!("{param} is not supported here: expected {expected}");
        Self::invalid(StatusCode::BAD_REQUEST, Some("unsupported_parameter"), message).of(param)
    }

    /// A parameter that nobody knows.
    pub(super) fn unknown_parameter(param: &str) -> Self {
        let message = format!("unrecognized request argument supplied: {param}");
        Self::invalid(StatusCode::BAD_REQUEST, Some("unknown_parameter"), message).of(param)
    }

    /// A body that is no request.
    pub(super) fn body(message: impl Into<String>) -> Self {
        Self::invalid(StatusCode::BAD_REQUEST, None, message)
    }

    /// A body that is not said to be JSON. A page of another site can send such a one without being asked first.
    pub(super) fn not_json() -> Self {
        let message = "expected the header Content-Type to be application/json";
        Self::invalid(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, message)
    }

    /// A body above the bound.
    pub(super) fn too_large(bytes_max: usize) -> Self {
        let message = format!("request body has more than {bytes_max} bytes");
        Self::invalid(StatusCode::PAYLOAD_TOO_LARGE, Some("request_too_large"), message)
    }

    /// A body that does not come to its end.
    pub(super) fn slow_body() -> Self {
        Self::invalid(StatusCode::REQUEST_TIMEOUT, None, "request body took too long to arrive")
    }

    /// A prompt without room for an answer.
    pub(super) fn too_long(param: &str, got: usize, context: usize) -> Self {
        let message = format!("{param} has {got} tokens, expected fewer than the context of {context}");
        Self::invalid(StatusCode::BAD_REQUEST, Some("context_length_exceeded"), message).of(param)
    }

    /// A model that is not served.
    pub(super) fn no_model(asked: &str, served: &[&str]) -> Self {
        // A name is shown so far as a person reads it.
        let asked: String = asked.chars().take(100).collect();
        let message = format!("the model {asked:?} is not served here, expected {}", served.join(" or "));
        Self::invalid(StatusCode::NOT_FOUND, Some("model_not_found"), message).of("model")
    }

    /// The model with the personal adapter, which is not there any more as it was.
    pub(super) fn personal_gone() -> Self {
        let message = "the personal adapter was forgotten or trained again since this endpoint was started";
        Self::invalid(StatusCode::NOT_FOUND, Some("model_not_found"), message).of("model")
    }

    /// A path that leads nowhere.
    pub(super) fn no_route(method: &str, path: &str) -> Self {
        let path: String = path.chars().take(100).collect();
        let message = format!("unknown request URL: {method} {path}");
        Self::invalid(StatusCode::NOT_FOUND, Some("unknown_url"), message)
    }

    /// Another method than the path has.
    pub(super) fn no_method(method: &str) -> Self {
        let message = format!("not allowed to {method} on this URL");
        Self::invalid(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_supported"), message)
    }

    /// A request under a name that is not this machine's.
    pub(super) fn foreign_host() -> Self {
        let message = "expected the header Host to be localhost or the address listened on";
        Self::invalid(StatusCode::FORBIDDEN, Some("foreign_host"), message)
    }

    /// No key, or another one.
    pub(super) fn no_key() -> Self {
        let message =
            "expected the header Authorization to be Bearer and the key this endpoint was started with";
        Self::invalid(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
    }

    /// The queue is full.
    pub(super) fn busy() -> Self {
        let message = "too many requests wait already; try again later".to_owned();
        Self::new(StatusCode::TOO_MANY_REQUESTS, "requests", Some("rate_limit_exceeded"), message)
    }

    /// The queue did not move.
    pub(super) fn waited(seconds: u64) -> Self {
        let message = format!("no room for this request within {seconds} seconds; try again later");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("overloaded"), message)
    }

    /// Our own failure.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message.into())
    }

    /// `{"error": …}`, also as the last event of a stream that fails.
    pub(super) fn body_json(&self) -> Value {
        let Self { kind, code, param, message, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body_json())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, RETRY_SECONDS.into());
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_has_the_four_fields_that_clients_read() {
        let body = Refusal::unsupported("logit_bias", "none").body_json();
        assert_eq!(
            body,
            json!({"error": {"message": "logit_bias is not supported here: expected none",
                "type": "invalid_request_error", "param": "logit_bias", "code": "unsupported_parameter"}})
        );
        let response = Refusal::busy().into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
    }
}
