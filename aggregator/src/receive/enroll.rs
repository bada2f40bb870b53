//! How a device gets and keeps its identity: single-use tokens stored as digests, certificates for signing
//! requests, revocation looked up for every request.
//!
//! `aggregator token`, `devices` and `revoke` use this beside a running server: all of it is in the store.

mod list;
mod withdraw;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use commonweal_protocol::{CertificateChain, Csr, DeviceId, Token};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::chain;
use crate::store::{Coord, Entry, StoreError};

/// Issues certificates; the transport's certificate authority, or a twin in simulations.
pub trait Certify: Send + Sync {
    /// A certificate for `device` over the request's key, valid from `now_ms` to `expires_ms`.
    fn certify(
        &self,
        device: DeviceId,
        csr: &Csr,
        now_ms: u64,
        expires_ms: u64,
    ) -> Result<CertificateChain, String>;
}

/// An invitation's token as it is kept: under its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// When it was made.
    pub created_ms: u64,
    /// When it ends.
    pub expires_ms: u64,
    /// Who spent it.
    pub device: Option<DeviceId>,
    /// When an operator withdrew it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub withdrawn_ms: Option<u64>,
}

impl TokenRecord {
    fn is_open(&self, now_ms: u64) -> bool {
        self.device.is_none() && self.withdrawn_ms.is_none() && self.expires_ms > now_ms
    }
}

/// An enrolled device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// When it enrolled.
    pub enrolled_ms: u64,
    /// When its newest certificate ends.
    pub expires_ms: u64,
    /// When it was revoked.
    pub revoked_ms: Option<u64>,
}

/// Why a device has no certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The token is not one of ours.
    #[error("the token is unknown")]
    TokenUnknown,
    /// The token was spent.
    #[error("the token was spent by device {device}")]
    TokenSpent {
        /// By whom.
        device: DeviceId,
    },
    /// The token is too old.
    #[error("the token expired at {expires_ms}, it is {now_ms}")]
    TokenExpired {
        /// Its end.
        expires_ms: u64,
        /// The time.
        now_ms: u64,
    },
    /// The token was withdrawn before anybody spent it.
    #[error("the token was withdrawn at {withdrawn_ms}")]
    TokenWithdrawn {
        /// When.
        withdrawn_ms: u64,
    },
    /// The signing request is not acceptable.
    #[error("the signing request is not acceptable: {0}")]
    Csr(String),
    /// No such device.
    #[error("device {device} is not enrolled")]
    DeviceUnknown {
        /// Which.
        device: DeviceId,
    },
    /// The device was revoked.
    #[error("device {device} was revoked")]
    Revoked {
        /// Which.
        device: DeviceId,
    },
    /// A stored record does not decode.
    #[error("the record `{log}` is damaged")]
    Damaged {
        /// Its log.
        log: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The store failed.
    #[error("the registry was not stored")]
    Store(#[from] StoreError),
}

/// Tokens and devices.
#[derive(Clone)]
pub struct Registry {
    coord: Arc<dyn Coord>,
    /// Damaged records that were warned of.
    warned: Arc<Mutex<BTreeSet<String>>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Registry")
    }
}

fn token_log(token: &Token) -> String {
    format!("token/{}", token.digest())
}

fn device_log(device: &DeviceId) -> String {
    format!("device/{device}")
}

fn decode<T: DeserializeOwned>(log: &str, entry: &Entry) -> Result<T, EnrollError> {
    serde_json::from_slice(&entry.value)
        .map_err(|source| EnrollError::Damaged { log: log.to_owned(), source })
}

impl Registry {
    /// Over this store.
    pub fn new(coord: Arc<dyn Coord>) -> Self {
        Self { coord, warned: Arc::default() }
    }

    fn load<T: DeserializeOwned>(&self, log: &str) -> Result<Option<(u64, T)>, EnrollError> {
        let Some(entry) = self.coord.head(log)? else { return Ok(None) };
        Ok(Some((entry.sequence, decode(log, &entry)?)))
    }

