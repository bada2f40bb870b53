//! The aggregator's side of one stream, whatever carries it: reads the request, asks the `Handler`, answers.
//! Neighbours: `quic::server` and `sim` accept streams and say who is at the other end; `frames` moves the bytes.
//!
//! One request a stream. A refusal ends the stream and not the connection. The log gets the whole reason, the peer the
//! coarse one.

use crate::{
    Clock, Handler, Opened, Peer,
    frames::{ReceiveError, SendError, receive, send},
    limits::ServeLimits,
    seats::{Seat, Seats},
};
use commonweal_protocol::{
    Accepted, Chunk, Content, DecodeError, DeviceId, EnrolmentReply, EnrolmentRequest, Fetch, Open, Refusal,
    Refused, Reply, Request, bounds,
};
use std::time::Duration;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    sync::{Semaphore, SemaphorePermit},
};

/// Uploads and downloads of one device at once: one under way, and those that a cut left behind.
const TRANSFERS_OF_A_DEVICE_MAX: usize = 8;

/// Serves requests with one handler, so many at once.
#[derive(Debug)]
pub(crate) struct Service<H> {
    handler: H,
    clock: Clock,
    window: Duration,
    requests: Semaphore,
    transfers: Semaphore,
    devices: Seats<DeviceId>,
}

