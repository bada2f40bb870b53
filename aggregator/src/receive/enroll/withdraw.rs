//! Takes invitations back that nobody has used: whoever comes with one afterwards is refused.

use commonweal_protocol::Token;

use super::{EnrollError, Registry, TokenRecord, decode, token_log};
use crate::store::StoreError;

impl Registry {
    /// Withdraws a token, at once. Doing it again is harmless; one that was spent is refused with its device's name.
    pub fn withdraw(&self, token: &Token, now_ms: u64) -> Result<(), EnrollError> {
        self.withdraw_log(&token_log(token), now_ms)
    }

    /// Withdraws all that can still be spent; how many there were.
    pub fn withdraw_all(&self, now_ms: u64) -> Result<usize, EnrollError> {
        let mut withdrawn = 0;
        for log in self.open_logs(now_ms)? {
            match self.withdraw_log(&log, now_ms) {
                Ok(()) => withdrawn += 1,
                // Somebody was faster.
                Err(EnrollError::TokenSpent { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(withdrawn)
    }

    fn withdraw_log(&self, log: &str, now_ms: u64) -> Result<(), EnrollError> {
        loop {
            let head = self.coord.head(log)?.ok_or(EnrollError::TokenUnknown)?;
            let record = match decode(log, &head) {
                Ok(TokenRecord { device: Some(device), .. }) => {
                    return Err(EnrollError::TokenSpent { device });
                }
                Ok(TokenRecord { withdrawn_ms: Some(_), .. }) => return Ok(()),
                // A process of a version that knows of no withdrawal takes it for one whose time is over.
                Ok(record) => TokenRecord {
                    expires_ms: record.expires_ms.min(now_ms),
                    withdrawn_ms: Some(now_ms),
                    ..record
                },
                // It opens nothing either way, and then says so.
                Err(_) => {
                    TokenRecord { created_ms: 0, expires_ms: 0, device: None, withdrawn_ms: Some(now_ms) }
                }
            };
            match self.save(log, head.sequence, &record) {
                // Spent or withdrawn meanwhile: the record says.
                Err(EnrollError::Store(StoreError::Conflict { .. })) => {}
                result => return result,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use commonweal_protocol::{CertificateChain, Csr, DeviceId};

    use super::super::Certify;
    use super::*;
    use crate::store::MemoryStorage;

    /// Certifies whatever comes, and does something else meanwhile.
    struct Meanwhile<F>(F);

    impl<F: Fn() + Send + Sync> Certify for Meanwhile<F> {
        fn certify(&self, _: DeviceId, _: &Csr, _: u64, _: u64) -> Result<CertificateChain, String> {
            (self.0)();
            Ok(CertificateChain(Vec::new()))
        }
    }

    fn enroll(
        registry: &Registry,
        token: Token,
        meanwhile: impl Fn() + Send + Sync,
    ) -> Result<(), EnrollError> {
        let csr = Csr::new(vec![1]).unwrap();
        registry
            .enroll(&Meanwhile(meanwhile), &token, &csr, DeviceId(token.0[..16].try_into().unwrap()), 50, 900)
            .map(drop)
    }

    fn registry(tokens: u8) -> (Registry, Vec<Token>) {
        let registry = Registry::new(MemoryStorage::default().storage().coord);
        let tokens: Vec<_> = (0..tokens).map(|number| Token([number; 32])).collect();
        for token in &tokens {
            registry.invite(token, 0, 100).unwrap();
        }
        (registry, tokens)
    }

    #[test]
    fn a_withdrawn_token_enrols_nobody_and_the_others_do() {
        let (registry, tokens) = registry(2);
        registry.withdraw(&tokens[0], 40).unwrap();
        registry.withdraw(&tokens[0], 45).unwrap();
        assert_eq!(registry.tokens_open(10).unwrap(), 1, "also by a clock that is behind");
        let refused = enroll(&registry, tokens[0], || ());
        assert!(matches!(refused, Err(EnrollError::TokenWithdrawn { withdrawn_ms: 40 })), "{refused:?}");
        enroll(&registry, tokens[1], || ()).unwrap();
        let spent = registry.withdraw(&tokens[1], 60);
        assert!(matches!(spent, Err(EnrollError::TokenSpent { .. })), "{spent:?}");
        assert!(matches!(registry.withdraw(&Token([9; 32]), 60), Err(EnrollError::TokenUnknown)));
    }

    #[test]
    fn all_that_are_open_are_withdrawn_together() {
        let (registry, tokens) = registry(4);
        enroll(&registry, tokens[0], || ()).unwrap();
        registry.withdraw(&tokens[1], 40).unwrap();
        assert_eq!(registry.withdraw_all(50).unwrap(), 2);
        assert_eq!((registry.withdraw_all(50).unwrap(), registry.tokens_open(0).unwrap()), (0, 0));
        assert!(enroll(&registry, tokens[3], || ()).is_err());
        assert_eq!(registry.devices().unwrap().len(), 1, "who was enrolled stays");
    }

    #[test]
    fn a_token_withdrawn_while_it_is_spent_leaves_no_device_that_may_ask() {
        let (registry, tokens) = registry(1);
        let refused = enroll(&registry, tokens[0], || registry.withdraw(&tokens[0], 50).unwrap());
        assert!(matches!(refused, Err(EnrollError::TokenWithdrawn { .. })), "{refused:?}");
        let devices = registry.devices().unwrap();
        assert!(devices.iter().all(|(_, record)| record.revoked_ms.is_some()), "{devices:?}");
    }

    /// As version 0.1 wrote it, which reads what is written now.
    #[test]
    fn a_record_is_as_before_unless_it_was_withdrawn() {
        let before = r#"{"created_ms":1,"expires_ms":2,"device":null}"#;
        let record: TokenRecord = serde_json::from_str(before).unwrap();
        assert_eq!(record.withdrawn_ms, None);
        assert_eq!(serde_json::to_string(&record).unwrap(), before);
    }
}