    fn save<T: Serialize>(&self, log: &str, expected: u64, record: &T) -> Result<(), EnrollError> {
        let bytes = serde_json::to_vec(record)
            .map_err(|source| EnrollError::Damaged { log: log.to_owned(), source })?;
        self.coord.compare_and_set(log, expected, &bytes)?;
        Ok(())
    }

    /// Remembers a new token.
    pub fn invite(&self, token: &Token, now_ms: u64, expires_ms: u64) -> Result<(), EnrollError> {
        let record = TokenRecord { created_ms: now_ms, expires_ms, device: None, withdrawn_ms: None };
        self.save(&token_log(token), 0, &record)
    }

    /// Spends a token on a new device and issues its certificate. The device is written first: a crash in
    /// between leaves a name that nobody has, and a token that still works.
    pub fn enroll(
        &self,
        authority: &dyn Certify,
        token: &Token,
        csr: &Csr,
        device: DeviceId,
        now_ms: u64,
        expires_ms: u64,
    ) -> Result<CertificateChain, EnrollError> {
        let log = token_log(token);
        let (sequence, mut record): (u64, TokenRecord) = self.load(&log)?.ok_or(EnrollError::TokenUnknown)?;
        if let Some(device) = record.device {
            return Err(EnrollError::TokenSpent { device });
        }
        if let Some(withdrawn_ms) = record.withdrawn_ms {
            return Err(EnrollError::TokenWithdrawn { withdrawn_ms });
        }
        if record.expires_ms <= now_ms {
            return Err(EnrollError::TokenExpired { expires_ms: record.expires_ms, now_ms });
        }
        let certificates = authority.certify(device, csr, now_ms, expires_ms).map_err(EnrollError::Csr)?;
        self.save(
            &device_log(&device),
            0,
            &DeviceRecord { enrolled_ms: now_ms, expires_ms, revoked_ms: None },
        )?;
        record.device = Some(device);
        match self.save(&log, sequence, &record) {
            Ok(()) => Ok(certificates),
            // Perhaps it was written after all, perhaps somebody else was faster: the token says.
            Err(error) => match self.load::<TokenRecord>(&log)? {
                Some((_, found)) if found.device == Some(device) => Ok(certificates),
                found => {
                    if let Err(left) = self.revoke(&device, now_ms) {
                        tracing::warn!(%device, error = chain(&left), "an unused device stays listed");
                    }
                    match found.map(|(_, found)| (found.device, found.withdrawn_ms)) {
                        Some((Some(device), _)) => Err(EnrollError::TokenSpent { device }),
                        Some((_, Some(withdrawn_ms))) => Err(EnrollError::TokenWithdrawn { withdrawn_ms }),
                        _ => Err(error),
                    }
                }
            },
        }
    }

    /// A fresh certificate for a device that has one.
    pub fn renew(
        &self,
        authority: &dyn Certify,
        csr: &Csr,
        device: DeviceId,
        now_ms: u64,
        expires_ms: u64,
    ) -> Result<CertificateChain, EnrollError> {
        // Read once: who is revoked from here on has moved the head, and the record below does not go over it.
        let (sequence, record) = self.admitted(&device)?;
        let certificates = authority.certify(device, csr, now_ms, expires_ms).map_err(EnrollError::Csr)?;
        let log = device_log(&device);
        self.save(&log, sequence, &DeviceRecord { expires_ms, ..record })?;
        self.coord.truncate(&log, sequence)?;
        Ok(certificates)
    }

    /// The record of a device that may ask.
    pub fn admit(&self, device: &DeviceId) -> Result<DeviceRecord, EnrollError> {
        self.admitted(device).map(|(_, record)| record)
    }

    /// Whether a device was revoked; one that nobody enrolled was not.
    pub fn is_revoked(&self, device: &DeviceId) -> Result<bool, EnrollError> {
        let record: Option<(u64, DeviceRecord)> = self.load(&device_log(device))?;
        Ok(record.is_some_and(|(_, record)| record.revoked_ms.is_some()))
    }

    fn admitted(&self, device: &DeviceId) -> Result<(u64, DeviceRecord), EnrollError> {
        let (sequence, record) = self.device(device)?;
        if record.revoked_ms.is_some() {
            return Err(EnrollError::Revoked { device: *device });
        }
        Ok((sequence, record))
    }

