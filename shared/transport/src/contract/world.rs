//! What a case of the suite needs: a handler to question, a carrier to question it over, and a device that can also
//! misbehave. Neighbours: the cases beside this file; `sim` and `quic` are the carriers.

use crate::{
    Authority, Clock, Credentials, DeviceKey, Faults, Handler, LinkLimits, QuicServer, QuicWire, ServeLimits,
    ServerIdentity, Session, SimNetwork, SimWire,
    frames::{receive, send, send_bytes},
    wire::{Purpose, Stream, Wire},
};
use commonweal_protocol::{
    AggregatorKey, BaseHash, DeviceId, Digest, KeyNumber, Open, Poll, Refusal, Reply, Request, RoundId,
    Token, bounds,
};
use std::{net::Ipv4Addr, sync::Arc, time::Duration};

/// When the suite happens, ms since 1970: 1 January 2026.
const NOW_MS: u64 = 1_767_225_600_000;
const YEAR_MS: u64 = 365 * 24 * 3600 * 1000;

/// Long enough for any machine; what is waited for ends much sooner or not at all.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A handler under test, and what the suite does behind its back.
pub trait Subject: Send + Sync + 'static {
    /// The handler.
    type Handler: Handler;

    /// A fresh handler that issues from this authority and reads this clock. To it belong a federation with a base, a
    /// round in which every enrolled device may deliver, a round that is over, and something published.
    fn start(authority: Arc<Authority>, clock: Clock) -> Self;
    /// The handler.
    fn handler(&self) -> Arc<Self::Handler>;
    /// A fresh enrolment token.
    fn invite(&self) -> Token;
    /// Revokes a device.
    fn revoke(&self, device: DeviceId);
    /// The key that receipts are signed with.
    fn signing_key(&self) -> AggregatorKey;
    /// The federation's base.
    fn base(&self) -> BaseHash;
    /// An update that the current round takes, at least 16 bytes, and its announcement. The same at every call.
    fn update(&self) -> (Open, Vec<u8>);
    /// A round that is over.
    fn stale_round(&self) -> RoundId;
    /// Something published, at least 16 bytes.
    fn published(&self) -> Vec<u8>;
}

/// A carrier under test.
pub trait Medium<H: Handler>: Send + Sync {
    /// What its devices open streams with.
    type Wire: Wire;

    /// Serves this handler.
    fn serve(handler: Arc<H>, identity: ServerIdentity, limits: ServeLimits, clock: Clock) -> Self;
    /// The way in of a device.
    fn device(&self, credentials: Credentials, limits: &LinkLimits, clock: &Clock) -> Self::Wire;
    /// The way in of a device that enrols.
    fn enrolment(&self, authority: Digest, limits: &LinkLimits, clock: &Clock) -> Self::Wire;
}

/// QUIC over the loopback interface.
#[derive(Debug)]
pub struct QuicMedium(QuicServer);

impl<H: Handler> Medium<H> for QuicMedium {
    type Wire = QuicWire;

    fn serve(handler: Arc<H>, identity: ServerIdentity, limits: ServeLimits, clock: Clock) -> Self {
        Self(QuicServer::bind((Ipv4Addr::LOCALHOST, 0).into(), identity, handler, limits, clock).unwrap())
    }

    fn device(&self, credentials: Credentials, limits: &LinkLimits, clock: &Clock) -> QuicWire {
        let port = self.0.local_addr().port();
        QuicWire::device("127.0.0.1", port, credentials, clock.clone(), limits).unwrap()
    }

    fn enrolment(&self, authority: Digest, limits: &LinkLimits, clock: &Clock) -> QuicWire {
        QuicWire::enrolment("127.0.0.1", self.0.local_addr().port(), authority, clock, limits).unwrap()
    }
}

/// Memory, without faults.
#[derive(Debug)]
pub struct SimMedium<H>(Arc<SimNetwork<H>>);

impl<H: Handler> Medium<H> for SimMedium<Arc<H>> {
    type Wire = SimWire<Arc<H>>;

