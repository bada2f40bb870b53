//! The guard, asked by clients (`/v1/moderations`) and put in front of answers and behind them (`[serve] guard`).
//! `routes.rs` calls it; it judges as the filter stage does, with the owner's thresholds.

use std::sync::Arc;

use commonweal_runtime::{Cancel, Message, Role};
use commonweal_safety::{CategoryId, Constitution, Guard, GuardError, Judgement, Pair};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;

use super::refusals::Refusal;

/// Texts of one request.
pub(super) const INPUTS_MAX: usize = 64;
/// Requests that wait for the guard; a further one is told to come back.
const WAITING_MAX: usize = 16;
/// OpenAI's names of its guard, which clients send unasked.
const ALIASES: [&str; 2] = ["omni-moderation-latest", "text-moderation-latest"];

/// The guard, and what is answered in the place of what it finds.
#[derive(Debug)]
pub(super) struct Moderator {
    guard: Arc<Guard>,
    constitution: Constitution,
    places: Arc<Semaphore>,
}

/// A text, or a text and what was answered to it.
pub(super) type Judged = (String, Option<String>);

impl Moderator {
    pub(super) fn new(guard: Guard, constitution: Constitution) -> Self {
        Self { guard: Arc::new(guard), constitution, places: Arc::new(Semaphore::new(WAITING_MAX)) }
    }

    /// The guard's name: the model of `/v1/moderations`.
    pub(super) fn name(&self) -> &str {
        &self.guard.config().name
    }

    /// Whether a request means the guard by this name.
    pub(super) fn is_named(&self, name: &str) -> bool {
        name == self.name() || ALIASES.contains(&name)
    }

    /// What is answered instead of something of a category.
    pub(super) fn refusal(&self, category: Option<&CategoryId>) -> String {
        self.constitution.refusal_for(category).to_owned()
    }

    /// The guard's judgement of each, on a thread where it may take its time. Dropped by its caller, it stops.
    pub(super) async fn judge(&self, texts: Vec<Judged>) -> Result<Vec<Judgement>, Refusal> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| Refusal::busy())?;
        let (guard, cancel) = (Arc::clone(&self.guard), Cancel::new());
        let _stops_when_dropped = Stop(cancel.clone());
        let judged = tokio::task::spawn_blocking(move || {
            let _place = place;
            let texts = texts.iter();
            let pairs: Vec<Pair<'_>> =
                texts.map(|(prompt, response)| Pair { prompt, response: response.as_deref() }).collect();
            guard.judge(&pairs, &cancel)
        });
        match judged.await {
            Ok(Ok(judgements)) => Ok(judgements),
            Ok(Err(error)) => Err(refusal(&error)),
            Err(_) => Err(Refusal::failed("the guard failed")),
        }
    }

    /// `/v1/moderations`: of each text, whether it is flagged, and for which of the guard's categories. The guard names
    /// the most probable one only; the probability is that one's score, and those of the others are 0.
    pub(super) fn results(&self, judgements: &[Judgement]) -> Value {
        let result = |judgement: &Judgement| {
            let (mut categories, mut scores) = (Map::new(), Map::new());
            for category in &self.guard.config().categories {
                let is_it = judgement.category.as_ref() == Some(&category.id);
                categories.insert(category.id.to_string(), json!(is_it && judgement.is_unsafe));
                scores
                    .insert(category.id.to_string(), json!(if is_it { judgement.probability } else { 0.0 }));
            }
            // What is unsafe in no way that the guard has a name for.
            let unnamed = judgement.category.is_none();
            categories.insert("unsafe".into(), json!(unnamed && judgement.is_unsafe));
            scores.insert("unsafe".into(), json!(if unnamed { judgement.probability } else { 0.0 }));
            json!({"flagged": judgement.is_unsafe, "categories": categories, "category_scores": scores})
        };
        judgements.iter().map(result).collect()
    }
}

struct Stop(Cancel);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// One text's own fault is the client's, everything else ours. What cannot be judged does not pass for safe.
fn refusal(error: &GuardError) -> Refusal {
    if error.is_of_a_pair() {
        Refusal::value("input", format!("a text cannot be judged: {error}"))
    } else {
        Refusal::failed(format!("the guard failed: {error}"))
    }
}

/// What the next answer is judged against: everything that was said since the answer before it, as the filter stage
/// judges samples.
pub(super) fn since_last_answer(messages: &[Message]) -> String {
    let begins =
        messages.iter().rposition(|message| message.role == Role::Assistant).map_or(0, |last| last + 1);
    let said: Vec<&str> = messages[begins..].iter().map(|message| message.content.as_str()).collect();
    said.join("\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_judged_with_all_that_was_said_since_the_last_one() {
        let messages =
            [Message::user("a"), Message::assistant("b"), Message::system("c"), Message::user("d")];
        assert_eq!(since_last_answer(&messages), "c\n\nd");
        assert_eq!(since_last_answer(&messages[..1]), "a");
        assert_eq!(since_last_answer(&messages[..2]), "");
    }
}
