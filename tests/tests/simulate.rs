//! A thousand rounds of either mode with everything that can go wrong, from seeds: the real state machine, receiver, desk, merge and
//! publisher over stores that pass the contract suites, and devices over the simulated link.
//!
//! Streams are cut, doubled and corrupted; devices vanish, lie and repeat themselves; the store fails, knowingly and
//! not; the aggregator is killed at any write; the clock jumps. What must hold regardless is in `invariants.rs`.
//! A failure names its seed: `COMMONWEAL_SEED=N cargo test -p commonweal-tests --test simulate` replays it exactly.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a test that cannot get its value has failed")]

#[path = "simulation/world.rs"]
mod world;
#[path = "simulation/device.rs"]
mod device;
#[path = "simulation/stages.rs"]
mod stages;
#[path = "simulation/invariants.rs"]
mod invariants;

use aggregator::round::RoundMode;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use world::World;

const SEEDS: u64 = 40;
const ROUNDS: u64 = 25;
/// More than any seed needs; a simulation that gets here has come to a standstill.
const STEPS_MAX: u64 = 20_000;

/// What one seed came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    rounds: u64,
    published: u64,
    rejected: u64,
    abandoned: u64,
    receipts: u64,
    kills: u64,
    faults: u64,
    /// Updates merged into a later release than the one that they were trained from.
    stale: u64,
}

async fn simulate(seed: u64, mode: RoundMode) -> Tally {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut world = World::new(seed, mode);
    let mut steps = 0;
    while world.round() <= ROUNDS {
        steps += 1;
        assert!(steps < STEPS_MAX, "seed {seed}: round {} does not end", world.round());
        match random.random_range(0..100) {
            0..45 => world.device_acts(&mut random).await,
            45..55 => world.devices_act_together(&mut random).await,
            55..85 => world.drive(),
            85..93 => world.time_passes(random.random_range(1..20_000)),
            93..96 => world.store_fails(&mut random),
            96..98 => world.store_heals(),
            98 => world.crash_soon(random.random_range(0..40)),
            _ => world.kill(),
        }
        invariants::check_running(&world);
    }
    world.settle().await;
    invariants::check_end(&world)
}

fn run(seed: u64, mode: RoundMode) -> Tally {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(simulate(seed, mode))
}

/// Runs a seed and names it if it fails.
fn run_named(seed: u64, mode: RoundMode) -> Tally {
    struct Name(u64);
    impl Drop for Name {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!(
                    "replay with COMMONWEAL_SEED={} cargo test -p commonweal-tests --test simulate",
                    self.0
                );
            }
        }
    }
    let _name = Name(seed);
    run(seed, mode)
}

/// Seeds of a mode; a simulation in which nothing happens proves nothing.
fn run_all(mode: RoundMode, wanted: impl Fn(&Tally) -> Vec<(&'static str, u64)>) {
    let seeds = match std::env::var("COMMONWEAL_SEED") {
        Ok(seed) => seed.parse().unwrap()..seed.parse::<u64>().unwrap() + 1,
        Err(_) => 0..SEEDS,
    };
    let count = seeds.end - seeds.start;
    let mut total = Tally::default();
    for seed in seeds {
        let tally = run_named(seed, mode);
        total.rounds += tally.rounds;
        total.published += tally.published;
        total.rejected += tally.rejected;
        total.abandoned += tally.abandoned;
        total.receipts += tally.receipts;
        total.kills += tally.kills;
        total.faults += tally.faults;
        total.stale += tally.stale;
    }
    eprintln!("{total:?}");
    assert_eq!(total.rounds, count * ROUNDS);
    if count == SEEDS {
        for (what, number) in wanted(&total) {
            assert!(number >= 50, "only {number} {what}");
        }
    }
}

#[test]
fn a_thousand_rounds_keep_the_invariants() {
    run_all(RoundMode::Synchronous, |total| {
        assert_eq!(total.stale, 0);
        vec![
            ("published rounds", total.published),
            ("rejected rounds", total.rejected),
            ("abandoned rounds", total.abandoned),
            ("kills", total.kills),
            ("faults of the link", total.faults),
        ]
    });
}

#[test]
fn a_thousand_buffered_rounds_keep_the_invariants() {
    run_all(RoundMode::Buffered, |total| {
        vec![
            ("published rounds", total.published),
            ("rejected rounds", total.rejected),
            ("updates that lay behind", total.stale),
            ("kills", total.kills),
            ("faults of the link", total.faults),
        ]
    });
}

#[test]
fn a_seed_replays_exactly() {
    for mode in [RoundMode::Synchronous, RoundMode::Buffered] {
        assert_eq!(run_named(7, mode), run_named(7, mode));
    }
}
