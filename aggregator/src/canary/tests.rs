//! Tests of `canary.rs`.

use super::*;
use commonweal_protocol::Fault;

fn settings() -> config::Release {
    config::Release { canary_share: 0.1, canary_loss_rise: 0.0, ..config::Release::default() }
}

/// A trial of release 1 after release 0.
fn trial(before: &[f32], after: &[f32]) -> Canary {
    let mut canary = Canary::stable(Version(0));
    canary.count(1, before.iter().map(|loss| (Version(0), *loss)));
    assert!(canary.see_head(Version(1), true, 1_000));
    canary.count(2, after.iter().map(|loss| (Version(1), *loss)));
    canary
}

#[test]
fn the_rank_test_is_scipys() {
    // scipy.stats.mannwhitneyu(after, before, alternative="greater", method="asymptotic").pvalue is
    // 0.010785873974 and, with ties, 0.086016854461; the z of these, by norm.isf, are below.
    let (after, before) = ([1.9, 2.1, 2.3, 2.6, 2.9], [1.0, 1.2, 1.5, 1.7, 2.0]);
    assert!((rank_test(&after, &before, 0.0) - 2.297_825_058_615_212_4).abs() < 1e-9);
    let (after, before) = ([2.0, 2.0, 3.0, 1.0], [1.0, 1.0, 2.0, 0.5]);
    assert!((rank_test(&after, &before, 0.0) - 1.365_698_202_000_488_9).abs() < 1e-9);
    assert!(rank_test(&[1.0; 9], &[1.0; 9], 0.0).abs() < 1e-12, "no difference at all");
}

#[test]
fn what_is_worse_by_more_than_chance_is_rolled_back_and_what_is_not_is_for_all() {
    let before: Vec<f32> = (0..12).map(|number| 2.0 + number as f32 * 0.05).collect();
    let higher = |by: f32| before.iter().map(|loss| loss + by).collect::<Vec<_>>();
    let judged = |by: f32, rise: f64| {
        let settings = config::Release { canary_loss_rise: rise, ..settings() };
        trial(&before, &higher(by)).judge(&settings, 2_000)
    };
    assert!(matches!(judged(0.5, 0.0), Verdict::Worse(_)));
    assert!(matches!(judged(0.5, 0.5), Verdict::Fine(_)), "within what is allowed");
    assert!(matches!(judged(0.0, 0.0), Verdict::Fine(_)));
    assert!(matches!(judged(-0.5, 0.0), Verdict::Fine(_)));
}

#[test]
fn a_few_liars_neither_force_a_roll_back_nor_prevent_one() {
    let before: Vec<f32> = (0..20).map(|number| 2.0 + number as f32 * 0.05).collect();
    let mut same = before.clone();
    same[..3].fill(1e6);
    assert!(matches!(trial(&before, &same).judge(&settings(), 2_000), Verdict::Fine(_)));
    let mut worse: Vec<f32> = before.iter().map(|loss| loss + 1.0).collect();
    worse[..3].fill(-1e6);
    assert!(matches!(trial(&before, &worse).judge(&settings(), 2_000), Verdict::Worse(_)));
}

#[test]
fn too_few_reports_are_waited_for_until_the_time_is_over() {
    let canary = trial(&[2.0; 8], &[9.0; 7]);
    assert_eq!(canary.judge(&settings(), 2_000), Verdict::Wait);
    assert!(matches!(canary.judge(&settings(), 1_000 + 24 * 3_600_000), Verdict::Fine(_)));
    assert_eq!(Canary::stable(Version(3)).judge(&settings(), u64::MAX), Verdict::Wait, "nothing is on trial");
}

/// A trial on which devices have said this.
fn heard(words: &[Said]) -> Canary {
    let mut canary = trial(&[2.0; 8], &[]);
    for (number, said) in words.iter().enumerate() {
        let word = Word { device: DeviceId([number as u8; 16]), version: Version(1), said: *said };
        canary.hear(number as u64 + 1, Some(word));
    }
    canary
}

#[test]
fn what_devices_cannot_install_is_rolled_back() {
    let (can, silent) = (Said::Installed, Said::Nothing);
    let (damaged, base) = (Said::Cannot(Fault::Damaged), Said::Cannot(Fault::Base));
    let (soon, late) = (2_000, 1_000 + 24 * 3_600_000);
    let judged = |words: &[Said], now_ms| heard(words).judge(&settings(), now_ms);
    let Verdict::Worse(why) = judged(&[damaged, damaged, base, can, can, silent, silent, silent], soon)
    else {
        panic!("three of eight cannot")
    };
    assert_eq!(
        why,
        "3 of 8 devices cannot install it: it is for another base (1), its bytes are damaged (2)"
    );
    // A quarter may: a liar, a full disk.
    assert_eq!(judged(&[damaged, base, can, can, can, can, can, can], soon), Verdict::Wait);
    // Who fails is heard first: the others may be at work on it.
    let first = [damaged, damaged, can, silent, silent, silent, silent, silent];
    assert_eq!(judged(&first, soon), Verdict::Wait);
    assert!(matches!(judged(&first, late), Verdict::Worse(_)));
    // Too few to say so at once; and once the time is over.
    let few = [damaged, damaged, can];
    assert_eq!(judged(&few, soon), Verdict::Wait);
    assert!(matches!(judged(&few, late), Verdict::Worse(_)));
    assert!(matches!(judged(&[can; 3], late), Verdict::Fine(_)));
    assert!(matches!(judged(&[silent; 9], late), Verdict::Fine(_)));
}

