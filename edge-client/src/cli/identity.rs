//! Who the device is: its credentials and its aggregator's address on disk, and a fresh certificate before the old one
//! ends.
//!
//! `enroll.rs` makes it, `rounds.rs` renews it between visits, the other verbs read it. The private key is never sent.

use anyhow::Result;
use commonweal_protocol::{DeviceId, Invitation};
use commonweal_transport::{Credentials, DeviceKey, Link, QuicLink};
use serde::{Deserialize, Serialize};

use crate::store::{Store, StoreError};

const CREDENTIALS: &str = "identity/credentials.pem";
pub(crate) const ADDRESS: &str = "identity/aggregator.json";
/// The address of a device that is enrolled once its credentials are there.
const NEXT_ADDRESS: &str = "identity/next.json";

/// Where the aggregator is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
}

impl Address {
    pub(super) fn of(invitation: &Invitation) -> Self {
        Self { host: invitation.host.to_string(), port: invitation.port }
    }

    /// As it lies in a file, and for which device; none of before.
    pub(super) fn read(store: &Store, name: &str) -> Result<Option<(Self, Option<DeviceId>)>, StoreError> {
        let Some(bytes) = store.read(name)? else { return Ok(None) };
        let kept: Kept =
            serde_json::from_slice(&bytes).map_err(|_| damaged(store, name, "expected host and port"))?;
        Ok(Some((kept.address, kept.device)))
    }
}

fn damaged(store: &Store, name: &str, reason: &str) -> StoreError {
    StoreError::Damaged { path: store.path(name), reason: reason.into() }
}

/// An address as it is kept: with the device that it is for, which tells whether it goes with the credentials.
#[derive(Serialize, Deserialize)]
struct Kept {
    #[serde(flatten)]
    address: Address,
    /// None of before.
    device: Option<DeviceId>,
}

/// What enrolling brought, and renewing keeps.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) credentials: Credentials,
    pub(super) address: Address,
}

impl Identity {
    /// The device's identity, if it is enrolled.
    pub(super) fn read(store: &Store) -> Result<Option<Self>> {
        let Some(pem) = store.read(CREDENTIALS)? else { return Ok(None) };
        let pem = String::from_utf8(pem).map_err(|_| damaged(store, CREDENTIALS, "expected PEM text"))?;
        let credentials = Credentials::from_pem(&pem)?;
        for name in [NEXT_ADDRESS, ADDRESS] {
            let Some((address, device)) = Address::read(store, name)? else { continue };
            if device.is_none_or(|device| device == credentials.device()) {
                return Ok(Some(Self { credentials, address }));
            }
        }
        Ok(None)
    }

    /// In the place of the one before: the credentials' renaming decides which of them it is, whenever a kill comes.
    pub(super) fn keep(&self, store: &Store) -> Result<()> {
        let kept = Kept { address: self.address.clone(), device: Some(self.credentials.device()) };
        store.write(NEXT_ADDRESS, &serde_json::to_vec(&kept)?)?;
        store.write(CREDENTIALS, self.credentials.to_pem().as_bytes())?;
        Ok(store.rename(NEXT_ADDRESS, ADDRESS)?)
    }

