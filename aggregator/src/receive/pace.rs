//! Pace steering: when devices come back, so that many of them come evenly and no faster than is wanted (Bonawitz et al.
//! 2019, arXiv 1902.01046, section 2.3).
//!
//! `receive` puts the window into every answer. The number of devices is of those that came within a day or two;
//! a crowd that comes at once, after a restart say, is spread by the count that grows as it comes.

use commonweal_protocol::{DeviceId, ReconnectWindow, bounds};

/// Bits of a count: 128 KiB, whatever comes.
const BITS: usize = 1 << 20;
/// How long devices are counted together; who stayed away for two of these is no longer in the count.
const COUNTED_MS: u64 = 24 * 3_600_000;

/// How many devices come, in bounded memory: linear counting (Whang et al. 1990), a bit for each name's hash. Names are
/// random, so that a part of one is its hash.
#[derive(Debug)]
pub(super) struct Crowd {
    bits: Vec<u64>,
    set: usize,
    since_ms: u64,
    before: usize,
}

impl Default for Crowd {
    fn default() -> Self {
        Self { bits: vec![0; BITS / 64], set: 0, since_ms: 0, before: 0 }
    }
}

impl Crowd {
    /// A device came.
    pub(super) fn see(&mut self, device: &DeviceId, now_ms: u64) {
        if now_ms.saturating_sub(self.since_ms) >= COUNTED_MS {
            *self = Self { since_ms: now_ms, before: self.counted(), ..Self::default() };
        }
        let mut hash = [0; 8];
        hash.copy_from_slice(&device.0[..8]);
        let place = u64::from_le_bytes(hash) as usize % BITS;
        let bit = 1 << (place % 64);
        if let Some(word) = self.bits.get_mut(place / 64)
            && *word & bit == 0
        {
            *word |= bit;
            self.set += 1;
        }
    }

    /// About how many there are: to half a percent up to a million.
    pub(super) fn devices(&self) -> usize {
        self.counted().max(self.before)
    }

    fn counted(&self) -> usize {
        let (bits, free) = (BITS as f64, BITS.saturating_sub(self.set).max(1) as f64);
        (bits * (bits / free).ln()).round() as usize
    }
}

/// The window at which `devices` devices come `per_second` times a second at most, and no earlier than `least`.
///
/// With n devices and r visits a second, a device comes back after n / r seconds, plus an even draw from 0 to n / r.
/// Whatever their phases, even all at the same moment, the expected rate is then never above r: a wave is spread over
/// n / r seconds, and the next begins where it ends. Once they have mixed, it is two thirds of r.
pub(super) fn window(devices: usize, per_second: f64, least: ReconnectWindow) -> ReconnectWindow {
    let needed_ms = (devices as f64 / per_second * 1_000.0).ceil();
    // A cast from a float ends at the type's bounds.
    let needed_ms = (needed_ms as u32).min(bounds::RECONNECT_MS_MAX);
    ReconnectWindow { after_ms: least.after_ms.max(needed_ms), spread_ms: least.spread_ms.max(needed_ms) }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const LEAST: ReconnectWindow = ReconnectWindow { after_ms: 1_000, spread_ms: 1_000 };

    /// Visits in each ten seconds of an hour; `first_ms` draws when a device comes for the first time.
    fn visits(devices: usize, per_second: f64, mut first_ms: impl FnMut(&mut ChaCha8Rng) -> u64) -> Vec<u32> {
        let mut random = ChaCha8Rng::seed_from_u64(devices as u64);
        let mut next: BinaryHeap<_> =
            (0..devices).map(|device| Reverse((first_ms(&mut random), device))).collect();
        let names: Vec<_> = (0..devices).map(|_| DeviceId(random.random())).collect();
        let (mut crowd, mut counts) = (Crowd::default(), vec![0; 360]);
        while let Some(Reverse((at_ms, device))) = next.pop() {
            let Some(count) = counts.get_mut((at_ms / 10_000) as usize) else { break };
            *count += 1;
            crowd.see(&names[device], at_ms);
            let window = window(crowd.devices(), per_second, LEAST);
            next.push(Reverse((at_ms + window.delay_ms(random.random()), device)));
        }
        counts
    }

    /// The wanted number in ten seconds, and five standard deviations for chance.
    fn bound(per_second: f64) -> f64 {
        let wanted = per_second * 10.0;
        wanted + 5.0 * wanted.sqrt()
    }

    #[test]
    fn a_crowd_that_comes_at_once_comes_back_no_faster_than_wanted() {
        for (devices, per_second) in [(20_000, 200.0), (5_000, 20.0), (30_000, 1_000.0)] {
            let counts = visits(devices, per_second, |_| 0);
            let most = counts[1..].iter().max().copied().unwrap();
            assert!(f64::from(most) <= bound(per_second), "{devices} devices: {most} in ten seconds");
            let mean = f64::from(counts[180..].iter().sum::<u32>()) / 1_800.0;
            assert!(mean > per_second * 0.55, "{devices} devices: {mean} a second is slower than need be");
        }
    }

    #[test]
    fn devices_that_come_one_after_the_other_stay_spread() {
        let counts = visits(20_000, 200.0, |random| random.random_range(0..200_000));
        let most = counts.iter().max().copied().unwrap();
        // Until all were seen, those that are new come beside those that come back.
        assert!(f64::from(most) <= 2.0 * bound(200.0), "{most}");
        let later = counts[60..].iter().max().copied().unwrap();
        assert!(f64::from(later) <= bound(200.0), "{later}");
    }

    #[test]
    fn a_crowd_is_counted_in_the_same_memory_and_who_stays_away_leaves_the_count() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let mut crowd = Crowd::default();
        let names: Vec<DeviceId> = (0..200_000).map(|_| DeviceId(random.random())).collect();
        for (at, name) in names.iter().enumerate() {
            crowd.see(name, 0);
            crowd.see(name, 1);
            if matches!(at + 1, 1 | 10 | 100 | 20_000 | 200_000) {
                let error = crowd.devices() as f64 / (at + 1) as f64 - 1.0;
                assert!(error.abs() < 0.005, "{} of {}", crowd.devices(), at + 1);
            }
        }
        crowd.see(&names[0], COUNTED_MS);
        assert!(crowd.devices() > 190_000, "a day's count holds for the next");
        crowd.see(&names[0], 2 * COUNTED_MS);
        assert_eq!(crowd.devices(), 1);
    }

    #[test]
    fn few_devices_come_as_often_as_the_operator_set_and_none_is_sent_away_for_longer_than_a_week() {
        assert_eq!(window(0, 100.0, LEAST), LEAST);
        assert_eq!(window(100, 100.0, LEAST), LEAST);
        assert_eq!(window(101, 100.0, LEAST).after_ms, 1_010);
        let longest = window(usize::MAX, 0.1, LEAST);
        assert_eq!(
            (longest.after_ms, longest.spread_ms),
            (bounds::RECONNECT_MS_MAX, bounds::RECONNECT_MS_MAX)
        );
    }
}
