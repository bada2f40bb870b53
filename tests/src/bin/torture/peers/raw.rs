//! A stream on which anything can be said, and how it ended. What the peers beside this file have in common.

use std::time::Duration;

use commonweal_protocol::{
    EnrolmentReply, Header, Message, Refusal, Reply, SignedReceipt, bounds::FRAME_BYTES_MAX, decode,
};
use commonweal_transport::{LinkError, Purpose, QuicWire, Stream, Wire};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

/// How long a peer waits for anything. The aggregator gives up what stalls long before.
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Raw {
    stream: Stream<<QuicWire as Wire>::Sending, <QuicWire as Wire>::Receiving>,
    /// What has come of the next message.
    heard: Vec<u8>,
}

/// What became of a try.
#[derive(Debug)]
pub(super) enum End {
    /// The aggregator said no.
    Refused(Refusal),
    /// An update is there.
    Receipt(Box<SignedReceipt>),
    /// Some other answer.
    Answered,
    /// It was cut, by the aggregator or by its end.
    Ended,
    /// The aggregator was not there.
    Nobody,
}

/// What the aggregator answers on one of its ALPNs.
pub(super) trait Word: Message {
    /// What the try came to, if nothing follows.
    fn end(&self) -> Option<End>;
}

impl Word for Reply {
    fn end(&self) -> Option<End> {
        match self {
            Self::Refused(refused) => Some(End::Refused(refused.reason)),
            Self::Accepted(accepted) => Some(End::Receipt(Box::new(accepted.receipt))),
            _ => None,
        }
    }
}

impl Word for EnrolmentReply {
    fn end(&self) -> Option<End> {
        match self {
            Self::Refused(refused) => Some(End::Refused(refused.reason)),
            Self::Enrolled(_) => None,
        }
    }
}

impl Raw {
    /// A stream, over a fresh connection if it is to be for a transfer.
    pub(super) async fn open(wire: &QuicWire, purpose: Purpose) -> Result<Self, End> {
        match timeout(PATIENCE, wire.open(purpose)).await {
            Ok(Ok(stream)) => Ok(Self { stream, heard: Vec::new() }),
            // What was let in no further than the handshake.
            Ok(Err(LinkError::Cut { .. })) => Err(End::Ended),
            Ok(Err(_)) | Err(_) => Err(End::Nobody),
        }
    }

    /// Says these bytes; false if nobody reads them any more.
    pub(super) async fn say(&mut self, bytes: &[u8]) -> bool {
        let said = timeout(PATIENCE, AsyncWriteExt::write_all(&mut self.stream.sending, bytes)).await;
        matches!(said, Ok(Ok(())))
    }

    /// The next message; none if there is none any more. What came of it stays if this is not waited for.
    pub(super) async fn hear<W: Word>(&mut self) -> Option<W> {
        let announced = *self.fill(Header::BYTES).await?.first_chunk()?;
        let end = Header::BYTES + Header::parse(announced, FRAME_BYTES_MAX).ok()?.body_bytes();
        let message = decode(self.fill(end).await?.get(Header::BYTES..)?).ok();
        self.heard.drain(..end);
        message
    }

    async fn fill(&mut self, wanted: usize) -> Option<&[u8]> {
        while self.heard.len() < wanted {
            let read = AsyncReadExt::read_buf(&mut self.stream.receiving, &mut self.heard).await.ok()?;
            if read == 0 {
                return None;
            }
        }
        self.heard.get(..wanted)
    }

    /// Says no more, and hears all that is left.
    pub(super) async fn last_word<W: Word>(mut self) -> End {
        // A stream that nobody reads any more cannot be ended, and need not be.
        drop(timeout(PATIENCE, AsyncWriteExt::shutdown(&mut self.stream.sending)).await);
        let mut is_answered = false;
        while let Ok(Some(word)) = timeout(PATIENCE, self.hear::<W>()).await {
            if let Some(end) = word.end() {
                return end;
            }
            is_answered = true;
        }
        if is_answered { End::Answered } else { End::Ended }
    }
}

/// Says these frames over a fresh connection, whatever is answered meanwhile, and hears what comes of them.
pub(super) async fn try_frames<W: Word>(wire: &QuicWire, frames: impl IntoIterator<Item = Vec<u8>>) -> End {
    let mut raw = match Raw::open(wire, Purpose::Transfer).await {
        Ok(raw) => raw,
        Err(end) => return end,
    };
    for frame in frames {
        if !raw.say(&frame).await {
            break;
        }
    }
    raw.last_word::<W>().await
}
