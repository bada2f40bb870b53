//! Generation on the real library: adapters over one base, ragged batches, chunks, prefixes, stops, limits. What touches
//! the cache is held for both of its forms.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use commonweal_compiler::{Accuracy, compile::CacheBits};
use commonweal_package::Package;
use commonweal_runtime::{
    Cancel, GenerateOptions, Generated, InferError, Model, OpenOptions, Prompt, StopReason,
};
use support::{CACHES, adapter, build_with, cached_model, greedy, model, model_with, prompts};

const TEXTS: [&str; 4] = ["The sea is", "a", "Once upon a time there was a very long prompt that", "x = "];

fn same(left: &[Generated], right: &[Generated]) {
    assert_eq!(left.len(), right.len());
    for (left, right) in left.iter().zip(right) {
        assert_eq!((&left.tokens, &left.text, left.stop), (&right.tokens, &right.text, right.stop));
        assert!((left.logprob - right.logprob).abs() < 1e-3, "{} {}", left.logprob, right.logprob);
    }
}

#[test]
fn two_adapters_over_one_base_give_what_each_gives_alone() {
    for cache in CACHES {
        let shared = cached_model(cache, OpenOptions::default());
        let (one, two) = (adapter(&shared, 1), adapter(&shared, 2));
        let alone = |adapter| {
            let model = cached_model(cache, OpenOptions::default());
            let prepared = model.prepare(adapter).unwrap();
            model.generate(&prepared, &prompts(&model, &TEXTS), &greedy(12), &Cancel::new()).unwrap()
        };
        let expected = [alone(Some(&one)), alone(Some(&two)), alone(None)];
        assert_ne!(expected[0][0].tokens, expected[1][0].tokens);
        assert_ne!(expected[0][0].tokens, expected[2][0].tokens);
        let prepared = [Some(&one), Some(&two), None].map(|adapter| shared.prepare(adapter).unwrap());
        for turn in [0, 1, 2, 1, 0, 0, 2] {
            let got =
                shared.generate(&prepared[turn], &prompts(&shared, &TEXTS), &greedy(12), &Cancel::new());
            assert_eq!(got.unwrap(), expected[turn]);
        }
    }
}

#[test]
fn ragged_batch_gives_what_each_row_gives_alone() {
    for cache in CACHES {
        let model = cached_model(cache, OpenOptions::default());
        let prepared = model.prepare(Some(&adapter(&model, 3))).unwrap();
        let prompts = prompts(&model, &TEXTS);
        let run =
            |prompts: &[Prompt]| model.generate(&prepared, prompts, &greedy(20), &Cancel::new()).unwrap();
        let alone: Vec<Generated> =
            prompts.iter().flat_map(|prompt| run(std::slice::from_ref(prompt))).collect();
        same(&run(&prompts), &alone);
    }
}

#[test]
fn small_chunks_and_small_groups_change_nothing() {
    for cache in CACHES {
        let whole = cached_model(cache, OpenOptions::default());
        for options in [
            OpenOptions { prefill_tokens_max: 7, ..OpenOptions::default() },
            OpenOptions { batch_max: 3, ..OpenOptions::default() },
            OpenOptions { cache_bytes_max: 1, ..OpenOptions::default() },
        ] {
            let small = cached_model(cache, options);
            let run = |model: &Model| {
                let prepared = model.prepare(Some(&adapter(model, 4))).unwrap();
                model.generate(&prepared, &prompts(model, &TEXTS), &greedy(10), &Cancel::new()).unwrap()
            };
            same(&run(&small), &run(&whole));
        }
    }
}