    /// Gets a fresh key and certificate. They are on disk before the link uses them: a kill leaves the old or the new.
    pub(super) async fn renew(&mut self, store: &Store, link: &QuicLink) -> Result<()> {
        let key = DeviceKey::generate()?;
        let chain = link.renew(key.csr()?).await?;
        let fresh = self.credentials.renewed(key, &chain)?;
        store.write(CREDENTIALS, fresh.to_pem().as_bytes())?;
        link.wire().replace(fresh.clone()).await?;
        self.credentials = fresh;
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::{
        net::Ipv4Addr,
        sync::{Arc, Mutex},
    };

    use commonweal_protocol::{
        Accepted, AggregatorKey, BaseHash, CertificateChain, Chunk, Csr, Enroll, Enrolled, Fetch, KeyNumber,
        Open, Poll, PollReply, ReconnectWindow, Refusal, Refused, SigningKey, UploadKey,
    };
    use commonweal_transport::{
        Authority, Clock, ContentPart, Handler, LinkLimits, Opened, Peer, QuicServer, ServeLimits,
    };

    const DAY_MS: u64 = 24 * 3600 * 1000;

    /// Renews, and remembers the certificate that the last poll came with.
    struct Desk {
        authority: Authority,
        clock: Clock,
        seen: Mutex<Option<Peer>>,
    }

    impl Handler for Desk {
        async fn admit(&self, _: &Peer) -> Result<(), Refused> {
            Ok(())
        }

        async fn poll(&self, peer: &Peer, _: Poll) -> Result<PollReply, Refused> {
            *self.seen.lock().unwrap() = Some(*peer);
            Ok(PollReply {
                task: None,
                release: None,
                successions: vec![],
                reconnect: ReconnectWindow::default(),
            })
        }

        async fn renew(&self, peer: &Peer, csr: Csr) -> Result<CertificateChain, Refused> {
            let (device, now_ms) = (peer.device, self.clock.unix_ms());
            Ok(self.authority.issue_device(&csr, device, now_ms, 30 * DAY_MS).unwrap())
        }

        async fn open(&self, _: &Peer, _: Open) -> Result<Opened, Refused> {
            Err(Refusal::Internal.into())
        }

        async fn chunk(&self, _: &Peer, _: UploadKey, _: Chunk) -> Result<u64, Refused> {
            Err(Refusal::Internal.into())
        }

        async fn finish(&self, _: &Peer, _: UploadKey) -> Result<Accepted, Refused> {
            Err(Refusal::Internal.into())
        }

        async fn read(&self, _: &Peer, _: Fetch, _: usize) -> Result<ContentPart, Refused> {
            Err(Refusal::Internal.into())
        }

        async fn enroll(&self, _: Enroll) -> Result<Enrolled, Refused> {
            Err(Refusal::Internal.into())
        }
    }

    pub(in crate::cli) fn credentials(authority: &Authority, device: DeviceId, begun_ms: u64) -> Credentials {
        let key = DeviceKey::generate().unwrap();
        let chain = authority.issue_device(&key.csr().unwrap(), device, begun_ms, 30 * DAY_MS).unwrap();
        let signing_key = AggregatorKey::of(&SigningKey::from_bytes(&[5; 32]));
        let enrolled = Enrolled { device, chain, signing_key, key_number: KeyNumber(0) };
        Credentials::new(key, &enrolled, authority.digest()).unwrap()
    }

    #[test]
    fn a_kill_while_another_identity_is_kept_leaves_one_of_them_whole() {
        let begun_ms = 1_767_225_600_000;
        let authority = Authority::create(begun_ms).unwrap();
        let identity = |number: u8| Identity {
            credentials: credentials(&authority, DeviceId([number; 16]), begun_ms),
            address: Address { host: format!("host-{number}"), port: number.into() },
        };
        let (before, after) = (identity(1), identity(2));
        let mut seen = std::collections::BTreeSet::new();
        for steps in 0.. {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(directory.path()).unwrap();
            before.keep(&store).unwrap();
            drop(store);
            let dying = Store::open_dying(directory.path(), steps).unwrap();
            let is_whole = after.keep(&dying).is_ok();
            drop(dying);
            let store = Store::open(directory.path()).unwrap();
            let found = Identity::read(&store).unwrap().unwrap();
            let wanted =
                if found.credentials.device() == before.credentials.device() { &before } else { &after };
            assert_eq!(found.address, wanted.address, "after {steps} steps");
            seen.insert(found.address.port);
            // Whatever is there, enrolling once more ends well.
            before.keep(&store).unwrap();
            assert_eq!(Identity::read(&store).unwrap().unwrap().address, before.address);
            if is_whole {
                assert_eq!(found.address, after.address);
                break;
            }
        }
        assert_eq!(seen.len(), 2);
    }

    #[test]
    fn an_address_of_before_goes_with_any_credentials() {
        let authority = Authority::create(0).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let address = Address { host: "host".into(), port: 1 };
        let credentials = credentials(&authority, DeviceId([1; 16]), 0);
        Identity { credentials, address: address.clone() }.keep(&store).unwrap();
        store.write(ADDRESS, br#"{"host":"host","port":1}"#).unwrap();
        assert_eq!(Identity::read(&store).unwrap().unwrap().address, address);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_fresh_certificate_is_kept_and_shown_by_the_link_that_is_open() {
        let clock = Clock::manual(1_767_225_600_000);
        let begun_ms = clock.unix_ms();
        let authority = Authority::create(begun_ms).unwrap();
        let device = DeviceId([7; 16]);
        let credentials = credentials(&authority, device, begun_ms);
        let server_identity = authority.issue_server(begun_ms, 60 * DAY_MS).unwrap();
        let desk = Arc::new(Desk { authority, clock: clock.clone(), seen: Mutex::default() });
        let any_port = (Ipv4Addr::LOCALHOST, 0).into();
        let limits = ServeLimits::default();
        let server =
            QuicServer::bind(any_port, server_identity, Arc::clone(&desk), limits, clock.clone()).unwrap();
        let (host, port) = ("127.0.0.1", server.local_addr().port());
        let link =
            QuicLink::new(host, port, credentials.clone(), LinkLimits::default(), clock.clone()).unwrap();
        let poll = Poll { base: BaseHash([1; 32]), installed: None, key: KeyNumber(0), trouble: None };
        link.poll(poll).await.unwrap();
        assert_eq!(desk.seen.lock().unwrap().unwrap().expires_ms, credentials.expires_ms());

        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let mut identity = Identity { credentials, address: Address { host: host.into(), port } };
        identity.keep(&store).unwrap();
        clock.set(begun_ms + 21 * DAY_MS);
        identity.renew(&store, &link).await.unwrap();
        // The old certificate is over: what is served now is the new one.
        clock.set(begun_ms + 31 * DAY_MS);
        link.poll(poll).await.unwrap();
        let peer = desk.seen.lock().unwrap().unwrap();
        assert_eq!((peer.device, peer.expires_ms), (device, identity.credentials.expires_ms()));
        let kept = Identity::read(&store).unwrap().unwrap();
        assert_eq!(kept.credentials.to_pem(), identity.credentials.to_pem());
        assert_eq!(kept.address, identity.address);
    }
}
