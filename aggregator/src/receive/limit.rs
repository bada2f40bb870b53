//! How often and how much a device may send: a token bucket of requests, and a budget of bytes a round.
//! In memory only: a restart forgives.

use std::collections::BTreeMap;

use commonweal_protocol::{DeviceId, RoundId};

use crate::config::Receive;

/// Devices remembered at once; beyond this the one that was idle longest is forgotten.
const DEVICES_MAX: usize = 20_000;

#[derive(Clone, Copy, Debug)]
struct Bucket {
    requests: f64,
    seen_ms: u64,
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
}

impl Limits {
    pub(super) fn new(settings: &Receive, update_bytes_max: u64) -> Self {
        Self {
            burst: f64::from(settings.requests_burst),
            per_ms: settings.requests_per_second / 1_000.0,
            bytes_max: update_bytes_max.saturating_mul(u64::from(settings.resends_max)),
            buckets: BTreeMap::new(),
        }
    }

    fn bucket(&mut self, device: DeviceId, now_ms: u64) -> &mut Bucket {
        if self.buckets.len() >= DEVICES_MAX && !self.buckets.contains_key(&device) {
            let idle =
                self.buckets.iter().min_by_key(|(_, bucket)| bucket.seen_ms).map(|(device, _)| *device);
            if let Some(idle) = idle {
                self.buckets.remove(&idle);
            }
        }
        let full = Bucket { requests: self.burst, seen_ms: now_ms, round: RoundId(0), bytes: 0 };
        self.buckets.entry(device).or_insert(full)
    }

    /// Takes one request; false if there are none left.
    pub(super) fn spend_request(&mut self, device: DeviceId, now_ms: u64) -> bool {
        let (burst, per_ms) = (self.burst, self.per_ms);
        let bucket = self.bucket(device, now_ms);
        let passed_ms = now_ms.saturating_sub(bucket.seen_ms) as f64;
        bucket.requests = (bucket.requests + passed_ms * per_ms).min(burst);
        bucket.seen_ms = bucket.seen_ms.max(now_ms);
        if bucket.requests < 1.0 {
            return false;
        }
        bucket.requests -= 1.0;
        true
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
        assert!(limits.spend_request(DEVICE, 2_000));
        assert!(!limits.spend_request(DEVICE, 2_100));
        assert!(limits.spend_request(DeviceId([2; 16]), 2_100));
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
