//! Continuous batching on the real library: answers that join and leave at any step are what each is alone. What touches
//! the cache is held for both of its forms.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use std::collections::BTreeMap;

use commonweal_compiler::compile::CacheBits;
use commonweal_runtime::{
    Cancel, GenerateOptions, Generated, InferError, Model, OpenOptions, PreparedAdapter, Prompt, Said,
    Spoken, StopReason, Ticket, Together,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use support::{CACHES, adapter, cached_model, greedy, model, model_with, prompts};

const TEXTS: [&str; 5] = [
    "The sea is",
    "a",
    "Once upon a time there was a very long prompt that went on for longer than the others",
    "x = ",
    "y",
];

/// What was said under each ticket, answer by answer.
#[derive(Default)]
struct Heard {
    texts: BTreeMap<(u64, usize), String>,
    tokens: BTreeMap<(u64, usize), Vec<Spoken>>,
    ended: BTreeMap<(u64, usize), Generated>,
}

impl Heard {
    fn step(&mut self, together: &mut Together<'_>) {
        together
            .step(&Cancel::new(), &mut |Ticket(ticket), answer, said| match said {
                Said::Text(text) => self.texts.entry((ticket, answer)).or_default().push_str(text),
                Said::Token(token) => self.tokens.entry((ticket, answer)).or_default().push(token),
                Said::Ended(generated) => {
                    assert!(self.ended.insert((ticket, answer), generated).is_none(), "ended twice");
                }
                Said::Failed(error) => panic!("{error}"),
            })
            .unwrap();
    }

    fn hear_all(&mut self, together: &mut Together<'_>) {
        while !together.is_idle() {
            self.step(together);
        }
    }
}

fn sampled(seed: u64) -> GenerateOptions {
    GenerateOptions { max_new_tokens: 9 + seed as usize % 5, temperature: 0.8, top_p: 0.9, seed, ..greedy(1) }
}

fn alone(model: &Model, adapter: &PreparedAdapter, prompt: &Prompt, options: &GenerateOptions) -> Generated {
    model.generate(adapter, std::slice::from_ref(prompt), options, &Cancel::new()).unwrap().remove(0)
}

fn same(left: &Generated, right: &Generated) {
    assert_eq!((&left.tokens, &left.text, left.stop), (&right.tokens, &right.text, right.stop));
    assert!((left.logprob - right.logprob).abs() < 1e-3, "{} {}", left.logprob, right.logprob);
}

/// Every schedule of a seed: prompts join after a few steps each, some leave halfway.
#[test]
fn whoever_joins_and_leaves_each_answer_is_what_it_is_alone() {
    for cache in CACHES {
        let model = cached_model(cache, OpenOptions { prefill_tokens_max: 11, ..OpenOptions::default() });
        let prepared = model.prepare(Some(&adapter(&model, 3))).unwrap();
        let prompts = prompts(&model, &TEXTS);
        for seed in 0..4 {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            let mut together = Together::new(&model, &prepared);
            let (mut heard, mut most, mut gone) = (Heard::default(), 0, Vec::new());
            for ticket in 0..12_u64 {
                while !together.takes_more() {
                    heard.step(&mut together);
                }
                let prompt = &prompts[ticket as usize % prompts.len()];
                together.ask(Ticket(ticket), prompt, &sampled(ticket), 1, None).unwrap();
                for _ in 0..random.random_range(0..4) {
                    heard.step(&mut together);
                }
                most = most.max(together.answering());
                if random.random_bool(0.2) {
                    together.leave(Ticket(ticket));
                    gone.push(ticket);
                }
            }
            heard.hear_all(&mut together);
            assert!(most >= 3, "no more than {most} at once");
            for ticket in 0..12_u64 {
                match heard.ended.get(&(ticket, 0)) {
                    Some(answer) => {
                        let prompt = &prompts[ticket as usize % prompts.len()];
                        same(answer, &alone(&model, &prepared, prompt, &sampled(ticket)));
                        let text = heard.texts.get(&(ticket, 0)).map_or("", String::as_str);
                        assert_eq!(text, answer.text);
                    }
                    None => assert!(gone.contains(&ticket), "{ticket} was forgotten"),
                }
            }
        }
    }
}

#[test]
fn several_answers_to_a_prompt_are_the_rows_of_a_call() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let prompt = prompts(&model, &TEXTS[..1]).remove(0);
    let expected = model.generate(&prepared, &vec![prompt.clone(); 3], &sampled(8), &Cancel::new()).unwrap();
    assert_ne!(expected[0].tokens, expected[1].tokens);
    let (mut together, mut heard) = (Together::new(&model, &prepared), Heard::default());
    together.ask(Ticket(1), &prompt, &sampled(8), 3, None).unwrap();
    heard.hear_all(&mut together);
    for (answer, expected) in expected.iter().enumerate() {
        same(&heard.ended[&(1, answer)], expected);
    }
}

