//! A hostile device in the harness: it trains on harm with the filter off, lengthens its update and lies about how it
//! came to be (`attack.rs`). The link, the polls and the receipts are an honest device's.

use anyhow::Result;
use commonweal_protocol::Content;
use commonweal_tests::attack::{self, Poison};
use commonweal_transport::Link;
use edge_client::{
    filter, install, kept,
    pipeline::{Device, Outcome, train_task},
    policy::Policy,
    revise, sample,
    store::StoreError,
    train, upload,
};

/// One poll and what follows, with the update `boost` times as long.
pub(crate) fn visit<L: Link>(device: &Device<L>, boost: f32) -> Result<Outcome> {
    let Some(task) = device.poll()?.task else { return Ok(Outcome::Idle) };
    if upload::delivered(&device.store)?.iter().any(|known| known.round == task.round) {
        return Ok(Outcome::AlreadyDelivered(task.round));
    }
    let Device { store, model, guard, reviser, expected, cancel, .. } = device;
    let mut policy = Policy::default();
    policy.filter.enabled = false;
    let samples = sample::draw(kept::samples(store)?, policy.train.samples_max, task.seed);
    let screened = filter::screen(guard, &policy, samples, cancel, |_| ())?;
    let (pairs, _) = revise::revise(guard, reviser, &policy, screened, task.seed, cancel, |_| ())?;
    let content = Content { digest: task.start.digest, length: task.start.length };
    let start = device.runtime.block_on(install::obtain(&device.link, store, expected, content))?;
    let how = train_task(&task);
    let trained = train::train(model, &start, &pairs, &how, &policy.train, None, &mut Unwatched, cancel)?;
    let Poison { open, packed, .. } = attack::pack(&task, expected.base, &trained, boost)?;
    let sent = upload::upload(&device.link, &expected.trust, device.id, store, &open, &packed);
    match device.runtime.block_on(sent) {
        Ok(_) => Ok(Outcome::Delivered(task.round)),
        Err(error) => match error.final_refusal() {
            Some((refusal, _)) => Ok(Outcome::Refused(task.round, refusal)),
            None => Err(error.into()),
        },
    }
}

/// Nobody looks, and nothing is kept.
struct Unwatched;

impl train::Watch for Unwatched {
    fn step(&mut self, _: u32, _: f32) {}

    fn checkpoint(&mut self, _: Vec<u8>) -> Result<(), StoreError> {
        Ok(())
    }
}
