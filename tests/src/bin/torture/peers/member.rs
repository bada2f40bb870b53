//! A hostile peer that is enrolled: the updates that it made, which it may have merged once each, and the receipts that it
//! was given, of which there may be one a round. Neighbours: `replay` and `corrupt` send its updates.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, ensure};
use commonweal_adapter::AdapterLayout;
use commonweal_protocol::{
    AggregatorKey, Chunk, DeviceId, DeviceReport, Digest, Invitation, KeyNumber, Open, Poll, Request,
    RoundId, RoundTask, SignedReceipt, bounds::CHUNK_BYTES_MAX, encode,
};
use commonweal_tests::{
    verdict::{Held, Peer},
    visitor::{self, BASE},
};
use commonweal_transport::{Clock, Link as _, LinkLimits, QuicLink};
use edge_client::{compress::Packed, upload};
use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Site, limits};
use crate::serving::ADAPTER_MB;

/// Updates that are remembered whole. More than the rounds whose receipts an aggregator repeats.
const RECENT_MAX: usize = 20;
/// Retries of what a peer does as a device does it.
const RETRIES_MAX: u32 = 3;
/// Beyond the numbers of honest devices, whose updates are drawn by theirs.
const NUMBERS_FROM: u64 = 128;

/// See the module.
pub(super) struct Member {
    id: DeviceId,
    key: AggregatorKey,
    /// To each of the aggregator's processes.
    links: Vec<QuicLink>,
    layout: Arc<AdapterLayout>,
    number: u64,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    made: BTreeMap<RoundId, Digest>,
    recent: BTreeMap<RoundId, Arc<Delivery>>,
    promised: BTreeMap<RoundId, SignedReceipt>,
}

/// An update with its announcement.
pub(super) struct Delivery {
    pub(super) open: Open,
    pub(super) packed: Packed,
}

impl Delivery {
    /// What a device says to deliver it, frame by frame, if nothing of it is there.
    pub(super) fn frames(&self) -> Result<Vec<Vec<u8>>> {
        let mut frames = vec![encode(&Request::Open(self.open))?];
        let mut offset = 0;
        for bytes in self.packed.bytes().chunks(CHUNK_BYTES_MAX) {
            let chunk = Chunk::new(offset, bytes.to_vec())?;
            offset = chunk.end();
            frames.push(encode(&Request::Chunk(chunk))?);
        }
        frames.push(encode(&Request::Finish)?);
        Ok(frames)
    }
}

/// What every poll of a peer says.
pub(super) const POLL: Poll = Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None };

impl Member {
    /// Spends an invitation, as a device does.
    pub(super) async fn enroll(site: &Site, invitation: &Invitation, number: u64) -> Result<Self> {
        let credentials = visitor::enroll(invitation, &LinkLimits::default()).await?;
        let link = |port: &u16| {
            QuicLink::new(&site.host, *port, credentials.clone(), limits(RETRIES_MAX), Clock::system())
        };
        Ok(Self {
            id: credentials.device(),
            key: *credentials.signing_key(),
            links: site.ports.iter().map(link).collect::<Result<_, _>>()?,
            layout: visitor::layout(ADAPTER_MB)?,
            number: NUMBERS_FROM + number,
            book: Mutex::default(),
        })
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A way to one of the aggregator's processes.
    pub(super) fn link(&self, random: &mut ChaCha8Rng) -> Result<&QuicLink> {
        self.links.get(random.random_range(0..self.links.len().max(1))).context("nobody answers")
    }

    /// Its task, if there is one and somebody is there to give it.
    pub(super) async fn task(&self, random: &mut ChaCha8Rng) -> Result<Option<RoundTask>> {
        Ok(self.link(random)?.poll(POLL).await.ok().and_then(|reply| reply.task))
    }

    /// The update of a task, the same whenever it is asked for.
    pub(super) fn make(&self, task: &RoundTask) -> Result<Arc<Delivery>> {
        if let Some(delivery) = self.book().recent.get(&task.round) {
            return Ok(delivery.clone());
        }
        let mut random = ChaCha8Rng::seed_from_u64((task.round.0 << 8) | self.number);
        let packed = visitor::noise(&self.layout, &mut random)?;
        let open = upload::announce(task.round, BASE, &packed, DeviceReport::default(), 1);
        let delivery = Arc::new(Delivery { open, packed });
        let mut book = self.book();
        book.made.insert(task.round, open.digest);
        book.recent.insert(task.round, delivery.clone());
        while book.recent.len() > RECENT_MAX {
            book.recent.pop_first();
        }
        Ok(delivery)
    }

    /// One of the updates that it remembers: as often as not the newest, else any.
    pub(super) fn recall(&self, random: &mut ChaCha8Rng) -> Option<Arc<Delivery>> {
        let book = self.book();
        if random.random() {
            return book.recent.values().next_back().cloned();
        }
        let index = random.random_range(0..book.recent.len().max(1));
        book.recent.values().nth(index).cloned()
    }

    /// Whether its update of a round is in.
    pub(super) fn has_receipt(&self, round: RoundId) -> bool {
        self.book().promised.contains_key(&round)
    }

    /// Takes a receipt.
    ///
    /// # Errors
    /// It is not the aggregator's word for this device's own update of the round, or not the one that it gave before.
    pub(super) fn note(&self, signed: SignedReceipt) -> Result<()> {
        let receipt = *signed.verify(&self.key).context("a receipt that the aggregator did not sign")?;
        let round = receipt.round;
        let mut book = self.book();
        ensure!(receipt.device == self.id, "a receipt of {} for {}", receipt.device, self.id);
        ensure!(
            book.made.get(&round) == Some(&receipt.digest),
            "a receipt of round {round} for what {} did not make",
            self.id
        );
        let before = book.promised.entry(round).or_insert(signed);
        ensure!(before.receipt == receipt, "another receipt of {} for round {round}", self.id);
        Ok(())
    }

    /// What it holds, and what it may have merged.
    pub(super) fn account(&self) -> (Held, Peer) {
        let book = self.book();
        let receipts = book.promised.values().copied().collect();
        (Held { id: self.id, receipts }, Peer { id: self.id, made: book.made.clone() })
    }
}
