//! What of a round goes on after a kill or a change of mind, and what is made anew.

use std::{fs, sync::Arc};

use commonweal_adapter::{Adapter, Residual, Trainable};
use commonweal_protocol::{Digest, RoundId, SigningKey};
use commonweal_runtime::Cancel;
use commonweal_safety::{Guard, Reviser};
use edge_client::{
    filter, kept,
    pipeline::Outcome,
    policy::{Method, Policy, TrainPolicy},
    revise::{self, TrainingPair},
    rows::{self},
    sample::Sample,
    store::{Store, StoreError},
    train,
};

use crate::world::*;

#[test]
fn receipts_of_another_aggregator_count_for_nothing() {
    let mut world = World::new();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.visit(), Outcome::AlreadyDelivered(RoundId(1)));
    // Enrolled anew, with another aggregator, whose first round has the same number.
    let key = SigningKey::from_bytes(&[8; 32]);
    world.device.expected.trust = trust(&key);
    world.device.link.key = key;
    for expected in [Outcome::Delivered(RoundId(1)), Outcome::AlreadyDelivered(RoundId(1))] {
        assert_eq!(world.visit(), expected);
    }
    assert_eq!(world.opened().len(), 2);
}

#[test]
fn what_another_guard_or_constitution_said_is_not_gone_on_with() {
    let mut world = World::new();
    world.tell(|told| told.is_away = true);
    world.device.visit().unwrap_err();
    assert!(world.has("round/pairs.json") && world.has("round/update.packed"));
    let mut config = world.device.guard.config().clone();
    (config.threshold, config.categories) = (1e-9, config.categories.clone());
    config.categories.iter_mut().for_each(|category| category.threshold = None);
    (config.prompt.threshold, config.pair.threshold) = (None, None);
    let guard = Guard::from_package(&world.device.model, &world.device.cancel).unwrap();
    world.device.guard = guard.with_thresholds(config).unwrap();
    world.device.visit().unwrap_err();
    let strict = world.device.store.read("round/pairs.json").unwrap();

    let mut constitution = world.device.reviser.constitution().clone();
    constitution.name.push_str(", of the owner");
    world.device.reviser =
        Reviser::from_package(&world.device.model).unwrap().with_constitution(constitution);
    world.device.store.write("round/pairs.json", b"of before").unwrap();
    world.device.visit().unwrap_err();
    assert_eq!(world.device.store.read("round/pairs.json").unwrap(), strict);
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.opened()[0].report.kept, 0, "everything is unsafe by that guard");
}

#[test]
fn what_its_owner_removed_is_made_again() {
    let world = World::new();
    world.tell(|told| told.is_away = true);
    world.device.visit().unwrap_err();
    for folder in ["round", "samples"] {
        fs::remove_dir_all(world.directory.path().join(folder)).unwrap();
    }
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::NoSamples);
    let good = samples("device-1.jsonl", 5);
    Store::open_shared(world.directory.path()).unwrap();
    kept::keep(&world.device.store, &rows::Parsed { good, bad: Vec::new() }, "again", 0).unwrap();
    fs::remove_dir_all(world.directory.path().join("round")).unwrap();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.opened()[0].report.sampled, 5);
}

/// A delta that is finite and larger than any update can say.
#[test]
fn an_update_that_cannot_be_packed_ends_its_round_only() {
    let world = World::new();
    let zeros = Residual::zeros(Arc::clone(world.device.model.layout()), Trainable::BOnly);
    let mut bytes = zeros.to_bytes();
    let values = bytes.len() - 4 * zeros.values().len();
    bytes[values..].chunks_exact_mut(4).for_each(|value| value.copy_from_slice(&1000f32.to_le_bytes()));
    world.device.store.write("residual.bin", &bytes).unwrap();
    for _ in 0..2 {
        assert_eq!(world.visit(), Outcome::Diverged(RoundId(1)));
    }
    assert!(world.opened().is_empty());
    world.device.store.remove("residual.bin").unwrap();
    world.begin(2);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(2)));
}

#[test]
fn a_device_with_nothing_fit_to_learn_stays_in_the_federation() {
    let mut world = World::new();
    world.device.policy = Policy::from_toml("[filter]\nthreshold = 1e-9\naction = \"drop\"\n").unwrap();
    for _ in 0..2 {
        assert_eq!(world.visit(), Outcome::NoSamples);
    }
    assert!(world.has("round/given-up.json"));
    // A kill came before the rest was removed.
    world.device.store.write("round/training.safetensors", b"of the round").unwrap();
    assert_eq!(world.visit(), Outcome::NoSamples);
    assert!(!world.has("round/training.safetensors"));
    // The owner changes the policy: the same round is looked at again.
    world.device.policy = Policy::default();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
}

#[test]
fn work_under_another_policy_is_not_sent() {
    let mut world = World::new();
    world.tell(|told| told.is_away = true);
    world.device.visit().unwrap_err();
    assert!(world.has("round/update.packed"));
    world.device.policy.train.samples_max = 3;
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.opened()[0].report.sampled, 3);
}

