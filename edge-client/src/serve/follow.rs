//! Follows the answers to one request, reply by reply (`batch.rs`), until all are whole; on the way each piece may go out
//! as an event. `routes.rs` begins it.

use std::convert::Infallible;

use axum::response::sse::Event;
use commonweal_runtime::{InferError, Spoken};
use tokio::sync::mpsc::{Receiver, Sender};

use super::{
    answers::{Answer, Form, Reason},
    batch::Reply,
    refusals::Refusal,
};

/// An event on its way to a client.
pub(super) type Sent = Result<Event, Infallible>;

/// Why there are no whole answers.
#[derive(Debug)]
pub(super) enum Broken {
    /// Nobody reads any more.
    Gone,
    /// The client is to be told.
    Refused(Refusal),
}

impl From<Refusal> for Broken {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// One request's answers, growing.
struct Growing<'a> {
    form: &'a Form,
    events: Option<&'a Sender<Sent>>,
    answers: Vec<Answer>,
    /// Characters of each that went out.
    sent: Vec<usize>,
    /// Text whose token has not come yet.
    pending: Vec<String>,
    /// Whether text waits for the token behind it.
    with_tokens: bool,
}

/// Reads replies until all answers are whole. Dropping `replies` early tells the batch that nobody waits.
pub(super) async fn follow(
    form: &Form,
    mut replies: Receiver<Reply>,
    answers: usize,
    with_tokens: bool,
    events: Option<&Sender<Sent>>,
) -> Result<Vec<Answer>, Broken> {
    let answer = Answer { tokens: with_tokens.then(Vec::new), ..Answer::default() };
    let (sent, pending) = (vec![0; answers], vec![String::new(); answers]);
    let mut growing = Growing { form, events, answers: vec![answer; answers], sent, pending, with_tokens };
    for index in 0..answers {
        growing.send(form.begins(index)).await?;
    }
    let mut left = answers;
    while left > 0 {
        let reply = match events {
            Some(events) => tokio::select! {
                reply = replies.recv() => reply,
                () = events.closed() => return Err(Broken::Gone),
            },
            None => replies.recv().await,
        };
        match reply {
            Some(Reply::Begun) => {}
            Some(Reply::Text { answer, text }) => growing.text(answer, &text).await?,
            Some(Reply::Token { answer, token }) => growing.token(answer, token).await?,
            Some(Reply::Ended { answer, generated }) => {
                let growing_answer = &mut growing.answers[answer];
                growing_answer.length = generated.tokens.len();
                growing_answer.reason = Some(Reason::Stop(generated.stop));
                growing.end(answer, Reason::Stop(generated.stop)).await?;
                left -= 1;
            }
            Some(Reply::Failed(error)) => return Err(Broken::Refused(failed(&error))),
            Some(Reply::Lost) | None => return Err(Broken::Refused(Refusal::failed("the answer was lost"))),
        }
    }
    Ok(growing.answers)
}

/// What a failure of the network is to a client.
pub(super) fn failed(error: &InferError) -> Refusal {
    Refusal::failed(format!("no answer: {error}"))
}

impl Growing<'_> {
    async fn text(&mut self, answer: usize, text: &str) -> Result<(), Broken> {
        self.answers[answer].text.push_str(text);
        self.pending[answer].push_str(text);
        if self.with_tokens { Ok(()) } else { self.flush(answer, None).await }
    }

    async fn token(&mut self, answer: usize, token: Spoken) -> Result<(), Broken> {
        if let Some(tokens) = &mut self.answers[answer].tokens {
            tokens.push(token.clone());
        }
        self.flush(answer, Some(token)).await
    }

    async fn end(&mut self, answer: usize, reason: Reason) -> Result<(), Broken> {
        if !self.pending[answer].is_empty() {
            self.flush(answer, None).await?;
        }
        self.send(Some(self.form.ends(answer, reason))).await
    }

    async fn flush(&mut self, answer: usize, token: Option<Spoken>) -> Result<(), Broken> {
        let text = std::mem::take(&mut self.pending[answer]);
        let tokens = self.with_tokens.then(|| token.into_iter().collect::<Vec<_>>());
        let chunk = self.form.goes_on(answer, &text, tokens.as_deref(), self.sent[answer]);
        self.sent[answer] += text.chars().count();
        self.send(Some(chunk)).await
    }

    async fn send(&self, chunk: Option<serde_json::Value>) -> Result<(), Broken> {
        match (self.events, chunk) {
            (Some(events), Some(chunk)) => send(events, &chunk).await,
            _ => Ok(()),
        }
    }
}

/// Sends one chunk.
pub(super) async fn send(events: &Sender<Sent>, chunk: &serde_json::Value) -> Result<(), Broken> {
    events.send(Ok(Event::default().data(chunk.to_string()))).await.map_err(|_| Broken::Gone)
}