#[test]
fn shared_prefix_changes_nothing_even_when_prompts_outgrow_it() {
    for cache in CACHES {
        let model = cached_model(cache, OpenOptions::default());
        let prepared = model.prepare(Some(&adapter(&model, 5))).unwrap();
        let policy = "Policy: be kind, be brief. ";
        let long = format!("{policy}{}", "and so on ".repeat(15));
        let texts = [&*format!("{policy}One?"), "no policy here", &*long, policy, &*format!("{policy}Two!")];
        let prompts = prompts(&model, &texts);
        // Short enough that the long prompt makes the prefix's buffer grow.
        let ids = model.tokenizer().encode("Policy: be ").unwrap();
        let prefix = model.share_prefix(&prepared, &ids, &Cancel::new()).unwrap();
        let options = greedy(8);
        let with = |prompts: &[Prompt]| {
            model
                .generate_streaming(
                    &prepared,
                    Some(&prefix),
                    prompts,
                    &options,
                    &mut |_, _| (),
                    &Cancel::new(),
                )
                .unwrap()
        };
        // Alone, a prompt is read into the cache that decodes it: nothing is copied from another one.
        let alone = |prompt| {
            model.generate(&prepared, std::slice::from_ref(prompt), &options, &Cancel::new()).unwrap()
        };
        let without: Vec<Generated> = prompts.iter().flat_map(alone).collect();
        same(&with(&prompts), &without);
        same(&with(&prompts), &without);
    }
}

#[test]
fn guesses_from_the_prompt_change_nothing() {
    for cache in CACHES {
        let model = cached_model(cache, OpenOptions::default());
        let prepared = model.prepare(Some(&adapter(&model, 5))).unwrap();
        // Greedy answers of a random network run in circles, so many guesses are right; sampled ones are mostly wrong.
        let prompts = prompts(&model, &TEXTS);
        for temperature in [0.0, 0.3, 1.5] {
            let plain = GenerateOptions { temperature, seed: 3, ..greedy(60) };
            let copying = GenerateOptions { copying: true, ..plain.clone() };
            let run = |options| model.generate(&prepared, &prompts, options, &Cancel::new()).unwrap();
            same(&run(&copying), &run(&plain));
        }
    }
}

/// Of fast kernels, whose activations are rounded: the difference of a token's log-probability, in nats, between a
/// reading of several tokens and one of a single one.
const FAST_DIFFERENCE_MAX: f64 = 0.1;

/// The tiny package with the kernels that packages have by default.
fn fast_model(folder: &std::path::Path, options: OpenOptions) -> Model {
    let package = Package::open(build_with(folder, Accuracy::Fast, CacheBits::Full)).unwrap();
    Model::open(&support::library(), &package, options).unwrap()
}

/// Fast kernels round one row of tokens another way than several, so that answers may part where two tokens are about
/// as probable. Neither is then the better one.
#[test]
fn guesses_under_fast_kernels_give_answers_as_probable() {
    let folder = tempfile::tempdir().unwrap();
    let model = fast_model(folder.path(), OpenOptions::default());
    let prepared = model.prepare(Some(&adapter(&model, 5))).unwrap();
    let cancel = Cancel::new();
    let texts = ["one two three four five six seven", "The sea is", "x = 1; y = 2; z = 3;", "aaaa bbbb"];
    for prompt in prompts(&model, &texts) {
        let both = |options: GenerateOptions| {
            [false, true].map(|copying| {
                let options = GenerateOptions { copying, ..options.clone() };
                model.generate(&prepared, std::slice::from_ref(&prompt), &options, &cancel).unwrap().remove(0)
            })
        };
        // The same tokens, which are guessed, since they stand in the prompt.
        let copied = GenerateOptions { begin: prompt.ids.clone(), ..greedy(prompt.ids.len()) };
        let [single, several] = both(copied);
        assert_eq!(single.tokens, several.tokens);
        let difference = (single.logprob - several.logprob).abs();
        assert!(difference < FAST_DIFFERENCE_MAX * single.tokens.len() as f64, "{difference}");
        // Where free answers part, one reading finds both tokens about as probable.
        let [single, several] = both(greedy(100));
        let parts = single.tokens.iter().zip(&several.tokens).position(|(left, right)| left != right);
        if let Some(at) = parts {
            let before = Prompt::from([&prompt.ids[..], &single.tokens[..at]].concat());
            let candidates = [single.tokens[at], several.tokens[at]];
            let scores = model.score_next(&prepared, None, &[before], &candidates, &cancel).unwrap();
            let difference = f64::from((scores[0][0] - scores[0][1]).abs());
            assert!(difference < 2.0 * FAST_DIFFERENCE_MAX, "{difference} at {at}");
        }
    }
}

