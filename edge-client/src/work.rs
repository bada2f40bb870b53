//! The work of a round: sample, filter, revise, train, compress, one stage after the other.
//!
//! Of `pipeline.rs`, which decides whether there is work and what becomes of its update. Each stage leaves its result in
//! `round/`, so that after a kill the next one begins where that is.

use std::time::Instant;

use commonweal_adapter::{Adapter, Residual};
use commonweal_package::TrainGraph;
use commonweal_protocol::{Content, DeviceReport, Mode, RoundTask};
use commonweal_transport::Link;
use serde::{Deserialize, Serialize};

use crate::{
    compress::{self, Packed},
    control::{self, Controls},
    doing,
    events::{Done, Event, Output},
    filter, install,
    owed::{NEXT_RESIDUAL, residual_of},
    pipeline::{CHECKPOINT, Device, PACKED, PACKED_REPORT, PAIRS, PackedReport, PipelineError},
    revise::{ReviseCounts, TrainingPair},
    store::{Store, StoreError},
    task::{train_task, trainable},
    train::{self, TrainSummary, Trained, TrainingError},
};

/// What training and packing have on the disk at most, for each value of the adapter: a checkpoint has four numbers of 4
/// bytes and is written beside the one before it. What packing leaves beside the last one is less.
const ROUND_BYTES_A_PARAMETER: u64 = 2 * 4 * 4;
/// With a correction, whose two numbers are in each checkpoint.
const CORRECTED_BYTES_A_PARAMETER: u64 = 2 * 6 * 4;
/// Whatever the adapter's size: names, shapes and losses in both checkpoints, and their seals.
const ROUND_BYTES: u64 = 64 << 10;

/// The screened and revised samples of a round, as kept on disk.
#[derive(Serialize, Deserialize)]
pub(crate) struct Prepared {
    sampled: usize,
    counts: ReviseCounts,
    pairs: Vec<TrainingPair>,
}

impl<L: Link> Device<L> {
    /// The update of this task: what a kill left of its stages is gone on with. `None` without samples.
    pub(crate) fn packed_update(
        &self,
        task: &RoundTask,
    ) -> Result<Option<(Packed, PackedReport)>, PipelineError> {
        let Some(prepared) = self.prepare(task)? else { return Ok(None) };
        let start = self.start(task)?;
        let layout = start.layout();
        let controls = control::begin(&self.link, &self.store, &self.expected, &task.scaffold, layout);
        let controls = self.ask(controls)??;
        // What a break left of packing is packed anew.
        for name in [NEXT_RESIDUAL, PACKED, control::NEXT] {
            self.store.remove(name)?;
        }
        // Before hours are spent on what cannot be kept, and with all that came for the round.
        require_disk(&self.store, layout.parameters() as u64, task.scaffold.is_on())?;
        let trained = self.train(task, &start, &prepared, controls.as_ref())?;
        // Packing takes no handle; what was trained is kept, and a visit that has ended begins nothing more.
        if self.cancel.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        let begun = Instant::now();
        let (packed, residual, summary) = self.pack(task, &trained, controls.as_ref())?;
        let report = report(&prepared, trained.summary(), summary.norm);
        let report = PackedReport { report, samples: prepared.pairs.len() as u32 };
        // The report last: with it, the update counts as packed.
        self.store.write_within(NEXT_RESIDUAL, &residual.to_bytes())?;
        self.store.write_within(PACKED, packed.bytes())?;
        self.write_json(PACKED_REPORT, &report)?;
        let (bytes, bits_per_parameter) = (packed.bytes().len(), summary.bits_per_parameter);
        self.stage(task.round.0, begun, Done::Compress { bytes, bits_per_parameter, norm: summary.norm });
        Ok(Some((packed, report)))
    }

    /// Sample, filter, revise.
    fn prepare(&self, task: &RoundTask) -> Result<Option<Prepared>, PipelineError> {
        if let Some(prepared) = self.read_round(PAIRS)? {
            // A kill may have come between the pairs and this.
            self.remove_chunks()?;
            return Ok(Some(prepared));
        }
        let round = task.round.0;
        let begun = Instant::now();
        let samples = self.draw(task)?;
        let sampled = samples.len();
        if sampled == 0 {
            return Ok(None);
        }
        self.stage(round, begun, Done::Sample { samples: sampled });

        let begun = Instant::now();
        let screened = self.judge(task, samples)?;
        let found = filter::count(&screened);
        let filter::FilterCounts { kept, dropped, refused, flagged, .. } = found;
        self.stage(round, begun, Done::Filter { kept, dropped, refused, flagged });

        let begun = Instant::now();
        let (pairs, counts) = self.rewrite(task, screened)?;
        let ReviseCounts { revised, refused, dropped, attempts, .. } = counts;
        self.stage(round, begun, Done::Revise { revised, refused, dropped, attempts });
        let prepared = Prepared { sampled, counts, pairs };
        self.store.write_within(PAIRS, &self.encode(PAIRS, &prepared)?)?;
        self.remove_chunks()?;
        Ok(Some(prepared))
    }

    /// The adapter that the round starts from.
    pub(crate) fn start(&self, task: &RoundTask) -> Result<Adapter, PipelineError> {
        let content = Content { digest: task.start.digest, length: task.start.length };
        Ok(self.ask(install::obtain(&self.link, &self.store, &self.expected, content))??)
    }

