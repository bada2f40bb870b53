//! A thousand rounds of either mode with everything that can go wrong, from seeds; see docs/simulation.md.
//! A failure names its seed, and `scripts/simulate --mode MODE --seed N --rounds 25` replays it exactly.
#![allow(missing_docs, dead_code, reason = "of what is shared with the command, a part is used here")]

#[path = "simulation/mod.rs"]
mod simulation;

use aggregator::round::RoundMode;
use simulation::{ROUNDS, Tally, run};

const SEEDS: u64 = 40;

/// All seeds of a mode; a simulation in which nothing happens proves nothing.
fn run_all(mode: RoundMode, wanted: impl Fn(&Tally) -> u64, what: &str) {
    let mut total = Tally::default();
    for seed in 0..SEEDS {
        total += run(seed, mode);
    }
    eprintln!("{total:?}");
    assert_eq!(total.rounds, SEEDS * ROUNDS);
    for (what, number) in [
        ("published rounds", total.published),
        ("rejected rounds", total.rejected),
        ("kills", total.kills),
        ("partitions", total.partitions),
        ("steps back of the clock", total.clock_steps_back),
        ("faults of the link", total.link_faults()),
        ("merges computed again", total.merges_checked),
        (what, wanted(&total)),
    ] {
        assert!(number >= 30, "only {number} {what}");
    }
}

#[test]
fn a_thousand_rounds_keep_the_invariants() {
    run_all(RoundMode::Synchronous, |total| total.abandoned, "abandoned rounds");
}

#[test]
fn a_thousand_buffered_rounds_keep_the_invariants() {
    run_all(RoundMode::Buffered, |total| total.stale, "updates that lay behind");
}

#[test]
fn a_seed_replays_exactly() {
    for mode in [RoundMode::Synchronous, RoundMode::Buffered] {
        assert_eq!(run(7, mode), run(7, mode));
    }
}