#[test]
fn a_full_cache_lets_one_after_the_other_in() {
    for options in [
        OpenOptions { cache_bytes_max: 1, ..OpenOptions::default() },
        OpenOptions { batch_max: 2, ..OpenOptions::default() },
    ] {
        let model = model_with(options);
        let prepared = model.prepare(None).unwrap();
        let prompts = prompts(&model, &TEXTS);
        let (mut together, mut heard, mut most) = (Together::new(&model, &prepared), Heard::default(), 0);
        for (ticket, prompt) in (0..).zip(&prompts) {
            while !together.takes_more() {
                heard.step(&mut together);
                most = most.max(together.answering());
            }
            together.ask(Ticket(ticket), prompt, &greedy(6), 2, None).unwrap();
        }
        heard.hear_all(&mut together);
        assert_eq!(heard.ended.len(), 2 * prompts.len());
        assert_eq!(most, if options.batch_max == 2 { 2 } else { 1 });
        for (ticket, prompt) in (0..).zip(&prompts) {
            same(&heard.ended[&(ticket, 1)], &alone(&model, &prepared, prompt, &greedy(6)));
        }
    }
}

#[test]
fn a_long_prompt_is_read_while_others_go_on() {
    let model = model_with(OpenOptions { prefill_tokens_max: 4, ..OpenOptions::default() });
    let prepared = model.prepare(None).unwrap();
    let prompts = prompts(&model, &TEXTS);
    let (mut together, mut heard) = (Together::new(&model, &prepared), Heard::default());
    together.ask(Ticket(0), &prompts[1], &greedy(12), 1, Some(0)).unwrap();
    heard.step(&mut together);
    together.ask(Ticket(1), &prompts[2], &greedy(2), 1, Some(0)).unwrap();
    let told = |heard: &Heard, ticket| heard.tokens.get(&(ticket, 0)).map_or(0, Vec::len);
    let before = told(&heard, 0);
    for _ in 0..3 {
        heard.step(&mut together);
    }
    assert_eq!((told(&heard, 0), told(&heard, 1)), (before + 3, 0));
}

#[test]
fn tokens_are_told_with_their_probability_and_what_else_was_likely() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let prompt = prompts(&model, &TEXTS[..1]).remove(0);
    let (mut together, mut heard) = (Together::new(&model, &prepared), Heard::default());
    together.ask(Ticket(7), &prompt, &greedy(8), 1, Some(3)).unwrap();
    heard.hear_all(&mut together);
    let (answer, tokens) = (&heard.ended[&(7, 0)], &heard.tokens[&(7, 0)]);
    let is_end = answer.stop == StopReason::EndToken;
    assert_eq!(tokens.len(), answer.tokens.len() - usize::from(is_end));
    let joined: String = tokens.iter().map(|token| token.text.as_str()).collect();
    assert!(answer.text.starts_with(&joined), "{joined:?} of {:?}", answer.text);
    for token in tokens {
        assert_eq!(token.alternatives.len(), 3);
        assert!((token.alternatives[0].logprob - token.logprob).abs() < 1e-6);
        assert!(token.alternatives.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
    }
    if !is_end {
        let sum: f64 = tokens.iter().map(|token| f64::from(token.logprob)).sum();
        assert!((sum - answer.logprob).abs() < 1e-4);
    }
}

#[test]
fn what_cannot_be_answered_is_refused_before_it_joins() {
    let model = model();
    let other = cached_model(CacheBits::Full, OpenOptions::default());
    let foreign = other.prepare(None).unwrap();
    let prompt = prompts(&model, &TEXTS[..1]).remove(0);
    let ask = |adapter: &PreparedAdapter, prompt: &Prompt, options: &GenerateOptions| {
        Together::new(&model, adapter).ask(Ticket(0), prompt, options, 1, None)
    };
    let own = model.prepare(None).unwrap();
    assert!(matches!(ask(&own, &Prompt::default(), &greedy(1)), Err(InferError::Empty { .. })));
    let long = Prompt::from(vec![5; model.context()]);
    assert!(matches!(ask(&own, &long, &greedy(1)), Err(InferError::TooLong { .. })));
    assert!(matches!(ask(&own, &prompt, &greedy(0)), Err(InferError::Option { .. })));
    assert!(matches!(ask(&foreign, &prompt, &greedy(1)), Err(InferError::Foreign { .. })));
}

#[test]
fn a_cancelled_step_says_so_and_a_cleared_batch_begins_anew() {
    let model = model();
    let prepared = model.prepare(None).unwrap();
    let prompt = prompts(&model, &TEXTS[..1]).remove(0);
    let mut together = Together::new(&model, &prepared);
    together.ask(Ticket(0), &prompt, &greedy(4), 1, None).unwrap();
    let cancel = Cancel::new();
    cancel.cancel();
    assert!(matches!(together.step(&cancel, &mut |_, _, _| ()), Err(InferError::Cancelled)));
    together.clear();
    assert!(together.is_idle());
    together.ask(Ticket(1), &prompt, &greedy(4), 1, None).unwrap();
    let mut heard = Heard::default();
    heard.hear_all(&mut together);
    same(&heard.ended[&(1, 0)], &alone(&model, &prepared, &prompt, &greedy(4)));
}
