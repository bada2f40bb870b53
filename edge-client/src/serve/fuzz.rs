//! What must hold for anything at all that is said to the endpoint (`../fuzz.rs`).

#[path = "../../../fuzz/exchange.rs"]
mod exchange;

use std::{
    cell::LazyCell,
    net::{IpAddr, Ipv4Addr},
};

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Request},
};
use exchange::exchange;
use tokio::runtime::{Builder, Runtime};

use super::{
    door::{self, Key},
    moderate::INPUTS_MAX,
    requests::{self, ANSWERS_MAX, TextPrompt, Wish},
};
use crate::fuzz::WORDS_MAX;

/// A body is refused shortly, or asks for what can be had.
pub fn request(bytes: &[u8]) {
    let Some((which, body)) = bytes.split_first() else { return };
    let refused = match which % 3 {
        0 => requests::chat(body).map(|asked| {
            assert!(!asked.messages.is_empty());
            check(&asked.wish);
        }),
        1 => requests::text(body).map(|asked| {
            assert!((1..=ANSWERS_MAX).contains(&(asked.prompts.len() * asked.wish.answers)));
            let longest = asked.prompts.iter().map(|prompt| match prompt {
                TextPrompt::Text(text) => text.len(),
                TextPrompt::Tokens(tokens) => tokens.len(),
            });
            assert!(longest.max().unwrap_or(0) <= body.len());
            check(&asked.wish);
        }),
        _ => requests::moderation(body, INPUTS_MAX)
            .map(|(texts, _)| assert!((1..=INPUTS_MAX).contains(&texts.len()))),
    };
    if let Err(refusal) = refused {
        assert!(refusal.status.is_client_error());
        let told = refusal.body_json().to_string();
        assert!(told.len() < WORDS_MAX, "{told}");
    }
}

fn check(wish: &Wish) {
    let options = &wish.options;
    assert!((0.0..=2.0).contains(&options.temperature) && options.top_p > 0.0 && options.top_p <= 1.0);
    assert!((1..=ANSWERS_MAX).contains(&wish.answers) && (1..=1 << 20).contains(&options.max_new_tokens));
    assert!(options.stop.iter().all(|stop| !stop.is_empty()));
    assert!(wish.alternatives.is_none_or(|alternatives| alternatives <= 20));
}

const SECRET: &str = "the tests' key";
const REACHED: &str = "reached";

struct Endpoint {
    runtime: Runtime,
    app: Router,
}

thread_local! {
    static ENDPOINT: LazyCell<Endpoint> = LazyCell::new(|| {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let inner = Router::new().fallback(|request: Request<Body>| async move {
            let [host, key] = ["host", "authorization"].map(|name| request.headers().get(name));
            let told = |value: Option<&HeaderValue>| value.map(|value| value.as_bytes().to_vec()).unwrap_or_default();
            [REACHED.as_bytes(), &told(host), &told(key), b""].join(&b'\n')
        });
        let app = door::guarded(inner, IpAddr::from(Ipv4Addr::LOCALHOST), Some(Key::new(SECRET)));
        Endpoint { runtime, app }
    });
}

/// Whatever comes on a connection, nobody gets past the door but who calls this machine by its own name and knows the key.
pub fn door(bytes: &[u8]) {
    let answer = ENDPOINT.with(|endpoint| exchange(&endpoint.runtime, &endpoint.app, bytes));
    for reached in answer.split(REACHED).skip(1) {
        let mut lines = reached.lines().skip(1);
        let (host, key) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        let name =
            host.rsplit_once(':').filter(|(_, port)| !port.contains(']')).map_or(host, |(name, _)| name);
        let own = ["localhost", "127.0.0.1", "[::1]", "::1"].iter().any(|own| name.eq_ignore_ascii_case(own));
        let loopback =
            name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        assert!(own || loopback, "let in as {host}");
        assert!(key.contains(SECRET), "let in with {key}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::mutate;

    #[test]
    fn request_target() {
        mutate::run("request", 20_000, request);
    }

    #[test]
    fn door_target() {
        mutate::run("door", 5_000, door);
    }
}