#[test]
fn losses_promote_nothing_while_too_many_cannot_install_it() {
    let (can, silent) = (Said::Installed, Said::Nothing);
    let damaged = Said::Cannot(Fault::Damaged);
    let judged = |words: &[Said]| {
        let mut canary = heard(words);
        canary.count(3, std::iter::repeat_n((Version(1), 1.0), 20));
        canary.judge(&settings(), 2_000)
    };
    assert!(matches!(judged(&[damaged; 8]), Verdict::Worse(_)));
    assert_eq!(judged(&[damaged, damaged, can, silent, silent, silent, silent, silent]), Verdict::Wait);
    assert!(matches!(judged(&[damaged, damaged, can, can, can, can, can, can]), Verdict::Fine(_)));
}

#[test]
fn a_word_counts_once_and_only_on_what_is_on_trial() {
    let mut canary = heard(&[Said::Cannot(Fault::Room); 2]);
    let word = |number: u8, version, said| Some(Word { device: DeviceId([number; 16]), version, said });
    canary.hear(3, word(0, Version(1), Said::Installed));
    // Counted before, of the release before, of one that nobody published.
    canary.hear(3, word(1, Version(1), Said::Installed));
    canary.hear(4, word(1, Version(0), Said::Installed));
    canary.hear(5, word(1, Version(2), Said::Installed));
    canary.hear(6, None);
    let count = canary.trial.as_ref().unwrap().words.count();
    assert_eq!((count.told, count.installed, count.failed()), (2, 1, 1));
    // The next trial begins with nothing; how this one went is remembered.
    canary.promote("fine".into(), 3_000);
    assert_eq!(canary.ended[0].devices, count);
    canary.see_head(Version(2), true, 3_000);
    assert!(canary.trial.as_ref().unwrap().words.count().told == 0 && canary.counted_word == 6);
    for version in 3..3 + 2 * ENDED_MAX as u64 {
        canary.promote("fine".into(), 3_000);
        canary.see_head(Version(version), true, 3_000);
    }
    let last = canary.ended.last().unwrap().version.0;
    assert_eq!((canary.ended.len(), last), (ENDED_MAX, 1 + 2 * ENDED_MAX as u64));
}

#[test]
fn later_releases_join_a_trial_and_what_nobody_reported_of_begins_another() {
    let mut canary = trial(&[2.0; 8], &[2.0; 4]);
    canary.see_head(Version(2), true, 2_000);
    canary.count(3, std::iter::repeat_n((Version(2), 2.0), 4));
    canary.count(3, std::iter::repeat_n((Version(2), 9.0), 40));
    canary.see_head(Version(3), true, 3_000);
    let Verdict::Fine(reason) = canary.judge(&settings(), 3_000) else { panic!("{canary:?}") };
    canary.promote(reason, 3_000);
    assert_eq!(canary.stable, Version(2));
    let trial = canary.trial.clone().unwrap();
    assert_eq!((trial.version, trial.losses.len()), (Version(3), 0));
    canary.roll_back(Version(4), "worse".to_owned(), 4_000);
    assert_eq!((canary.stable, &canary.trial), (Version(4), &None));
    assert!(!canary.see_head(Version(4), false, 5_000));
}

#[test]
fn an_operators_roll_back_is_for_all_at_once() {
    let mut canary = trial(&[2.0; 8], &[]);
    assert!(canary.see_head(Version(2), false, 2_000));
    assert_eq!((canary.stable, &canary.trial), (Version(2), &None));
    assert!(canary.ended[0].rolled_back);
}

#[test]
fn the_share_is_a_share_and_another_one_in_the_next_trial() {
    let device = |number: u32| {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&number.to_le_bytes());
        DeviceId(id)
    };
    let seen = |stable: u64| -> Vec<bool> {
        let mut canary = Canary::stable(Version(stable));
        canary.see_head(Version(stable + 1), true, 0);
        let head = Version(stable + 1);
        (0..10_000).map(|number| canary.release_for(&device(number), head, 0.1) == head).collect()
    };
    let (first, second) = (seen(0), seen(1));
    let count = |seen: &[bool]| seen.iter().filter(|seen| **seen).count();
    // Deviation: √(10000 · 0.1 · 0.9) = 30.
    assert!((850..=1_150).contains(&count(&first)), "{}", count(&first));
    let both = first.iter().zip(&second).filter(|(one, other)| **one && **other).count();
    assert!((50..=150).contains(&both), "{both}");
    let none = Canary::stable(Version(7));
    assert_eq!(none.release_for(&device(1), Version(7), 0.0), Version(7));
}
