//! The paths, and the way of a request: read, checked, judged if the policy says so, batched, answered. Each step is
//! another file's: `requests.rs`, `moderate.rs`, `batch.rs`, `follow.rs`, `answers.rs`.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, Method, Uri, header},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
    routing::{get, post},
};
use commonweal_runtime::{Message, Prompt};
use serde_json::{Value, json};
use tokio::sync::mpsc::{self, Receiver};
use tokio_stream::wrappers::ReceiverStream;

use super::{
    Served,
    answers::{Answer, Form, Kind, Reason},
    batch::{Job, Reply, replies_max},
    follow::{Broken, Sent, failed, follow, send},
    keep,
    moderate::{INPUTS_MAX, since_last_answer},
    refusals::Refusal,
    requests::{self, TextPrompt, Wish},
};
use crate::era::Era;

/// A request's body: some tens of thousands of tokens of any language, far above the context of what runs on a device.
const BODY_BYTES_MAX: usize = 1 << 20;
/// A body must come within this.
const BODY_WAIT: Duration = Duration::from_secs(30);
/// A request that got no place in the batch within this is told to come back.
const PLACE_WAIT: Duration = Duration::from_secs(60);
/// Chunks that wait for a slow reader, beside what the batch has room for.
const CHUNKS_MAX: usize = 64;

type Answered = Result<Response, Refusal>;

pub(super) fn routes(served: Arc<Served>) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(text))
        .route("/v1/moderations", post(moderations))
        .method_not_allowed_fallback(|method: Method| async move { Refusal::no_method(method.as_str()) })
        .fallback(|method: Method, uri: Uri| async move { Refusal::no_route(method.as_str(), uri.path()) })
        .with_state(served)
}

/// What is to be answered: prompts with the texts that the guard would judge, and who asked for what.
struct Asked {
    kind: Kind,
    wish: Wish,
    adapter: usize,
    prompts: Vec<Prompt>,
    texts: Vec<String>,
    /// The conversation and when it was asked for, if its owner agreed that it be kept.
    kept: Option<(Vec<Message>, Era)>,
}

async fn models(State(served): State<Arc<Served>>) -> Json<Value> {
    let models: Vec<Value> = served.names().into_iter().map(entry).collect();
    Json(json!({"object": "list", "data": models}))
}

async fn model(State(served): State<Arc<Served>>, Path(id): Path<String>) -> Answered {
    let voice = &served.voices[served.voice(Some(&id))?];
    Ok(Json(entry(&voice.name)).into_response())
}

fn entry(name: &str) -> Value {
    json!({"id": name, "object": "model", "created": 0, "owned_by": "commonweal"})
}

async fn chat(State(served): State<Arc<Served>>, request: Request) -> Answered {
    let (headers, body) = read(request).await?;
    let requests::ChatWish { messages, wish } = requests::chat(&body)?;
    let prompt = served.model.chat().prompt(&messages);
    let prompt = prompt.map_err(|error| Refusal::value("messages", format!("messages: {error}")))?;
    let texts = vec![since_last_answer(&messages)];
    let agreed = wish.answers == 1 && served.consent.keeps(&headers);
    let adapter = served.voice(wish.model.as_deref())?;
    let kept = agreed.then(|| served.keeping.era_of(&messages)).flatten().map(|era| (messages, era));
    let keeps = kept.is_some();
    let mut response =
        give(&served, Asked { kind: Kind::Chat, wish, adapter, prompts: vec![prompt], texts, kept }).await?;
    response.headers_mut().insert(keep::TOLD, HeaderValue::from_static(if keeps { "yes" } else { "no" }));
    Ok(response)
}

async fn text(State(served): State<Arc<Served>>, request: Request) -> Answered {
    let (_, body) = read(request).await?;
    let requests::TextWish { prompts: asked, wish } = requests::text(&body)?;
    let (mut prompts, mut texts) = (Vec::with_capacity(asked.len()), Vec::with_capacity(asked.len()));
    let tokenizer = served.model.tokenizer();
    let refuse = |error| Refusal::value("prompt", format!("prompt: {error}"));
    for prompt in asked {
        let (ids, text) = match prompt {
            TextPrompt::Text(text) => (tokenizer.encode(&text).map_err(refuse)?, text),
            TextPrompt::Tokens(ids) => {
                let vocab_size = served.model.manifest().model.vocab_size;
                if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
                    let expected = format!("prompt: expected tokens below {vocab_size}, got {id}");
                    return Err(Refusal::value("prompt", expected));
                }
                let text = tokenizer.decode(&ids).map_err(refuse)?;
                (ids, text)
            }
        };
        prompts.push(Prompt::from(ids));
        texts.push(text);
    }
    let adapter = served.voice(wish.model.as_deref())?;
    give(&served, Asked { kind: Kind::Text, wish, adapter, prompts, texts, kept: None }).await
}

