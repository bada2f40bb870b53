//! `serve`: an OpenAI-compatible endpoint for the installed model, on this machine. What is said here is answered and
//! forgotten: chats become samples only by `add`. A page that a browser shows may have its name point here (DNS
//! rebinding); requests under a name that is not this machine's are refused.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use axum::{
    Json, Router,
    extract::{Request, State, rejection::JsonRejection},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response, Sse, sse::Event},
    routing::{get, post},
};
use commonweal_runtime::{Cancel, GenerateOptions, Message, Model, PreparedAdapter, StopReason};
use commonweal_safety::{Guard, Pair};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use super::{Shared, identity::Identity, open};
use crate::{
    events,
    install::{self, Expected},
};

/// Requests that wait for the model at once; further ones are told to come back.
const WAITING_MAX: usize = 16;
/// How often a signal to stop is looked for.
const STOP_LOOK: Duration = Duration::from_millis(100);
/// Texts of one moderation request.
const INPUTS_MAX: usize = 64;
/// Pieces of an answer that a slow reader may leave unread before generation waits for it.
const PIECES_MAX: usize = 256;

struct Served {
    model: Model,
    guard: Guard,
    adapter: PreparedAdapter,
    name: String,
    places: Arc<Semaphore>,
}

#[derive(Deserialize)]
struct ChatRequest {
    messages: Vec<Message>,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    temperature: Option<f32>,
    #[serde(default)]
    top_p: Option<f32>,
    #[serde(default, alias = "max_completion_tokens")]
    max_tokens: Option<usize>,
    #[serde(default)]
    seed: Option<u64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Inputs {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct ModerationRequest {
    input: Inputs,
}

pub(super) fn serve(shared: &Shared, listen: SocketAddr) -> Result<()> {
    let place = open::Place::find(shared)?;
    let cancel = Cancel::new();
    let stages = open::Stages::open(shared, &place, &place.policy(shared)?, &cancel)?;
    let store = place.look()?;
    let installed = match Identity::read(&store)? {
        None => None,
        Some(Identity { credentials, .. }) => {
            let expected =
                Expected { key: *credentials.signing_key(), base: stages.base(), layout: stages.layout() };
            install::installed(&store, &expected)?
        }
    };
    let adapter = stages.model.prepare(installed.as_ref().map(|installed| &installed.adapter))?;
    let release = installed.map_or("base".to_owned(), |installed| format!("release-{}", installed.version.0));
    let name = format!("{}/{release}", stages.model.manifest().model.name);
    let served = Served {
        model: stages.model,
        guard: stages.guard,
        adapter,
        name,
        places: Arc::new(Semaphore::new(WAITING_MAX)),
    };
    let app = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/moderations", post(moderate))
        .with_state(Arc::new(served));
    let app = for_this_host_only(app, listen.ip());
    let runtime = tokio::runtime::Runtime::new().context("cannot start")?;
    let output = shared.output();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen on {listen}"))?;
        output.show(&events::Event::Serving { url: format!("http://{}/v1", listener.local_addr()?) });
        let stopped = open::stop_on_signal(&tokio::runtime::Handle::current());
        let stop = async move {
            while !stopped.is_cancelled() {
                tokio::time::sleep(STOP_LOOK).await;
            }
        };
        axum::serve(listener, app).with_graceful_shutdown(stop).await.context("the endpoint failed")
    })
}

/// Answers only what was asked of this machine by a name that nobody else can give out.
fn for_this_host_only(app: Router, listen: IpAddr) -> Router {
    app.layer(middleware::from_fn(move |request: Request, next: Next| async move {
        let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        if host.is_some_and(|host| is_this_host(host, listen)) {
            return next.run(request).await;
        }
        refuse(StatusCode::FORBIDDEN, "expected the header Host to be localhost or the address listened on")
    }))
}