    fn device(&self, device: &DeviceId) -> Result<(u64, DeviceRecord), EnrollError> {
        self.load(&device_log(device))?.ok_or(EnrollError::DeviceUnknown { device: *device })
    }

    /// Revokes a device, from its next request and the next merge on. Doing it again is harmless. In place of a record that
    /// is damaged comes one that is revoked: it serves nobody either way, and then says so.
    pub fn revoke(&self, device: &DeviceId, now_ms: u64) -> Result<(), EnrollError> {
        let log = device_log(device);
        loop {
            let head = self.coord.head(&log)?.ok_or(EnrollError::DeviceUnknown { device: *device })?;
            let revoked = match decode::<DeviceRecord>(&log, &head) {
                Ok(record) if record.revoked_ms.is_some() => return Ok(()),
                Ok(record) => DeviceRecord { revoked_ms: Some(now_ms), ..record },
                Err(_) => DeviceRecord { enrolled_ms: 0, expires_ms: 0, revoked_ms: Some(now_ms) },
            };
            match self.save(&log, head.sequence, &revoked) {
                // The device renewed its certificate meanwhile, which does not save it.
                Err(EnrollError::Store(StoreError::Conflict { .. })) => {}
                result => return result,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Faults, MemoryStorage};

    pub(super) struct Stamp;
    impl Certify for Stamp {
        fn certify(&self, _: DeviceId, csr: &Csr, _: u64, _: u64) -> Result<CertificateChain, String> {
            if csr.is_empty() { Err("empty".to_owned()) } else { Ok(CertificateChain(Vec::new())) }
        }
    }

    fn csr() -> Csr {
        Csr::new(vec![1]).unwrap()
    }

    const TOKEN: Token = Token([7; 32]);

    fn device(number: u8) -> DeviceId {
        DeviceId([number; 16])
    }

    fn registry(memory: &MemoryStorage) -> Registry {
        Registry::new(memory.storage().coord)
    }

    #[test]
    fn a_token_enrols_one_device_once() {
        let memory = MemoryStorage::default();
        let registry = registry(&memory);
        let enroll = |number| registry.enroll(&Stamp, &TOKEN, &csr(), device(number), 50, 900);
        assert!(matches!(enroll(1), Err(EnrollError::TokenUnknown)));
        registry.invite(&TOKEN, 0, 100).unwrap();
        assert_eq!(registry.tokens_open(50).unwrap(), 1);
        let bad = registry.enroll(&Stamp, &TOKEN, &Csr::new(Vec::new()).unwrap(), device(1), 50, 900);
        assert!(matches!(bad, Err(EnrollError::Csr(_))), "a bad request does not spend the token");
        enroll(1).unwrap();
        assert!(matches!(enroll(2), Err(EnrollError::TokenSpent { device: by }) if by == device(1)));
        assert_eq!(registry.tokens_open(50).unwrap(), 0);
        assert_eq!(registry.devices().unwrap().len(), 1);
        assert!(registry.admit(&device(1)).is_ok());
        assert!(matches!(registry.admit(&device(2)), Err(EnrollError::DeviceUnknown { .. })));
    }

    #[test]
    fn an_expired_token_is_refused() {
        let memory = MemoryStorage::default();
        let registry = registry(&memory);
        registry.invite(&TOKEN, 0, 100).unwrap();
        let late = registry.enroll(&Stamp, &TOKEN, &csr(), device(1), 100, 900);
        assert!(matches!(late, Err(EnrollError::TokenExpired { expires_ms: 100, now_ms: 100 })));
    }

    #[test]
    fn a_revoked_device_is_refused_and_cannot_renew() {
        let memory = MemoryStorage::default();
        let registry = registry(&memory);
        registry.invite(&TOKEN, 0, 100).unwrap();
        registry.enroll(&Stamp, &TOKEN, &csr(), device(1), 50, 900).unwrap();
        registry.renew(&Stamp, &csr(), device(1), 60, 1_000).unwrap();
        assert_eq!(registry.admit(&device(1)).unwrap().expires_ms, 1_000);
        registry.revoke(&device(1), 70).unwrap();
        registry.revoke(&device(1), 80).unwrap();
        assert!(matches!(registry.admit(&device(1)), Err(EnrollError::Revoked { .. })));
        assert!(matches!(
            registry.renew(&Stamp, &csr(), device(1), 90, 2_000),
            Err(EnrollError::Revoked { .. })
        ));
        assert!(matches!(registry.revoke(&device(9), 1), Err(EnrollError::DeviceUnknown { .. })));
    }

    /// Does something else in the midst of certifying.
    struct Meanwhile<F>(F);
    impl<F: Fn() + Send + Sync> Certify for Meanwhile<F> {
        fn certify(
            &self,
            device: DeviceId,
            csr: &Csr,
            now_ms: u64,
            expires_ms: u64,
        ) -> Result<CertificateChain, String> {
            (self.0)();
            Stamp.certify(device, csr, now_ms, expires_ms)
        }
    }

    #[test]
    fn a_device_revoked_while_it_renews_stays_revoked() {
        let memory = MemoryStorage::default();
        let registry = registry(&memory);
        registry.invite(&TOKEN, 0, 100).unwrap();
        registry.enroll(&Stamp, &TOKEN, &csr(), device(1), 50, 900).unwrap();
        let revoking = Meanwhile(|| registry.revoke(&device(1), 60).unwrap());
        assert!(registry.renew(&revoking, &csr(), device(1), 60, 1_000).is_err());
        assert!(matches!(registry.admit(&device(1)), Err(EnrollError::Revoked { .. })));
    }

    /// Renews the device once, between a caller's look and its write.
    struct RenewsOnce {
        memory: MemoryStorage,
        renewed: std::sync::atomic::AtomicBool,
    }

    impl Coord for RenewsOnce {
        fn head(&self, log: &str) -> Result<Option<Entry>, StoreError> {
            self.memory.head(log)
        }
        fn move_head(
            &self,
            log: &str,
            expected: u64,
            value: &[u8],
            other: Option<crate::store::While<'_>>,
        ) -> Result<u64, StoreError> {
            if !self.renewed.swap(true, std::sync::atomic::Ordering::SeqCst) {
                registry(&self.memory).renew(&Stamp, &csr(), device(1), 60, 1_000).unwrap();
            }
            self.memory.move_head(log, expected, value, other)
        }
        fn scan(&self, log: &str, from: u64, limit: usize) -> Result<Vec<Entry>, StoreError> {
            self.memory.scan(log, from, limit)
        }
        fn logs(&self, prefix: &str, after: &str, limit: usize) -> Result<Vec<String>, StoreError> {
            self.memory.logs(prefix, after, limit)
        }
        fn truncate(&self, log: &str, below: u64) -> Result<(), StoreError> {
            self.memory.truncate(log, below)
        }
    }

    #[test]
    fn a_device_that_renews_while_it_is_revoked_is_revoked() {
        let memory = MemoryStorage::default();
        let plain = registry(&memory);
        plain.invite(&TOKEN, 0, 100).unwrap();
        plain.enroll(&Stamp, &TOKEN, &csr(), device(1), 50, 900).unwrap();
        let racing = Registry::new(Arc::new(RenewsOnce { memory: memory.clone(), renewed: false.into() }));
        racing.revoke(&device(1), 70).unwrap();
        assert!(matches!(plain.admit(&device(1)), Err(EnrollError::Revoked { .. })));
    }

    #[test]
    fn whatever_the_store_does_a_token_serves_one_device_at_most() {
        for seed in 0..200 {
            let memory = MemoryStorage::default();
            let registry = registry(&memory);
            registry.invite(&TOKEN, 0, 100).unwrap();
            memory.inject(seed, Faults { determinate: 0.2, indeterminate: 0.3 });
            let enrolled = (0..20)
                .filter(|number| registry.enroll(&Stamp, &TOKEN, &csr(), device(*number), 1, 9).is_ok())
                .count();
            assert!(enrolled <= 1, "seed {seed}: {enrolled} devices");
        }
    }
}