async fn moderations(State(served): State<Arc<Served>>, request: Request) -> Answered {
    let (_, body) = read(request).await?;
    let (texts, model) = requests::moderation(&body, INPUTS_MAX)?;
    let name = served.moderator.name().to_owned();
    if let Some(asked) = model.filter(|asked| !served.moderator.is_named(asked)) {
        return Err(Refusal::no_model(&asked, &[&name]));
    }
    let judgements = served.moderator.judge(texts.into_iter().map(|text| (text, None)).collect()).await?;
    let (id, results) = (served.identifier("modr"), served.moderator.results(&judgements));
    Ok(Json(json!({"id": id, "model": name, "results": results})).into_response())
}

/// The body of a request that says it is JSON.
async fn read(request: Request) -> Result<(HeaderMap, Bytes), Refusal> {
    let (parts, body) = request.into_parts();
    let kind =
        parts.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Refusal::not_json());
    }
    match tokio::time::timeout(BODY_WAIT, axum::body::to_bytes(body, BODY_BYTES_MAX)).await {
        Ok(Ok(body)) => Ok((parts.headers, body)),
        Ok(Err(_)) => Err(Refusal::too_large(BODY_BYTES_MAX)),
        Err(_) => Err(Refusal::slow_body()),
    }
}

/// Gives what was asked for, whole or in pieces.
async fn give(served: &Arc<Served>, asked: Asked) -> Answered {
    let prompt_tokens = asked.prompts.iter().map(|prompt| prompt.ids.len()).sum();
    check_lengths(served, &asked)?;
    let form = served.form(&asked);
    if let Some(refused) = before(served, &asked).await? {
        return Ok(give_whole(&form, &refused, prompt_tokens, asked.wish.stream));
    }
    let (replies, answers) = ask(served, &asked).await?;
    let with_tokens = asked.wish.alternatives.is_some();
    if !asked.wish.stream {
        let answers = served.allowed(asked.adapter, async {
            let answers = follow(&form, replies, answers, with_tokens, None).await;
            let answers = answers.map_err(|broken| match broken {
                Broken::Refused(refusal) => refusal,
                Broken::Gone => Refusal::failed("nobody reads the answer"),
            })?;
            finish(served, &asked, answers).await
        });
        let answers = answers.await?;
        return Ok(Json(form.whole(&answers, prompt_tokens)).into_response());
    }
    let (events, stream) = mpsc::channel::<Sent>(CHUNKS_MAX);
    let served = Arc::clone(served);
    tokio::spawn(async move {
        // What the guard has not seen yet does not go out.
        let at_once = (!served.guards_answers()).then_some(&events);
        let sent = served.allowed(asked.adapter, async {
            let followed = tokio::select! {
                followed = follow(&form, replies, answers, with_tokens, at_once) => followed,
                () = events.closed() => Err(Broken::Gone),
            };
            let answers = finish(&served, &asked, followed?).await?;
            if at_once.is_none() {
                send_whole(&form, &answers, &events).await?;
            }
            let answer_tokens = answers.iter().map(|answer| answer.length).sum();
            if let Some(usage) = form.usage(prompt_tokens, answer_tokens) {
                send(&events, &usage).await?;
            }
            let _ = events.send(Ok(Event::default().data("[DONE]"))).await;
            Ok(())
        });
        if let Err(Broken::Refused(refusal)) = sent.await {
            let _ = send(&events, &refusal.body_json()).await;
        }
    });
    Ok(Sse::new(ReceiverStream::new(stream)).keep_alive(KeepAlive::default()).into_response())
}

fn check_lengths(served: &Served, asked: &Asked) -> Result<(), Refusal> {
    let (context, param) =
        (served.model.context(), if asked.kind == Kind::Chat { "messages" } else { "prompt" });
    for length in asked.prompts.iter().map(|prompt| prompt.ids.len()) {
        if length >= context {
            return Err(Refusal::too_long(param, length, context));
        }
        if length == 0 {
            return Err(Refusal::value(param, format!("{param}: expected at least 1 token")));
        }
    }
    Ok(())
}

