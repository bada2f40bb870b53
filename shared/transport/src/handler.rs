//! What the aggregator does with each request, whatever carried it: the trait that it implements.
//! Neighbours: `serve` reads requests off a stream and calls it; `contract` is the suite that an implementation must pass.

use commonweal_protocol::{
    Accepted, CertificateChain, Chunk, Csr, DeviceId, Digest, Enroll, Enrolled, Fetch, Open, Poll, PollReply,
    Refused, UploadKey,
};
use std::{future::Future, sync::Arc};

/// Who asks: a device whose certificate was verified when it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The device, as its certificate says.
    pub device: DeviceId,
    /// BLAKE3 of its DER certificate.
    pub certificate: Digest,
    /// When its certificate ends, ms since 1970.
    pub expires_ms: u64,
}

/// What an upload's opening finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// This many bytes are held durably (0 at first); send from there.
    Resume(u64),
    /// The update is here already: the same receipt as before.
    Done(Accepted),
}

/// Some bytes of published content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentPart {
    /// Bytes of the whole.
    pub length: u64,
    /// Bytes from the offset asked for: at least one unless the offset is the end, at most the number asked for.
    pub bytes: Vec<u8>,
}

/// The aggregator's side of the link; a shared handler ([`Arc`]) is one too. Called from many tasks at once.
///
/// The transport has already checked every message's bounds, each chunk's hash, and that chunks of one stream follow
/// each other and stay within the announced length. It has not checked anything that needs memory across streams.
pub trait Handler: Send + Sync + 'static {
    /// Whether this device may ask anything now (it may have been revoked since it connected). Called before every
    /// request, and again before an upload is finished.
    fn admit(&self, peer: &Peer) -> impl Future<Output = Result<(), Refused>> + Send;

    /// Answers with work and news.
    fn poll(&self, peer: &Peer, poll: Poll) -> impl Future<Output = Result<PollReply, Refused>> + Send;

    /// Opens or resumes the upload of (round, device, digest). An update that was accepted before yields the same
    /// receipt as then, even if its round is over.
    fn open(&self, peer: &Peer, open: Open) -> impl Future<Output = Result<Opened, Refused>> + Send;

    /// Appends a chunk to an open upload, if it starts where the bytes held end ([`OffsetMismatch`] otherwise), and
    /// returns the offset after it. Need not be durable yet.
    ///
    /// [`OffsetMismatch`]: commonweal_protocol::Refusal::OffsetMismatch
    fn chunk(
        &self,
        peer: &Peer,
        key: UploadKey,
        chunk: Chunk,
    ) -> impl Future<Output = Result<u64, Refused>> + Send;

    /// Checks length and digest of the whole, makes it durable, and only then signs. Bytes that do not match are
    /// dropped, so that the upload can start over. Finishing again yields the same receipt.
    fn finish(&self, peer: &Peer, key: UploadKey) -> impl Future<Output = Result<Accepted, Refused>> + Send;

    /// Reads published content from an offset, at most `length_max` bytes.
    fn read(
        &self,
        peer: &Peer,
        fetch: Fetch,
        length_max: usize,
    ) -> impl Future<Output = Result<ContentPart, Refused>> + Send;

    /// Issues a fresh certificate for the same device.
    fn renew(&self, peer: &Peer, csr: Csr) -> impl Future<Output = Result<CertificateChain, Refused>> + Send;

    /// Spends a token and issues a device's first certificate. A token that yielded a certificate never does again.
    fn enroll(&self, enroll: Enroll) -> impl Future<Output = Result<Enrolled, Refused>> + Send;
}

impl<H: Handler> Handler for Arc<H> {
    async fn admit(&self, peer: &Peer) -> Result<(), Refused> {
        H::admit(self, peer).await
    }

    async fn poll(&self, peer: &Peer, poll: Poll) -> Result<PollReply, Refused> {
        H::poll(self, peer, poll).await
    }

    async fn open(&self, peer: &Peer, open: Open) -> Result<Opened, Refused> {
        H::open(self, peer, open).await
    }

    async fn chunk(&self, peer: &Peer, key: UploadKey, chunk: Chunk) -> Result<u64, Refused> {
        H::chunk(self, peer, key, chunk).await
    }

    async fn finish(&self, peer: &Peer, key: UploadKey) -> Result<Accepted, Refused> {
        H::finish(self, peer, key).await
    }

    async fn read(&self, peer: &Peer, fetch: Fetch, length_max: usize) -> Result<ContentPart, Refused> {
        H::read(self, peer, fetch, length_max).await
    }

    async fn renew(&self, peer: &Peer, csr: Csr) -> Result<CertificateChain, Refused> {
        H::renew(self, peer, csr).await
    }

    async fn enroll(&self, enroll: Enroll) -> Result<Enrolled, Refused> {
        H::enroll(self, enroll).await
    }
}
