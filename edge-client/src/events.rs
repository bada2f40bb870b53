//! What the device tells whoever runs it: one JSON object a line with `--json`, a sentence a line without.
//!
//! Written by `pipeline.rs` at the end of each stage. Counts, sizes and seconds only; never a person's text.

use std::{
    fmt,
    io::{self, Write},
};

use serde::Serialize;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The device has an identity now.
    Enrolled {
        /// Its identifier.
        device: String,
    },
    /// Another key signs for the aggregator; the one before is not trusted any more.
    KeyFollowed {
        /// Its number.
        number: u64,
        /// The key itself, in hex.
        key: String,
    },
    /// Samples were added to the store.
    Added {
        /// New ones.
        added: usize,
        /// Already there.
        known: usize,
        /// Lines left out.
        bad: usize,
    },
    /// A stage of a round is done.
    Stage {
        /// The round.
        round: u64,
        /// Wall time.
        seconds: f64,
        /// Which stage, and what it did.
        #[serde(flatten)]
        done: Done,
    },
    /// Samples are gone, and what was computed from them.
    Forgotten {
        /// How many; unknown where they could not be opened.
        samples: Option<usize>,
        /// Whether what rounds left went too: the round in progress, residuals, control variates.
        rounds: bool,
        /// Whether the personal adapter did.
        personal: bool,
        /// Whether the key was destroyed.
        key: bool,
    },
    /// One optimizer step.
    Step {
        /// The round.
        round: u64,
        /// From 1.
        step: u32,
        /// Mean loss a token, nats.
        loss: f32,
    },
    /// The local endpoint answers.
    Serving {
        /// Where.
        url: String,
        /// The models that can be named; the first answers requests that name none.
        models: Vec<String>,
        /// Where the guard stands.
        guard: String,
        /// What becomes of what is said, in plain words.
        chats: String,
    },
    /// The owner wants no rounds.
    Paused,
    /// The owner wants rounds again.
    Resumed,
    /// Nothing to do before the next poll.
    Waiting {
        /// Until then.
        seconds: f64,
        /// Why.
        why: String,
    },
}

/// What a stage did.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub enum Done {
    /// Samples drawn for the round.
    Sample {
        /// How many.
        samples: usize,
    },
    /// Judged by the guard.
    Filter {
        /// Safe: trained on as they are.
        kept: usize,
        /// Left out at once.
        dropped: usize,
        /// To be replaced by a refusal.
        refused: usize,
        /// Handed to revision.
        flagged: usize,
    },
    /// Rewritten by the constitution.
    Revise {
        /// Rewritten and judged safe.
        revised: usize,
        /// Replaced by a refusal, those of the filter included.
        refused: usize,
        /// Left out, those of the filter included.
        dropped: usize,
        /// Rewrites tried.
        attempts: usize,
    },
    /// Trained.
    Train {
        /// Optimizer steps.
        steps: u32,
        /// Tokens seen.
        tokens: u64,
        /// Loss of the first steps, nats a token.
        loss_first: f32,
        /// Loss of the last steps.
        loss_last: f32,
        /// Step that a checkpoint let it continue from; 0 from the start.
        resumed_step: u32,
    },
    /// Packed.
    Compress {
        /// Of the packed update.
        bytes: usize,
        /// Of the packed update, a value.
        bits_per_parameter: f64,
        /// Norm of the delta.
        norm: f64,
    },
    /// Delivered; the aggregator's signed receipt is on disk.
    Upload {
        /// Of the update.
        bytes: u64,
    },
    /// The aggregator did not take the update.
    Refused {
        /// Why.
        reason: String,
    },
    /// A release is in use.
    Install {
        /// Its version.
        version: u64,
    },
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sample { samples } => write!(f, "sample: {samples} samples"),
            Self::Filter { kept, dropped, refused, flagged } => {
                write!(f, "filter: {kept} kept, {flagged} to revise, {refused} to refuse, {dropped} dropped")
            }
            Self::Revise { revised, refused, dropped, attempts } => {
                write!(
                    f,
                    "revise: {revised} revised, {refused} refused, {dropped} dropped, {attempts} attempts"
                )
            }
            Self::Train { steps, tokens, loss_first, loss_last, resumed_step } => {
                write!(f, "train: {steps} steps, {tokens} tokens, loss {loss_first:.3} → {loss_last:.3}")?;
                if *resumed_step > 0 { write!(f, ", resumed at step {resumed_step}") } else { Ok(()) }
            }
            Self::Compress { bytes, bits_per_parameter, .. } => {
                write!(f, "compress: {bytes} bytes, {bits_per_parameter:.2} bits a parameter")
            }
            Self::Upload { bytes } => write!(f, "upload: {bytes} bytes, receipt on disk"),
            Self::Refused { reason } => write!(f, "upload: refused: {reason}"),
            Self::Install { version } => write!(f, "install: release {version}"),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enrolled { device } => write!(f, "enrolled as {device}"),
            Self::KeyFollowed { number, key } => {
                write!(f, "the aggregator signs with key {number} now: {key}")
            }
            Self::Added { added, known, bad } => {
                write!(f, "added {added} samples, {known} were known, {bad} lines left out")
            }
            Self::Forgotten { samples, rounds, personal, key } => {
                match samples {
                    Some(samples) => write!(f, "forgot {samples} samples")?,
                    None => f.write_str("forgot every sample")?,
                }
                let also = [
                    (*rounds, "what rounds had computed from them"),
                    (*personal, "the personal adapter"),
                    (*key, "the key"),
                ];
                also.iter().filter(|(is_gone, _)| *is_gone).try_for_each(|(_, what)| write!(f, ", {what}"))
            }
            Self::Stage { round, seconds, done } => write!(f, "round {round}: {done} ({seconds:.1} s)"),
            Self::Step { round, step, loss } => write!(f, "round {round}: step {step}, loss {loss:.3}"),
            Self::Serving { url, models, guard, chats } => {
                write!(f, "serving {} at {url}; guard {guard}; {chats}", models.join(", "))
            }
            Self::Paused => f.write_str("paused"),
            Self::Resumed => f.write_str("resumed"),
            Self::Waiting { seconds, why } => write!(f, "waiting {seconds:.1} s: {why}"),
        }
    }
}

/// How events are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Sentences.
    Text,
    /// JSON lines.
    Json,
}

impl Output {
    /// Shows an event on stdout. Single steps are for `--json` only: a person does not read hundreds of them.
    pub fn show(self, event: &Event) {
        match (self, event) {
            (Self::Text, Event::Step { .. }) => {}
            (Self::Text, event) => self.say(event),
            (Self::Json, event) => self.say(&serde_json::to_string(event).unwrap_or_default()),
        }
    }

    /// Prints a line. A reader who has gone must neither end a round in progress nor cause a panic.
    pub fn say(self, line: &(impl fmt::Display + ?Sized)) {
        let _ = writeln!(io::stdout().lock(), "{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_one_flat_object() {
        let event = Event::Stage { round: 2, seconds: 0.5, done: Done::Upload { bytes: 7 } };
        let json: serde_json::Value = serde_json::from_str(&serde_json::to_string(&event).unwrap()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"event":"stage","round":2,"seconds":0.5,"stage":"upload","bytes":7})
        );
        assert_eq!(event.to_string(), "round 2: upload: 7 bytes, receipt on disk (0.5 s)");
    }
}