#[test]
fn scores_under_fast_kernels_do_not_depend_on_what_was_shared_or_on_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fast_model(folder.path(), OpenOptions::default());
    let prompt = prompts(&whole, &["Policy: be kind. Is this a kind thing to say?"]).remove(0);
    let length = prompt.ids.len();
    let candidates: Vec<u32> = (5..60).collect();
    let score = |model: &Model, shared: usize| {
        let prepared = model.prepare(None).unwrap();
        let prefix = (shared > 0)
            .then(|| model.share_prefix(&prepared, &prompt.ids[..shared], &Cancel::new()).unwrap());
        let prompts = std::slice::from_ref(&prompt);
        model.score_next(&prepared, prefix.as_ref(), prompts, &candidates, &Cancel::new()).unwrap().remove(0)
    };
    let expected = score(&whole, 0);
    let close = |got: Vec<f32>| got.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4);
    for left in [1, 2, 3, 20] {
        assert!(close(score(&whole, length - left)), "{left} tokens behind the prefix");
    }
    let chunked = tempfile::tempdir().unwrap();
    let options = OpenOptions { prefill_tokens_max: length - 1, ..OpenOptions::default() };
    assert!(close(score(&fast_model(chunked.path(), options), 0)), "a last chunk of one token");
}

#[test]
fn an_answer_begins_as_it_is_told() {
    for cache in CACHES {
        let model = cached_model(cache, OpenOptions::default());
        let prepared = model.prepare(Some(&adapter(&model, 5))).unwrap();
        let prompts = prompts(&model, &TEXTS);
        let begin: Vec<u32> = (10..40).collect();
        for copying in [false, true] {
            let options = GenerateOptions { begin: begin.clone(), copying, ..greedy(34) };
            let answers = model.generate(&prepared, &prompts, &options, &Cancel::new()).unwrap();
            for (prompt, answer) in prompts.iter().zip(&answers) {
                assert!(answer.tokens.starts_with(&begin), "{:?}", answer.tokens);
                // What follows is what follows the same text as a prompt.
                let longer = Prompt::from([prompt.ids.clone(), begin.clone()].concat());
                let rest = model.generate(&prepared, &[longer], &greedy(4), &Cancel::new()).unwrap();
                assert_eq!(answer.tokens[begin.len()..], rest[0].tokens);
            }
        }
        let foreign = GenerateOptions { begin: vec![u32::MAX], ..greedy(4) };
        let error = model.generate(&prepared, &prompts, &foreign, &Cancel::new()).unwrap_err();
        assert!(matches!(error, InferError::Token { got: u32::MAX, .. }), "{error}");
    }
}

#[test]
fn stop_text_ends_the_answer_and_is_not_part_of_it() {
    let model = model();
    let prepared = model.prepare(Some(&adapter(&model, 6))).unwrap();
    let prompts = prompts(&model, &TEXTS);
    let free = model.generate(&prepared, &prompts, &greedy(40), &Cancel::new()).unwrap();
    let mut checked = 0;
    for (row, free) in free.iter().enumerate() {
        // Two characters from the middle of what it says anyway.
        let characters: Vec<(usize, char)> = free.text.char_indices().collect();
        let Some([first, second]) = characters.get(10..12).and_then(|pair| <[_; 2]>::try_from(pair).ok())
        else {
            continue;
        };
        let stop: String = [first.1, second.1].iter().collect();
        let options = GenerateOptions { stop: vec!["never said".into(), stop.clone()], ..greedy(40) };
        let mut streamed = String::new();
        let answer = model
            .generate_streaming(
                &prepared,
                None,
                &prompts[row..=row],
                &options,
                &mut |_, piece| streamed.push_str(piece),
                &Cancel::new(),
            )
            .unwrap()
            .remove(0);
        assert_eq!(answer.stop, StopReason::StopText);
        assert_eq!(answer.text, free.text[..free.text.find(&stop).unwrap()]);
        assert_eq!(streamed, answer.text);
        assert!(free.tokens.starts_with(&answer.tokens) && answer.tokens.len() < free.tokens.len());
        checked += 1;
    }
    assert!(checked > 1, "{checked} answers long enough to be stopped");
}

