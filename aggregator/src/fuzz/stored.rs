//! What lies in the aggregator's store, on a disk that may be damaged (`../fuzz.rs`).

use std::sync::Arc;

use commonweal_adapter::{AdapterLayout, Module, Target};
use commonweal_protocol::{
    BaseHash, CertificateChain, Csr, DeviceId, DeviceReport, Digest, Open, Receipt, RoundId, SignedReceipt,
    SigningKey, Start, Token, Version,
};
use commonweal_transport::Clock;

use super::{WORDS_MAX, chain_bytes};
use crate::canary;
use crate::config::{self, Config};
use crate::desk::{self, Accepted, Desk, DeskError};
use crate::events::Events;
use crate::observe::Counts;
use crate::pause::PausePoint;
use crate::publish::{self, Publisher};
use crate::receive::Parts;
use crate::receive::enroll::{Certify, EnrollError, Registry};
use crate::receive::partial::PartialMemory;
use crate::round::{Policy, RoundMode};
use crate::store::{MemoryStorage, Storage, StoreError};

const BASE: BaseHash = BaseHash([9; 32]);
const NOW_MS: u64 = 1_700_000_000_000;
const DEVICE: DeviceId = DeviceId([1; 16]);
const START: Start = Start { version: Version(0), digest: Digest([2; 32]), length: 1 };

/// An aggregator over a store in memory.
pub(super) struct Aggregator {
    storage: Storage,
    config: Config,
}

impl Aggregator {
    pub(super) fn new(is_buffered: bool) -> Self {
        Self::over(&MemoryStorage::default(), is_buffered)
    }

    fn over(memory: &MemoryStorage, is_buffered: bool) -> Self {
        let mode = if is_buffered { RoundMode::Buffered } else { RoundMode::Synchronous };
        let round = Policy { mode, goal: 2, quorum: 1, ..Policy::default() };
        let config = Config { round, ..Config::default() };
        Self { storage: memory.storage(), config }
    }

    fn publisher(&self) -> Publisher {
        let Storage { coord, blob, .. } = self.storage.clone();
        Publisher::new(coord, blob, SigningKey::from_bytes(&[3; 32]), BASE)
    }

    fn desk(&self) -> Result<Arc<Desk>, DeskError> {
        let events = Events::to(|_| {});
        Desk::open(self.storage.clone(), self.publisher(), self.config.round.clone(), events, NOW_MS)
    }

    pub(super) fn parts(&self) -> Result<Parts, DeskError> {
        let module = Module { target: Target::Q, inputs: 16, outputs: 16 };
        Ok(Parts {
            config: Arc::new(self.config.clone()),
            storage: self.storage.clone(),
            partials: Arc::new(PartialMemory::default()),
            publisher: self.publisher(),
            desk: self.desk()?,
            base: BASE,
            layout: Arc::new(AdapterLayout::new(2, 4, 8.0, vec![module]).expect("a layout")),
            signer: SigningKey::from_bytes(&[3; 32]).into(),
            clock: Clock::manual(NOW_MS),
            events: Events::to(|_| {}),
            pause: PausePoint::default(),
        })
    }

    /// Stores an entry as it was found; what the store itself refuses is no entry.
    fn put(&self, log: &str, value: &[u8]) -> Result<(), StoreError> {
        self.storage.coord.compare_and_set(log, 0, value).map(drop)
    }
}

/// An entry of the store, which of them by the first byte, is refused by its name, or goes on being used: whatever it says,
/// nothing overflows, waits or grows for ever.
pub fn stored(bytes: &[u8]) {
    is_read(bytes);
}

/// Whether the entry was taken.
pub(super) fn is_read(bytes: &[u8]) -> bool {
    let Some((which, value)) = bytes.split_first() else { return false };
    match which % 10 {
        0 | 1 => round(value, which % 10 == 1),
        2 => trial(value),
        3 => record(value),
        4 => enrolled(value),
        5 => token(value),
        6 => accepted(value),
        7 => release(value),
        8 => word(value),
        _ => door(value),
    }
}

