//! Scores on the real library: equal to generation's own numbers, whatever way the rows are run.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use commonweal_adapter::Adapter;
use commonweal_runtime::{
    Cancel, InferError, OpenOptions, Prompt, RowScore, TrainingRow, common_prefix, mean_loss,
};
use support::{adapter, greedy, model, model_with, prompts, row};

#[test]
fn scoring_equals_the_logprob_that_generation_reports() {
    let model = model();
    let prepared = model.prepare(Some(&adapter(&model, 1))).unwrap();
    let prompts = prompts(&model, &["The sea is", "hello there", "z"]);
    let answers = model.generate(&prepared, &prompts, &greedy(20), &Cancel::new()).unwrap();
    let rows: Vec<TrainingRow> = prompts
        .iter()
        .zip(&answers)
        .map(|(prompt, answer)| {
            let ids = [prompt.ids.clone(), answer.tokens.clone()].concat();
            let weights = (0..ids.len()).map(|at| f32::from(at >= prompt.ids.len())).collect();
            TrainingRow { ids, weights }
        })
        .collect();
    let scores = model.score_rows(&prepared, &rows, &Cancel::new()).unwrap();
    for (score, answer) in scores.iter().zip(&answers) {
        assert!((score.logprob - answer.logprob).abs() < 1e-3, "{} {}", score.logprob, answer.logprob);
        assert_eq!(score.token_logprobs.len(), answer.tokens.len());
    }
    // The first token's probability is also what scoring it as a next token gives.
    for (row, prompt) in prompts.iter().enumerate() {
        let next = model.score_next(
            &prepared,
            None,
            std::slice::from_ref(prompt),
            &answers[row].tokens[..1],
            &Cancel::new(),
        );
        let (next, first) = (next.unwrap()[0][0], scores[row].token_logprobs[0]);
        assert!((next - first).abs() < 1e-4, "{next} {first}");
    }
}

#[test]
fn the_graph_of_the_base_is_that_of_an_adapter_of_zeros() {
    let model = model();
    assert!(model.package().infer_base_graph().is_some());
    let mut zeros = adapter(&model, 1);
    zeros.values_mut().fill(0.0);
    let rows = [row(&model, "colour of the sky? ", "blue"), row(&model, "hi ", "hello")];
    let scores = |adapter: Option<&Adapter>| {
        let prepared = model.prepare(adapter).unwrap();
        model.score_rows(&prepared, &rows, &Cancel::new()).unwrap()
    };
    for (base, zeros) in scores(None).iter().zip(&scores(Some(&zeros))) {
        assert!((base.logprob - zeros.logprob).abs() < 1e-4, "{} {}", base.logprob, zeros.logprob);
    }
}

#[test]
fn a_prefix_goes_on_after_the_sessions_were_closed() {
    let model = model();
    for adapter in [None, Some(adapter(&model, 2))] {
        let prepared = model.prepare(adapter.as_ref()).unwrap();
        let prompts = prompts(&model, &["Judge the text: good", "Judge the text: a longer one"]);
        let prefix = model.share_prefix(&prepared, common_prefix(&prompts), &Cancel::new()).unwrap();
        let score =
            || model.score_next(&prepared, Some(&prefix), &prompts, &[70, 71], &Cancel::new()).unwrap();
        let before = score();
        model.close_inference();
        // Its memory was given back.
        let told = format!("{prefix:?}");
        assert!(told.contains("capacity: 1,") && told.contains("is_read: false"), "{told}");
        assert_eq!(score(), before);
        assert!(format!("{prefix:?}").contains("is_read: true"));
        // Closed again before anything was read behind the prefix, and after a prompt without it.
        model.close_inference();
        model.close_inference();
        model.score_next(&prepared, None, &prompts, &[70, 71], &Cancel::new()).unwrap();
        assert_eq!(score(), before);
        // What was cancelled while the prefix was read again is no prefix.
        model.close_inference();
        let cancelled = Cancel::new();
        cancelled.cancel();
        model.score_next(&prepared, Some(&prefix), &prompts, &[70, 71], &cancelled).unwrap_err();
        assert_eq!(score(), before);
    }
}

