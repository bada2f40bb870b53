//! A device without a model: what `edge_client::pipeline` does in a visit, with the same functions, but for the work of a
//! model, in whose place its updates are noise. Identity, link, directory and receipts are real. `round-bench`, `load` and
//! `torture` send it to the aggregator of `modelless.rs`.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::Result;
use commonweal_adapter::{AdapterDelta, AdapterLayout, Bits, CompressOptions, Residual, Trainable};
use commonweal_protocol::{BaseHash, Content, DeviceId, DeviceReport, Invitation, Poll, RoundTask};
use commonweal_transport::{Clock, Credentials, DeviceKey, Link, LinkError, LinkLimits, QuicLink, Uploaded};
use edge_client::{
    compress::Packed,
    install::{self, Expected},
    store::Store,
    trust::Trust,
    upload,
};
use rand::{Rng as _, RngCore as _, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A device, between two visits.
#[derive(Debug)]
pub struct Visitor {
    id: DeviceId,
    store: Store,
    link: QuicLink,
    expected: Expected,
    random: ChaCha8Rng,
}

/// What a visit came to.
#[derive(Clone, Copy, Debug)]
pub enum Visit {
    /// An update was delivered; its receipt is on disk.
    Delivered(Uploaded),
    /// There was nothing to do; to come again after so long.
    Wait(Duration),
}

/// Spends an invitation.
///
/// # Errors
/// As [`commonweal_transport::enroll`].
pub async fn enroll(invitation: &Invitation, limits: &LinkLimits) -> Result<Credentials, LinkError> {
    commonweal_transport::enroll(invitation, DeviceKey::generate()?, limits, &Clock::system()).await
}

impl Visitor {
    /// A device with its directory; the seed of its limits draws its waits too. To be called inside of a runtime.
    ///
    /// # Errors
    /// The directory is another process's or cannot be made; the credentials do not work.
    pub fn new(
        (host, port): (&str, u16),
        credentials: Credentials,
        (base, layout): (BaseHash, Arc<AdapterLayout>),
        directory: &Path,
        limits: LinkLimits,
    ) -> Result<Self> {
        let (id, store) = (credentials.device(), Store::open(directory)?);
        let expected = Expected { trust: Trust::open(&store, &credentials)?, base, layout };
        let link = QuicLink::new(host, port, credentials, limits, Clock::system())?;
        Ok(Self { id, store, link, expected, random: ChaCha8Rng::seed_from_u64(limits.seed) })
    }

    /// What it checks by, and what it has.
    pub fn expected(&self) -> (&Expected, &Store) {
        (&self.expected, &self.store)
    }

    /// Goes to another of the aggregator's processes from now on.
    pub fn turn_to(&mut self, link: QuicLink) {
        self.link = link;
    }

    /// Its link.
    pub fn link(&self) -> &QuicLink {
        &self.link
    }

    /// Asks for work, installs what is new, and does the work there is; `update` gives what training would have brought.
    ///
    /// # Errors
    /// Whatever goes wrong on the way; the next visit goes on.
    pub async fn visit(&mut self, update: impl FnOnce(&RoundTask) -> Result<Packed>) -> Result<Visit> {
        let Self { id, store, link, expected, random } = self;
        let installed = install::installed_version(store, expected)?;
        let key = expected.trust.number();
        let reply = link.poll(Poll { base: expected.base, installed, key, trouble: None }).await?;
        expected.trust.follow(store, &reply.successions)?;
        if let Some(release) = reply.release.as_ref().filter(|it| Some(it.release.version) != installed) {
            install::install(link, store, expected, release).await?;
        }
        let delivered = upload::delivered(store)?;
        match reply.task.filter(|task| delivered.iter().all(|known| known.round != task.round)) {
            None => Ok(Visit::Wait(Duration::from_millis(reply.reconnect.delay_ms(random.next_u64())))),
            Some(task) => {
                let content = Content { digest: task.start.digest, length: task.start.length };
                install::obtain(link, store, expected, content).await?;
                let packed = update(&task)?;
                let open = upload::announce(task.round, expected.base, &packed, DeviceReport::default(), 1);
                Ok(Visit::Delivered(upload::upload(link, &expected.trust, *id, store, &open, &packed).await?))
            }
        }
    }
}

/// An update of evenly distributed values, which an entropy coder cannot make smaller. The same draws give the same bytes.
///
/// # Errors
/// The layout has no such update.
pub fn noise(layout: &Arc<AdapterLayout>, random: &mut ChaCha8Rng) -> Result<Packed> {
    let trainable = Trainable::Both;
    let values =
        (0..layout.trainable_parameters(trainable)).map(|_| random.random_range(-1e-3..1e-3)).collect();
    let delta = AdapterDelta::from_values(layout.clone(), trainable, values)?;
    let mut residual = Residual::zeros(layout.clone(), trainable);
    let options = CompressOptions { bits: Bits::Eight, ..CompressOptions::default() };
    let bytes = commonweal_adapter::compress(&delta, &mut residual, &options, random)?.into_bytes();
    Ok(Packed::from_disk(bytes, layout, trainable, false)?)
}

/// The layout of an adapter of so many MB (10⁶ bytes) of 32-bit values: 25 layers, rank 8, two linears.
///
/// # Errors
/// No layout is that large.
pub fn layout(adapter_mb: u32) -> Result<Arc<AdapterLayout>> {
    use commonweal_adapter::{Module, Target};
    // 4 bytes × 25 layers × rank 8 × 2 linears × (313 + 312) = 10⁶.
    let (inputs, outputs) = (313 * adapter_mb as usize, 312 * adapter_mb as usize);
    let modules = [Target::Q, Target::O].map(|target| Module { target, inputs, outputs });
    Ok(Arc::new(AdapterLayout::new(25, 8, 16.0, modules.to_vec())?))
}

/// The base that everybody here claims to have.
pub const BASE: BaseHash = BaseHash([0xba; 32]);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

    use super::*;

    #[test]
    fn an_adapter_has_the_size_that_is_asked_for() {
        for mb in [1, 20, 400] {
            assert_eq!(layout(mb).unwrap().parameters() * 4, mb as usize * 1_000_000);
        }
    }

    #[test]
    fn the_same_draws_give_the_same_update() {
        let update = |seed| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            noise(&layout(1).unwrap(), &mut random).unwrap().bytes().to_vec()
        };
        assert_eq!(update(3), update(3));
        assert_ne!(update(3), update(4));
    }
}