    fn serve(handler: Arc<H>, identity: ServerIdentity, limits: ServeLimits, clock: Clock) -> Self {
        Self(SimNetwork::new(handler, identity, clock, &limits, Faults::none()).unwrap())
    }

    fn device(&self, credentials: Credentials, _: &LinkLimits, _: &Clock) -> Self::Wire {
        self.0.device(credentials).unwrap()
    }

    fn enrolment(&self, authority: Digest, _: &LinkLimits, _: &Clock) -> Self::Wire {
        self.0.enrolment(authority)
    }
}

/// A handler, served.
#[derive(Debug)]
pub struct World<S, M> {
    pub(super) subject: S,
    pub(super) medium: M,
    pub(super) authority: Arc<Authority>,
    pub(super) clock: Clock,
}

impl<S: Subject, M: Medium<S::Handler>> World<S, M> {
    pub(super) fn start() -> Self {
        Self::start_with(ServeLimits::default())
    }

    pub(super) fn start_with(limits: ServeLimits) -> Self {
        let clock = Clock::manual(NOW_MS);
        let authority = Arc::new(Authority::create(NOW_MS).unwrap());
        let subject = S::start(Arc::clone(&authority), clock.clone());
        let identity = authority.issue_server(NOW_MS, YEAR_MS).unwrap();
        let medium = M::serve(subject.handler(), identity, limits, clock.clone());
        Self { subject, medium, authority, clock }
    }

    /// Retries come soon, so that the suite does not wait.
    pub(super) fn limits() -> LinkLimits {
        LinkLimits { retry_first_ms: 10, retry_pause_ms_max: 100, retries_max: 20, ..LinkLimits::default() }
    }

    pub(super) fn stranger(&self, authority: Digest) -> Session<M::Wire> {
        Session::over(self.medium.enrolment(authority, &Self::limits(), &self.clock), Self::limits())
    }

    pub(super) async fn enrol(&self) -> Credentials {
        let key = DeviceKey::generate().unwrap();
        let stranger = self.stranger(self.authority.digest());
        let enrolled = stranger.enroll(self.subject.invite(), key.csr().unwrap()).await.unwrap();
        Credentials::new(key, &enrolled, self.authority.digest()).unwrap()
    }

    pub(super) fn link(&self, credentials: &Credentials) -> Session<M::Wire> {
        let wire = self.medium.device(credentials.clone(), &Self::limits(), &self.clock);
        Session::over(wire, Self::limits())
    }

    pub(super) fn poll(&self) -> Poll {
        Poll { base: self.subject.base(), installed: None, key: KeyNumber(0), trouble: None }
    }
}

/// A stream on which anything can be said.
pub(super) struct Raw<W: Wire>(pub(super) Stream<W::Sending, W::Receiving>);

impl<W: Wire> Raw<W> {
    pub(super) async fn open(link: &Session<W>) -> Self {
        Self(link.wire().open(Purpose::Transfer).await.unwrap())
    }

    pub(super) async fn send(&mut self, request: &Request) {
        send(&mut self.0.sending, request, PATIENCE).await.unwrap();
    }

    pub(super) async fn send_bytes(&mut self, bytes: &[u8]) {
        send_bytes(&mut self.0.sending, bytes, PATIENCE).await.unwrap();
    }

    pub(super) async fn reply(&mut self) -> Reply {
        receive(&mut self.0.receiving, bounds::FRAME_BYTES_MAX, PATIENCE).await.unwrap()
    }

    pub(super) async fn refusal(&mut self) -> Refusal {
        match self.reply().await {
            Reply::Refused(refused) => refused.reason,
            reply => panic!("expected a refusal, got {reply:?}"),
        }
    }

    /// Opens an upload; the offset to send from.
    pub(super) async fn open_upload(link: &Session<W>, open: Open) -> (Self, u64) {
        let mut raw = Self::open(link).await;
        raw.send(&Request::Open(open)).await;
        match raw.reply().await {
            Reply::Offset(offset) => (raw, offset),
            reply => panic!("expected an offset, got {reply:?}"),
        }
    }
}
