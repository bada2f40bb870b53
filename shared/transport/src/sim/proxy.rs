//! Carries the frames of one simulated stream between the two sides, and does to them what `faults` decides.
//! Neighbours: `sim` puts one between each device's stream and the server's.

use super::faults::{Fault, Faults};
use commonweal_protocol::bounds;
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio_util::sync::CancellationToken;

/// Both directions of one stream. Clones share it.
#[derive(Clone)]
pub(super) struct Proxy {
    faults: Faults,
    cut: CancellationToken,
    cut_at_answer: Arc<AtomicBool>,
    corrupt_answer: Arc<AtomicBool>,
}

/// The first bytes of a frame.
enum Header {
    Frame([u8; 4]),
    /// Not of a frame that can be held whole, or cut short by the stream's end: bytes to carry as they come.
    Unframed(Vec<u8>),
}

impl Proxy {
    pub(super) fn new(faults: Faults) -> Self {
        Self {
            faults,
            cut: CancellationToken::new(),
            cut_at_answer: Arc::default(),
            corrupt_answer: Arc::default(),
        }
    }

    /// From the device. Returns what the stream carried, if that is to arrive once more.
    pub(super) async fn forward(self, mut from: DuplexStream, mut to: DuplexStream) -> Option<Vec<u8>> {
        let mut ghost = Ghost { kept: Vec::new(), keep: self.faults.may_duplicate(), wanted: false };
        let carried = async {
            loop {
                // The header goes on before the body is here: the server may refuse it by its length.
                let header = match read_header(&mut from).await? {
                    Header::Frame(header) => header,
                    Header::Unframed(bytes) => {
                        to.write_all(&bytes).await?;
                        break tokio::io::copy(&mut from, &mut to).await.map(drop);
                    }
                };
                let fault = self.faults.next();
                match fault {
                    Some(Fault::CutBefore) => break Err(io::ErrorKind::ConnectionReset.into()),
                    Some(Fault::CutAfter) => self.cut_at_answer.store(true, Ordering::SeqCst),
                    Some(Fault::CorruptAnswer) => self.corrupt_answer.store(true, Ordering::SeqCst),
                    Some(Fault::Duplicate) => ghost.wanted = true,
                    Some(Fault::Delay { ms }) => tokio::time::sleep(Duration::from_millis(ms.into())).await,
                    Some(Fault::CutInside | Fault::Corrupt) | None => {}
                }
                to.write_all(&header).await?;
                let (mut body, whole) = read_body(&mut from, header).await?;
                if ghost.keep {
                    ghost.kept.extend_from_slice(&header);
                    ghost.kept.extend_from_slice(&body);
                }
                match fault {
                    Some(Fault::CutInside) => {
                        to.write_all(&body[..body.len() / 2]).await?;
                        break Err(io::ErrorKind::ConnectionReset.into());
                    }
                    Some(Fault::Corrupt) => flip(&mut body),
                    _ => {}
                }
                to.write_all(&body).await?;
                if !whole {
                    break Ok(());
                }
            }
        };
        let outcome: Option<io::Result<()>> = self.cut.run_until_cancelled(carried).await;
        if matches!(&outcome, Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset) {
            self.cut.cancel();
        }
        ghost.wanted.then_some(ghost.kept)
    }

    /// From the server.
    pub(super) async fn backward(self, mut from: DuplexStream, mut to: DuplexStream) {
        let carried = async {
            loop {
                let header = match read_header(&mut from).await? {
                    Header::Frame(header) => header,
                    Header::Unframed(bytes) => break to.write_all(&bytes).await,
                };
                let (mut body, whole) = read_body(&mut from, header).await?;
                if self.cut_at_answer.load(Ordering::SeqCst) {
                    self.cut.cancel();
                }
                if self.corrupt_answer.swap(false, Ordering::SeqCst) {
                    flip(&mut body);
                }
                // The cut takes effect here, before the frame is through.
                tokio::task::yield_now().await;
                to.write_all(&header).await?;
                to.write_all(&body).await?;
                if !whole {
                    break Ok(());
                }
            }
        };
        let _: Option<io::Result<()>> = self.cut.run_until_cancelled(carried).await;
    }
}

struct Ghost {
    kept: Vec<u8>,
    keep: bool,
    wanted: bool,
}

fn flip(body: &mut [u8]) {
    if let Some(last) = body.last_mut() {
        *last ^= 1;
    }
}

async fn read_header(from: &mut DuplexStream) -> io::Result<Header> {
    let mut header = [0; 4];
    let read = read_up_to(from, &mut header).await?;
    if read < header.len() || body_bytes(header) > bounds::FRAME_BYTES_MAX {
        return Ok(Header::Unframed(header[..read].to_vec()));
    }
    Ok(Header::Frame(header))
}

/// What there is of a frame's body, and whether that is all of it.
async fn read_body(from: &mut DuplexStream, header: [u8; 4]) -> io::Result<(Vec<u8>, bool)> {
    let mut body = vec![0; body_bytes(header)];
    let read = read_up_to(from, &mut body).await?;
    let whole = read == body.len();
    body.truncate(read);
    Ok((body, whole))
}

fn body_bytes(header: [u8; 4]) -> usize {
    u32::from_le_bytes(header) as usize
}

/// Fills the buffer unless the stream ends first; the number of bytes read.
async fn read_up_to(from: &mut DuplexStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]).await? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}
