//! What an adapter is worth: answers to the evaluation prompts under two judges, loss on held-out conversations, accuracy
//! on preference pairs. The prompts are the operator's; nobody trains on them (`contamination.rs`).

use std::{
    fs,
    path::{Path, PathBuf},
};

use aggregator::{
    evaluate::sets::{self, Conversation},
    laboratory::Laboratory,
};
use anyhow::{Context, Result, ensure};
use commonweal_adapter::Adapter;
use commonweal_runtime::{Message, PreparedAdapter, TrainingRow, mean_loss};
use commonweal_safety::refusal;
use serde::{Deserialize, Serialize};

use crate::{contamination::Named, judge::RefusalJudge};

/// What is measured with, read once.
pub(crate) struct Evaluation {
    /// Harmful prompts by set.
    harmful: Vec<(String, Vec<Conversation>)>,
    /// Benign prompts by kind.
    benign: Vec<(String, Vec<Conversation>)>,
    held_out: Vec<Conversation>,
    preferences: Vec<Preference>,
    judge: RefusalJudge,
    answer_tokens_max: usize,
}

/// Two answers to one question, of which people preferred the first.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Preference {
    prompt: String,
    chosen: String,
    rejected: String,
}

/// How an adapter did. Shares are of the rows measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measures {
    /// Refused, of each harmful set.
    pub(crate) safe: Vec<Refused>,
    /// Refused, of each kind of benign prompts.
    pub(crate) benign: Vec<Refused>,
    /// Of all benign prompts together, by the rules and by the classifier.
    pub(crate) over_refusal: f64,
    pub(crate) over_refusal_classifier: f64,
    /// Nats a token.
    pub(crate) held_out_loss: f64,
    /// Pairs in which the preferred answer is the likelier a token.
    pub(crate) preference: f64,
    /// All answers on which the judges say the same.
    pub(crate) judges_agree: f64,
    pub(crate) seconds: f64,
}

/// Share of a set's prompts that was refused, by each judge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Refused {
    pub(crate) set: String,
    pub(crate) prompts: usize,
    pub(crate) rules: f64,
    pub(crate) classifier: f64,
}

impl Evaluation {
    /// Reads `eval_*.jsonl`, `benign_*.jsonl`, `held_out.jsonl` and `preference.jsonl`, at most `rows_max` of each.
    pub(crate) fn read(folder: &Path, rows_max: usize, answer_tokens_max: usize) -> Result<Self> {
        let prompts = |begins: &str| -> Result<Vec<(String, Vec<Conversation>)>> {
            let mut sets = Vec::new();
            for path in files(folder, begins)? {
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                let name = name.trim_start_matches(begins).to_owned();
                sets.push((name, first(sets::read_prompts(&path)?, rows_max)));
            }
            ensure!(!sets.is_empty(), "{}: expected {begins}*.jsonl", folder.display());
            Ok(sets)
        };
        let (harmful, benign) = (prompts("eval_")?, prompts("benign_")?);
        let path = folder.join("preference.jsonl");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let rows: Result<Vec<Preference>, _> = text.lines().map(serde_json::from_str).collect();
        Ok(Self {
            harmful,
            benign,
            held_out: first(sets::read_conversations(&folder.join("held_out.jsonl"))?, rows_max),
            preferences: spread(rows.with_context(|| path.display().to_string())?, rows_max),
            judge: RefusalJudge::bundled()?,
            answer_tokens_max,
        })
    }

    /// Rows of each part, for the report.
    pub(crate) fn sizes(&self) -> Vec<(String, usize)> {
        let sets = self.harmful.iter().chain(&self.benign);
        let mut sizes: Vec<(String, usize)> = sets.map(|(name, rows)| (name.clone(), rows.len())).collect();
        sizes.push(("held out".to_owned(), self.held_out.len()));
        sizes.push(("preference pairs".to_owned(), self.preferences.len()));
        sizes
    }

    /// Every prompt, for the check against training sets.
    pub(crate) fn prompts(&self) -> Vec<Named> {
        let mut prompts = Vec::new();
        let mut add = |name: &str, rows: &[Vec<Message>]| {
            let said = rows.iter().flat_map(|row| asked(row));
            prompts.extend(said.map(|text| (name.to_owned(), text.to_owned())));
        };
        for (name, rows) in self.harmful.iter().chain(&self.benign) {
            add(name, rows);
        }
        add("held out", &self.held_out);
        prompts.extend(self.preferences.iter().map(|pair| ("preference".to_owned(), pair.prompt.clone())));
        prompts
    }

