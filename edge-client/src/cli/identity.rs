//! Who the device is: its credentials and its aggregator's address on disk, and a fresh certificate before the old one
//! ends.
//!
//! `enroll.rs` makes it, `rounds.rs` renews it between visits, the other verbs read it. The private key is never sent.

use anyhow::Result;
use commonweal_protocol::Invitation;
use commonweal_transport::{Credentials, DeviceKey, Link, QuicLink};
use serde::{Deserialize, Serialize};

use crate::store::{Store, StoreError};

const CREDENTIALS: &str = "identity/credentials.pem";
const ADDRESS: &str = "identity/aggregator.json";

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
        let (Some(pem), Some(address)) = (store.read(CREDENTIALS)?, store.read(ADDRESS)?) else {
            return Ok(None);
        };
        let damaged =
            |reason: &str| StoreError::Damaged { path: store.path("identity"), reason: reason.into() };
        let pem = String::from_utf8(pem).map_err(|_| damaged("expected PEM text"))?;
        let address = serde_json::from_slice(&address).map_err(|_| damaged("expected host and port"))?;
        Ok(Some(Self { credentials: Credentials::from_pem(&pem)?, address }))
    }

    pub(super) fn keep(&self, store: &Store) -> Result<()> {
        store.write(ADDRESS, &serde_json::to_vec(&self.address)?)?;
        store.write(CREDENTIALS, self.credentials.to_pem().as_bytes())?;
        Ok(())
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
mod tests {
    use super::*;
    use std::{
        net::Ipv4Addr,
        sync::{Arc, Mutex},
    };

    use commonweal_protocol::{
        Accepted, AggregatorKey, BaseHash, CertificateChain, Chunk, Csr, DeviceId, Enroll, Enrolled, Fetch,
        KeyNumber, Open, Poll, PollReply, ReconnectWindow, Refusal, Refused, SigningKey, UploadKey,
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

    #[tokio::test(flavor = "multi_thread")]
    async fn a_fresh_certificate_is_kept_and_shown_by_the_link_that_is_open() {
        let clock = Clock::manual(1_767_225_600_000);
        let begun_ms = clock.unix_ms();
        let authority = Authority::create(begun_ms).unwrap();
        let (key, device) = (DeviceKey::generate().unwrap(), DeviceId([7; 16]));
        let chain = authority.issue_device(&key.csr().unwrap(), device, begun_ms, 30 * DAY_MS).unwrap();
        let signing_key = AggregatorKey::of(&SigningKey::from_bytes(&[5; 32]));
        let enrolled = Enrolled { device, chain, signing_key, key_number: KeyNumber(0) };
        let credentials = Credentials::new(key, &enrolled, authority.digest()).unwrap();
        let server_identity = authority.issue_server(begun_ms, 60 * DAY_MS).unwrap();
        let desk = Arc::new(Desk { authority, clock: clock.clone(), seen: Mutex::default() });
        let any_port = (Ipv4Addr::LOCALHOST, 0).into();
        let limits = ServeLimits::default();
        let server =
            QuicServer::bind(any_port, server_identity, Arc::clone(&desk), limits, clock.clone()).unwrap();
        let (host, port) = ("127.0.0.1", server.local_addr().port());
        let link =
            QuicLink::new(host, port, credentials.clone(), LinkLimits::default(), clock.clone()).unwrap();
        let poll = Poll { base: BaseHash([1; 32]), installed: None, key: KeyNumber(0) };
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