/// Whether a `Host` is a name of the loopback or the address listened on. When that is every address of the machine, any
/// will do: an address, unlike a name, cannot be made to point elsewhere.
fn is_this_host(host: &str, listen: IpAddr) -> bool {
    let port_cut = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let name = port_cut.map_or(host, |(name, _)| name);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    match address.parse::<IpAddr>() {
        Ok(address) => address.is_loopback() || address == listen || listen.is_unspecified(),
        Err(_) => name.eq_ignore_ascii_case("localhost"),
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn error_body(message: impl Into<String>) -> Value {
    json!({"error": {"message": message.into(), "type": "invalid_request_error"}})
}

fn refuse(status: StatusCode, message: impl Into<String>) -> Response {
    (status, Json(error_body(message))).into_response()
}

fn refuse_busy() -> Response {
    refuse(StatusCode::TOO_MANY_REQUESTS, "too many requests at once")
}

/// A body that is no request, in the form that clients of such an endpoint read.
fn refuse_body(rejection: &JsonRejection) -> Response {
    refuse(rejection.status(), rejection.body_text())
}

async fn models(State(served): State<Arc<Served>>) -> Json<Value> {
    let model = json!({"id": served.name, "object": "model", "created": 0, "owned_by": "commonweal"});
    Json(json!({"object": "list", "data": [model]}))
}

pub(super) fn finish_reason(stop: StopReason) -> &'static str {
    match stop {
        StopReason::EndToken | StopReason::StopText => "stop",
        StopReason::Length | StopReason::Context => "length",
    }
}

/// What a streamed answer consists of.
enum Piece {
    Text(String),
    End(&'static str),
    Failed(String),
}

async fn chat(
    State(served): State<Arc<Served>>,
    request: Result<Json<ChatRequest>, JsonRejection>,
) -> Response {
    let Json(request) = match request {
        Ok(request) => request,
        Err(rejection) => return refuse_body(&rejection),
    };
    let prompt = match served.model.chat().prompt(&request.messages) {
        Ok(prompt) if prompt.ids.len() < served.model.context() => prompt,
        Ok(prompt) => {
            let (got, context) = (prompt.ids.len(), served.model.context());
            let text = format!("conversation has {got} tokens, expected fewer than {context}");
            return refuse(StatusCode::BAD_REQUEST, text);
        }
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error.to_string()),
    };
    let options = GenerateOptions {
        max_new_tokens: request.max_tokens.unwrap_or(256).max(1),
        temperature: request.temperature.unwrap_or(0.7),
        top_p: request.top_p.unwrap_or(1.0),
        stop: Vec::new(),
        seed: request.seed.unwrap_or_else(unix_seconds),
        ..GenerateOptions::default()
    };
    let Ok(waiting) = Arc::clone(&served.places).try_acquire_owned() else { return refuse_busy() };
    let prompt_tokens = prompt.ids.len();
    let (pieces, receiver) = mpsc::channel::<Piece>(PIECES_MAX);
    let worker = Arc::clone(&served);
    let streaming = request.stream;
    let task = tokio::task::spawn_blocking(move || {
        let _waiting = waiting;
        let cancel = Cancel::new();
        let stop = cancel.clone();
        let mut on_text = |_: usize, piece: &str| {
            // A reader who went away needs no more words.
            if streaming && pieces.blocking_send(Piece::Text(piece.to_owned())).is_err() {
                stop.cancel();
            }
        };
        let answers = worker.model.generate_streaming(
            &worker.adapter,
            None,
            &[prompt],
            &options,
            &mut on_text,
            &cancel,
        );
        if streaming {
            let end = answers.as_ref().map(|answers| answers.first().map(|answer| answer.stop));
            // Nobody is there to be told if this does not arrive.
            let _ = pieces.blocking_send(match end {
                Ok(stop) => Piece::End(stop.map_or("stop", finish_reason)),
                Err(error) => Piece::Failed(error.to_string()),
            });
        }
        answers
    });
    let (id, created) = (format!("chatcmpl-{}", unix_seconds()), unix_seconds());
    let name = served.name.clone();
    if streaming {
        let chunk = move |delta: Value, finish: Value| {
            let choice = json!({"index": 0, "delta": delta, "finish_reason": finish});
            json!({"id": id, "object": "chat.completion.chunk", "created": created, "model": name,
                "choices": [choice]})
        };
        let event = |body: Value| Ok::<_, Infallible>(Event::default().data(body.to_string()));
        let stream = ReceiverStream::new(receiver).map(move |piece| match piece {
            Piece::Text(text) => event(chunk(json!({"content": text}), Value::Null)),
            Piece::End(reason) => event(chunk(json!({}), json!(reason))),
            Piece::Failed(message) => event(error_body(message)),
        });
        let stream = stream.chain(tokio_stream::once(Ok(Event::default().data("[DONE]"))));
        return Sse::new(stream).into_response();
    }
    match task.await {
        Ok(Ok(answers)) => {
            let Some(answer) = answers.into_iter().next() else {
                return refuse(StatusCode::INTERNAL_SERVER_ERROR, "no answer");
            };
            let completion_tokens = answer.tokens.len();
            Json(json!({
                "id": id, "object": "chat.completion", "created": created, "model": name,
                "choices": [{"index": 0, "message": {"role": "assistant", "content": answer.text},
                    "finish_reason": finish_reason(answer.stop)}],
                "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
                    "total_tokens": prompt_tokens + completion_tokens},
            }))
            .into_response()
        }
        Ok(Err(error)) => refuse(StatusCode::BAD_REQUEST, error.to_string()),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "generation failed"),
    }
}