#[test]
fn end_tokens_of_the_package_end_the_answer() {
    let model = model();
    let free = |model: &Model| {
        let prepared = model.prepare(None).unwrap();
        model.generate(&prepared, &prompts(model, &TEXTS), &greedy(12), &Cancel::new()).unwrap()
    };
    let expected = free(&model);
    // What the first answer says anyway, in the middle of it.
    let end = expected[0].tokens[5];
    let folder = tempfile::tempdir().unwrap();
    let package = support::altered(folder.path(), |facts| facts.tokens.eos = vec![1, end], "", &[]);
    let ended = free(&Model::open(&support::library(), &package, OpenOptions::default()).unwrap());
    for (ended, free) in ended.iter().zip(&expected) {
        match free.tokens.iter().position(|&token| token == end) {
            Some(at) => {
                assert_eq!((ended.stop, &ended.tokens[..]), (StopReason::EndToken, &free.tokens[..=at]));
            }
            None => assert_eq!((ended.stop, &ended.tokens), (free.stop, &free.tokens)),
        }
    }
    assert!(ended[0].tokens.len() <= 6);
}

#[test]
fn streamed_pieces_make_up_each_text() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let mut streamed = vec![String::new(); TEXTS.len()];
    let answers = model
        .generate_streaming(
            &prepared,
            None,
            &prompts(&model, &TEXTS),
            &greedy(15),
            &mut |row, piece| streamed[row].push_str(piece),
            &Cancel::new(),
        )
        .unwrap();
    assert_eq!(streamed, answers.iter().map(|answer| answer.text.clone()).collect::<Vec<_>>());
}

#[test]
fn sampling_depends_on_seed_and_row_only() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let prompts = prompts(&model, &TEXTS);
    let run = |seed, count: usize| {
        let options = GenerateOptions { temperature: 1.0, top_p: 0.95, seed, ..greedy(16) };
        let answers = model.generate(&prepared, &prompts[..count], &options, &Cancel::new()).unwrap();
        answers.into_iter().map(|answer| answer.tokens).collect::<Vec<_>>()
    };
    assert_eq!(run(7, 4), run(7, 4));
    assert_eq!(run(7, 2), run(7, 4)[..2]);
    assert_ne!(run(7, 4), run(8, 4));
}

#[test]
fn answer_ends_where_the_context_does() {
    let model = model_with(OpenOptions { context_max: Some(24), ..OpenOptions::default() });
    let prepared = model.prepare(None).unwrap();
    let prompts = [Prompt::from(vec![70; 20]), Prompt::from(vec![71; 5])];
    let answers = model.generate(&prepared, &prompts, &greedy(100), &Cancel::new()).unwrap();
    for (answer, prompt) in answers.iter().zip(&prompts) {
        if answer.stop != StopReason::EndToken {
            assert_eq!(answer.stop, StopReason::Context);
            assert_eq!(prompt.ids.len() + answer.tokens.len(), 24);
        }
    }
}