#[test]
fn next_token_scores_do_not_depend_on_chunks_batches_or_prefix() {
    let whole = model();
    let small = model_with(OpenOptions { prefill_tokens_max: 5, ..OpenOptions::default() });
    let candidates = [70, 71, 72, 3];
    let policy = "Judge the text. Unsafe means harmful. Text: ";
    let texts: Vec<String> = ["good", "a longer one", "xy"].map(|text| format!("{policy}{text}")).to_vec();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let run = |model: &commonweal_runtime::Model, shared: bool, single: bool| -> Vec<f32> {
        let prepared = model.prepare(Some(&adapter(model, 2))).unwrap();
        let prompts = prompts(model, &texts);
        let prefix = shared.then(|| {
            assert!(common_prefix(&prompts).len() >= policy.len());
            model.share_prefix(&prepared, common_prefix(&prompts), &Cancel::new()).unwrap()
        });
        let score = |prompts: &[Prompt]| {
            model.score_next(&prepared, prefix.as_ref(), prompts, &candidates, &Cancel::new()).unwrap()
        };
        let rows = if single { prompts.chunks(1).flat_map(score).collect() } else { score(&prompts) };
        rows.into_iter().flatten().collect()
    };
    let expected = run(&whole, false, false);
    assert_eq!(expected.len(), 12);
    for (model, shared, single) in
        [(&whole, true, false), (&whole, false, true), (&small, false, false), (&small, true, true)]
    {
        for (got, expected) in run(model, shared, single).iter().zip(&expected) {
            assert!((got - expected).abs() < 1e-3, "{got} {expected}");
        }
    }
}

#[test]
fn candidates_over_the_whole_vocabulary_sum_to_one() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let all: Vec<u32> = (0..288).collect();
    let scores =
        model.score_next(&prepared, None, &prompts(&model, &["abc", "d"]), &all, &Cancel::new()).unwrap();
    for row in scores {
        let sum: f64 = row.iter().map(|logprob| f64::from(*logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-4, "{sum}");
    }
}

#[test]
fn row_scores_do_not_depend_on_how_rows_are_run() {
    let rows_of = |model: &commonweal_runtime::Model| {
        let long = "many words ".repeat(12);
        vec![
            row(model, "a", "b"),
            row(model, &long, "end"),
            row(model, "question ", &long),
            row(model, "x", "yz"),
        ]
    };
    let (whole, small) =
        (model(), model_with(OpenOptions { prefill_tokens_max: 16, ..OpenOptions::default() }));
    let run = |model: &commonweal_runtime::Model| {
        let prepared = model.prepare(Some(&adapter(model, 3))).unwrap();
        model.score_rows(&prepared, &rows_of(model), &Cancel::new()).unwrap()
    };
    let (one, two) = (run(&whole), run(&small));
    for (one, two) in one.iter().zip(&two) {
        assert_eq!(one.token_logprobs.len(), two.token_logprobs.len());
        for (one, two) in one.token_logprobs.iter().zip(&two.token_logprobs) {
            assert!((one - two).abs() < 1e-3, "{one} {two}");
        }
    }
    let weights: Vec<u32> = one.iter().map(|score| score.weight as u32).collect();
    assert_eq!(weights, [1, 3, 132, 2]);
    assert!(mean_loss(&one).unwrap() > 0.0);
    assert_eq!(mean_loss(&[]), None);
}

#[test]
fn bad_rows_are_refused() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let run = |ids: Vec<u32>, weights: Vec<f32>| {
        model.score_rows(&prepared, &[TrainingRow { ids, weights }], &Cancel::new())
    };
    assert!(matches!(run(vec![5; 3], vec![1.0; 2]), Err(InferError::Weights { expected: 3, got: 2, .. })));
    assert!(matches!(run(vec![5; 2], vec![0.0, f32::NAN]), Err(InferError::Weights { .. })));
    assert!(matches!(
        run(vec![5; 258], vec![1.0; 258]),
        Err(InferError::TooLong { limit: 257, got: 258, .. })
    ));
    assert!(matches!(run(vec![5, 999], vec![1.0; 2]), Err(InferError::Token { got: 999, .. })));
    assert_eq!(run(vec![5; 257], vec![1.0; 257]).unwrap()[0].token_logprobs.len(), 256);
    assert_eq!(run(vec![5; 4], vec![0.0; 4]).unwrap(), [RowScore::default()]);
    let scores = model.score_next(&prepared, None, &prompts(&model, &["a"]), &[288], &Cancel::new());
    assert!(matches!(scores, Err(InferError::Token { got: 288, .. })), "{scores:?}");
}
