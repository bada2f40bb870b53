//! `/api/v1`: what the dashboard shows, as JSON. Fields are those of `observe`'s types; docs/operations.md lists the
//! requests. Routed by `routes.rs`, behind the door.

use axum::Json;
use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use commonweal_protocol::DeviceId;
use serde::{Deserialize, Serialize};

use super::routes::Served;
use crate::observe::{ObserveError, Observer};

/// Rows of a page if nothing is said.
const ROWS: usize = 50;

pub(super) fn routes() -> Router<Served> {
    Router::new()
        .route("/api/v1/standing", get(standing))
        .route("/api/v1/rounds", get(rounds))
        .route("/api/v1/releases", get(releases))
        .route("/api/v1/trials", get(trials))
        .route("/api/v1/devices", get(devices))
        .route("/api/v1/events", get(events))
}

/// Newest first: those before `before`.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Newest {
    before: Option<u64>,
    limit: usize,
}

impl Default for Newest {
    fn default() -> Self {
        Self { before: None, limit: ROWS }
    }
}

/// By name: those after `after`.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Named {
    after: Option<String>,
    limit: usize,
}

impl Default for Named {
    fn default() -> Self {
        Self { after: None, limit: ROWS }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Since {
    after: u64,
}

async fn answer<T: Serialize + Send + 'static>(
    served: Served,
    look: impl FnOnce(&Observer) -> Result<T, ObserveError> + Send + 'static,
) -> Response {
    match served.look(look).await {
        Ok(value) => Json(value).into_response(),
        Err(failure) => failure,
    }
}

async fn standing(State(served): State<Served>) -> Response {
    answer(served, Observer::standing).await
}

async fn rounds(State(served): State<Served>, Query(page): Query<Newest>) -> Response {
    answer(served, move |observer| observer.rounds(page.before, page.limit)).await
}

async fn releases(State(served): State<Served>, Query(page): Query<Newest>) -> Response {
    answer(served, move |observer| observer.releases(page.before, page.limit)).await
}

async fn trials(State(served): State<Served>) -> Response {
    answer(served, Observer::trials).await
}

async fn devices(State(served): State<Served>, Query(page): Query<Named>) -> Response {
    let after = match page.after.map(|name| name.parse::<DeviceId>()).transpose() {
        Ok(after) => after,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("after: {error}\n")).into_response(),
    };
    answer(served, move |observer| observer.devices(after, page.limit)).await
}

async fn events(State(served): State<Served>, Query(since): Query<Since>) -> Response {
    answer(served, move |observer| Ok(observer.recent(since.after))).await
}