#[test]
fn cancelled_calls_end_with_a_clear_error() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let prompts = prompts(&model, &TEXTS);
    let used = Cancel::new();
    used.cancel();
    let before = model.generate(&prepared, &prompts, &greedy(5), &used);
    assert!(matches!(before, Err(InferError::Cancelled)), "{before:?}");
    // From inside the call, after the first piece of text, and from another thread: neither runs on to the end.
    let cancel = Cancel::new();
    let mut pieces = 0;
    let mut stop = |_: usize, _: &str| {
        pieces += 1;
        let cancel = cancel.clone();
        std::thread::spawn(move || cancel.cancel()).join().unwrap();
    };
    let during = model.generate_streaming(&prepared, None, &prompts, &greedy(200), &mut stop, &cancel);
    assert!(matches!(during, Err(InferError::Cancelled)), "{during:?}");
    assert!(pieces <= prompts.len(), "{pieces} pieces after the cancellation");
    // The model is as usable as before.
    assert!(model.generate(&prepared, &prompts, &greedy(5), &Cancel::new()).is_ok());
}

#[test]
fn cancel_interrupts_a_run_in_progress() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let cancel = Cancel::new();
    let handle = cancel.clone();
    // The other thread cancels once the call runs; without the handle it would run for many minutes.
    let rows = vec![support::row(&model, &"p".repeat(100), &"q".repeat(100)); 50_000];
    let canceller = std::thread::spawn(move || {
        while !handle.is_running() {
            std::thread::yield_now();
        }
        handle.cancel();
    });
    let result = model.score_rows(&prepared, &rows, &cancel);
    assert!(matches!(result, Err(InferError::Cancelled)), "{:?}", result.map(|scores| scores.len()));
    canceller.join().unwrap();
    assert!(!cancel.is_running());
}

#[test]
fn bad_prompts_and_options_are_refused() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let run = |prompts: &[Prompt], options: &GenerateOptions| {
        model.generate(&prepared, prompts, options, &Cancel::new()).unwrap_err()
    };
    let good = Prompt::from(vec![70, 71]);
    let long = run(&[good.clone(), Prompt::from(vec![70; 256])], &greedy(1));
    assert_eq!(long.to_string(), "prompt 1 must have at most 255 tokens, got 256");
    assert!(matches!(run(&[Prompt::default()], &greedy(1)), InferError::Empty { row: 0 }));
    let foreign = run(&[Prompt::from(vec![288])], &greedy(1));
    assert!(matches!(foreign, InferError::Token { got: 288, vocab_size: 288, .. }), "{foreign}");
    for options in [
        greedy(0),
        GenerateOptions { temperature: f32::NAN, ..greedy(1) },
        GenerateOptions { temperature: -1.0, ..greedy(1) },
        GenerateOptions { top_p: 0.0, ..greedy(1) },
        GenerateOptions { stop: vec![String::new()], ..greedy(1) },
    ] {
        assert!(
            matches!(run(std::slice::from_ref(&good), &options), InferError::Option { .. }),
            "{options:?}"
        );
    }
    assert_eq!(model.generate(&prepared, &[], &greedy(1), &Cancel::new()).unwrap(), []);
}

#[test]
fn adapter_with_nan_and_foreign_adapters_are_refused() {
    let model = model();
    let mut broken = adapter(&model, 1);
    broken.values_mut()[17] = f32::NAN;
    let error = model.prepare(Some(&broken)).unwrap_err();
    assert_eq!(error.to_string(), "adapter value 17 must be finite, got NaN");
    let other = support::model().prepare(None).unwrap();
    let foreign = model.generate(&other, &prompts(&model, &TEXTS), &greedy(1), &Cancel::new());
    assert!(matches!(foreign, Err(InferError::Foreign { what: "adapter", .. })), "{foreign:?}");
    let (one, two) = (model.prepare(None).unwrap(), model.prepare(Some(&adapter(&model, 1))).unwrap());
    let prefix = model.share_prefix(&one, &[70, 71], &Cancel::new()).unwrap();
    let foreign = model.score_next(&two, Some(&prefix), &prompts(&model, &TEXTS), &[3], &Cancel::new());
    assert!(matches!(foreign, Err(InferError::Foreign { what: "prefix", .. })), "{foreign:?}");
}
