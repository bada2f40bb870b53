//! `kill -9` at moments that a seed draws, of whom it draws, beside hostile peers (`peers.rs`).

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use commonweal_tests::verdict::{self, Found};

use crate::{
    fleet::Fleet,
    peers::{self, Peers},
    serving,
};

/// One kill in so many is the aggregator's.
const AGGREGATOR_SHARE: u32 = 3;
/// One pause in so many is this many times as long, so that rounds come to their end between kills too.
const LONG_SHARE: u32 = 4;
const LONG_FACTOR: u64 = 5;
/// Kills between two words to whoever watches.
const TOLD_EVERY: u64 = 50;

/// How often who was killed.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Kills {
    pub(super) aggregator: u64,
    pub(super) devices: u64,
    pub(super) seconds: f64,
}

/// Kills `cycles` times, lets the federation come to itself beside its hostile peers, and judges what everybody then holds.
pub(super) fn kill(
    place: &Path,
    (devices, fronts): (u32, u32),
    cycles: u64,
    pause_ms: u64,
    seed: u64,
) -> Result<(Kills, Found, peers::Report)> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let begun = Instant::now();
    let mut kills = Kills::default();
    let directory = place.join("aggregator");
    let mut fleet = Fleet::start(&directory, place, devices, fronts)?;
    let peers = Peers::start(fleet.door(), seed)?;
    for cycle in 1..=cycles {
        let longest = pause_ms * if random.random_ratio(1, LONG_SHARE) { LONG_FACTOR } else { 1 };
        thread::sleep(Duration::from_millis(random.random_range(0..=longest)));
        if random.random_ratio(1, AGGREGATOR_SHARE) {
            fleet.kill_aggregator(random.random())?;
            kills.aggregator += 1;
        } else {
            fleet.kill_device(random.random_range(0..devices as usize))?;
            kills.devices += 1;
        }
        if cycle % TOLD_EVERY == 0 {
            let rounds = fleet.rounds()?.len();
            let left = begun.elapsed().as_secs_f64() * (cycles - cycle) as f64 / cycle as f64;
            eprintln!("{cycle} of {cycles} kills, {rounds} rounds, about {left:.0} s left");
        }
    }
    kills.seconds = begun.elapsed().as_secs_f64();
    fleet.goes_on()?;
    let peers::Ended { mut report, held: theirs, peers } = peers.stop()?;
    let (mut held, _postgres) = fleet.stop()?;
    let aggregator = serving::open(&directory, devices)?;
    report.merged = verdict::judge_peers(aggregator.parts(), &held, &peers)?;
    held.extend(theirs);
    Ok((kills, verdict::judge(aggregator.parts(), &held)?, report))
}
