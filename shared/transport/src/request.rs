//! The device's side of one stream: sends a request and takes the answer. No retries here. Neighbours: `session`
//! repeats these; `serve` is the other side.

use crate::{
    LinkError,
    frames::{ReceiveError, SendError, receive, send},
    meter::{self, Metered},
    wire::{Purpose, Stream, Wire},
};
use commonweal_protocol::{
    Accepted, Chunk, Content, Digest, Enroll, Enrolled, EnrolmentReply, EnrolmentRequest, Fetch, Message,
    Open, Reply, Request, bounds,
};
use std::{io, time::Duration};
use tokio::io::AsyncWriteExt as _;

/// One stream, with the window that stalls are judged by.
struct Exchange<'w, W: Wire> {
    wire: &'w W,
    stream: Stream<W::Sending, W::Receiving>,
    window: Duration,
}

impl<'w, W: Wire> Exchange<'w, W> {
    async fn open(wire: &'w W, purpose: Purpose, window: Duration) -> Result<Self, LinkError> {
        Ok(Self { wire, stream: wire.open(purpose).await?, window })
    }

    async fn send(&mut self, during: &'static str, message: &impl Message) -> Result<(), LinkError> {
        send(&mut self.stream.sending, message, self.window).await.map_err(|error| match error {
            SendError::Broken(error) => self.wire.explain(during, error),
            SendError::Stalled(_) => self.stalled(during),
            SendError::Encode(error) => error.into(),
        })
    }

    async fn receive<M: Message>(&mut self, during: &'static str, limit: usize) -> Result<M, LinkError> {
        receive(&mut self.stream.receiving, limit, self.window).await.map_err(|error| match error {
            ReceiveError::Ended => self.wire.explain(during, io::ErrorKind::UnexpectedEof.into()),
            ReceiveError::Broken(error) => self.wire.explain(during, error),
            ReceiveError::Stalled(_) => self.stalled(during),
            ReceiveError::Decode(error) => error.into(),
        })
    }

    fn stalled(&self, during: &'static str) -> LinkError {
        LinkError::Stalled { during, stall_ms: u64::try_from(self.window.as_millis()).unwrap_or(u64::MAX) }
    }

    /// A reply; a refusal is an error.
    async fn reply(&mut self, during: &'static str, limit: usize) -> Result<Reply, LinkError> {
        match self.receive(during, limit).await? {
            Reply::Refused(refused) => Err(refused.into()),
            reply => Ok(reply),
        }
    }

    /// Sends, or learns why the peer wants no more: whoever refuses stops reading first.
    async fn push(&mut self, during: &'static str, message: &Request) -> Result<(), LinkError> {
        match self.send(during, message).await {
            Err(LinkError::Cut { during, source }) => {
                match self.reply(during, bounds::CONTROL_BYTES_MAX).await {
                    Err(refused @ LinkError::Refused { .. }) => Err(refused),
                    _ => Err(LinkError::Cut { during, source }),
                }
            }
            outcome => outcome,
        }
    }
}

/// Asks and takes one reply. A certificate is renewed whatever the budget: a device that is put off for weeks would have
/// to enrol anew.
pub(crate) async fn ask<W: Wire>(
    wire: &W,
    window: Duration,
    during: &'static str,
    request: &Request,
) -> Result<Reply, LinkError> {
    if !matches!(request, Request::Renew(_)) {
        meter::may_ask(wire)?;
    }
    let mut exchange = Exchange::open(wire, Purpose::Question, window).await?;
    exchange.push(during, request).await?;
    exchange.reply(during, bounds::CONTROL_BYTES_MAX).await
}

/// Enrols over a wire that was opened for it.
pub(crate) async fn enroll<W: Wire>(
    wire: &W,
    window: Duration,
    enroll: Enroll,
) -> Result<Enrolled, LinkError> {
    const DURING: &str = "enrolling";
    let mut exchange = Exchange::open(wire, Purpose::Question, window).await?;
    exchange.send(DURING, &EnrolmentRequest::Enroll(enroll)).await?;
    match exchange.receive(DURING, bounds::CONTROL_BYTES_MAX).await? {
        EnrolmentReply::Enrolled(enrolled) => Ok(enrolled),
        EnrolmentReply::Refused(refused) => Err(refused.into()),
    }
}