async fn moderate(
    State(served): State<Arc<Served>>,
    request: Result<Json<ModerationRequest>, JsonRejection>,
) -> Response {
    let Json(request) = match request {
        Ok(request) => request,
        Err(rejection) => return refuse_body(&rejection),
    };
    let inputs = match request.input {
        Inputs::One(text) => vec![text],
        Inputs::Many(texts) => texts,
    };
    if inputs.len() > INPUTS_MAX {
        return refuse(StatusCode::BAD_REQUEST, format!("expected at most {INPUTS_MAX} inputs"));
    }
    let Ok(waiting) = Arc::clone(&served.places).try_acquire_owned() else { return refuse_busy() };
    let name = served.name.clone();
    let judged = tokio::task::spawn_blocking(move || {
        let _waiting = waiting;
        let pairs: Vec<Pair<'_>> = inputs.iter().map(|text| Pair { prompt: text, response: None }).collect();
        served.guard.judge(&pairs, &Cancel::new())
    });
    match judged.await {
        Ok(Ok(judgements)) => {
            let results: Vec<Value> = judgements
                .into_iter()
                .map(|judgement| {
                    let category = judgement.category.map_or("unsafe".to_owned(), |id| id.to_string());
                    json!({"flagged": judgement.is_unsafe,
                        "categories": {category.clone(): judgement.is_unsafe},
                        "category_scores": {category: judgement.probability}})
                })
                .collect();
            Json(json!({"id": "modr-0", "model": name, "results": results})).into_response()
        }
        Ok(Err(error)) => refuse(StatusCode::BAD_REQUEST, error.to_string()),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "the guard failed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    #[test]
    fn names_of_this_machine_are_told_from_others() {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.0.0.1", "[::1]:8080", "[::1]"] {
            assert!(is_this_host(host, loopback), "{host}");
        }
        for host in [
            "",
            "attacker.example",
            "attacker.example:8080",
            "localhost.attacker.example",
            "127.0.0.1.attacker.example",
            "localhost@attacker.example",
            "192.168.1.7:8080",
            "0.0.0.0",
            "[::1].attacker.example",
            "local host",
        ] {
            assert!(!is_this_host(host, loopback), "{host}");
        }
        let own = IpAddr::from([192, 168, 1, 7]);
        assert!(is_this_host("192.168.1.7:8080", own) && !is_this_host("192.168.1.8:8080", own));
        for all in [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)] {
            assert!(is_this_host("192.168.1.7:8080", all) && is_this_host("[2001:db8::7]", all));
            assert!(!is_this_host("attacker.example", all));
        }
    }

    #[tokio::test]
    async fn a_request_under_anothers_name_is_refused() {
        let app = Router::new().route("/v1/models", get(|| async { "answered" }));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(axum::serve(listener, for_this_host_only(app, address.ip())).into_future());
        for (host, is_answered) in [
            (format!("Host: {address}\r\n"), true),
            ("Host: localhost:1\r\n".to_owned(), true),
            (format!("Host: attacker.example:{}\r\n", address.port()), false),
            (String::new(), false),
        ] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!("GET /v1/models HTTP/1.1\r\n{host}Connection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut response = String::new();
            stream.read_to_string(&mut response).await.unwrap();
            let status = if is_answered { "HTTP/1.1 200" } else { "HTTP/1.1 403" };
            assert!(response.starts_with(status), "{host:?}: {response}");
            assert_eq!(response.contains("answered"), is_answered, "{host:?}");
        }
    }
}
