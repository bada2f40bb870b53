//! A device of the simulation: honest, clumsy or hostile, but always the same for its seed. It keeps what a real one
//! keeps (its update until it has a receipt) and every receipt, for the invariants.

use std::collections::BTreeMap;
use std::sync::Arc;

use commonweal_adapter::{AdapterDelta, AdapterLayout, CompressOptions, Residual, Trainable, compress};
use commonweal_protocol::{
    BaseHash, DeviceId, DeviceReport, Digest, KeyNumber, Open, Poll, RoundId, RoundTask, SignedReceipt,
    Version,
};
use commonweal_transport::{Credentials, Link, LinkError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How a device behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    Honest,
    /// Takes tasks and never delivers.
    Vanishing,
    /// Delivers what is no update.
    Garbage,
    /// Delivers twice, the second time something else.
    Twice,
}

/// See the module.
#[derive(Debug)]
pub struct Device {
    pub id: DeviceId,
    pub credentials: Credentials,
    pub manner: Manner,
    pub installed: Option<Version>,
    pub pending: Option<(Open, Vec<u8>)>,
    /// Every update that it ever tried to deliver, by round.
    pub sent: BTreeMap<RoundId, Vec<(Open, Vec<u8>)>>,
    pub receipts: BTreeMap<RoundId, SignedReceipt>,
    /// The release that each round's task named.
    pub starts: BTreeMap<RoundId, Version>,
}

/// A packed update with values drawn from a seed.
pub fn update(layout: &Arc<AdapterLayout>, seed: u64) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let count = layout.trainable_parameters(Trainable::Both);
    let values = (0..count).map(|_| random.random_range(-0.1..0.1)).collect();
    let delta = AdapterDelta::from_values(layout.clone(), Trainable::Both, values).unwrap();
    let mut residual = Residual::zeros(layout.clone(), Trainable::Both);
    compress(&delta, &mut residual, &CompressOptions::default(), &mut random).unwrap().into_bytes()
}

impl Device {
    pub fn new(id: DeviceId, credentials: Credentials, manner: Manner) -> Self {
        Self {
            id,
            credentials,
            manner,
            installed: None,
            pending: None,
            sent: BTreeMap::new(),
            receipts: BTreeMap::new(),
            starts: BTreeMap::new(),
        }
    }

    fn prepare(&mut self, task: &RoundTask, layout: &Arc<AdapterLayout>, random: &mut ChaCha8Rng) {
        let bytes = match self.manner {
            Manner::Garbage => (0..random.random_range(1..400_usize)).map(|_| random.random()).collect(),
            _ => update(layout, random.random()),
        };
        self.announce(task.round, task.base, bytes, random);
    }

    fn announce(&mut self, round: RoundId, base: BaseHash, bytes: Vec<u8>, random: &mut ChaCha8Rng) {
        let open = Open {
            round,
            base,
            digest: Digest::of(&bytes),
            length: bytes.len() as u64,
            samples: random.random_range(1..100),
            report: DeviceReport::default(),
            trace: None,
        };
        self.sent.entry(round).or_default().push((open, bytes.clone()));
        self.pending = Some((open, bytes));
    }

    /// One visit: finish what is pending, else ask for work. Errors are the network's and end the visit.
    pub async fn visit(
        &mut self,
        link: &impl Link,
        base: BaseHash,
        layout: &Arc<AdapterLayout>,
        random: &mut ChaCha8Rng,
    ) {
        if let Some((open, bytes)) = self.pending.clone() {
            self.deliver(link, open, &bytes, random).await;
            return;
        }
        let poll = Poll { base, installed: self.installed, key: KeyNumber(0), trouble: None };
        let Ok(reply) = link.poll(poll).await else { return };
        // A damaged poll may have named another release than the one installed; what is not newer is left alone.
        if let Some(release) = reply.release.filter(|release| self.installed < Some(release.release.version))
        {
            release
                .verify(self.credentials.signing_key())
                .expect("a release that the aggregator did not sign");
            let mut bytes = Vec::new();
            if link.fetch(release.release.content(), &mut bytes).await.is_ok() {
                self.installed = Some(release.release.version);
            }
        }
        if let Some(task) = reply.task {
            assert!(!self.receipts.contains_key(&task.round), "a task after the receipt");
            let before = self.starts.insert(task.round, task.start.version);
            assert!(before.is_none_or(|before| before == task.start.version), "one round, two starts");
            self.prepare(&task, layout, random);
            if self.manner == Manner::Vanishing {
                self.pending = None;
            }
        }
    }

    async fn deliver(&mut self, link: &impl Link, open: Open, bytes: &[u8], random: &mut ChaCha8Rng) {
        match link.upload(&open, bytes).await {
            Ok(uploaded) => {
                let receipt =
                    *uploaded.receipt.verify(self.credentials.signing_key()).expect("a forged receipt");
                assert_eq!(
                    (receipt.round, receipt.device, receipt.digest),
                    (open.round, self.id, open.digest)
                );
                if let Some(before) = self.receipts.insert(open.round, uploaded.receipt) {
                    assert_eq!(before, uploaded.receipt, "the same update, another receipt");
                }
                self.pending = None;
                match self.manner {
                    // The same again, as after an answer that was lost.
                    Manner::Honest if random.random_bool(0.2) => self.pending = Some((open, bytes.to_vec())),
                    Manner::Twice if random.random_bool(0.5) => {
                        let mut other = bytes.to_vec();
                        other.push(0);
                        self.announce(open.round, open.base, other, random);
                    }
                    _ => {}
                }
            }
            // A refusal for good: the update is dropped, as a device does.
            Err(LinkError::Refused { reason, .. }) if !reason.is_transient() => self.pending = None,
            Err(_) => {}
        }
    }
}
