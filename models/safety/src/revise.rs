//! The reviser: critique by a principle → rewrite → judged again by the guard, a bounded number of times.
//!
//! Between a device's filter and its training; the aggregator's alignment uses it too. Constitutional AI (Bai et al.
//! 2022), with a judge behind each rewriting: what the guard still finds unsafe is never handed on.

use std::fmt;

use commonweal_adapter::Adapter;
use commonweal_runtime::{
    AdaptError, Cancel, ConversationError, GenerateOptions, Generated, InferError, Message, Model,
    PreparedAdapter, Prompt, StopReason,
};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::{
    category::CategoryId,
    constitution::{Constitution, Principle, PrincipleId},
    guard::{Guard, GuardError, Judgement, Pair},
};

/// A pair that the guard flagged.
#[derive(Clone, Copy)]
pub struct Flagged<'t> {
    /// What was asked.
    pub prompt: &'t str,
    /// What was answered, to be rewritten.
    pub response: &'t str,
    /// The kind of harm that the guard named.
    pub category: Option<&'t CategoryId>,
}

impl fmt::Debug for Flagged<'_> {
    /// Lengths only, as for [`Pair`].
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flagged")
            .field("prompt_bytes", &self.prompt.len())
            .field("response_bytes", &self.response.len())
            .field("category", &self.category)
            .finish()
    }
}

/// How hard to try.
#[derive(Clone, Debug, PartialEq)]
pub struct ReviseOptions {
    /// Critiques with rewriting per pair; at least 1.
    pub attempts_max: u32,
    /// Longest critique in tokens.
    pub critique_tokens_max: usize,
    /// Longest rewriting in tokens; one that does not end by then is not used.
    pub revision_tokens_max: usize,
    /// Temperature of the attempts after the first, which takes the most probable words.
    pub temperature: f32,
    /// Nucleus of the attempts after the first.
    pub top_p: f32,
    /// Seed for the order of principles and for sampling.
    pub seed: u64,
}

impl Default for ReviseOptions {
    fn default() -> Self {
        Self {
            attempts_max: 3,
            critique_tokens_max: 48,
            revision_tokens_max: 160,
            temperature: 0.7,
            top_p: 0.9,
            seed: 0,
        }
    }
}

/// What became of a flagged pair.
#[derive(Clone, PartialEq)]
pub enum Revision {
    /// Rewritten, and judged safe.
    Safe {
        /// The new response.
        text: String,
        /// Attempts that were needed.
        attempts: u32,
        /// The principle of the last one.
        principle: PrincipleId,
        /// What the guard says about it.
        judgement: Judgement,
    },
    /// No attempt was judged safe.
    StillUnsafe {
        /// Attempts that were made; 0 when the pair leaves no room in the context.
        attempts: u32,
        /// What the constitution answers instead.
        refusal: String,
    },
}

impl fmt::Debug for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Safe { text, attempts, principle, judgement } => f
                .debug_struct("Safe")
                .field("text_bytes", &text.len())
                .field("attempts", attempts)
                .field("principle", principle)
                .field("judgement", judgement)
                .finish(),
            Self::StillUnsafe { attempts, .. } => {
                f.debug_struct("StillUnsafe").field("attempts", attempts).finish_non_exhaustive()
            }
        }
    }
}