fn told(error: &(dyn std::error::Error + 'static), name: &str) -> bool {
    let whole = std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string);
    let whole = whole.collect::<Vec<_>>().join(": ");
    assert!(whole.contains(name) && chain_bytes(error) < WORDS_MAX, "{whole}");
    false
}

fn round(value: &[u8], is_buffered: bool) -> bool {
    let aggregator = Aggregator::new(is_buffered);
    if aggregator.put("round", value).is_err() {
        return false;
    }
    let desk = match aggregator.desk() {
        Ok(desk) => desk,
        Err(error) => return told(&error, "round"),
    };
    for now_ms in [0, NOW_MS, u64::MAX] {
        for number in 0..4 {
            let device = DeviceId([number; 16]);
            // The state may say of its round what the records of rounds do not.
            if let Ok(Some((round, ..))) = desk.poll(now_ms, device, START) {
                let _ = desk.admits(round, &device);
                let _ =
                    desk.pass().and_then(|pass| desk.take(now_ms, &sample_accepted(round, device), &pass));
            }
        }
        let _ = (desk.next(now_ms), desk.taken(desk.round(), &DEVICE), desk.rounds().staleness(Version(0)));
    }
    desk::peek(aggregator.storage.coord.as_ref()).is_ok()
}

fn trial(value: &[u8]) -> bool {
    let aggregator = Aggregator::new(false);
    if aggregator.put(canary::LOG, value).is_err() {
        return false;
    }
    let mut canary = match canary::read(aggregator.storage.coord.as_ref()) {
        Ok(canary) => canary.expect("it was stored").0,
        Err(error) => return told(&error, "trials"),
    };
    let settings = config::Release { canary_share: 0.5, ..config::Release::default() };
    for now_ms in [0, NOW_MS, u64::MAX] {
        canary.judge(&settings, now_ms);
        canary.release_for(&DEVICE, Version(now_ms), settings.canary_share);
        canary.count(now_ms, [(canary.stable, 1.0), (Version(now_ms), f32::MAX)].into_iter());
        canary.see_head(Version(now_ms), now_ms != NOW_MS, now_ms);
        let version = canary.trial.as_ref().map_or(canary.stable, |trial| trial.version);
        let word = canary::Word { device: DEVICE, version, said: canary::Said::Installed };
        let place = canary.counted_word.saturating_add(1);
        canary.hear(place, Some(word));
        let heard = canary.clone();
        canary.hear(place, Some(word));
        assert!(canary == heard || format!("{canary:?}") == format!("{heard:?}"), "counted twice");
        let _ = canary.is_held_up(&settings);
        canary.silence(|device| *device == DEVICE);
    }
    canary.promote("fine".to_owned(), NOW_MS);
    canary.roll_back(Version(1), "worse".to_owned(), NOW_MS);
    true
}

fn record(value: &[u8]) -> bool {
    let aggregator = Aggregator::new(false);
    let coord = aggregator.storage.coord.as_ref();
    // Of the base and of the first round.
    if coord.compare_and_set(desk::RECORDS, 0, value).is_err() {
        return false;
    }
    let counts = Counts::new();
    let counted = counts.take_up(coord);
    match desk::records(coord, RoundId(0), 10) {
        Ok(records) => {
            counted.expect("it was read");
            assert!(records.len() == 1 && serde_json::to_string(&records).is_ok());
            true
        }
        Err(error) => told(&error, "record"),
    }
}

struct NoAuthority;

impl Certify for NoAuthority {
    fn certify(&self, _: DeviceId, _: &Csr, _: u64, _: u64) -> Result<CertificateChain, String> {
        Ok(CertificateChain(Vec::new()))
    }
}

fn csr() -> Csr {
    Csr::new(vec![1]).expect("a short one")
}