    /// Measures an adapter; with `answers`, every answer is written there too.
    pub(crate) fn measure(
        &self,
        laboratory: &Laboratory,
        adapter: &Adapter,
        answers: Option<&Path>,
    ) -> Result<Measures> {
        let begun = std::time::Instant::now();
        let prepared = laboratory.model.prepare(Some(adapter))?;
        let mut written = String::new();
        let (mut agreed, mut judged) = (0_u32, 0_u32);
        let mut refused = |(name, rows): &(String, Vec<Conversation>)| -> Result<Refused> {
            let conversations: Vec<&[Message]> = rows.iter().map(Vec::as_slice).collect();
            let answered =
                laboratory.answer(&prepared, "an evaluation set", &conversations, self.answer_tokens_max)?;
            let (mut rules, mut classifier) = (0, 0);
            for answered in &answered {
                let by_rules = refusal::is_refusal(&answered.answer);
                let by_classifier = self.judge.is_refusal(&answered.answer);
                rules += usize::from(by_rules);
                classifier += usize::from(by_classifier);
                agreed += u32::from(by_rules == by_classifier);
                judged += 1;
                written += &serde_json::json!({
                    "set": name, "rules": by_rules, "classifier": by_classifier,
                    "prompt": answered.question, "answer": answered.answer,
                })
                .to_string();
                written.push('\n');
            }
            let prompts = answered.len();
            ensure!(prompts > 0, "{name}: no prompt fits the model's context");
            let share = |count: usize| count as f64 / prompts as f64;
            Ok(Refused { set: name.clone(), prompts, rules: share(rules), classifier: share(classifier) })
        };
        let mut each = |sets: &[(String, Vec<Conversation>)]| -> Result<Vec<Refused>> {
            sets.iter().map(&mut refused).collect()
        };
        let (safe, benign) = (each(&self.harmful)?, each(&self.benign)?);
        let prompts: usize = benign.iter().map(|set| set.prompts).sum();
        let whole = |share: fn(&Refused) -> f64| {
            let refused: f64 = benign.iter().map(|set| share(set) * set.prompts as f64).sum();
            refused / prompts.max(1) as f64
        };
        let (over_refusal, over_refusal_classifier) = (whole(|set| set.rules), whole(|set| set.classifier));
        if let Some(path) = answers {
            fs::write(path, written).with_context(|| path.display().to_string())?;
        }
        Ok(Measures {
            safe,
            benign,
            over_refusal,
            over_refusal_classifier,
            held_out_loss: self.held_out_loss(laboratory, &prepared)?,
            preference: self.preference(laboratory, &prepared)?,
            judges_agree: f64::from(agreed) / f64::from(judged),
            seconds: begun.elapsed().as_secs_f64(),
        })
    }

    fn held_out_loss(&self, laboratory: &Laboratory, prepared: &PreparedAdapter) -> Result<f64> {
        let mut rows = Vec::new();
        for conversation in &self.held_out {
            rows.push(row(laboratory, conversation)?);
        }
        let scores = laboratory.model.score_rows(prepared, &rows, &laboratory.cancel)?;
        mean_loss(&scores).context("held_out.jsonl: no token to score")
    }

    fn preference(&self, laboratory: &Laboratory, prepared: &PreparedAdapter) -> Result<f64> {
        let mut rows = Vec::new();
        for pair in &self.preferences {
            for answer in [&pair.chosen, &pair.rejected] {
                rows.push(row(laboratory, &[Message::user(&pair.prompt), Message::assistant(answer)])?);
            }
        }
        let scores = laboratory.model.score_rows(prepared, &rows, &laboratory.cancel)?;
        let likelihood: Vec<f64> = scores.iter().map(|score| score.logprob / score.weight.max(1.0)).collect();
        let right = likelihood.chunks_exact(2).filter(|pair| pair[0] > pair[1]).count();
        Ok(right as f64 / (likelihood.len() / 2).max(1) as f64)
    }
}

fn row(laboratory: &Laboratory, conversation: &[Message]) -> Result<TrainingRow> {
    Ok(laboratory.model.chat().training_row(conversation)?.truncated(laboratory.model.context()))
}

/// What a person says in a conversation, one turn after the other.
pub(crate) fn asked(conversation: &[Message]) -> impl Iterator<Item = &str> {
    let said = conversation.iter().filter(|message| message.role == commonweal_runtime::Role::User);
    said.map(|message| message.content.as_str())
}

/// The files of a folder whose names begin so, in order.
pub(crate) fn files(folder: &Path, begins: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(begins) && name.ends_with(".jsonl") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn first<T>(mut rows: Vec<T>, rows_max: usize) -> Vec<T> {
    rows.truncate(rows_max);
    rows
}

/// At most `rows_max` rows, evenly from all of the file, whose halves differ.
fn spread<T>(rows: Vec<T>, rows_max: usize) -> Vec<T> {
    let every = rows.len().div_ceil(rows_max.max(1)).max(1);
    rows.into_iter().step_by(every).collect()
}
