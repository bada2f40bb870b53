//! Training on the real library: the step is AdamW of the true gradient, and only what should change changes.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use std::{collections::BTreeSet, sync::Arc};

use commonweal_adapter::scaffold::Correction;
use commonweal_adapter::{Adapter, AdapterLayout, Module, Part, Target, Trainable, stack};
use commonweal_package::TrainGraph;
use commonweal_runtime::{
    AdamW, AdaptError, Cancel, Model, Schedule, TrainError, TrainOptions, Trainer, TrainingRow, mean_loss,
};
use safetensors::SafeTensors;
use support::{adapter, model, row};

fn options() -> TrainOptions {
    TrainOptions { learning_rate: 5e-3, steps_max: 1000, clip_norm: None, ..TrainOptions::default() }
}

fn rows(model: &Model) -> Vec<TrainingRow> {
    vec![
        row(model, "colour of the sky? ", "blue"),
        row(model, "two and two? ", "four, of course"),
        row(model, "hi ", "hello"),
    ]
}

fn trainer(model: &Model, options: TrainOptions) -> Trainer {
    Trainer::new(model, Adapter::init(Arc::clone(model.layout()), 1), options).unwrap()
}

/// A tensor of a saved state.
fn saved(trainer: &Trainer, name: &str) -> Vec<f32> {
    let bytes = trainer.checkpoint().unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = tensors.tensor(name).unwrap().data().to_vec();
    data.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
}

fn distance(left: &Adapter, right: &Adapter) -> f64 {
    let squares = left.values().iter().zip(right.values()).map(|(l, r)| f64::from(l - r).powi(2));
    squares.sum::<f64>().sqrt()
}

#[test]
fn training_reduces_the_loss_and_inference_agrees() {
    let model = model();
    let rows = rows(&model);
    let mut trainer = trainer(&model, options());
    let first = trainer.step(&rows, &Cancel::new()).unwrap();
    assert_eq!((first.step, first.tokens), (1, 4 + 15 + 5));
    for _ in 0..39 {
        trainer.step(&rows, &Cancel::new()).unwrap();
    }
    let now = trainer.adapter().clone();
    let last = trainer.step(&rows, &Cancel::new()).unwrap();
    assert!(last.loss < first.loss * 0.6, "{} {}", first.loss, last.loss);
    // The inference graph takes the adapter fused, the gradient graph takes it canonical: same network, same loss.
    let prepared = model.prepare(Some(&now)).unwrap();
    let loss = mean_loss(&model.score_rows(&prepared, &rows, &Cancel::new()).unwrap()).unwrap();
    assert!((loss - last.loss).abs() < 2e-3, "{loss} {}", last.loss);
}

#[test]
fn the_frugal_graph_gives_the_same_step_and_the_upper_one_leaves_the_lower_half() {
    let model = model();
    let rows = rows(&model);
    let start = adapter(&model, 1);
    let after = |graph| {
        let options = TrainOptions { graph, ..options() };
        let mut trainer = Trainer::new(&model, start.clone(), options).unwrap();
        let report = trainer.step(&rows, &Cancel::new()).unwrap();
        (report.loss, saved(&trainer, "first_moment"), trainer.finish())
    };
    let (full, frugal, upper) =
        (after(TrainGraph::Full), after(TrainGraph::Frugal), after(TrainGraph::Upper));
    for other in [&frugal, &upper] {
        assert!((full.0 - other.0).abs() < 1e-5, "{} {}", full.0, other.0);
    }
    let layers = model.layout().layers();
    for tensor in model.layout().tensors() {
        let near = |other: &[f32]| {
            let pairs = full.1[tensor.range.clone()].iter().zip(&other[tensor.range.clone()]);
            pairs.map(|(a, b)| (a - b).abs() / (1.0 + a.abs())).fold(0.0_f32, f32::max) < 1e-5
        };
        assert!(near(&frugal.1), "{} of the frugal graph", tensor.name());
        if tensor.layer >= layers / 2 {
            assert!(near(&upper.1), "{} of the upper graph", tensor.name());
        } else {
            let values = |adapter: &Adapter| adapter.values()[tensor.range.clone()].to_vec();
            assert_eq!(values(&upper.2), values(&start), "{} is not trained", tensor.name());
        }
    }
}

