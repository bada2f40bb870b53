//! The real handler, on real files, under the transport's contract suite: over QUIC and in memory.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    dead_code,
    reason = "a test that cannot get its value has failed"
)]

mod support;

use std::sync::Arc;

use aggregator::receive::handler::{Service, Threads};
use aggregator::store::RealDisk;
use commonweal_protocol::{
    Accepted, AggregatorKey, BaseHash, CertificateChain, Chunk, Csr, DeviceId, Enroll, Enrolled, Fetch,
    KeyNumber, Open, Poll, PollReply, Refused, RoundId, Token, UploadKey,
};
use commonweal_transport::contract::{QuicMedium, SimMedium, Subject};
use commonweal_transport::{Authority, Clock, ContentPart, Handler, Opened, Peer};
use support::World;

/// The handler as it is, but that a device has its task as soon as it is enrolled.
pub struct Assigning {
    service: Service,
    world: Arc<World>,
}

impl Handler for Assigning {
    async fn admit(&self, peer: &Peer) -> Result<(), Refused> {
        self.service.admit(peer).await
    }
    async fn poll(&self, peer: &Peer, poll: Poll) -> Result<PollReply, Refused> {
        self.service.poll(peer, poll).await
    }
    async fn open(&self, peer: &Peer, open: Open) -> Result<Opened, Refused> {
        self.service.open(peer, open).await
    }
    async fn chunk(&self, peer: &Peer, key: UploadKey, chunk: Chunk) -> Result<u64, Refused> {
        self.service.chunk(peer, key, chunk).await
    }
    async fn finish(&self, peer: &Peer, key: UploadKey) -> Result<Accepted, Refused> {
        self.service.finish(peer, key).await
    }
    async fn read(&self, peer: &Peer, fetch: Fetch, length_max: usize) -> Result<ContentPart, Refused> {
        self.service.read(peer, fetch, length_max).await
    }
    async fn renew(&self, peer: &Peer, csr: Csr) -> Result<CertificateChain, Refused> {
        self.service.renew(peer, csr).await
    }
    async fn enroll(&self, enroll: Enroll) -> Result<Enrolled, Refused> {
        let enrolled = self.service.enroll(enroll).await?;
        let poll = Poll { base: support::BASE, installed: None, key: KeyNumber(0), trouble: None };
        assert!(self.world.receiver.poll(enrolled.device, poll)?.task.is_some());
        Ok(enrolled)
    }
}

/// The suite's way behind the handler's back.
pub struct AggregatorSubject {
    handler: Arc<Assigning>,
    world: Arc<World>,
    clock: Clock,
    tokens: std::sync::atomic::AtomicU8,
}

impl Subject for AggregatorSubject {
    type Handler = Assigning;

    fn start(authority: Arc<Authority>, clock: Clock) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let world = World::open_at(dir, Arc::new(RealDisk), clock.clone(), |config| {
            config.round.over_selection = 4.0;
            config.round.deadline_ms = 24 * 3_600_000;
            config.receive.requests_burst = 10_000;
        });
        world.assign(&[]);
        let world = Arc::new(world);
        let service =
            Service::new(world.receiver.clone(), world.registry.clone(), authority, Threads::Blocking);
        let handler = Arc::new(Assigning { service, world: world.clone() });
        Self { handler, world, clock, tokens: 0.into() }
    }

    fn handler(&self) -> Arc<Assigning> {
        self.handler.clone()
    }

    fn invite(&self) -> Token {
        let number = self.tokens.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let token = Token([number; 32]);
        let now_ms = self.clock.unix_ms();
        self.world.registry.invite(&token, now_ms, now_ms + 3_600_000).unwrap();
        token
    }

    fn revoke(&self, device: DeviceId) {
        self.world.registry.revoke(&device, self.clock.unix_ms()).unwrap();
    }

    fn signing_key(&self) -> AggregatorKey {
        self.world.parts.signer.keys().lineage().key()
    }

    fn base(&self) -> BaseHash {
        support::BASE
    }

    fn update(&self) -> (Open, Vec<u8>) {
        let bytes = support::update(0.1);
        (support::open(1, &bytes), bytes)
    }

    fn stale_round(&self) -> RoundId {
        RoundId(0)
    }

    fn published(&self) -> Vec<u8> {
        let head = self.world.parts.publisher.head().unwrap().unwrap().release;
        self.world.parts.storage.blob.read_all(&head.digest, 1 << 20).unwrap()
    }
}

commonweal_transport::contract_suite!(over_quic, AggregatorSubject, QuicMedium);
commonweal_transport::contract_suite!(in_memory, AggregatorSubject, SimMedium<Arc<Assigning>>);
