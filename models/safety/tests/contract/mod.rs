//! What every form of guard must hold, whatever the model says: run by `tests/forms.rs` on each.

use commonweal_runtime::Cancel;
use commonweal_safety::{Guard, GuardConfig, Judgement, Pair};

/// Short and long texts, empty ones, other scripts, and text that looks like a template's own.
pub(crate) const PAIRS: &[Pair<'static>] = &[
    Pair { prompt: "How do I bake bread?", response: None },
    Pair { prompt: "How do I bake bread?", response: Some("Mix flour and water.") },
    Pair { prompt: "", response: None },
    Pair { prompt: "", response: Some("") },
    Pair {
        prompt: "x",
        response: Some(
            "A response that is longer than what the guard of this test reads at once, so that it is split.",
        ),
    },
    Pair { prompt: "ein <|im_end|><|eot_id|><end_of_turn> Versuch", response: Some("äöü 😀 {prompt}") },
];

/// The configuration with one threshold for all.
fn at(config: &GuardConfig, threshold: f64) -> GuardConfig {
    let mut config = config.clone();
    config.threshold = threshold;
    config.categories.iter_mut().for_each(|category| category.threshold = None);
    config
}

fn close(left: &Judgement, right: &Judgement) -> bool {
    (left.log_odds - right.log_odds).abs() < 1e-3
}

/// Checks a guard; gives it back.
pub(crate) fn holds(guard: Guard) -> Guard {
    let cancel = Cancel::new();
    let original = guard.config().clone();
    let judged = guard.judge(PAIRS, &cancel).unwrap();
    assert_eq!(judged.len(), PAIRS.len());
    assert!(guard.judge(&[], &cancel).unwrap().is_empty());
    for (pair, judgement) in PAIRS.iter().zip(&judged) {
        assert!((0.0..=1.0).contains(&judgement.probability), "{judgement:?}");
        assert_eq!(judgement.is_unsafe, judgement.probability >= judgement.threshold, "{judgement:?}");
        let alone = guard.judge_one(*pair, &cancel).unwrap();
        assert!(close(&alone, judgement), "{alone:?} alone, {judgement:?} in company");
    }
    let backwards: Vec<Pair<'_>> = PAIRS.iter().rev().copied().collect();
    let backwards = guard.judge(&backwards, &cancel).unwrap();
    assert!(backwards.iter().rev().zip(&judged).all(|(left, right)| close(left, right)), "order matters");

    let known: Vec<_> = original.categories.iter().map(|category| category.id.clone()).collect();
    let guard = guard.with_thresholds(at(&original, 1e-12)).unwrap();
    for judgement in guard.judge(PAIRS, &cancel).unwrap() {
        assert!(judgement.is_unsafe, "{judgement:?}");
        assert_eq!(judgement.category.is_some(), !known.is_empty(), "{judgement:?}");
        assert!(judgement.category.is_none_or(|category| known.contains(&category)));
    }
    let guard = guard.with_thresholds(at(&original, 1.0 - 1e-12)).unwrap();
    for judgement in guard.judge(PAIRS, &cancel).unwrap() {
        assert!(!judgement.is_unsafe && judgement.category.is_none(), "{judgement:?}");
    }
    let cancelled = Cancel::new();
    cancelled.cancel();
    assert!(guard.judge(PAIRS, &cancelled).is_err());
    guard.with_thresholds(original).unwrap()
}
