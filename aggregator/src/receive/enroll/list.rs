//! What the registry holds as a whole, a page at a time: devices, those that are served, invitations that are open.
//!
//! A record that is damaged is passed over, with a warning the first time: it is one device's or one token's, and nobody
//! else's list, count or trial waits for it. Whoever asks for that very device is told (`admit`, `is_revoked`).

use std::collections::BTreeSet;
use std::sync::PoisonError;

use commonweal_protocol::DeviceId;
use serde::de::DeserializeOwned;

use super::{DeviceRecord, EnrollError, Registry, TokenRecord, decode};
use crate::store::{PAGE_MAX, StoreError};

/// Damaged records that are warned of.
const WARNED_MAX: usize = 1_000;

impl Registry {
    /// All devices, in the order of their names.
    pub fn devices(&self) -> Result<Vec<(DeviceId, DeviceRecord)>, StoreError> {
        let mut devices = Vec::new();
        self.each("device/", |log, record| {
            if let Ok(id) = log.trim_start_matches("device/").parse() {
                devices.push((id, record));
            }
        })?;
        Ok(devices)
    }

    /// Those that are not revoked.
    pub fn served(&self) -> Result<BTreeSet<DeviceId>, StoreError> {
        let served = self.devices()?.into_iter().filter(|(_, record)| record.revoked_ms.is_none());
        Ok(served.map(|(device, _)| device).collect())
    }

    /// Tokens that can still be spent.
    pub fn tokens_open(&self, now_ms: u64) -> Result<usize, StoreError> {
        Ok(self.open_logs(now_ms)?.len())
    }

    /// Their logs.
    pub(super) fn open_logs(&self, now_ms: u64) -> Result<Vec<String>, StoreError> {
        let mut open = Vec::new();
        self.each("token/", |log, record: TokenRecord| {
            if record.is_open(now_ms) {
                open.push(log.to_owned());
            }
        })?;
        Ok(open)
    }

    fn each<T: DeserializeOwned>(
        &self,
        prefix: &str,
        mut with: impl FnMut(&str, T),
    ) -> Result<(), StoreError> {
        let mut after = String::new();
        loop {
            let page = self.coord.heads(prefix, &after, PAGE_MAX)?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after.clone_from(last);
            for (log, entry) in &page {
                match decode(log, entry) {
                    Ok(record) => with(log, record),
                    Err(error) => self.warn_once(log, &error),
                }
            }
        }
    }

    /// A page of the dashboard lists every two seconds.
    fn warn_once(&self, log: &str, error: &EnrollError) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.len() < WARNED_MAX && warned.insert(log.to_owned()) {
            tracing::warn!(%error, "a damaged record is passed over");
        }
    }
}

#[cfg(test)]
mod tests {
    use commonweal_protocol::{Csr, Token};

    use super::super::tests::Stamp;
    use super::*;
    use crate::store::{Coord, MemoryStorage};

    /// Three devices and two open tokens; a device and a token are damaged.
    fn damaged() -> (MemoryStorage, Registry, [DeviceId; 3]) {
        let memory = MemoryStorage::default();
        let registry = Registry::new(memory.storage().coord);
        let devices = [1, 2, 3].map(|number| DeviceId([number; 16]));
        let csr = Csr::new(vec![1]).unwrap();
        for device in devices {
            let token = Token([device.0[0]; 32]);
            registry.invite(&token, 0, 100).unwrap();
            registry.enroll(&Stamp, &token, &csr, device, 50, 900).unwrap();
        }
        for number in [8, 9] {
            registry.invite(&Token([number; 32]), 0, 100).unwrap();
        }
        for log in [format!("device/{}", devices[1]), format!("token/{}", Token([9; 32]).digest())] {
            let head = memory.head(&log).unwrap().unwrap();
            memory.compare_and_set(&log, head.sequence, b"not json").unwrap();
        }
        (memory, registry, devices)
    }

    #[test]
    fn what_is_damaged_is_passed_over_and_told_to_whoever_asks_for_it() {
        let (_memory, registry, [first, broken, third]) = damaged();
        let listed: Vec<DeviceId> =
            registry.devices().unwrap().into_iter().map(|(device, _)| device).collect();
        assert_eq!(listed, [first, third]);
        assert_eq!(registry.served().unwrap(), BTreeSet::from([first, third]));
        assert_eq!(registry.tokens_open(10).unwrap(), 1);
        assert_eq!(registry.warned.lock().unwrap().len(), 2, "each is warned of");
        assert_eq!(registry.withdraw_all(10).unwrap(), 1);
        assert!(matches!(registry.admit(&broken), Err(EnrollError::Damaged { .. })));
        registry.revoke(&third, 60).unwrap();
        assert_eq!(registry.served().unwrap(), BTreeSet::from([first]));
    }

    #[test]
    fn a_damaged_invitation_opens_nothing_and_can_be_withdrawn() {
        let (_memory, registry, _) = damaged();
        let enroll = || {
            registry.enroll(&Stamp, &Token([9; 32]), &Csr::new(vec![1]).unwrap(), DeviceId([9; 16]), 50, 900)
        };
        assert!(matches!(enroll(), Err(EnrollError::Damaged { .. })));
        registry.withdraw(&Token([9; 32]), 60).unwrap();
        registry.withdraw(&Token([9; 32]), 70).unwrap();
        assert!(matches!(enroll(), Err(EnrollError::TokenWithdrawn { withdrawn_ms: 60 })));
    }

    #[test]
    fn a_damaged_device_can_be_revoked_and_is_then_listed_so() {
        let (_memory, registry, [_, broken, _]) = damaged();
        registry.revoke(&broken, 60).unwrap();
        registry.revoke(&broken, 70).unwrap();
        assert!(matches!(registry.admit(&broken), Err(EnrollError::Revoked { .. })));
        let devices = registry.devices().unwrap();
        assert_eq!(devices.iter().find(|(device, _)| *device == broken).unwrap().1.revoked_ms, Some(60));
    }
}
