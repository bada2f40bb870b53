//! What can be asked, and the answers. Between `listen.rs` and `observe`.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Router, middleware};
use tokio::sync::Semaphore;

use super::{Admin, door, interface, page};
use crate::observe::{METRICS_TYPE, ObserveError, Observer};
use crate::receive::chain;

/// Looks at the stores at once: one, for a look reads every device's record. Whoever asks meanwhile waits.
const LOOKS_MAX: usize = 1;

/// Waits so long for the stores before it says that they do not answer.
const READY_PATIENCE: Duration = Duration::from_secs(5);

/// What every request sees.
#[derive(Clone)]
pub(super) struct Served {
    observer: Arc<Observer>,
    looks: Arc<Semaphore>,
}

/// All routes.
pub(super) fn routes(admin: Admin) -> Router {
    let Admin { observer, token, metrics_token } = admin;
    let served = Served { observer, looks: Arc::new(Semaphore::new(LOOKS_MAX)) };
    let guard = || middleware::from_fn_with_state(token.clone(), door::guard);
    let metrics = Router::new().route("/metrics", get(metrics));
    let metrics = if metrics_token { metrics.route_layer(guard()) } else { metrics };
    Router::new()
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .merge(metrics)
        .merge(page::routes())
        .merge(interface::routes().route_layer(guard()))
        .fallback(|| async { (StatusCode::NOT_FOUND, "there is nothing here\n") })
        .layer(middleware::map_response(harden))
        .with_state(served)
}

/// Headers of every answer: nobody keeps it, and no page frames or guesses at it.
async fn harden(mut response: Response) -> Response {
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, page::POLICY),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

async fn ready(State(served): State<Served>) -> Response {
    // Behind no other look: what they wait for may be what is wrong.
    let looked = tokio::task::spawn_blocking(move || served.observer.obstacles());
    let obstacles = match tokio::time::timeout(READY_PATIENCE, looked).await {
        Ok(Ok(obstacles)) => obstacles,
        Ok(Err(error)) => vec![error.to_string()],
        Err(_) => vec!["the store does not answer".to_owned()],
    };
    if obstacles.is_empty() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, obstacles.join("\n") + "\n").into_response()
}

async fn metrics(State(served): State<Served>) -> Response {
    match served.look(Observer::metrics).await {
        Ok(text) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(failure) => failure,
    }
}

impl Served {
    /// Looks on a thread that may block, one look at a time.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Observer) -> Result<T, ObserveError> + Send + 'static,
    ) -> Result<T, Response> {
        let failed = |reason: String| {
            tracing::warn!("the admin port cannot answer: {reason}");
            (StatusCode::INTERNAL_SERVER_ERROR, format!("{reason}\n")).into_response()
        };
        let place =
            Arc::clone(&self.looks).acquire_owned().await.map_err(|error| failed(error.to_string()))?;
        let observer = Arc::clone(&self.observer);
        let looked = tokio::task::spawn_blocking(move || {
            let _place = place;
            look(&observer)
        });
        match looked.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(failed(chain(&error))),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}
