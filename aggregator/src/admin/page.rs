//! The dashboard: one page, its script and its style, all in the program. They hold no data; the script asks
//! `interface.rs` for it with the token that the operator gives.

use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;

use super::routes::Served;

/// What the page may load: its own files, from here. Nothing may frame it, and it can send nothing elsewhere.
pub(super) const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                                 img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) fn routes() -> Router<Served> {
    Router::new()
        .route("/", get(|| async { file("text/html; charset=utf-8", include_str!("page/dashboard.html")) }))
        .route(
            "/dashboard.js",
            get(|| async { file("text/javascript; charset=utf-8", include_str!("page/dashboard.js")) }),
        )
        .route(
            "/dashboard.css",
            get(|| async { file("text/css; charset=utf-8", include_str!("page/dashboard.css")) }),
        )
}

fn file(media_type: &'static str, text: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, media_type)], text)
}