/// Puts the prompts in the queue, and waits for the first one's turn.
async fn ask(served: &Served, asked: &Asked) -> Result<(Receiver<Reply>, usize), Refusal> {
    let Asked { wish, prompts, adapter, .. } = asked;
    let answers = prompts.len() * wish.answers;
    let mut options = wish.options.clone();
    options.seed = wish.seed.unwrap_or_else(rand::random);
    // An answer is at most as long as what the context leaves.
    options.max_new_tokens = options.max_new_tokens.min(served.model.context());
    let (sender, mut replies) = mpsc::channel(prompts.len() * replies_max(&options, wish.answers));
    let job = |(prompt, first): (&Prompt, usize)| Job {
        adapter: *adapter,
        prompt: prompt.clone(),
        options: options.clone(),
        answers: wish.answers,
        alternatives: wish.alternatives,
        first,
        replies: sender.clone(),
    };
    // All find a place, or none does.
    let places = served.jobs.try_reserve_many(prompts.len()).map_err(|_| Refusal::busy())?;
    for (place, asked) in places.zip(prompts.iter().zip((0..).step_by(wish.answers))) {
        place.send(job(asked));
    }
    drop(sender);
    match tokio::time::timeout(PLACE_WAIT, replies.recv()).await {
        Ok(Some(Reply::Failed(error))) => Err(failed(&error)),
        Ok(Some(_)) => Ok((replies, answers)),
        Ok(None) => Err(Refusal::failed("the endpoint ends")),
        Err(_) => Err(Refusal::waited(PLACE_WAIT.as_secs())),
    }
}

/// The guard in front: refusals, if it finds any of the prompts unsafe.
async fn before(served: &Served, asked: &Asked) -> Result<Option<Vec<Answer>>, Refusal> {
    if !served.guards_answers() {
        return Ok(None);
    }
    let judgements =
        served.moderator.judge(asked.texts.iter().map(|text| (text.clone(), None)).collect()).await?;
    let Some(worst) = judgements.iter().find(|judgement| judgement.is_unsafe) else { return Ok(None) };
    let text = served.moderator.refusal(worst.category.as_ref());
    let refused = Answer { text, reason: Some(Reason::Filtered), ..Answer::default() };
    Ok(Some(vec![refused; asked.prompts.len() * asked.wish.answers]))
}

/// The guard behind, and the owner's consent to keep what was said.
async fn finish(
    served: &Arc<Served>,
    asked: &Asked,
    mut answers: Vec<Answer>,
) -> Result<Vec<Answer>, Refusal> {
    if served.guards_answers() {
        let judged = answers.iter().zip((0..).map(|number| number / asked.wish.answers));
        let judged = judged.map(|(answer, prompt)| (asked.texts[prompt].clone(), Some(answer.text.clone())));
        let judgements = served.moderator.judge(judged.collect()).await?;
        for (answer, judgement) in
            answers.iter_mut().zip(judgements).filter(|(_, judgement)| judgement.is_unsafe)
        {
            answer.text = served.moderator.refusal(judgement.category.as_ref());
            answer.tokens = None;
            answer.reason = Some(Reason::Filtered);
        }
    }
    if let (Some((messages, era)), [answer]) = (&asked.kept, answers.as_slice())
        && matches!(answer.reason, Some(Reason::Stop(_)))
    {
        served.keeping.hear(messages, &answer.text, *era);
    }
    Ok(answers)
}

fn give_whole(form: &Form, answers: &[Answer], prompt_tokens: usize, stream: bool) -> Response {
    if !stream {
        return Json(form.whole(answers, prompt_tokens)).into_response();
    }
    let event = |chunk: Value| Ok::<_, std::convert::Infallible>(Event::default().data(chunk.to_string()));
    let chunks = answers.iter().enumerate().flat_map(|(index, answer)| chunks(form, index, answer));
    let mut events: Vec<Sent> = chunks.chain(form.usage(prompt_tokens, 0)).map(event).collect();
    events.push(Ok(Event::default().data("[DONE]")));
    Sse::new(tokio_stream::iter(events)).into_response()
}

async fn send_whole(form: &Form, answers: &[Answer], events: &mpsc::Sender<Sent>) -> Result<(), Broken> {
    for (index, answer) in answers.iter().enumerate() {
        for chunk in chunks(form, index, answer) {
            send(events, &chunk).await?;
        }
    }
    Ok(())
}

/// A whole answer as a stream has it.
fn chunks(form: &Form, index: usize, answer: &Answer) -> Vec<Value> {
    let text = form.goes_on(index, &answer.text, answer.tokens.as_deref(), 0);
    let end = answer.reason.map(|reason| form.ends(index, reason));
    form.begins(index).into_iter().chain([text]).chain(end).collect()
}

impl Served {
    fn form(&self, asked: &Asked) -> Form {
        let prefix = if asked.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        Form {
            kind: asked.kind,
            id: self.identifier(prefix),
            created: super::unix_seconds(),
            model: self.voices[asked.adapter].name.clone(),
            fingerprint: self.fingerprint.clone(),
            include_usage: asked.wish.include_usage,
        }
    }
}
