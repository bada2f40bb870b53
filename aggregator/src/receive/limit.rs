//! How often and how much a device may send: a token bucket of requests, and a budget of bytes a round; and how often the
//! operator is told of strangers. In memory only: a restart forgives.

use std::collections::BTreeMap;

use commonweal_protocol::{DeviceId, RoundId};

use crate::config::Receive;

/// Devices remembered at once; beyond this the one that was idle longest is forgotten.
const DEVICES_MAX: usize = 20_000;

/// Refusals of strangers that the operator is told at once, and after that one every ten seconds.
const STRANGERS_TOLD: f64 = 20.0;
const STRANGERS_TOLD_PER_MS: f64 = 1.0 / 10_000.0;

/// So many at once, and then as they come back.
#[derive(Clone, Copy, Debug)]
struct Tokens {
    left: f64,
    seen_ms: u64,
}

impl Tokens {
    /// Takes one; false if there are none left.
    fn spend(&mut self, burst: f64, per_ms: f64, now_ms: u64) -> bool {
        let passed_ms = now_ms.saturating_sub(self.seen_ms) as f64;
        self.left = (self.left + passed_ms * per_ms).min(burst);
        self.seen_ms = self.seen_ms.max(now_ms);
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    requests: Tokens,
    round: RoundId,
    bytes: u64,
}

/// The buckets of all devices.
#[derive(Debug)]
pub(super) struct Limits {
    burst: f64,
    per_ms: f64,
    bytes_max: u64,
    buckets: BTreeMap<DeviceId, Bucket>,
    strangers: Tokens,
    strangers_untold: u64,
    throttled: u64,
}

impl Limits {
    pub(super) fn new(settings: &Receive, update_bytes_max: u64) -> Self {
        Self {
            burst: f64::from(settings.requests_burst),
            per_ms: settings.requests_per_second / 1_000.0,
            bytes_max: update_bytes_max.saturating_mul(u64::from(settings.resends_max)),
            buckets: BTreeMap::new(),
            strangers: Tokens { left: STRANGERS_TOLD, seen_ms: 0 },
            strangers_untold: 0,
            throttled: 0,
        }
    }

    fn bucket(&mut self, device: DeviceId, now_ms: u64) -> &mut Bucket {
        if self.buckets.len() >= DEVICES_MAX && !self.buckets.contains_key(&device) {
            let idle = self
                .buckets
                .iter()
                .min_by_key(|(_, bucket)| bucket.requests.seen_ms)
                .map(|(device, _)| *device);
            if let Some(idle) = idle {
                self.buckets.remove(&idle);
            }
        }
        let requests = Tokens { left: self.burst, seen_ms: now_ms };
        let full = Bucket { requests, round: RoundId(0), bytes: 0 };
        self.buckets.entry(device).or_insert(full)
    }

    /// Takes one request; false if there are none left.
    pub(super) fn spend_request(&mut self, device: DeviceId, now_ms: u64) -> bool {
        let (burst, per_ms) = (self.burst, self.per_ms);
        let is_left = self.bucket(device, now_ms).requests.spend(burst, per_ms, now_ms);
        self.throttled = self.throttled.saturating_add(u64::from(!is_left));
        is_left
    }

    /// When each device asked last.
    pub(super) fn seen(&self) -> BTreeMap<DeviceId, u64> {
        self.buckets.iter().map(|(device, bucket)| (*device, bucket.requests.seen_ms)).collect()
    }

    /// Requests for which there was none left.
    pub(super) fn throttled(&self) -> u64 {
        self.throttled
    }

    /// Whether the operator is to be told of a stranger's refusal, and if so how many were not told before it.
    pub(super) fn tell_stranger(&mut self, now_ms: u64) -> Option<u64> {
        if self.strangers.spend(STRANGERS_TOLD, STRANGERS_TOLD_PER_MS, now_ms) {
            return Some(std::mem::take(&mut self.strangers_untold));
        }
        self.strangers_untold = self.strangers_untold.saturating_add(1);
        None
    }

    /// Takes bytes of a round; false if that would be too many.
    pub(super) fn spend_bytes(&mut self, device: DeviceId, round: RoundId, bytes: u64) -> bool {
        let bytes_max = self.bytes_max;
        let bucket = self.bucket(device, 0);
        if bucket.round != round {
            (bucket.round, bucket.bytes) = (round, 0);
        }
        let total = bucket.bytes.saturating_add(bytes);
        if total > bytes_max {
            return false;
        }
        bucket.bytes = total;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: DeviceId = DeviceId([1; 16]);

    fn limits() -> Limits {
        let settings =
            Receive { requests_burst: 4, requests_per_second: 1.0, resends_max: 2, ..Receive::default() };
        Limits::new(&settings, 100)
    }

    #[test]
    fn a_device_is_slowed_down_and_others_are_not() {
        let mut limits = limits();
        for _ in 0..4 {
            assert!(limits.spend_request(DEVICE, 1_000));
        }
        assert!(!limits.spend_request(DEVICE, 1_900));
        assert_eq!((limits.throttled(), limits.seen()[&DEVICE]), (1, 1_900));
        assert!(limits.spend_request(DEVICE, 2_000));
        assert!(!limits.spend_request(DEVICE, 2_100));
        assert!(limits.spend_request(DeviceId([2; 16]), 2_100));
    }

    #[test]
    fn strangers_are_told_of_now_and_then_and_none_is_forgotten() {
        let mut limits = limits();
        let told = (0..100).filter(|_| limits.tell_stranger(1_000) == Some(0)).count();
        assert_eq!(told, 20);
        assert_eq!(limits.tell_stranger(11_000), Some(80));
        assert_eq!(limits.tell_stranger(12_000), None);
        assert_eq!(limits.tell_stranger(1_000_000), Some(1));
    }

    #[test]
    fn bytes_are_counted_by_round() {
        let mut limits = limits();
        assert!(limits.spend_bytes(DEVICE, RoundId(1), 150));
        assert!(!limits.spend_bytes(DEVICE, RoundId(1), 51));
        assert!(limits.spend_bytes(DEVICE, RoundId(1), 50));
        assert!(limits.spend_bytes(DEVICE, RoundId(2), 200));
    }
}