#[test]
fn first_step_is_adamw_of_the_true_gradient() {
    let model = model();
    let rows = rows(&model);
    let start = adapter(&model, 1);
    let constants = AdamW { weight_decay: 0.1, ..AdamW::default() };
    let options = TrainOptions { optimizer: constants, ..options() };
    let mut trainer = Trainer::new(&model, start.clone(), options.clone()).unwrap();
    let report = trainer.step(&rows, &Cancel::new()).unwrap();
    let gradient: Vec<f64> = saved(&trainer, "first_moment").iter().map(|m| f64::from(*m) / 0.1).collect();
    // The state holds β-weighted means of the gradient, and the values moved as Loshchilov and Hutter's equations say.
    let second = saved(&trainer, "second_moment");
    for (index, gradient) in gradient.iter().enumerate() {
        assert!(
            (f64::from(second[index]) - 0.001 * gradient * gradient).abs()
                < 1e-6 * (1.0 + gradient * gradient)
        );
        let decayed = f64::from(start.values()[index]) * (1.0 - 5e-3 * 0.1);
        let expected = decayed - 5e-3 * gradient / (gradient.abs() + 1e-8);
        let got = f64::from(trainer.adapter().values()[index]);
        assert!(
            (got - expected).abs() < 1e-5 || gradient.abs() < 1e-6,
            "{index}: {got} {expected} {gradient}"
        );
    }
    let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
    assert!((norm - report.grad_norm).abs() < 1e-4 * norm, "{norm} {}", report.grad_norm);
    // And the gradient is that of the reported loss: central differences at the largest values of every kind of tensor.
    let loss_at = |index: usize, change: f32| {
        let mut moved = start.clone();
        moved.values_mut()[index] += change;
        Trainer::new(&model, moved, options.clone()).unwrap().step(&rows, &Cancel::new()).unwrap().loss
    };
    let mut kinds = BTreeSet::new();
    for spec in model.layout().tensors() {
        if !kinds.insert((spec.target, spec.part)) {
            continue;
        }
        let largest = spec.range.max_by(|l, r| gradient[*l].abs().total_cmp(&gradient[*r].abs())).unwrap();
        let slope = (loss_at(largest, 1e-2) - loss_at(largest, -1e-2)) / 2e-2;
        let exact = gradient[largest];
        assert!(
            (slope - exact).abs() < 0.02 * exact.abs() + 2e-4,
            "{:?}: {slope} {exact}",
            (spec.target, spec.part)
        );
    }
    assert_eq!(kinds.len(), 14);
}

#[test]
fn split_steps_are_the_same_step() {
    let model = model();
    let rows = rows(&model);
    let run = |accumulation| {
        let mut trainer = trainer(&model, TrainOptions { accumulation, ..options() });
        let report = trainer.step(&rows, &Cancel::new()).unwrap();
        (report.loss, saved(&trainer, "first_moment"))
    };
    let (whole, split) = (run(1), run(3));
    assert!((whole.0 - split.0).abs() < 1e-5, "{} {}", whole.0, split.0);
    for (whole, split) in whole.1.iter().zip(&split.1) {
        assert!((whole - split).abs() < 1e-6, "{whole} {split}");
    }
}

#[test]
fn restored_training_goes_on_bit_for_bit() {
    let model = model();
    let rows = rows(&model);
    let options = TrainOptions {
        schedule: Schedule::Cosine,
        warmup_steps: 2,
        steps_max: 10,
        proximal_mu: 0.1,
        clip_norm: Some(0.5),
        ..options()
    };
    let mut straight = trainer(&model, options.clone());
    let mut saved = None;
    for step in 0..6 {
        if step == 3 {
            saved = Some(straight.checkpoint().unwrap());
        }
        straight.step(&rows, &Cancel::new()).unwrap();
    }
    let mut resumed = Trainer::restore(&model, &saved.unwrap()).unwrap();
    assert_eq!((resumed.steps_done(), resumed.options()), (3, &options));
    for _ in 3..6 {
        resumed.step(&rows, &Cancel::new()).unwrap();
    }
    // Equal bytes: values, start, both moments and the count. The header is a map, so compare after parsing.
    for name in ["adapter", "start", "first_moment", "second_moment"] {
        let bits =
            |trainer: &Trainer| self::saved(trainer, name).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&straight), bits(&resumed), "{name}");
    }
    assert_eq!(straight.steps_done(), resumed.steps_done());
}

