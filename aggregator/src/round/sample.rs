//! Who is asked: which of the devices that are ready get a task of a synchronous round.
//!
//! A part of `round.tick`. Draws are a hash of seed, round and device: the same devices that are ready make the same
//! choice on every machine, and no device can tell when its turn comes without the seed.

use std::collections::{BTreeMap, BTreeSet};

use commonweal_protocol::{DeviceId, RoundId};
use serde::{Deserialize, Serialize};

/// Devices that can be ready at once; who comes later waits for the next round.
pub(super) const READY_MAX: usize = 20_000;
/// Devices whose last round is remembered; of those forgotten, which were chosen longest ago, it counts as never.
const CHOSEN_MAX: usize = 20_000;

/// Whom a round asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// Whoever comes first; a round opens as soon as enough are ready.
    #[default]
    First,
    /// An even draw of all that became ready within `wait_ms`.
    Uniform,
    /// Those that were asked longest ago or never, of all that became ready within `wait_ms`; among equals a draw.
    Fair,
}

/// When each device was last asked, the newest alone; of [`Sampling::Fair`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Chosen(BTreeMap<DeviceId, RoundId>);

impl Chosen {
    /// Notes whom a round asks.
    pub(super) fn note(&mut self, round: RoundId, devices: impl Iterator<Item = DeviceId>) {
        self.0.extend(devices.map(|device| (device, round)));
        let surplus = self.0.len().saturating_sub(CHOSEN_MAX);
        if surplus > 0 {
            let mut rounds: Vec<_> = self.0.iter().map(|(device, round)| (*round, *device)).collect();
            rounds.sort_unstable();
            for (_, device) in rounds.iter().take(surplus) {
                self.0.remove(device);
            }
        }
    }

    fn last(&self, device: &DeviceId) -> RoundId {
        self.0.get(device).copied().unwrap_or(RoundId(0))
    }
}

/// At most `count` of the devices that are ready.
pub(super) fn choose(
    ready: &BTreeSet<DeviceId>,
    sampling: Sampling,
    chosen: &Chosen,
    (seed, round): (u64, RoundId),
    count: usize,
) -> BTreeSet<DeviceId> {
    let mut ranked: Vec<_> = ready
        .iter()
        .map(|device| {
            let last = if sampling == Sampling::Fair { chosen.last(device) } else { RoundId(0) };
            (last, draw(seed, round, device), *device)
        })
        .collect();
    ranked.sort_unstable();
    ranked.into_iter().take(count).map(|(_, _, device)| device).collect()
}

fn draw(seed: u64, round: RoundId, device: &DeviceId) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("commonweal sampling v1");
    hasher.update(&seed.to_le_bytes()).update(&round.0.to_le_bytes()).update(&device.0);
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(count: u16) -> BTreeSet<DeviceId> {
        (0..count)
            .map(|number| {
                let mut id = [0; 16];
                id[..2].copy_from_slice(&number.to_be_bytes());
                DeviceId(id)
            })
            .collect()
    }

    fn times(sampling: Sampling, rounds: u64, count: usize) -> BTreeMap<DeviceId, u32> {
        let ready = devices(50);
        let (mut chosen, mut times) = (Chosen::default(), BTreeMap::new());
        for round in (1..=rounds).map(RoundId) {
            let asked = choose(&ready, sampling, &chosen, (7, round), count);
            assert_eq!(asked.len(), count);
            chosen.note(round, asked.iter().copied());
            for device in asked {
                *times.entry(device).or_default() += 1;
            }
        }
        times
    }

    #[test]
    fn an_even_draw_asks_each_about_as_often() {
        // 2000 rounds of 5 of 50: 200 each, with a deviation of √(2000 · 0.1 · 0.9) = 13.4.
        let times = times(Sampling::Uniform, 2_000, 5);
        assert_eq!(times.len(), 50);
        assert!(times.values().all(|times| (140..=260).contains(times)), "{times:?}");
    }

    #[test]
    fn a_fair_draw_asks_each_exactly_as_often_and_in_no_fixed_order() {
        let times = times(Sampling::Fair, 100, 5);
        assert!(times.values().all(|times| *times == 10) && times.len() == 50, "{times:?}");
        let ready = devices(50);
        let first = |seed| choose(&ready, Sampling::Fair, &Chosen::default(), (seed, RoundId(1)), 5);
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn a_device_that_was_away_comes_next() {
        let (mut chosen, all) = (Chosen::default(), devices(10));
        for round in (1..=20).map(RoundId) {
            let ready = all.iter().skip(1).copied().collect();
            let asked = choose(&ready, Sampling::Fair, &chosen, (7, round), 3);
            chosen.note(round, asked.into_iter());
        }
        let asked = choose(&all, Sampling::Fair, &chosen, (7, RoundId(21)), 3);
        assert!(asked.contains(all.first().unwrap()));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_newest_stay() {
        let mut chosen = Chosen::default();
        let all: Vec<_> = devices(u16::MAX).into_iter().collect();
        for (round, some) in all.chunks(15_000).enumerate() {
            chosen.note(RoundId(round as u64 + 1), some.iter().copied());
            assert!(chosen.0.len() <= CHOSEN_MAX);
        }
        assert_eq!(chosen.last(all.last().unwrap()), RoundId(5));
        assert_eq!(chosen.last(&all[0]), RoundId(0));
    }
}