/// Why nothing could be revised.
#[derive(Debug, thiserror::Error)]
pub enum ReviseError {
    /// No attempt is allowed.
    #[error("attempts_max is 0, expected at least 1")]
    NoAttempts,
    /// The constitution was not read from a file, and asks for nothing.
    #[error("constitution has 0 principles, expected at least 1")]
    NoPrinciples,
    /// The adapter does not fit the model.
    #[error("reviser adapter does not fit the model")]
    Adapt(#[from] AdaptError),
    /// A conversation could not be encoded.
    #[error("pair cannot be encoded for the reviser")]
    Conversation(#[from] ConversationError),
    /// The model could not be run, or the call was cancelled.
    #[error("reviser cannot generate")]
    Infer(#[from] InferError),
    /// The guard could not judge a rewriting.
    #[error("rewriting cannot be judged")]
    Guard(#[from] GuardError),
}

/// A reviser over an open model. Keeps no text.
#[derive(Debug)]
pub struct Reviser {
    model: Model,
    adapter: PreparedAdapter,
    constitution: Constitution,
}

/// The conversation that asks for a critique; its answer goes into [`revision_messages`].
pub fn critique_messages(prompt: &str, response: &str, principle: &Principle) -> Vec<Message> {
    vec![Message::user(prompt), Message::assistant(response), Message::user(&principle.critique)]
}

/// The conversation that asks for the rewriting.
pub fn revision_messages(
    prompt: &str,
    response: &str,
    constitution: &Constitution,
    principle: &Principle,
    critique: &str,
) -> Vec<Message> {
    let mut messages = critique_messages(prompt, response, principle);
    messages.push(Message::assistant(critique));
    messages.push(Message::user(constitution.revision_request(principle)));
    messages
}

/// One pair on its way through the attempts.
struct Work<'t, 'c> {
    index: usize,
    flagged: Flagged<'t>,
    principles: Vec<&'c Principle>,
    /// The least unsafe rewriting so far, with its log-odds: the next attempt starts from it.
    best: Option<(f64, String)>,
    attempts: u32,
}

impl Reviser {
    /// `adapter` is the reviser's own; `None` when the base itself can criticise and rewrite.
    pub fn open(
        model: &Model,
        constitution: Constitution,
        adapter: Option<&Adapter>,
    ) -> Result<Self, ReviseError> {
        Ok(Self { model: model.clone(), adapter: model.prepare(adapter)?, constitution })
    }

    /// The same reviser under another constitution, an operator's or an owner's own.
    #[must_use]
    pub fn with_constitution(self, constitution: Constitution) -> Self {
        Self { constitution, ..self }
    }

    /// The constitution.
    pub fn constitution(&self) -> &Constitution {
        &self.constitution
    }

    /// A revision for every flagged pair, in their order; pairs run side by side.
    pub fn revise(
        &self,
        guard: &Guard,
        flagged: &[Flagged<'_>],
        options: &ReviseOptions,
        cancel: &Cancel,
    ) -> Result<Vec<Revision>, ReviseError> {
        if options.attempts_max == 0 {
            return Err(ReviseError::NoAttempts);
        }
        if self.constitution.principles.is_empty() {
            return Err(ReviseError::NoPrinciples);
        }
        let mut revisions: Vec<Revision> = flagged.iter().map(|flagged| self.give_up(*flagged, 0)).collect();
        let mut open: Vec<Work<'_, '_>> =
            flagged.iter().enumerate().map(|(index, flagged)| self.begin(index, *flagged, options)).collect();
        for attempt in 0..options.attempts_max {
            let mut rewritten = self.attempt(&mut open, attempt, options, cancel)?;
            let pairs: Vec<Pair<'_>> = rewritten
                .iter()
                .map(|(slot, text)| Pair { prompt: open[*slot].flagged.prompt, response: Some(text) })
                .collect();
            let judgements = guard.judge_each(&pairs, cancel)?;
            for ((slot, text), judgement) in rewritten.drain(..).zip(judgements) {
                // What cannot be judged is not handed on, and not built upon.
                let Ok(judgement) = judgement else { continue };
                let work = &mut open[slot];
                if judgement.is_unsafe {
                    let improves = work.best.as_ref().is_none_or(|(odds, _)| judgement.log_odds < *odds);
                    if improves {
                        work.best = Some((judgement.log_odds, text));
                    }
                } else {
                    let principle = work.principle(attempt).id.clone();
                    revisions[work.index] =
                        Revision::Safe { text, attempts: work.attempts, principle, judgement };
                }
            }
            open.retain(|work| !matches!(revisions[work.index], Revision::Safe { .. }));
        }
        for work in open {
            revisions[work.index] = self.give_up(work.flagged, work.attempts);
        }
        Ok(revisions)
    }

    fn begin<'t>(&self, index: usize, flagged: Flagged<'t>, options: &ReviseOptions) -> Work<'t, '_> {
        // A stream per pair: the draw does not depend on what else is in the batch before it.
        let mut random = ChaCha8Rng::seed_from_u64(options.seed);
        random.set_stream(index as u64);
        let mut principles = self.constitution.principles_for(flagged.category);
        principles.shuffle(&mut random);
        Work { index, flagged, principles, best: None, attempts: 0 }
    }

    /// Critique and rewriting of every open pair; gives the usable rewritings with their pair's place in `open`.
    fn attempt(
        &self,
        open: &mut [Work<'_, '_>],
        attempt: u32,
        options: &ReviseOptions,
        cancel: &Cancel,
    ) -> Result<Vec<(usize, String)>, ReviseError> {
        let (mut slots, mut prompts) = (Vec::new(), Vec::new());
        for (slot, work) in open.iter_mut().enumerate() {
            let messages = critique_messages(work.flagged.prompt, work.response(), work.principle(attempt));
            let prompt = self.model.chat().prompt(&messages)?;
            // Room for critique, request and rewriting; a text cut to fit would be another text.
            let request = self.constitution.revision_request(work.principle(attempt));
            let request_tokens = self.model.chat().prompt(&[Message::user(request)])?.ids.len();
            let needed =
                prompt.ids.len() + options.critique_tokens_max + request_tokens + options.revision_tokens_max;
            if needed <= self.model.context() {
                work.attempts += 1;
                slots.push(slot);
                prompts.push(prompt);
            }
        }
        let critiques = self.generate(&prompts, attempt, 0, options.critique_tokens_max, options, cancel)?;
        let mut prompts = Vec::with_capacity(slots.len());
        for (&slot, critique) in slots.iter().zip(&critiques) {
            let work = &open[slot];
            let messages = revision_messages(
                work.flagged.prompt,
                work.response(),
                &self.constitution,
                work.principle(attempt),
                critique.text.trim(),
            );
            prompts.push(self.model.chat().prompt(&messages)?);
        }
        let texts = self.generate(&prompts, attempt, 1, options.revision_tokens_max, options, cancel)?;
        let usable = |(slot, generated): (usize, Generated)| {
            let text = generated.text.trim();
            let whole = generated.stop == StopReason::EndToken && !text.is_empty();
            (whole && text != open[slot].flagged.response.trim()).then(|| (slot, text.to_owned()))
        };
        Ok(slots.into_iter().zip(texts).filter_map(usable).collect())
    }

    fn generate(
        &self,
        prompts: &[Prompt],
        attempt: u32,
        step: u64,
        max_new_tokens: usize,
        options: &ReviseOptions,
        cancel: &Cancel,
    ) -> Result<Vec<Generated>, ReviseError> {
        let options = GenerateOptions {
            max_new_tokens,
            temperature: if attempt == 0 { 0.0 } else { options.temperature },
            top_p: if attempt == 0 { 1.0 } else { options.top_p },
            // A rewrite keeps most of what it rewrites; a critique does not.
            copying: step == 1,
            seed: options.seed.wrapping_add(u64::from(attempt) * 2 + step),
            ..GenerateOptions::default()
        };
        Ok(self.model.generate(&self.adapter, prompts, &options, cancel)?)
    }

    fn give_up(&self, flagged: Flagged<'_>, attempts: u32) -> Revision {
        let refusal = self.constitution.refusal_for(flagged.category).to_owned();
        Revision::StillUnsafe { attempts, refusal }
    }
}

impl Work<'_, '_> {
    /// The principle of an attempt: each in turn. [`Reviser::revise`] checked that there is one.
    fn principle(&self, attempt: u32) -> &Principle {
        self.principles[attempt as usize % self.principles.len()]
    }

    /// What the next attempt rewrites.
    fn response(&self) -> &str {
        self.best.as_ref().map_or(self.flagged.response, |(_, text)| text)
    }
}
