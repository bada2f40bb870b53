//! What carries streams: the seam between the two carriers and the one session over them. Neighbours: `quic` and `sim`
//! implement it; `session` opens streams by it; the contract suite uses it to misbehave.

use crate::{LinkError, Meter};
use std::{any::Any, fmt, io};
use tokio::io::{AsyncRead, AsyncWrite};

/// What a stream is for, since a transfer wants its connection kept alive and a question does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A short exchange.
    Question,
    /// An upload or a download.
    Transfer,
}

/// A stream in both directions. Dropping it cuts it.
pub struct Stream<S, R> {
    /// To the aggregator.
    pub sending: S,
    /// From the aggregator.
    pub receiving: R,
    /// What must live as long as the stream does.
    pub(crate) guard: Option<Box<dyn Any + Send + Sync>>,
}

impl<S, R> fmt::Debug for Stream<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("guarded", &self.guard.is_some()).finish_non_exhaustive()
    }
}

/// Opens streams to the aggregator, connecting where it must.
pub trait Wire: Send + Sync + 'static {
    /// The sending half.
    type Sending: AsyncWrite + Unpin + Send;
    /// The receiving half.
    type Receiving: AsyncRead + Unpin + Send;

    /// Opens one stream.
    fn open(
        &self,
        purpose: Purpose,
    ) -> impl Future<Output = Result<Stream<Self::Sending, Self::Receiving>, LinkError>> + Send;

    /// Lets go of a connection that is kept between streams, before a request that failed on it is made again: whoever
    /// was at its other end may be gone without a word.
    fn let_go(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// What counts the bytes that the sockets move, if they are counted.
    fn meter(&self) -> Option<&dyn Meter> {
        None
    }

    /// What it means that a stream broke so.
    fn explain(&self, during: &'static str, error: io::Error) -> LinkError {
        LinkError::Cut { during, source: error }
    }
}