#[test]
fn a_damaged_file_of_a_round_is_made_again_with_the_same_result() {
    let world = World::new();
    world.tell(|told| told.is_away = true);
    world.device.visit().unwrap_err();
    let packed = world.device.store.read("round/update.packed").unwrap().unwrap();
    for name in ["pairs.json", "training.safetensors", "update.packed"] {
        world.device.store.write(&format!("round/{name}"), b"{\"damaged").unwrap();
    }
    world.tell(|told| told.is_away = false);
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    assert_eq!(world.opened()[0].digest, Digest::of(&packed));
}

#[test]
fn a_round_for_another_base_is_refused_with_both_hashes() {
    let world = World::new();
    world.tell(|told| told.task.as_mut().unwrap().base.0[0] ^= 1);
    let error = world.device.visit().unwrap_err();
    let (task, own) = (world.told.lock().unwrap().task.unwrap().base, world.device.expected.base);
    let text = error.to_string();
    assert!(text.contains(&task.to_string()) && text.contains(&own.to_string()), "{text}");
    assert_eq!(edge_client::cli::exit::code(&error.into()), 3);
}

/// Stops training behind a step.
struct Stop<'c> {
    after: u32,
    cancel: &'c Cancel,
    kept: Option<Vec<u8>>,
}

impl train::Watch for Stop<'_> {
    fn step(&mut self, step: u32, _: f32) {
        if step == self.after {
            self.cancel.cancel();
        }
    }

    fn checkpoint(&mut self, bytes: Vec<u8>) -> Result<(), StoreError> {
        self.kept = Some(bytes);
        Ok(())
    }
}

#[test]
fn training_goes_on_to_the_same_bits_and_the_same_report() {
    let (model, cancel) = (model(), Cancel::new());
    let (guard, reviser) =
        (Guard::from_package(&model, &cancel).unwrap(), Reviser::from_package(&model).unwrap());
    let mut policy = Policy::default();
    policy.train.checkpoint_steps = 3;
    let start = Adapter::init(Arc::clone(model.layout()), 1);
    let task = train::TrainTask {
        steps_max: 6,
        warmup_steps: 0,
        step_rows: 2,
        row_tokens_max: 128,
        learning_rate: 2e-3,
        weight_decay: 0.0,
        clip_norm: 1.0,
        proximal_mu: 0.0,
        trainable: Trainable::Both,
        seed: 3,
        correction: None,
        first_rank: 0,
    };
    // Two of three are harmful: their revisions make preference pairs. Rows alone and pairs are both drawn.
    let some: Vec<Sample> = [samples("device-1.jsonl", 4), samples("hostile.jsonl", 8)]
        .concat()
        .into_iter()
        .map(|(_, sample)| sample)
        .collect();
    let screened = filter::screen(&guard, &policy, some, &cancel, |_| ()).unwrap();
    let (pairs, counts) = revise::revise(&guard, &reviser, &policy, screened, 0, &cancel, |_| ()).unwrap();
    assert!(counts.kept >= 3 && counts.revised + counts.refused >= 6, "{counts:?}");
    for method in [Method::Sft, Method::Dpo] {
        policy.train.method = method;
        let run = |pairs: &[TrainingPair], checkpoint: Option<&[u8]>| {
            let mut keep = Keep::default();
            let trained =
                train::train(&model, &start, pairs, &task, &policy.train, checkpoint, &mut keep, &cancel)
                    .unwrap();
            (trained, keep)
        };
        let (whole, keep) = run(&pairs, None);
        let (resumed, kept) = run(&pairs, keep.0.as_deref());
        assert_eq!((keep.1, kept.1), (6, 3), "steps made");
        assert_eq!(resumed.delta(), whole.delta(), "{method:?}");
        let mut summary = *resumed.summary();
        assert_eq!(std::mem::take(&mut summary.resumed_step), 3);
        assert_eq!(summary, *whole.summary(), "{method:?}");
        assert!(summary.tokens > 0 && whole.delta().norm() > 0.0, "{method:?}: {summary:?}");
        // Every step's tokens are told, not the last one's.
        let half = train::TrainTask { steps_max: 3, ..task.clone() };
        let mut watch = Keep::default();
        let half =
            train::train(&model, &start, &pairs, &half, &policy.train, None, &mut watch, &cancel).unwrap();
        assert!(half.summary().tokens < summary.tokens, "{method:?}");
        // What is no checkpoint is not gone on with.
        let (anew, kept) = run(&pairs, Some(b"not a checkpoint"));
        assert_eq!((anew.delta(), kept.1), (whole.delta(), 6));
        // Stopped behind any step, it goes on with the next.
        let seldom = TrainPolicy { checkpoint_steps: 1_000, ..policy.train.clone() };
        for after in 1..6 {
            let cancel = Cancel::new();
            let mut stop = Stop { after, cancel: &cancel, kept: None };
            train::train(&model, &start, &pairs, &task, &seldom, None, &mut stop, &cancel).unwrap_err();
            let (kept, mut rest) = (stop.kept.unwrap(), Keep::default());
            let cancel = Cancel::new();
            let resumed =
                train::train(&model, &start, &pairs, &task, &seldom, Some(&kept), &mut rest, &cancel)
                    .unwrap();
            assert_eq!(rest.1, 6 - after as usize, "steps made");
            assert_eq!(resumed.delta(), whole.delta(), "{method:?}, stopped behind step {after}");
        }
    }
}
