//! A link that survives cuts: repeats `request`s over a `Wire`, with growing pauses, from where the other side's bytes
//! end. Neighbours: this is the `Link` of both carriers, and how a device enrols over either.

use crate::{
    Link, LinkError, LinkLimits, Uploaded,
    request::{self, UploadProgress, ask},
    wire::Wire,
};
use commonweal_protocol::{
    CertificateChain, Content, Csr, Digest, Enroll, Enrolled, Invalid, Open, Poll, PollReply, Refusal, Renew,
    Reply, Request, Token,
};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// The device's side of a link over some carrier.
#[derive(Debug)]
pub struct Session<W> {
    wire: W,
    limits: LinkLimits,
    jitter: Mutex<ChaCha8Rng>,
}

impl<W: Wire> Session<W> {
    /// A link over this carrier. Nothing is connected before the first request.
    pub fn over(wire: W, limits: LinkLimits) -> Self {
        Self { wire, limits, jitter: Mutex::new(ChaCha8Rng::seed_from_u64(limits.seed)) }
    }

    /// The carrier.
    pub fn wire(&self) -> &W {
        &self.wire
    }

    /// Spends the token of an invitation, over a carrier made for enrolling. Tried once: a token is single-use, and an
    /// answer lost on its way needs a new one.
    pub async fn enroll(&self, token: Token, csr: Csr) -> Result<Enrolled, LinkError> {
        request::enroll(&self.wire, self.window(), Enroll { token, csr }).await
    }

    fn window(&self) -> Duration {
        Duration::from_millis(self.limits.stall_ms)
    }

    /// The pause before a retry: it doubles with each in a row, and a random half of it is left out, so that devices
    /// cut at one moment do not return at one moment.
    fn pause(&self, retries: u32) -> Duration {
        let doubled =
            self.limits.retry_first_ms.saturating_mul(1u64.checked_shl(retries).unwrap_or(u64::MAX));
        let longest_ms = doubled.min(self.limits.retry_pause_ms_max);
        let mut jitter = self.jitter.lock().unwrap_or_else(PoisonError::into_inner);
        Duration::from_millis(jitter.random_range(longest_ms / 2..=longest_ms))
    }

    /// Counts a failure: waits and returns if the request should be made again, else gives the error back.
    async fn retry(&self, error: LinkError, retries: &mut u32) -> Result<(), LinkError> {
        // A busy or failing aggregator said when to come back, and so does a budget; that is for the caller to plan.
        let told_when =
            matches!(error.refusal(), Some(Refusal::Busy | Refusal::Internal)) || error.put_off().is_some();
        if !error.is_transient() || told_when || *retries >= self.limits.retries_max {
            return Err(error);
        }
        let pause = self.pause(*retries);
        *retries += 1;
        tracing::debug!(error = %crate::serve::chain(&error), ?pause, retries, "trying again");
        self.wire.let_go().await;
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Asks until answered. Only for requests that may be asked twice.
    async fn ask(&self, during: &'static str, request: &Request) -> Result<Reply, LinkError> {
        let mut retries = 0;
        loop {
            match ask(&self.wire, self.window(), during, request).await {
                Ok(reply) => return Ok(reply),
                Err(error) => self.retry(error, &mut retries).await?,
            }
        }
    }
}

impl<W: Wire> Link for Session<W> {
    async fn poll(&self, poll: Poll) -> Result<PollReply, LinkError> {
        match self.ask("polling", &Request::Poll(poll)).await? {
            Reply::Poll(reply) => Ok(reply),
            _ => Err(LinkError::OutOfPlace { expected: "the answer to a poll" }),
        }
    }

    async fn upload(&self, open: &Open, payload: &[u8]) -> Result<Uploaded, LinkError> {
        if open.length != payload.len() as u64 || open.digest != Digest::of(payload) {
            return Err(LinkError::PayloadMismatch { announced: open.length, digest: open.digest });
        }
        let (mut progress, mut retries) = (UploadProgress::default(), 0);
        loop {
            let durable = progress.durable;
            match request::upload(&self.wire, self.window(), open, payload, &mut progress).await {
                Ok(accepted) => {
                    return Ok(Uploaded {
                        receipt: accepted.receipt,
                        reconnect: accepted.reconnect,
                        resumed_from: progress.resumed_from.unwrap_or_default(),
                        sent_bytes: progress.sent_bytes,
                    });
                }
                Err(error) => {
                    if progress.durable > durable {
                        retries = 0;
                    }
                    self.retry(error, &mut retries).await?;
                }
            }
        }
    }

    async fn fetch(&self, content: Content, partial: &mut Vec<u8>) -> Result<(), LinkError> {
        if partial.len() as u64 > content.length {
            partial.clear();
        }
        let wanted = usize::try_from(content.length).unwrap_or(usize::MAX) - partial.len();
        let limit = commonweal_protocol::bounds::CONTENT_BYTES_MAX;
        if content.length > limit || partial.try_reserve_exact(wanted).is_err() {
            let too_large = Invalid::TooLarge { field: "content length", limit, got: content.length };
            return Err(commonweal_protocol::EncodeError::from(too_large).into());
        }
        let mut retries = 0;
        loop {
            let before = partial.len();
            let outcome = if before as u64 == content.length {
                Ok(())
            } else {
                request::download(&self.wire, self.window(), content, partial).await
            };
            match outcome.and_then(|()| verify(content, partial)) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    if partial.len() > before {
                        retries = 0;
                    }
                    self.retry(error, &mut retries).await?;
                }
            }
        }
    }

    async fn renew(&self, csr: Csr) -> Result<CertificateChain, LinkError> {
        match self.ask("renewing", &Request::Renew(Renew { csr })).await? {
            Reply::Renewed(chain) => Ok(chain),
            _ => Err(LinkError::OutOfPlace { expected: "a certificate" }),
        }
    }
}

/// Bytes that are not those of the digest are dropped: nothing says which of them are wrong.
fn verify(content: Content, partial: &mut Vec<u8>) -> Result<(), LinkError> {
    let got = Digest::of(partial);
    if got != content.digest {
        partial.clear();
        return Err(LinkError::Corrupt { expected: content.digest, got });
    }
    Ok(())
}