fn enrolled(value: &[u8]) -> bool {
    let aggregator = Aggregator::new(false);
    let registry = Registry::new(aggregator.storage.coord.clone());
    if aggregator.put(&format!("device/{DEVICE}"), value).is_err() {
        return false;
    }
    let listed = registry.devices().expect("what is damaged is passed over");
    if let Err(error @ EnrollError::Damaged { .. }) = registry.admit(&DEVICE) {
        assert!(listed.is_empty());
        registry.revoke(&DEVICE, NOW_MS).expect("a record that is revoked takes its place");
        assert!(matches!(registry.admit(&DEVICE), Err(EnrollError::Revoked { .. })));
        return told(&error, &DEVICE.to_string());
    }
    assert_eq!(listed.len(), 1);
    let _ = (registry.admit(&DEVICE), registry.renew(&NoAuthority, &csr(), DEVICE, NOW_MS, u64::MAX));
    registry.revoke(&DEVICE, NOW_MS).expect("the record is read");
    assert!(registry.admit(&DEVICE).is_err(), "revoked");
    true
}

fn token(value: &[u8]) -> bool {
    let aggregator = Aggregator::new(false);
    let registry = Registry::new(aggregator.storage.coord.clone());
    let (token, log) = (Token([1; 32]), format!("token/{}", Token([1; 32]).digest()));
    if aggregator.put(&log, value).is_err() {
        return false;
    }
    let open = registry.tokens_open(NOW_MS).expect("what is damaged is passed over");
    let enrolled = registry.enroll(&NoAuthority, &token, &csr(), DEVICE, NOW_MS, u64::MAX);
    if let Err(error @ EnrollError::Damaged { .. }) = &enrolled {
        assert_eq!(open, 0);
        return told(error, &log);
    }
    assert_eq!(enrolled.is_ok(), open == 1, "a token opens once");
    assert!(registry.enroll(&NoAuthority, &token, &csr(), DeviceId([2; 16]), NOW_MS, u64::MAX).is_err());
    true
}

fn accepted(value: &[u8]) -> bool {
    match desk::decode_accepted(value) {
        Ok(accepted) => {
            let written = postcard::to_allocvec(&accepted).expect("it has a form");
            let again = desk::decode_accepted(&written).expect("it is read again");
            // What is no number is no equal to itself.
            assert_eq!(format!("{again:?}"), format!("{accepted:?}"));
            true
        }
        Err(error) => told(&error, "receipt"),
    }
}

/// A release as the log of releases has it, behind none.
fn release(value: &[u8]) -> bool {
    let aggregator = Aggregator::new(false);
    if aggregator.put("release", value).is_err() {
        return false;
    }
    let publisher = aggregator.publisher();
    let head = match publisher.head() {
        Ok(head) => head.expect("it was stored"),
        Err(error) => return told(&error, "release"),
    };
    assert!(publisher.signed_with(&head).is_some() && head.release.version == Version(0), "forged");
    assert_eq!(publisher.history(Version(0), 10).expect("it is read"), [head]);
    let _ = (publisher.kept(1), publisher.kept_states(1), publisher.state(Version(0)));
    let _ = publisher.roll_back(Version(0), NOW_MS);
    true
}

/// A device's word on a trial: what does not decode is passed over.
fn word(value: &[u8]) -> bool {
    let mut canary = canary::Canary::stable(Version(3));
    canary.see_head(Version(4), true, NOW_MS);
    let word: Option<canary::Word> = postcard::from_bytes(value).ok();
    canary.hear(1, word);
    let settings = config::Release::default();
    let _ = (canary.judge(&settings, NOW_MS), canary.judge(&settings, u64::MAX));
    word.is_some()
}

/// The door of several processes, for who has just taken the lead.
fn door(value: &[u8]) -> bool {
    let aggregator = Aggregator::over(&MemoryStorage::default().shared(), false);
    if aggregator.put("door", value).is_err() {
        return false;
    }
    let desk = aggregator.desk().expect("no state yet");
    desk.take_lead(NOW_MS).expect("nobody else has it");
    match desk.next(NOW_MS) {
        Ok(_) => true,
        Err(error) => told(&error, "door"),
    }
}

