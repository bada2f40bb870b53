//! One seed's simulation: the real state machine, receiver, desk, merge and publisher over stores that pass the contract
//! suites, and devices over the simulated link. What goes wrong, and what must hold regardless, is in
//! docs/simulation.md. Used by the test beside it and by `scripts/simulate`.
#![allow(clippy::unwrap_used, unreachable_pub, reason = "a simulation that cannot get its value has failed")]

pub mod world;
pub mod device;
pub mod stages;
pub mod invariants;

use std::ops::AddAssign;

use aggregator::round::RoundMode;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use world::World;

/// Rounds of a seed.
pub const ROUNDS: u64 = 25;
/// More than any seed needs; a simulation that gets here has come to a standstill.
const STEPS_MAX: u64 = 20_000;

/// What seeds came to: counts of what happened, and of what was checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub rounds: u64,
    pub published: u64,
    pub rejected: u64,
    pub abandoned: u64,
    pub receipts: u64,
    /// Updates merged into a later release than the one that they were trained from.
    pub stale: u64,
    pub kills: u64,
    pub crashes: u64,
    pub store_faults: u64,
    pub partitions: u64,
    pub clock_steps_back: u64,
    pub cuts: u64,
    pub duplicates: u64,
    pub delays: u64,
    pub corruptions: u64,
    /// States of a running world in which every bound was looked at.
    pub states_checked: u64,
    /// Merges computed again from what the devices sent.
    pub merges_checked: u64,
}

impl Tally {
    /// Faults of the link.
    pub fn link_faults(&self) -> u64 {
        self.cuts + self.duplicates + self.delays + self.corruptions
    }

    /// Every count with its name.
    pub fn counts(&self) -> [(&'static str, u64); 17] {
        [
            ("rounds", self.rounds),
            ("published", self.published),
            ("rejected", self.rejected),
            ("abandoned", self.abandoned),
            ("receipts, each looked up in the merges", self.receipts),
            ("updates merged behind their release", self.stale),
            ("aggregator killed", self.kills),
            ("of these, within a write", self.crashes),
            ("spells of a failing store", self.store_faults),
            ("devices cut off for a while", self.partitions),
            ("clock set back", self.clock_steps_back),
            ("streams cut", self.cuts),
            ("streams repeated", self.duplicates),
            ("frames delayed", self.delays),
            ("frames and answers damaged", self.corruptions),
            ("states checked against the bounds", self.states_checked),
            ("merges computed again", self.merges_checked),
        ]
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.rounds += other.rounds;
        self.published += other.published;
        self.rejected += other.rejected;
        self.abandoned += other.abandoned;
        self.receipts += other.receipts;
        self.stale += other.stale;
        self.kills += other.kills;
        self.crashes += other.crashes;
        self.store_faults += other.store_faults;
        self.partitions += other.partitions;
        self.clock_steps_back += other.clock_steps_back;
        self.cuts += other.cuts;
        self.duplicates += other.duplicates;
        self.delays += other.delays;
        self.corruptions += other.corruptions;
        self.states_checked += other.states_checked;
        self.merges_checked += other.merges_checked;
    }
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
            55..84 => world.drive(),
            84..91 => world.time_passes(random.random_range(1..20_000)),
            91 => world.clock_steps_back(random.random_range(1..10_000)),
            92 => world.partition(&mut random),
            93..96 => world.store_fails(&mut random),
            96..98 => world.store_heals(),
            98 => world.crash_soon(random.random_range(0..40)),
            _ => world.kill(),
        }
        invariants::check_running(&world);
    }
    world.settle().await;
    let mut tally = invariants::check_end(&world);
    tally.states_checked = steps;
    tally
}

/// The same seed gives the same course of events and the same counts.
///
/// # Panics
/// When an invariant does not hold; the message names the seed.
pub fn run(seed: u64, mode: RoundMode) -> Tally {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(simulate(seed, mode))
}
