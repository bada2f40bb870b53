//! The smallest handler that keeps the contract, in memory: what the suite and the simulation are run with here.
//! Neighbours: `contract.rs`, `simulation.rs` and `quic.rs` beside this folder.

#![allow(dead_code, unreachable_pub, reason = "shared by several test binaries, each of which uses its part")]

use commonweal_protocol::{
    Accepted, AggregatorKey, BaseHash, CertificateChain, Chunk, Csr, DeviceId, DeviceReport, Digest, Enroll,
    Enrolled, Fetch, KeyNumber, Open, Poll, PollReply, Receipt, ReconnectWindow, Refusal, Refused, RoundId,
    SignedReceipt, SigningKey, Token, UploadKey,
};
use commonweal_transport::{Authority, Clock, ContentPart, Handler, Opened, Peer, contract::Subject};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

pub const BASE: BaseHash = BaseHash([0xba; 32]);
pub const ROUND: RoundId = RoundId(7);
const RECONNECT: ReconnectWindow = ReconnectWindow { after_ms: 100, spread_ms: 50 };
const CERTIFICATE_LIFE_MS: u64 = 24 * 3600 * 1000;

#[derive(Debug)]
pub struct Reference {
    authority: Arc<Authority>,
    clock: Clock,
    key: SigningKey,
    published: Vec<u8>,
    /// An upload that holds this many bytes waits before it takes more.
    pause_at: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub struct State {
    tokens: BTreeSet<Digest>,
    tokens_given: u8,
    devices: u8,
    revoked: BTreeSet<DeviceId>,
    uploads: BTreeMap<(DeviceId, UploadKey), (Open, Vec<u8>)>,
    /// What was accepted: the bytes, and the receipt given for them.
    pub accepted: BTreeMap<(DeviceId, UploadKey), (Vec<u8>, Accepted)>,
    pub polls: u32,
}

impl Reference {
    pub fn new(authority: Arc<Authority>, clock: Clock) -> Self {
        let key = SigningKey::from_bytes(&[5; 32]);
        let published = bytes(2_500_000, 2);
        Self {
            authority,
            clock,
            key,
            published,
            pause_at: AtomicUsize::new(usize::MAX),
            state: Mutex::default(),
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn published(&self) -> &[u8] {
        &self.published
    }

    /// Makes uploads that hold this many bytes wait; `usize::MAX` lets all go on.
    pub fn pause_at(&self, bytes: usize) {
        self.pause_at.store(bytes, Ordering::SeqCst);
    }

    /// Bytes of uploads that are not finished.
    pub fn uploaded_bytes(&self) -> usize {
        self.state().uploads.values().map(|(_, held)| held.len()).sum()
    }

    pub fn signing_key(&self) -> AggregatorKey {
        AggregatorKey::of(&self.key)
    }

    pub fn invite(&self) -> Token {
        let mut state = self.state();
        state.tokens_given += 1;
        let token = Token([state.tokens_given; 32]);
        state.tokens.insert(token.digest());
        token
    }

    pub fn revoke(&self, device: DeviceId) {
        self.state().revoked.insert(device);
    }

    fn issue(&self, csr: &Csr, device: DeviceId) -> Result<CertificateChain, Refused> {
        let now_ms = self.clock.unix_ms();
        let chain = self.authority.issue_device(csr, device, now_ms, CERTIFICATE_LIFE_MS);
        Ok(chain.map_err(|_| Refusal::CsrRefused)?)
    }
}

/// Bytes that look random and are the same at every call.
pub fn bytes(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

pub fn announce(payload: &[u8]) -> Open {
    Open {
        round: ROUND,
        base: BASE,
        digest: Digest::of(payload),
        length: payload.len() as u64,
        samples: 12,
        report: DeviceReport { sampled: 20, kept: 12, dropped: 8, ..DeviceReport::default() },
    }
}

impl Handler for Reference {
    async fn admit(&self, peer: &Peer) -> Result<(), Refused> {
        if self.state().revoked.contains(&peer.device) {
            return Err(Refusal::Revoked.into());
        }
        Ok(())
    }

    async fn poll(&self, _: &Peer, poll: Poll) -> Result<PollReply, Refused> {
        if poll.base != BASE {
            return Err(Refusal::WrongBase.into());
        }
        self.state().polls += 1;
        Ok(PollReply { task: None, release: None, successions: vec![], reconnect: RECONNECT })
    }

    async fn open(&self, peer: &Peer, open: Open) -> Result<Opened, Refused> {
        let mut state = self.state();
        let name = (peer.device, open.key());
        if let Some((_, accepted)) = state.accepted.get(&name) {
            return Ok(Opened::Done(*accepted));
        }
        if open.base != BASE {
            return Err(Refusal::WrongBase.into());
        }
        if open.round != ROUND {
            return Err(Refusal::StaleRound.into());
        }
        let upload = state.uploads.entry(name).or_insert_with(|| (open, Vec::new()));
        if upload.0.length != open.length {
            *upload = (open, Vec::new());
        }
        Ok(Opened::Resume(upload.1.len() as u64))
    }

    async fn chunk(&self, peer: &Peer, key: UploadKey, chunk: Chunk) -> Result<u64, Refused> {
        while chunk.offset >= self.pause_at.load(Ordering::SeqCst) as u64 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let mut state = self.state();
        let (_, held) = state.uploads.get_mut(&(peer.device, key)).ok_or(Refusal::UploadUnknown)?;
        if chunk.offset != held.len() as u64 {
            return Err(Refusal::OffsetMismatch.into());
        }
        held.extend_from_slice(&chunk.bytes);
        Ok(held.len() as u64)
    }

    async fn finish(&self, peer: &Peer, key: UploadKey) -> Result<Accepted, Refused> {
        let name = (peer.device, key);
        let mut state = self.state();
        if let Some((_, accepted)) = state.accepted.get(&name) {
            return Ok(*accepted);
        }
        let (open, held) = state.uploads.remove(&name).ok_or(Refusal::UploadUnknown)?;
        if held.len() as u64 != open.length {
            return Err(Refusal::LengthMismatch.into());
        }
        if Digest::of(&held) != key.digest {
            return Err(Refusal::DigestMismatch.into());
        }
        let receipt = Receipt {
            round: key.round,
            device: peer.device,
            digest: key.digest,
            length: open.length,
            received_ms: self.clock.unix_ms(),
        };
        let receipt = SignedReceipt::sign(&self.key, receipt).map_err(|_| Refusal::Internal)?;
        let accepted = Accepted { receipt, reconnect: RECONNECT };
        state.accepted.insert(name, (held, accepted));
        Ok(accepted)
    }

    async fn read(&self, _: &Peer, fetch: Fetch, length_max: usize) -> Result<ContentPart, Refused> {
        let rest = usize::try_from(fetch.offset).ok().and_then(|offset| self.published.get(offset..));
        let rest =
            rest.filter(|_| Digest::of(&self.published) == fetch.digest).ok_or(Refusal::ContentUnknown)?;
        let bytes = rest[..rest.len().min(length_max)].to_vec();
        Ok(ContentPart { length: self.published.len() as u64, bytes })
    }

    async fn renew(&self, peer: &Peer, csr: Csr) -> Result<CertificateChain, Refused> {
        self.issue(&csr, peer.device)
    }

    async fn enroll(&self, enroll: Enroll) -> Result<Enrolled, Refused> {
        let mut state = self.state();
        if !state.tokens.contains(&enroll.token.digest()) {
            return Err(Refusal::TokenRefused.into());
        }
        let device = DeviceId([state.devices + 1; 16]);
        let chain = self.issue(&enroll.csr, device)?;
        state.tokens.remove(&enroll.token.digest());
        state.devices += 1;
        Ok(Enrolled { device, chain, signing_key: self.signing_key(), key_number: KeyNumber(0) })
    }
}

/// The reference handler, for the suite.
pub struct ReferenceSubject(Arc<Reference>);

impl Subject for ReferenceSubject {
    type Handler = Reference;

    fn start(authority: Arc<Authority>, clock: Clock) -> Self {
        Self(Arc::new(Reference::new(authority, clock)))
    }

    fn handler(&self) -> Arc<Reference> {
        Arc::clone(&self.0)
    }

    fn invite(&self) -> Token {
        self.0.invite()
    }

    fn revoke(&self, device: DeviceId) {
        self.0.revoke(device);
    }

    fn signing_key(&self) -> AggregatorKey {
        self.0.signing_key()
    }

    fn base(&self) -> BaseHash {
        BASE
    }

    fn update(&self) -> (Open, Vec<u8>) {
        let payload = bytes(2_500_000, 1);
        (announce(&payload), payload)
    }

    fn stale_round(&self) -> RoundId {
        RoundId(ROUND.0 - 1)
    }

    fn published(&self) -> Vec<u8> {
        self.0.published.clone()
    }
}