    fn train(
        &self,
        task: &RoundTask,
        start: &Adapter,
        prepared: &Prepared,
        controls: Option<&Controls>,
    ) -> Result<Trained, PipelineError> {
        let begun = Instant::now();
        let checkpoint = self.store.read_remade(CHECKPOINT)?;
        let mut watch = Watching { store: &self.store, output: self.output, round: task.round.0 };
        if self.policy.train.graph == TrainGraph::Frugal {
            self.model.close_inference();
            self.guard.close_inference();
        }
        let mut how = train_task(task);
        how.correction = controls.map(Controls::correction).transpose().map_err(TrainingError::from)?;
        let trained = train::train(
            &self.model,
            start,
            &prepared.pairs,
            &how,
            &self.policy.train,
            checkpoint.as_deref(),
            &mut watch,
            &self.cancel,
        )?;
        // Activations are needed for minutes a day; the base stays.
        self.model.close_training();
        let TrainSummary { steps, tokens, loss_first, loss_last, too_long, resumed_step } =
            *trained.summary();
        train::tell_too_long(too_long);
        self.stage(task.round.0, begun, Done::Train { steps, tokens, loss_first, loss_last, resumed_step });
        Ok(trained)
    }

    fn pack(
        &self,
        task: &RoundTask,
        trained: &Trained,
        controls: Option<&Controls>,
    ) -> Result<(Packed, Residual, compress::PackSummary), PipelineError> {
        let (layout, trainable) = (trained.delta().layout().clone(), trainable(task.mode, task.round));
        // A residual of another layout or mode is of another federation: begin with none.
        let owed = if task.mode == Mode::Exact { None } else { self.store.read_remade(residual_of(task))? };
        let mut residual = owed
            .and_then(|bytes| Residual::from_bytes(&bytes, layout.clone(), trainable).ok())
            .unwrap_or_else(|| Residual::zeros(layout.clone(), trainable));
        let options = compress::options(&task.compress)?;
        let Some(controls) = controls else {
            let (packed, summary) = compress::compress(trained, &mut residual, &options, task.seed)?;
            if task.mode == Mode::Exact {
                // The next start is factored anew: what is owed of these factors would fit none of its.
                residual = Residual::zeros(layout, trainable);
            }
            return Ok((packed, residual, summary));
        };
        let (packed, summary, next) =
            compress::compress_corrected(trained, controls.own(), &mut residual, &options, task.seed)?;
        control::write_next(&self.store, task.round, self.expected.base, &next)?;
        Ok((packed, residual, summary))
    }
}

/// Asks for all that training and packing need, less the checkpoint that a break left: that counts as used.
fn require_disk(store: &Store, parameters: u64, is_corrected: bool) -> Result<(), StoreError> {
    let each = if is_corrected { CORRECTED_BYTES_A_PARAMETER } else { ROUND_BYTES_A_PARAMETER };
    let both = ROUND_BYTES.saturating_add(each.saturating_mul(parameters));
    // A second one is written beside it, whatever it is worth.
    let left = store.bytes_of(CHECKPOINT)?.min(both / 2);
    store.require_disk(CHECKPOINT, both.saturating_sub(left))
}

/// Shows steps and keeps checkpoints.
struct Watching<'s> {
    store: &'s Store,
    output: Output,
    round: u64,
}

impl train::Watch for Watching<'_> {
    fn step(&mut self, step: u32, loss: f32) {
        let event = Event::Step { round: self.round, step, loss };
        doing::after_event(self.store, &event);
        self.output.show(&event);
    }

    fn checkpoint(&mut self, bytes: Vec<u8>) -> Result<(), StoreError> {
        self.store.write_within(CHECKPOINT, &bytes)
    }
}

fn report(prepared: &Prepared, summary: &TrainSummary, norm: f64) -> DeviceReport {
    let ReviseCounts { kept, revised, refused, dropped, attempts } = prepared.counts;
    let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    DeviceReport {
        sampled: count(prepared.sampled),
        kept: count(kept),
        dropped: count(dropped),
        refused: count(refused),
        revised: count(revised),
        revision_attempts: count(attempts),
        steps: summary.steps,
        trained_tokens: summary.tokens,
        loss_first: summary.loss_first,
        loss_last: summary.loss_last,
        delta_norm: norm as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Limit;

    #[test]
    fn what_a_round_asks_of_the_disk_is_enough_for_its_second_checkpoint_and_for_going_on() {
        let parameters = 100_000;
        for (is_corrected, numbers) in [(false, 4), (true, 6)] {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(directory.path()).unwrap();
            let each = if is_corrected { CORRECTED_BYTES_A_PARAMETER } else { ROUND_BYTES_A_PARAMETER };
            let used = store.disk_bytes().unwrap();
            let store = store.within(Limit::of(used + ROUND_BYTES + each * parameters));
            require_disk(&store, parameters, is_corrected).unwrap();
            assert!(require_disk(&store, parameters + 1, is_corrected).is_err());
            let checkpoint = vec![0; numbers * 4 * parameters as usize];
            for _ in 0..2 {
                store.write_within(CHECKPOINT, &checkpoint).unwrap();
                // A break came, and the round goes on.
                require_disk(&store, parameters, is_corrected).unwrap();
            }
            // Packing has room beside the last checkpoint; what a break left of it makes room again.
            for name in [NEXT_RESIDUAL, control::NEXT, PACKED] {
                store.write_within(name, &vec![0; 4 * parameters as usize]).unwrap();
            }
            assert!(require_disk(&store, parameters, is_corrected).is_err());
            for name in [NEXT_RESIDUAL, control::NEXT, PACKED] {
                store.remove(name).unwrap();
            }
            require_disk(&store, parameters, is_corrected).unwrap();
        }
    }
}
