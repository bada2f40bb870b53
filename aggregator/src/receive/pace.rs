//! Pace steering: when devices come back, so that many of them come evenly and no faster than is wanted (Bonawitz et al.
//! 2019, arXiv 1902.01046, section 2.3).
//!
//! `receive` puts the window into every answer. The number of devices is of those that were seen since the start; a
//! crowd that comes at once, after a restart say, is spread by the count that grows as it comes.

use commonweal_protocol::{ReconnectWindow, bounds};

/// The window at which `devices` devices come `per_second` times a second at most, and no earlier than `least`.
///
/// With n devices and r visits a second, a device comes back after n / r seconds, plus an even draw from 0 to n / r.
/// Whatever their phases, even all at the same moment, the expected rate is then never above r: a wave is spread over
/// n / r seconds, and the next begins where it ends. Once they have mixed, it is two thirds of r.
pub(super) fn window(devices: usize, per_second: f64, least: ReconnectWindow) -> ReconnectWindow {
    let needed_ms = (devices as f64 / per_second * 1_000.0).ceil();
    // A cast from a float ends at the type's bounds.
    let needed_ms = (needed_ms as u32).min(bounds::RECONNECT_MS_MAX);
    ReconnectWindow {
        after_ms: least.after_ms.max(needed_ms),
        spread_ms: least.spread_ms.max(needed_ms),
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::{BTreeSet, BinaryHeap};

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const LEAST: ReconnectWindow = ReconnectWindow { after_ms: 1_000, spread_ms: 1_000 };

    /// Visits in each ten seconds of an hour; `first_ms` draws when a device comes for the first time.
    fn visits(
        devices: usize,
        per_second: f64,
        mut first_ms: impl FnMut(&mut ChaCha8Rng) -> u64,
    ) -> Vec<u32> {
        let mut random = ChaCha8Rng::seed_from_u64(devices as u64);
        let mut next: BinaryHeap<_> =
            (0..devices).map(|device| Reverse((first_ms(&mut random), device))).collect();
        let (mut seen, mut counts) = (BTreeSet::new(), vec![0; 360]);
        while let Some(Reverse((at_ms, device))) = next.pop() {
            let Some(count) = counts.get_mut((at_ms / 10_000) as usize) else { break };
            *count += 1;
            seen.insert(device);
            let window = window(seen.len(), per_second, LEAST);
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
    fn few_devices_come_as_often_as_the_operator_set_and_none_is_sent_away_for_longer_than_a_week() {
        assert_eq!(window(0, 100.0, LEAST), LEAST);
        assert_eq!(window(100, 100.0, LEAST), LEAST);
        assert_eq!(window(101, 100.0, LEAST).after_ms, 1_010);
        let longest = window(usize::MAX, 0.1, LEAST);
        assert_eq!((longest.after_ms, longest.spread_ms), (bounds::RECONNECT_MS_MAX, bounds::RECONNECT_MS_MAX));
    }
}
