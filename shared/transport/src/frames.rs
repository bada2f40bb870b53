//! Frames over any byte stream, with a clock on progress and never on the whole. Neighbours: `request` and `serve` talk
//! through it; `commonweal_protocol` says what a frame is.
//!
//! A frame's length is judged before a byte of its body is waited for, and memory grows with what arrives and not with
//! what is announced.

use bytes::{BufMut as _, BytesMut};
use commonweal_protocol::{DecodeError, EncodeError, Header, Message, bounds, decode, encode};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::{Instant, timeout_at},
};

/// Bytes by which a body's buffer grows, and bytes offered to the stream at once.
const STEP_BYTES: usize = 64 << 10;

/// Why no message came.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    /// The stream ended between two frames.
    #[error("the stream ended")]
    Ended,
    /// The stream broke, or ended inside a frame.
    #[error("the stream broke")]
    Broken(#[source] io::Error),
    /// Too little came for too long.
    #[error("no progress for {0:?}")]
    Stalled(Duration),
    /// What came is not a message that may come here.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Why a message did not leave.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// The stream broke, or the peer wants no more.
    #[error("the stream broke")]
    Broken(#[source] io::Error),
    /// Too little left for too long.
    #[error("no progress for {0:?}")]
    Stalled(Duration),
    /// The message cannot be sent.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// A deadline that moves on with every [`bounds::PROGRESS_BYTES_MIN`] bytes, so that a transfer may take as long as it
/// moves, and dribbling a byte now and then does not count as moving.
#[derive(Debug)]
struct Progress {
    window: Duration,
    deadline: Instant,
    moved_bytes: usize,
}

impl Progress {
    fn begin(window: Duration) -> Self {
        Self { window, deadline: Instant::now() + window, moved_bytes: 0 }
    }

    fn moved(&mut self, bytes: usize) {
        self.moved_bytes += bytes;
        if self.moved_bytes >= bounds::PROGRESS_BYTES_MIN {
            self.moved_bytes = 0;
            self.deadline = Instant::now() + self.window;
        }
    }

    /// The operation's result, or none when the deadline passes first.
    async fn within<T>(&self, operation: impl Future<Output = T>) -> Option<T> {
        timeout_at(self.deadline, operation).await.ok()
    }
}

/// The next message. A window that passes without enough progress is a stall, also before the first byte.
pub(crate) async fn receive<M: Message>(
    stream: &mut (impl AsyncRead + Unpin),
    body_bytes_max: usize,
    window: Duration,
) -> Result<M, ReceiveError> {
    let mut progress = Progress::begin(window);
    let mut header = BytesMut::with_capacity(Header::BYTES);
    if !fill(stream, &mut header, Header::BYTES, &mut progress).await? {
        return Err(ReceiveError::Ended);
    }
    let mut announced = [0; Header::BYTES];
    announced.copy_from_slice(&header);
    let body_bytes = Header::parse(announced, body_bytes_max)?.body_bytes();
    let mut body = BytesMut::new();
    if !fill(stream, &mut body, body_bytes, &mut progress).await? {
        return Err(ReceiveError::Broken(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(decode(&body)?)
}

/// Fills the buffer up to `wanted` bytes; false if the stream ends before the first.
async fn fill(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
    wanted: usize,
    progress: &mut Progress,
) -> Result<bool, ReceiveError> {
    while buffer.len() < wanted {
        let step = (wanted - buffer.len()).min(STEP_BYTES);
        buffer.reserve(step);
        let read = progress.within(stream.read_buf(&mut (&mut *buffer).limit(step))).await;
        let read = read.ok_or(ReceiveError::Stalled(progress.window))?.map_err(ReceiveError::Broken)?;
        if read == 0 {
            let empty = buffer.is_empty();
            return if empty {
                Ok(false)
            } else {
                Err(ReceiveError::Broken(io::ErrorKind::UnexpectedEof.into()))
            };
        }
        progress.moved(read);
    }
    Ok(true)
}

/// Sends a message.
pub(crate) async fn send<M: Message>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &M,
    window: Duration,
) -> Result<(), SendError> {
    send_bytes(stream, &encode(message)?, window).await
}

/// Sends bytes as they are.
pub(crate) async fn send_bytes(
    stream: &mut (impl AsyncWrite + Unpin),
    mut bytes: &[u8],
    window: Duration,
) -> Result<(), SendError> {
    let mut progress = Progress::begin(window);
    while !bytes.is_empty() {
        let step = &bytes[..bytes.len().min(STEP_BYTES)];
        let written = progress.within(stream.write(step)).await;
        let written = written.ok_or(SendError::Stalled(window))?.map_err(SendError::Broken)?;
        if written == 0 {
            return Err(SendError::Broken(io::ErrorKind::WriteZero.into()));
        }
        progress.moved(written);
        bytes = &bytes[written..];
    }
    let flushed = progress.within(stream.flush()).await;
    flushed.ok_or(SendError::Stalled(window))?.map_err(SendError::Broken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonweal_protocol::{Chunk, Request};

    const WINDOW: Duration = Duration::from_secs(10);

    /// Time stands still until every task waits, and then jumps: an hour passes in a moment.
    #[tokio::test(start_paused = true)]
    async fn a_transfer_that_moves_takes_as_long_as_it_takes() {
        let (mut near, mut far) = tokio::io::duplex(1 << 21);
        let frame = encode(&Request::Chunk(Chunk::new(0, vec![1; 1 << 20]).unwrap())).unwrap();
        let begin = Instant::now();
        let sender = tokio::spawn(async move {
            for piece in frame.chunks(4096) {
                tokio::time::sleep(WINDOW * 9 / 10).await;
                near.write_all(piece).await.unwrap();
            }
        });
        let request: Request = receive(&mut far, bounds::FRAME_BYTES_MAX, WINDOW).await.unwrap();
        assert!(matches!(request, Request::Chunk(chunk) if chunk.bytes.len() == 1 << 20));
        assert!(begin.elapsed() > 200 * WINDOW);
        sender.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn dribbling_a_byte_now_and_then_is_a_stall() {
        let (mut near, mut far) = tokio::io::duplex(1 << 16);
        let frame = encode(&Request::Chunk(Chunk::new(0, vec![1; 1 << 20]).unwrap())).unwrap();
        let begin = Instant::now();
        tokio::spawn(async move {
            for byte in frame.chunks(1) {
                tokio::time::sleep(WINDOW / 2).await;
                near.write_all(byte).await.unwrap();
            }
        });
        let error = receive::<Request>(&mut far, bounds::FRAME_BYTES_MAX, WINDOW).await.unwrap_err();
        assert!(matches!(error, ReceiveError::Stalled(_)), "{error:?}");
        assert_eq!(begin.elapsed(), WINDOW);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stands_still_is_a_stall() {
        let (mut near, _far) = tokio::io::duplex(100);
        let error = send_bytes(&mut near, &[0; 1000], WINDOW).await.unwrap_err();
        assert!(matches!(error, SendError::Stalled(_)), "{error:?}");
    }

    #[tokio::test]
    async fn a_length_beyond_the_bound_is_refused_before_its_bytes_come() {
        let (mut near, mut far) = tokio::io::duplex(100);
        near.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
        let error = receive::<Request>(&mut far, bounds::FRAME_BYTES_MAX, WINDOW).await.unwrap_err();
        assert!(matches!(error, ReceiveError::Decode(DecodeError::TooLong { .. })), "{error:?}");
    }

    #[tokio::test]
    async fn the_end_between_frames_differs_from_the_end_inside_one() {
        let (near, mut far) = tokio::io::duplex(100);
        drop(near);
        assert!(matches!(receive::<Request>(&mut far, 100, WINDOW).await, Err(ReceiveError::Ended)));
        let (mut near, mut far) = tokio::io::duplex(100);
        near.write_all(&[2, 0, 0, 0, 1]).await.unwrap();
        drop(near);
        assert!(matches!(receive::<Request>(&mut far, 100, WINDOW).await, Err(ReceiveError::Broken(_))));
    }
}