/// Why a stream ended without a final reply, or with a refusal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// The peer was told no.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// No request came, or only a part.
    #[error("request not received")]
    Receive(#[from] ReceiveError),
    /// The answer did not leave.
    #[error("answer not sent")]
    Send(#[from] SendError),
}

impl StreamError {
    /// Whether nothing that this device asks will be answered.
    fn is_for_good(&self) -> bool {
        matches!(self, Self::Refused(refused) if matches!(refused.reason, Refusal::Revoked | Refusal::Expired))
    }

    /// What to tell the peer; none if it is not there to be told.
    fn refusal(&self) -> Option<Refused> {
        match self {
            Self::Refused(refused) => Some(*refused),
            Self::Receive(ReceiveError::Decode(error)) => Some(
                match error {
                    DecodeError::TooLong { .. } => Refusal::TooLarge,
                    DecodeError::Version(_) => Refusal::UnsupportedVersion,
                    _ => Refusal::Malformed,
                }
                .into(),
            ),
            // Our own answer is out of bounds: the handler's fault, and a peer that waits.
            Self::Send(SendError::Encode(_)) => Some(Refusal::Internal.into()),
            Self::Receive(_) | Self::Send(_) => None,
        }
    }
}

impl From<Refusal> for StreamError {
    fn from(reason: Refusal) -> Self {
        Self::Refused(reason.into())
    }
}

impl<H: Handler> Service<H> {
    pub(crate) fn new(handler: H, clock: Clock, limits: &ServeLimits) -> Self {
        Self {
            handler,
            clock,
            window: Duration::from_millis(limits.stall_ms),
            requests: Semaphore::new(limits.requests_max),
            transfers: Semaphore::new(limits.transfers_max),
            devices: Seats::new(TRANSFERS_OF_A_DEVICE_MAX),
        }
    }

    /// Serves one stream of a device that proved who it is. Whether the device may ask for more.
    pub(crate) async fn device(
        &self,
        peer: &Peer,
        mut sending: impl AsyncWrite + Unpin + Send,
        mut receiving: impl AsyncRead + Unpin + Send,
    ) -> bool {
        let outcome = self.answer(peer, &mut sending, &mut receiving).await;
        let is_shut_out = outcome.as_ref().err().is_some_and(StreamError::is_for_good);
        if let Err(error) = outcome {
            tracing::debug!(device = %peer.device, error = %chain(&error), "request not served");
            if let Some(refused) = error.refusal() {
                self.last_word(&mut sending, &Reply::Refused(refused)).await;
            }
        }
        let _ = sending.shutdown().await;
        !is_shut_out
    }

    /// Serves one stream of somebody who wants to enrol.
    pub(crate) async fn enrolment(
        &self,
        mut sending: impl AsyncWrite + Unpin + Send,
        mut receiving: impl AsyncRead + Unpin + Send,
    ) {
        let outcome = self.enroll(&mut sending, &mut receiving).await;
        if let Err(error) = outcome {
            tracing::debug!(error = %chain(&error), "enrolment not served");
            if let Some(refused) = error.refusal() {
                self.last_word(&mut sending, &EnrolmentReply::Refused(refused)).await;
            }
        }
        let _ = sending.shutdown().await;
    }

    async fn last_word(
        &self,
        sending: &mut (impl AsyncWrite + Unpin),
        reply: &impl commonweal_protocol::Message,
    ) {
        if let Err(error) = send(sending, reply, self.window).await {
            tracing::debug!(error = %chain(&error), "refusal not sent");
        }
    }

    async fn enroll(
        &self,
        sending: &mut (impl AsyncWrite + Unpin),
        receiving: &mut (impl AsyncRead + Unpin),
    ) -> Result<(), StreamError> {
        let EnrolmentRequest::Enroll(enroll) =
            receive(receiving, bounds::CONTROL_BYTES_MAX, self.window).await?;
        let _slot = self.requests.try_acquire().map_err(|_| Refusal::Busy)?;
        let enrolled = self.handler.enroll(enroll).await?;
        tracing::info!(device = %enrolled.device, "device enrolled");
        Ok(send(sending, &EnrolmentReply::Enrolled(enrolled), self.window).await?)
    }

    async fn answer(
        &self,
        peer: &Peer,
        sending: &mut (impl AsyncWrite + Unpin),
        receiving: &mut (impl AsyncRead + Unpin),
    ) -> Result<(), StreamError> {
        let request = receive(receiving, bounds::CONTROL_BYTES_MAX, self.window).await?;
        let _slot = self.requests.try_acquire().map_err(|_| Refusal::Busy)?;
        self.admit(peer).await?;
        let reply = match request {
            Request::Poll(poll) => Reply::Poll(self.handler.poll(peer, poll).await?),
            Request::Renew(renew) => Reply::Renewed(self.handler.renew(peer, renew.csr).await?),
            Request::Open(open) => Reply::Accepted(self.upload(peer, open, sending, receiving).await?),
            Request::Fetch(fetch) => return self.download(peer, fetch, sending).await,
            Request::Chunk(_) | Request::Finish => return Err(Refusal::Malformed.into()),
        };
        Ok(send(sending, &reply, self.window).await?)
    }

    /// Whether a device is refused whatever it asks, now and later.
    pub(crate) async fn is_shut_out(&self, peer: &Peer) -> bool {
        matches!(self.admit(peer).await, Err(error) if error.is_for_good())
    }

    async fn admit(&self, peer: &Peer) -> Result<(), StreamError> {
        // The handshake checked this too, but a connection may outlive a certificate.
        if self.clock.unix_ms() > peer.expires_ms {
            return Err(Refusal::Expired.into());
        }
        Ok(self.handler.admit(peer).await?)
    }

    /// Room for one more transfer, held as long as the value.
    fn transfer(&self, peer: &Peer) -> Result<(Seat<'_, DeviceId>, SemaphorePermit<'_>), Refusal> {
        let seat = self.devices.take(peer.device).ok_or(Refusal::Busy)?;
        Ok((seat, self.transfers.try_acquire().map_err(|_| Refusal::Busy)?))
    }

    async fn upload(
        &self,
        peer: &Peer,
        open: Open,
        sending: &mut (impl AsyncWrite + Unpin),
        receiving: &mut (impl AsyncRead + Unpin),
    ) -> Result<Accepted, StreamError> {
        let _room = self.transfer(peer)?;
        let mut offset = match self.handler.open(peer, open).await? {
            Opened::Done(accepted) => return Ok(accepted),
            Opened::Resume(offset) => offset,
        };
        send(sending, &Reply::Offset(offset), self.window).await?;
        loop {
            match receive(receiving, bounds::FRAME_BYTES_MAX, self.window).await? {
                Request::Chunk(chunk) => {
                    check(&chunk, offset, open.length)?;
                    offset = self.handler.chunk(peer, open.key(), chunk).await?;
                }
                Request::Finish if offset != open.length => return Err(Refusal::LengthMismatch.into()),
                Request::Finish => break,
                _ => return Err(Refusal::Malformed.into()),
            }
        }
        self.admit(peer).await?;
        Ok(self.handler.finish(peer, open.key()).await?)
    }

    async fn download(
        &self,
        peer: &Peer,
        fetch: Fetch,
        sending: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), StreamError> {
        let _room = self.transfer(peer)?;
        let mut part = self.handler.read(peer, fetch, bounds::CHUNK_BYTES_MAX).await?;
        let length = part.length;
        send(sending, &Reply::Content(Content { digest: fetch.digest, length }), self.window).await?;
        let mut offset = fetch.offset;
        while offset < length {
            let chunk = Chunk::new(offset, part.bytes).map_err(|error| {
                tracing::error!(%error, "the handler read an unusable part of published content");
                Refusal::Internal
            })?;
            offset = chunk.end();
            send(sending, &Reply::Chunk(chunk), self.window).await?;
            if offset >= length {
                break;
            }
            part = self.handler.read(peer, Fetch { offset, ..fetch }, bounds::CHUNK_BYTES_MAX).await?;
        }
        Ok(())
    }
}

fn check(chunk: &Chunk, offset: u64, length: u64) -> Result<(), Refusal> {
    if chunk.end() > length {
        return Err(Refusal::LengthMismatch);
    }
    if chunk.offset != offset {
        return Err(Refusal::OffsetMismatch);
    }
    if !chunk.is_intact() {
        return Err(Refusal::ChunkCorrupt);
    }
    Ok(())
}

/// An error with its sources, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