#[test]
fn damaged_and_foreign_states_are_refused() {
    let model = model();
    let state = trainer(&model, options()).checkpoint().unwrap();
    for end in [0, 7, 100, state.len() - 1] {
        assert!(matches!(Trainer::restore(&model, &state[..end]), Err(TrainError::State { .. })), "{end}");
    }
    let at = |needle: &[u8]| state.windows(needle.len()).position(|window| window == needle).unwrap();
    let mut other = state.clone();
    let base = at(model.manifest().base.to_string().as_bytes());
    other[base] = if other[base] == b'0' { b'1' } else { b'0' };
    let error = Trainer::restore(&model, &other).unwrap_err().to_string();
    assert!(error.contains("base"), "{error}");
    let mut infinite = state.clone();
    let length = infinite.len();
    infinite[length - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    assert!(matches!(Trainer::restore(&model, &infinite), Err(TrainError::State { .. })));
    // The bytes of every tensor end with its last value; `second_moment` is one of them.
    let tensors = SafeTensors::deserialize(&state).unwrap();
    let moment = tensors.tensor("second_moment").unwrap().data();
    let end = moment.as_ptr_range().end as usize - state.as_ptr() as usize;
    let mut negative = state.clone();
    negative[end - 4..end].copy_from_slice(&(-1.0_f32).to_le_bytes());
    let error = Trainer::restore(&model, &negative).unwrap_err().to_string();
    assert!(error.contains("second_moment"), "{error}");
}

#[test]
fn b_only_leaves_a_untouched() {
    let model = model();
    let rows = rows(&model);
    let start = adapter(&model, 2);
    let optimizer = AdamW { weight_decay: 0.1, ..AdamW::default() };
    let options = TrainOptions { trainable: Trainable::BOnly, optimizer, proximal_mu: 0.5, ..options() };
    let mut trainer = Trainer::new(&model, start.clone(), options).unwrap();
    for _ in 0..3 {
        trainer.step(&rows, &Cancel::new()).unwrap();
    }
    for spec in model.layout().tensors() {
        let (before, after) =
            (&start.values()[spec.range.clone()], &trainer.adapter().values()[spec.range.clone()]);
        assert_eq!(before == after, spec.part == Part::A, "{}", spec.name());
    }
}

#[test]
fn proximal_term_pulls_back_to_the_start() {
    let model = model();
    let rows = rows(&model);
    let moved = |proximal_mu| {
        let mut trainer = trainer(&model, TrainOptions { proximal_mu, ..options() });
        let mut norm = 0.0;
        for _ in 0..30 {
            norm = trainer.step(&rows, &Cancel::new()).unwrap().grad_norm;
        }
        (distance(trainer.adapter(), trainer.start()), norm)
    };
    let (free, weak, strong) = (moved(0.0), moved(1.0), moved(100.0));
    assert!(weak.0 < free.0 && strong.0 < 0.7 * weak.0, "{free:?} {weak:?} {strong:?}");
}

#[test]
fn proximal_term_adds_its_derivative_to_the_gradient() {
    let model = model();
    let rows = rows(&model);
    let two_steps = |proximal_mu| {
        let mut trainer = trainer(&model, TrainOptions { proximal_mu, ..options() });
        trainer.step(&rows, &Cancel::new()).unwrap();
        let moved = trainer.adapter().clone();
        trainer.step(&rows, &Cancel::new()).unwrap();
        (moved, saved(&trainer, "first_moment"), trainer.start().clone())
    };
    // The term is 0 where training begins, so both stand at the same place when they make the second step.
    let (free, held) = (two_steps(0.0), two_steps(3.0));
    assert_eq!(free.0, held.0);
    for (index, (now, start)) in held.0.values().iter().zip(held.2.values()).enumerate() {
        let (got, expected) = ((held.1[index] - free.1[index]) / 0.1, 3.0 * (now - start));
        assert!((got - expected).abs() < 1e-4, "{index}: {got} {expected}");
    }
}

#[test]
fn steps_are_as_long_as_the_schedule_says() {
    let model = model();
    let rows = rows(&model);
    let options = TrainOptions {
        schedule: Schedule::Linear,
        warmup_steps: 2,
        steps_max: 6,
        learning_rate: 6e-3,
        ..options()
    };
    let mut trainer = trainer(&model, options);
    for expected in [2e-3, 4e-3, 6e-3, 4.5e-3, 3e-3, 1.5e-3] {
        let before = trainer.adapter().clone();
        let report = trainer.step(&rows, &Cancel::new()).unwrap();
        assert!((report.learning_rate - expected).abs() < 1e-12, "{report:?}");
        let moved = before.values().iter().zip(trainer.adapter().values()).map(|(b, a)| (a - b).abs());
        let furthest = f64::from(moved.fold(0.0_f32, f32::max));
        // AdamW's first step moves a value by the learning rate, and steps along one direction by nearly that.
        assert!((0.5 * expected..1.5 * expected).contains(&furthest), "{furthest} {expected}");
    }
}

#[test]
fn clipped_steps_see_a_gradient_of_the_limit() {
    let model = model();
    let mut trainer = trainer(&model, TrainOptions { clip_norm: Some(1e-3), ..options() });
    let report = trainer.step(&rows(&model), &Cancel::new()).unwrap();
    let norm =
        saved(&trainer, "first_moment").iter().map(|m| (f64::from(*m) / 0.1).powi(2)).sum::<f64>().sqrt();
    assert!(report.grad_norm > 1e-2 && (norm - 1e-3).abs() < 1e-5, "{} {norm}", report.grad_norm);
}

#[test]
fn cancelled_and_failed_steps_change_nothing() {
    let model = model();
    let good = rows(&model);
    let mut trainer = trainer(&model, TrainOptions { steps_max: 2, ..options() });
    trainer.step(&good, &Cancel::new()).unwrap();
    let before = trainer.adapter().clone();
    let cancel = Cancel::new();
    cancel.cancel();
    assert!(matches!(trainer.step(&good, &cancel), Err(TrainError::Cancelled)));
    let mut refuse = |ids: Vec<u32>, weights: Vec<f32>| {
        trainer.step(&[good[0].clone(), TrainingRow { ids, weights }], &Cancel::new()).unwrap_err()
    };
    assert!(matches!(refuse(vec![5], vec![1.0]), TrainError::Row { row: 1, .. }));
    assert!(matches!(refuse(vec![5; 258], vec![1.0; 258]), TrainError::Row { row: 1, .. }));
    assert!(matches!(refuse(vec![5, 288], vec![1.0; 2]), TrainError::Row { row: 1, .. }));
    assert!(matches!(refuse(vec![5, 6], vec![1.0; 3]), TrainError::Row { row: 1, .. }));
    assert!(matches!(refuse(vec![5, 6], vec![1.0, f32::NAN]), TrainError::Row { row: 1, .. }));
    let nothing = trainer.step(&[TrainingRow { ids: vec![5, 6], weights: vec![1.0, 0.0] }], &Cancel::new());
    assert!(matches!(nothing, Err(TrainError::NothingToLearn { rows: 1 })), "{nothing:?}");
    let huge = TrainingRow { ids: vec![5, 6], weights: vec![0.0, f32::MAX] };
    let mut twice = good.clone();
    twice.extend([huge.clone(), huge]);
    // Weights whose sum overflows a float leave a loss that is no number, or one that is fine: never a broken adapter.
    let overflow = trainer.step(&twice, &Cancel::new());
    assert!(matches!(overflow, Err(TrainError::NotFinite { .. })), "{overflow:?}");
    assert_eq!((trainer.adapter(), trainer.steps_done()), (&before, 1));
    trainer.step(&good, &Cancel::new()).unwrap();
    assert!(matches!(trainer.step(&good, &Cancel::new()), Err(TrainError::Finished { steps_max: 2 })));
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let model = model();
    let module = Module { target: Target::Q, inputs: 64, outputs: 64 };
    let layout =
        |layers, modules: Vec<Module>| Arc::new(AdapterLayout::new(layers, 4, 8.0, modules).unwrap());
    let new = |adapter| Trainer::new(&model, adapter, options()).unwrap_err();
    let depth = new(Adapter::zeros(layout(3, vec![module])));
    assert!(matches!(depth, TrainError::Adapter(AdaptError::Layers { expected: 2, got: 3 })), "{depth}");
    let width = new(Adapter::zeros(layout(2, vec![Module { inputs: 32, ..module }])));
    assert!(matches!(width, TrainError::Adapter(AdaptError::Shape { .. })), "{width}");
    let targets = new(Adapter::zeros(layout(2, vec![module])));
    assert!(matches!(targets, TrainError::Targets { .. }), "{targets}");
    let mut broken = Adapter::zeros(Arc::clone(model.layout()));
    broken.values_mut()[9] = f32::NEG_INFINITY;
    assert!(matches!(new(broken), TrainError::Adapter(AdaptError::NotFinite { index: 9, .. })));
    let zeros = Adapter::zeros(Arc::clone(model.layout()));
    for bad in [
        TrainOptions { learning_rate: f64::NAN, ..options() },
        TrainOptions { accumulation: 0, ..options() },
        TrainOptions { clip_norm: Some(0.0), ..options() },
        TrainOptions { proximal_mu: -1.0, ..options() },
        TrainOptions { optimizer: AdamW { betas: (0.9, 1.0), ..AdamW::default() }, ..options() },
    ] {
        let error = Trainer::new(&model, zeros.clone(), bad).unwrap_err();
        assert!(matches!(error, TrainError::Option { .. }), "{error}");
    }
    // Another rank than the package's default is fine: the graph takes any.
    let other = AdapterLayout::new(2, 7, 3.0, model.layout().modules().to_vec()).unwrap();
    let mut trainer = Trainer::new(&model, Adapter::init(Arc::new(other), 3), options()).unwrap();
    assert!(trainer.step(&rows(&model), &Cancel::new()).unwrap().loss.is_finite());
}

#[test]
fn closed_training_opens_again_by_itself() {
    let model = model();
    let mut trainer = trainer(&model, options());
    let first = trainer.step(&rows(&model), &Cancel::new()).unwrap();
    model.close_training();
    let second = trainer.step(&rows(&model), &Cancel::new()).unwrap();
    assert!(second.loss < first.loss);
}

#[test]
fn a_correction_shifts_each_gradient_and_survives_an_interruption() {
    let model = model();
    let rows = rows(&model);
    let mut shift = Adapter::zeros(Arc::clone(model.layout()));
    shift.values_mut().iter_mut().enumerate().for_each(|(at, value)| *value = (at % 7) as f32 * 1e-3);
    let zeros = Adapter::zeros(Arc::clone(model.layout()));
    let options = TrainOptions { clip_norm: None, ..options() };
    let corrected = |shift: &Adapter| {
        let correction = Correction::new(shift, &zeros).unwrap();
        trainer(&model, options.clone()).corrected(correction).unwrap()
    };
    let (mut plain, mut shifted) = (corrected(&zeros), corrected(&shift));
    for trainer in [&mut plain, &mut shifted] {
        trainer.step(&rows, &Cancel::new()).unwrap();
    }
    // Both began at the same place: the plain gradient is the same, and the first moment is a tenth of the corrected.
    assert_eq!(plain.correction().unwrap().mean(), shifted.correction().unwrap().mean());
    let (plain_moment, moment) = (saved(&plain, "first_moment"), saved(&shifted, "first_moment"));
    for (at, shift) in shift.values().iter().enumerate() {
        let got = (moment[at] - plain_moment[at]) / 0.1;
        assert!((got - shift).abs() < 1e-5, "{at}: {got} {shift}");
    }

    let mut resumed = Trainer::restore(&model, &shifted.checkpoint().unwrap()).unwrap();
    for trainer in [&mut shifted, &mut resumed] {
        trainer.step(&rows, &Cancel::new()).unwrap();
    }
    assert_eq!(resumed.correction().unwrap().steps(), 2);
    assert_eq!(resumed.correction(), shifted.correction());
    assert_eq!(resumed.adapter(), shifted.adapter());
}

#[test]
fn ranks_beside_those_that_are_trained_stay_and_are_seen() {
    let model = model();
    let rows = rows(&model);
    let (release, own) = (adapter(&model, 3), Adapter::init(Arc::clone(model.layout()), 4));
    let both = stack(&release, &[&own]).unwrap();
    let kept = release.layout().rank();
    let trained = |start: &Adapter, first: usize| {
        let mut trainer = Trainer::new(&model, start.clone(), options()).unwrap().from_rank(first).unwrap();
        let losses: Vec<f64> = (0..20).map(|_| trainer.step(&rows, &Cancel::new()).unwrap().loss).collect();
        (trainer.finish(), losses)
    };
    let (beside, losses) = trained(&both, kept);
    assert_eq!(stack::part(&beside, 0..kept).unwrap().values(), release.values());
    assert!(losses[19] < losses[0] * 0.8, "{losses:?}");
    // What is trained is trained for the release that it lies beside: alone, it is another one.
    let (alone, first) = trained(&own, 0);
    assert!((first[0] - losses[0]).abs() > 1e-3);
    let part = stack::part(&beside, kept..2 * kept).unwrap();
    assert!(distance(&part, &alone) > 1e-3);
    // The inference graph makes the same of both as the gradient graph does.
    let prepared = model.prepare(Some(&beside)).unwrap();
    let scored = mean_loss(&model.score_rows(&prepared, &rows, &Cancel::new()).unwrap()).unwrap();
    assert!(scored < losses[0] * 0.8, "{scored} {losses:?}");
    assert!(matches!(
        Trainer::new(&model, both, options()).unwrap().from_rank(2 * kept),
        Err(TrainError::Option { name: "first rank", .. })
    ));
}
