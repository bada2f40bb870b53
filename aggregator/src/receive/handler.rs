//! The aggregator as `commonweal-transport` sees it: each request on a thread that may block.

use std::sync::Arc;

use commonweal_protocol::{
    Accepted, CertificateChain, Chunk, Csr, DeviceId, Enroll, Enrolled, Fetch, Open, Poll, PollReply,
    ReconnectWindow, Refusal, Refused, UploadKey,
};
use commonweal_transport::{ContentPart, Handler, Opened, Peer};
use rand::RngCore;

use super::enroll::{Certify, EnrollError, Registry};
use super::{Receiver, chain};
use crate::events::Event;

const DAY_MS: u64 = 24 * 3_600_000;

/// Where requests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// On the runtime's blocking threads.
    Blocking,
    /// On the caller's: a simulation replays only if nothing runs beside it.
    Caller,
}

/// Implements [`Handler`]; cheap to clone.
#[derive(Clone)]
pub struct Service {
    receiver: Arc<Receiver>,
    registry: Registry,
    authority: Arc<dyn Certify>,
    threads: Threads,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Service").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl Service {
    /// Joins the parts.
    pub fn new(
        receiver: Arc<Receiver>,
        registry: Registry,
        authority: Arc<dyn Certify>,
        threads: Threads,
    ) -> Self {
        Self { receiver, registry, authority, threads }
    }

    async fn on<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, Refused> + Send + 'static,
    ) -> Result<T, Refused> {
        if self.threads == Threads::Caller {
            return work(self);
        }
        let service = self.clone();
        match tokio::task::spawn_blocking(move || work(&service)).await {
            Ok(result) => result,
            Err(error) => {
                tracing::error!(%error, "a request's thread ended early");
                Err(Refusal::Internal.into())
            }
        }
    }

    fn expires_ms(&self) -> u64 {
        let days = u64::from(self.receiver.parts.config.certificate_days);
        self.receiver.now_ms().saturating_add(days * DAY_MS)
    }

    fn admit_now(&self, peer: &Peer) -> Result<(), Refused> {
        const REQUEST: &str = "admission";
        let now_ms = self.receiver.now_ms();
        let device = peer.device;
        // First, so that who is refused below is slowed down as well.
        if !self.receiver.live().rates.spend_request(device, now_ms) {
            // Not told as an event: a device that floods must not flood the operator too.
            tracing::debug!(%device, "too many requests");
            return Err(Refused {
                reason: Refusal::Busy,
                reconnect: ReconnectWindow { after_ms: 5_000, spread_ms: 5_000 },
            });
        }
        if peer.expires_ms < now_ms {
            return Err(self.receiver.refuse(Some(device), REQUEST, Refusal::Expired, "renew earlier"));
        }
        if let Err(error) = self.registry.admit(&device) {
            return Err(self.refuse_enrolment(Some(device), REQUEST, &error));
        }
        Ok(())
    }

    fn refuse_enrolment(
        &self,
        device: Option<DeviceId>,
        request: &'static str,
        error: &EnrollError,
    ) -> Refused {
        let reason = match error {
            EnrollError::TokenUnknown
            | EnrollError::TokenSpent { .. }
            | EnrollError::TokenExpired { .. }
            | EnrollError::TokenWithdrawn { .. } => Refusal::TokenRefused,
            EnrollError::Csr(_) => Refusal::CsrRefused,
            EnrollError::DeviceUnknown { .. } | EnrollError::Revoked { .. } => Refusal::Revoked,
            EnrollError::Damaged { .. } | EnrollError::Store(_) => Refusal::Internal,
        };
        self.receiver.refuse(device, request, reason, chain(error))
    }

    fn enroll_now(&self, enroll: &Enroll) -> Result<Enrolled, Refused> {
        let mut device = DeviceId([0; 16]);
        rand::rng().fill_bytes(&mut device.0);
        let (now_ms, expires_ms) = (self.receiver.now_ms(), self.expires_ms());
        let chain = self
            .registry
            .enroll(self.authority.as_ref(), &enroll.token, &enroll.csr, device, now_ms, expires_ms)
            .map_err(|error| self.refuse_enrolment(None, "enrolment", &error))?;
        self.receiver.parts.events.tell(&Event::Enrolled { device });
        let keys = self.receiver.parts.signer.keys();
        let (signing_key, key_number) = (keys.lineage().key(), keys.lineage().number());
        Ok(Enrolled { device, chain, signing_key, key_number })
    }
}

impl Handler for Service {
    async fn admit(&self, peer: &Peer) -> Result<(), Refused> {
        let peer = *peer;
        self.on(move |service| service.admit_now(&peer)).await
    }

    async fn poll(&self, peer: &Peer, poll: Poll) -> Result<PollReply, Refused> {
        let device = peer.device;
        self.on(move |service| service.receiver.poll(device, poll)).await
    }

    async fn open(&self, peer: &Peer, open: Open) -> Result<Opened, Refused> {
        let device = peer.device;
        self.on(move |service| service.receiver.open(device, open)).await
    }

    async fn chunk(&self, peer: &Peer, key: UploadKey, chunk: Chunk) -> Result<u64, Refused> {
        let device = peer.device;
        self.on(move |service| service.receiver.chunk(device, key, &chunk)).await
    }

    async fn finish(&self, peer: &Peer, key: UploadKey) -> Result<Accepted, Refused> {
        let device = peer.device;
        self.on(move |service| service.receiver.finish(device, key)).await
    }

    async fn read(&self, peer: &Peer, fetch: Fetch, length_max: usize) -> Result<ContentPart, Refused> {
        let device = peer.device;
        self.on(move |service| service.receiver.read(device, fetch, length_max)).await
    }

    async fn renew(&self, peer: &Peer, csr: Csr) -> Result<CertificateChain, Refused> {
        let device = peer.device;
        self.on(move |service| {
            let (now_ms, expires_ms) = (service.receiver.now_ms(), service.expires_ms());
            service
                .registry
                .renew(service.authority.as_ref(), &csr, device, now_ms, expires_ms)
                .map_err(|error| service.refuse_enrolment(Some(device), "renewal", &error))
        })
        .await
    }

    async fn enroll(&self, enroll: Enroll) -> Result<Enrolled, Refused> {
        self.on(move |service| service.enroll_now(&enroll)).await
    }
}
