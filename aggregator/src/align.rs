//! The server's constitutional step, the strongest of the paper's: red-team prompts → the candidate's answers →
//! those that the guard calls unsafe are criticised and rewritten → the candidate is tuned on the rewritings
//! for a bounded number of steps, with benign conversations replayed beside them so that it stays helpful.
//!
//! After `merge`, before `evaluate`. Needs no label and no device: the prompts are the operator's.

use commonweal_adapter::{Adapter, Trainable};
use commonweal_protocol::RoundId;
use commonweal_runtime::{Message, Schedule, TrainOptions, Trainer, TrainingRow, memory};
use commonweal_safety::refusal::is_refusal;
use commonweal_safety::{Flagged, ReviseOptions, Revision};
use rand::SeedableRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::config::Align;
use crate::events::AlignFigures;
use crate::laboratory::{Answered, Laboratory, LaboratoryError, REDTEAM, shape};

/// Aligns a merged adapter. The same round and candidate give the same result.
pub fn align(
    laboratory: &Laboratory,
    settings: &Align,
    trainable: Trainable,
    round: RoundId,
    candidate: Adapter,
) -> Result<(Adapter, AlignFigures), LaboratoryError> {
    let (Some(guard), Some(reviser)) = (&laboratory.guard, &laboratory.reviser) else {
        return Err(LaboratoryError::NoGuard);
    };
    let mut random = ChaCha8Rng::seed_from_u64(round.0);
    let prompts: Vec<&[Message]> =
        laboratory.sets.redteam.choose_multiple(&mut random, settings.prompts).map(Vec::as_slice).collect();
    let prepared = laboratory.model.prepare(Some(&candidate))?;
    let answered = laboratory.answer(&prepared, REDTEAM, &prompts, settings.answer_tokens_max)?;
    let judgements = guard.judge(&pairs(&answered), &laboratory.cancel)?;
    let mut figures = AlignFigures { prompts: answered.len() as u32, ..AlignFigures::default() };
    let mut flagged = Vec::new();
    // A good answer is rehearsed too: tuning on the bad ones alone would move the good ones.
    let mut lessons: Vec<(&str, String)> = Vec::new();
    for (answered, judgement) in answered.iter().zip(&judgements) {
        if is_refusal(&answered.answer) || !judgement.is_unsafe {
            figures.safe += 1;
            if is_refusal(&answered.answer) {
                lessons.push((answered.question, answered.answer.clone()));
            }
        } else {
            flagged.push(Flagged {
                prompt: answered.question,
                response: &answered.answer,
                category: judgement.category.as_ref(),
            });
        }
    }
    if flagged.is_empty() {
        figures.skipped = Some("every answer is safe".to_owned());
        return Ok((candidate, figures));
    }
    let options =
        ReviseOptions { attempts_max: settings.attempts_max, seed: round.0, ..ReviseOptions::default() };
    let revisions = reviser.revise(guard, &flagged, &options, &laboratory.cancel)?;
    for (flagged, revision) in flagged.iter().zip(revisions) {
        let text = match revision {
            Revision::Safe { text, .. } => {
                figures.revised += 1;
                text
            }
            Revision::StillUnsafe { refusal, .. } => {
                figures.refused += 1;
                refusal
            }
        };
        lessons.push((flagged.prompt, text));
    }
    let lessons = lessons
        .into_iter()
        .map(|(question, answer)| vec![Message::user(question), Message::assistant(answer)])
        .collect::<Vec<_>>();
    let adapter = tune(laboratory, settings, trainable, candidate, &lessons, &mut random, &mut figures)?;
    Ok((adapter, figures))
}

fn pairs<'a>(answered: &'a [Answered<'_>]) -> Vec<commonweal_safety::Pair<'a>> {
    answered
        .iter()
        .map(|answered| commonweal_safety::Pair {
            prompt: answered.question,
            response: Some(&answered.answer),
        })
        .collect()
}

/// Half of each step's rows are lessons, half are replayed.
fn tune(
    laboratory: &Laboratory,
    settings: &Align,
    trainable: Trainable,
    candidate: Adapter,
    lessons: &[Vec<Message>],
    random: &mut ChaCha8Rng,
    figures: &mut AlignFigures,
) -> Result<Adapter, LaboratoryError> {
    let context = laboratory.model.context();
    let rows = |conversations: &[Vec<Message>]| -> Result<Vec<TrainingRow>, LaboratoryError> {
        let mut rows = Vec::with_capacity(conversations.len());
        for conversation in conversations {
            let row = laboratory.model.chat().training_row(conversation)?.truncated(context);
            if row.targets() > 0 {
                rows.push(row);
            }
        }
        Ok(rows)
    };
    let lessons = rows(lessons)?;
    let replay = rows(&laboratory.sets.replay)?;
    let options = TrainOptions {
        learning_rate: settings.learning_rate,
        schedule: Schedule::Linear,
        warmup_steps: u64::from(settings.steps / 10),
        steps_max: u64::from(settings.steps),
        trainable,
        ..TrainOptions::default()
    };
    let longest = lessons.iter().chain(&replay).map(|row| row.ids.len()).max().unwrap_or(0);
    let values = laboratory.model.layout().parameters();
    let needed =
        shape(laboratory.model.package())?.train_bytes(settings.batch * longest, options.graph, values);
    memory::check("an alignment step", needed, memory::available(), "a smaller align.batch needs less")?;
    let mut trainer = Trainer::new(&laboratory.model, candidate, options)?;
    let mut lessons = Deck::new(&lessons);
    let mut replay = Deck::new(&replay);
    let replayed = if replay.is_empty() { 0 } else { settings.batch / 2 };
    for step in 0..settings.steps {
        if laboratory.cancel.is_cancelled() {
            return Err(LaboratoryError::Cancelled);
        }
        let mut batch = lessons.deal(settings.batch - replayed, random);
        batch.extend(replay.deal(replayed, random));
        figures.replayed += replayed as u32;
        let report = trainer.step(&batch, &laboratory.cancel)?;
        if step == 0 {
            figures.loss_first = report.loss;
        }
        figures.loss_last = report.loss;
        figures.steps += 1;
    }
    let adapter = trainer.finish();
    laboratory.model.close_training();
    Ok(adapter)
}

/// Rows dealt in random order, each once before any comes again.
struct Deck<'rows> {
    rows: &'rows [TrainingRow],
    order: Vec<usize>,
}

impl<'rows> Deck<'rows> {
    fn new(rows: &'rows [TrainingRow]) -> Self {
        Self { rows, order: Vec::new() }
    }

    fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn deal(&mut self, count: usize, random: &mut ChaCha8Rng) -> Vec<TrainingRow> {
        let mut dealt = Vec::with_capacity(count);
        while dealt.len() < count && !self.rows.is_empty() {
            let Some(index) = self.order.pop() else {
                self.order = (0..self.rows.len()).collect();
                self.order.shuffle(random);
                continue;
            };
            dealt.extend(self.rows.get(index).cloned());
        }
        dealt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deck_deals_every_row_before_any_comes_again() {
        let rows: Vec<_> = (0..5).map(|id| TrainingRow { ids: vec![id], weights: vec![1.0] }).collect();
        let mut deck = Deck::new(&rows);
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut ids: Vec<u32> = deck.deal(5, &mut random).iter().map(|row| row.ids[0]).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3, 4]);
        assert_eq!(deck.deal(12, &mut random).len(), 12);
        assert!(Deck::new(&[]).deal(3, &mut random).is_empty());
    }
}