/// What an upload has come to, over all its attempts.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct UploadProgress {
    /// Offset that the first opening found.
    pub(crate) resumed_from: Option<u64>,
    /// Highest offset that an opening found.
    pub(crate) durable: u64,
    /// Bytes sent.
    pub(crate) sent_bytes: u64,
}

/// One attempt at an upload.
pub(crate) async fn upload<W: Wire>(
    wire: &W,
    window: Duration,
    open: &Open,
    payload: &[u8],
    progress: &mut UploadProgress,
) -> Result<Accepted, LinkError> {
    meter::may_ask(wire)?;
    let mut exchange = Exchange::open(wire, Purpose::Transfer, window).await?;
    exchange.push("opening an upload", &Request::Open(*open)).await?;
    let offset = match exchange.reply("opening an upload", bounds::CONTROL_BYTES_MAX).await? {
        Reply::Accepted(accepted) => {
            progress.resumed_from.get_or_insert(open.length);
            return signed_for(open, accepted);
        }
        Reply::Offset(offset) => offset,
        _ => return Err(LinkError::OutOfPlace { expected: "an offset or a receipt" }),
    };
    let rest = usize::try_from(offset).ok().and_then(|offset| payload.get(offset..));
    let rest = rest.ok_or(LinkError::OutOfPlace { expected: "an offset within the update" })?;
    progress.resumed_from.get_or_insert(offset);
    progress.durable = progress.durable.max(offset);
    let metered = Metered::begin(wire, rest.len() as u64)?;
    let mut at = offset;
    for bytes in rest.chunks(bounds::CHUNK_BYTES_MAX) {
        let chunk = Chunk::new(at, bytes.to_vec()).map_err(commonweal_protocol::EncodeError::from)?;
        at = chunk.end();
        metered.go_on(wire, at - offset)?;
        exchange.push("uploading", &Request::Chunk(chunk)).await?;
        progress.sent_bytes += bytes.len() as u64;
    }
    exchange.push("finishing an upload", &Request::Finish).await?;
    let _ = exchange.stream.sending.shutdown().await;
    match exchange.reply("waiting for a receipt", bounds::CONTROL_BYTES_MAX).await? {
        Reply::Accepted(accepted) => signed_for(open, accepted),
        _ => Err(LinkError::OutOfPlace { expected: "a receipt" }),
    }
}

fn signed_for(open: &Open, accepted: Accepted) -> Result<Accepted, LinkError> {
    let receipt = &accepted.receipt.receipt;
    if (receipt.round, receipt.digest, receipt.length) != (open.round, open.digest, open.length) {
        return Err(LinkError::OutOfPlace { expected: "a receipt for this update" });
    }
    Ok(accepted)
}

/// One attempt at completing `partial`. The whole is verified by the caller.
pub(crate) async fn download<W: Wire>(
    wire: &W,
    window: Duration,
    content: Content,
    partial: &mut Vec<u8>,
) -> Result<(), LinkError> {
    const DURING: &str = "downloading";
    let rest = |partial: &[u8]| content.length.saturating_sub(partial.len() as u64);
    let metered = Metered::begin(wire, rest(partial))?;
    meter::may_ask(wire)?;
    let mut exchange = Exchange::open(wire, Purpose::Transfer, window).await?;
    let fetch = Fetch { digest: content.digest, offset: partial.len() as u64 };
    exchange.push(DURING, &Request::Fetch(fetch)).await?;
    match exchange.reply(DURING, bounds::CONTROL_BYTES_MAX).await? {
        Reply::Content(found) if found == content => {}
        _ => return Err(LinkError::OutOfPlace { expected: "the content asked for, of the length known" }),
    }
    while (partial.len() as u64) < content.length {
        metered.go_on(wire, rest(partial))?;
        let Reply::Chunk(chunk) = exchange.reply(DURING, bounds::FRAME_BYTES_MAX).await? else {
            return Err(LinkError::OutOfPlace { expected: "a chunk" });
        };
        if chunk.offset != partial.len() as u64 || chunk.end() > content.length {
            return Err(LinkError::OutOfPlace { expected: "the next chunk" });
        }
        if !chunk.is_intact() {
            return Err(LinkError::Corrupt { expected: chunk.hash, got: Digest::of(&chunk.bytes) });
        }
        partial.extend_from_slice(&chunk.bytes);
    }
    Ok(())
}
