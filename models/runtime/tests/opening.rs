//! A model at rest, and openings that nobody waits for any more, on the real library.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use std::{
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use commonweal_adapter::Adapter;
use commonweal_runtime::{
    Asking, Cancel, InferError, Model, OpenError, OpenOptions, TrainError, TrainOptions, Trainer,
    common_prefix, memory, settle,
};
use support::{adapter, prompts, row};

/// Held by tests that ask for memory, whose budget is the process's.
static BUDGET: Mutex<()> = Mutex::new(());

const ASKING: Asking = Asking { what: "opening the package", lower: "a smaller one needs less" };

/// A call that takes so long to begin an opening never begins one.
const PATIENCE: Duration = Duration::from_secs(60);

/// Begins a call on a closed model and cancels it when it holds a session, which it does from before that is opened. A
/// thread that cancels may be late for once: tried again, until a call was cancelled before it had its session.
fn leave_an_opening(model: &Model, call: impl Fn(&Cancel) -> bool) {
    let is_left = || {
        model.close();
        let cancel = Cancel::new();
        let says_so = thread::scope(|scope| {
            scope.spawn(|| {
                // A call that fails before it opens anything is told below, and not waited for.
                let begun = Instant::now();
                while !model.is_open() && begun.elapsed() < PATIENCE {
                    thread::yield_now();
                }
                cancel.cancel();
            });
            call(&cancel)
        });
        settle();
        says_so && !model.is_open()
    };
    assert!((0..50).any(|_| is_left()), "every opening was waited for, or none was said to be cancelled");
}

#[test]
fn a_call_that_waits_for_a_session_is_cancelled_and_the_next_one_opens_it() {
    let model = support::model();
    for adapter in [None, Some(adapter(&model, 1))] {
        let prepared = model.prepare(adapter.as_ref()).unwrap();
        let prompts = prompts(&model, &["The sea is", "hello there"]);
        let score = |cancel: &Cancel| model.score_next(&prepared, None, &prompts, &[70, 71], cancel);
        let before = score(&Cancel::new()).unwrap();
        leave_an_opening(&model, |cancel| matches!(score(cancel), Err(InferError::Cancelled)));
        assert_eq!(score(&Cancel::new()).unwrap(), before);
    }
}

#[test]
fn a_step_that_waits_for_its_session_is_cancelled_and_made_later() {
    let model = support::model();
    let rows = [row(&model, "colour of the sky? ", "blue")];
    let trainer = || {
        let start = Adapter::init(Arc::clone(model.layout()), 3);
        Trainer::new(&model, start, TrainOptions::default()).unwrap()
    };
    let loss = trainer().step(&rows, &Cancel::new()).unwrap().loss;
    leave_an_opening(&model, |cancel| matches!(trainer().step(&rows, cancel), Err(TrainError::Cancelled)));
    assert_eq!(trainer().step(&rows, &Cancel::new()).unwrap().loss.to_bits(), loss.to_bits());
}

#[test]
fn a_model_at_rest_opens_with_its_first_call_if_there_is_memory_and_rests_again() {
    let _budget = BUDGET.lock().unwrap();
    let open = support::model();
    let rest =
        Model::at_rest(&support::library(), &support::package(), OpenOptions::default(), ASKING).unwrap();
    let rows = [row(&rest, "colour of the sky? ", "blue"), row(&rest, "hi ", "hello")];
    let score = |model: &Model| {
        model.score_rows(&model.prepare(None).unwrap(), &rows, &Cancel::new()).map(|scores| scores[0].logprob)
    };
    let expected = score(&open).unwrap();
    let prompts = prompts(&rest, &["Judge the text: good", "Judge the text: a longer one"]);
    let prepared = rest.prepare(None).unwrap();
    let prefix = rest.prefix_at_rest(&prepared, common_prefix(&prompts)).unwrap();
    for _ in 0..2 {
        assert!(!rest.is_open());
        assert_eq!(score(&rest).unwrap().to_bits(), expected.to_bits());
        assert!(rest.is_open());
        let behind =
            |model: &Model| model.score_next(&prepared, Some(&prefix), &prompts, &[70], &Cancel::new());
        assert_eq!(behind(&rest).unwrap(), behind(&rest).unwrap());
        rest.close();
    }
    if cfg!(target_os = "linux") {
        memory::set_budget(Some(1));
        let refused = score(&rest).unwrap_err();
        memory::set_budget(None);
        assert!(matches!(&refused, InferError::Open(OpenError::Memory(error)) if error.what == ASKING.what));
        assert!(!rest.is_open());
        assert_eq!(score(&rest).unwrap().to_bits(), expected.to_bits());
    }
}

#[test]
fn what_is_wrong_with_a_package_at_rest_is_told_at_once_but_for_its_graphs() {
    let _budget = BUDGET.lock().unwrap();
    let refusal = |file: &str, bytes: &[u8]| {
        let folder = tempfile::tempdir().unwrap();
        let package = support::altered(folder.path(), |_| (), file, bytes);
        let model = Model::at_rest(&support::library(), &package, OpenOptions::default(), ASKING)?;
        let (prepared, rows) =
            (model.prepare(Some(&adapter(&model, 1))).unwrap(), [row(&model, "hi ", "hello")]);
        let error = model.score_rows(&prepared, &rows, &Cancel::new()).unwrap_err();
        Ok::<_, OpenError>(error.to_string())
    };
    assert!(matches!(refusal("tokenizer.json", b"{}"), Err(OpenError::Tokenizer(_))));
    assert!(matches!(refusal("chat_template.jinja", b"{% for %}"), Err(OpenError::Template(_))));
    let graph = refusal("infer.onnx", b"no graph").unwrap();
    assert!(graph.contains("infer.onnx"), "{graph}");
}
