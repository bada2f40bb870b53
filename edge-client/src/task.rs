//! A round's task in the words of the stages: the protocol knows nothing of training, `train.rs` nothing of the wire.
//! Used by `pipeline.rs`.

use commonweal_adapter::Trainable;
use commonweal_protocol::{BaseHash, Mode, RoundId, RoundTask};
use commonweal_runtime::Model;

use crate::train::TrainTask;

/// Which factors a round trains.
pub fn trainable(mode: Mode, round: RoundId) -> Trainable {
    match mode {
        Mode::Fedit | Mode::Exact => Trainable::Both,
        Mode::Ffa => Trainable::BOnly,
        Mode::Rolora if round.0 % 2 == 1 => Trainable::BOnly,
        Mode::Rolora => Trainable::AOnly,
    }
}

/// A round's settings as training takes them; the correction of its gradients is `control.rs`'s.
pub fn train_task(task: &RoundTask) -> TrainTask {
    let settings = &task.train;
    TrainTask {
        steps_max: settings.steps_max,
        warmup_steps: settings.warmup_steps,
        step_rows: settings.accumulation as usize,
        row_tokens_max: settings.row_tokens_max as usize,
        learning_rate: settings.learning_rate,
        weight_decay: settings.weight_decay,
        clip_norm: settings.clip_norm,
        proximal_mu: settings.proximal_mu,
        trainable: trainable(task.mode, task.round),
        seed: task.seed,
        correction: None,
        first_rank: 0,
    }
}

/// The base of a package as the protocol names it.
pub fn base_of(model: &Model) -> BaseHash {
    BaseHash(model.package().base().0)
}