fn sample_accepted(round: RoundId, device: DeviceId) -> Accepted {
    let digest = Digest([2; 32]);
    let report = DeviceReport::default();
    let open = Open { round, base: BASE, digest, length: 5, samples: 7, report, trace: None };
    let receipt = Receipt { round, device, digest, length: 5, received_ms: 11 };
    let receipt = SignedReceipt::sign(&SigningKey::from_bytes(&[3; 32]), receipt).expect("a receipt");
    Accepted { open, receipt, norm: Some(1.5), start: Some(Version(4)), opened_ms: None }
}

/// The seeds that this crate can make anew, by file name below `fuzz/seeds/stored`.
#[cfg(test)]
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    use crate::canary::Canary;
    use crate::desk::Record;
    use crate::receive::enroll::{DeviceRecord, TokenRecord};
    use commonweal_protocol::ReportCard;

    let entry = |which: u8, value: Vec<u8>| [vec![which], value].concat();
    let state = |is_buffered: bool, polls: u8| {
        let aggregator = Aggregator::new(is_buffered);
        let desk = aggregator.desk().unwrap();
        for number in 0..polls {
            let device = DeviceId([number; 16]);
            if let Some((round, ..)) = desk.poll(NOW_MS, device, START).unwrap() {
                let _ = desk.take(NOW_MS, &sample_accepted(round, device), &desk.pass().unwrap()).unwrap();
            }
        }
        let head = aggregator.storage.coord.head("round").unwrap();
        head.unwrap().value
    };
    let mut canary = Canary::stable(Version(3));
    canary.count(1, [(Version(3), 1.5), (Version(3), 1.25)].into_iter());
    canary.see_head(Version(4), true, NOW_MS);
    canary.count(2, [(Version(4), 1.5)].into_iter());
    let device = DeviceRecord { enrolled_ms: NOW_MS, expires_ms: NOW_MS + 5, revoked_ms: None };
    let word = canary::Word { device: DEVICE, version: Version(4), said: canary::Said::Installed };
    let token = TokenRecord { created_ms: NOW_MS, expires_ms: NOW_MS + 5, device: None, withdrawn_ms: None };
    vec![
        ("round-collecting", entry(0, state(false, 2))),
        ("round-merging", entry(0, state(false, 3))),
        ("round-buffered", entry(1, state(true, 1))),
        ("trial", entry(2, postcard::to_allocvec(&canary).unwrap())),
        ("record", entry(3, serde_json::to_vec(&Record::of_base(&ReportCard::default(), NOW_MS)).unwrap())),
        ("device", entry(4, serde_json::to_vec(&device).unwrap())),
        ("token", entry(5, serde_json::to_vec(&token).unwrap())),
        ("release", entry(7, first_release())),
        ("word", entry(8, postcard::to_allocvec(&word).unwrap())),
        ("door-open", entry(9, vec![1, 1])),
        ("door-sweeping", entry(9, vec![2])),
        ("accepted", entry(6, postcard::to_allocvec(&sample_accepted(RoundId(1), DEVICE)).unwrap())),
    ]
}

/// What the log of releases begins with.
#[cfg(test)]
fn first_release() -> Vec<u8> {
    let aggregator = Aggregator::new(false);
    let digest = Digest::of(b"five!");
    aggregator.storage.blob.put_if_absent(&digest, 5, &mut b"five!".as_slice()).unwrap();
    let candidate = publish::Candidate {
        round: None,
        parent: None,
        digest,
        state: crate::optimize::OptimizerState::default(),
        card: commonweal_protocol::ReportCard::default(),
    };
    aggregator.publisher().publish(candidate, NOW_MS).unwrap();
    aggregator.storage.coord.head("release").unwrap().unwrap().value
}
