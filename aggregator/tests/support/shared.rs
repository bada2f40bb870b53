//! Several processes over one store in memory: what each has for itself, and what they begin from.

use std::sync::{Arc, Mutex};

use aggregator::config::{Config, Gates};
use aggregator::desk::{Desk, Record};
use aggregator::events::{Event, Events};
use aggregator::laboratory::Base;
use aggregator::optimize::OptimizerState;
use aggregator::pause::PausePoint;
use aggregator::publish::{Candidate, Publisher};
use aggregator::receive::Parts;
use aggregator::receive::partial::PartialMemory;
use aggregator::round::{Policy, RoundMode};
use aggregator::store::MemoryStorage;
use commonweal_adapter::Adapter;
use commonweal_protocol::{Digest, ReportCard, SigningKey};
use commonweal_transport::Clock;

use super::{BASE, layout};

/// Rounds of a few devices, without gates.
pub fn config(mode: RoundMode) -> Config {
    let round = Policy {
        mode,
        goal: 5,
        over_selection: 1.6,
        quorum: 2,
        wait_ms: 20,
        deadline_ms: 150,
        ..Policy::default()
    };
    let mut config = Config { round, ..Config::default() };
    config.evaluate.gates = Gates::off();
    (config.receive.reserve_bytes, config.receive.releases_kept) = (0, 40);
    (config.receive.requests_burst, config.receive.requests_per_second) = (1_000_000, 1e6);
    config.storage.lead_seconds = 3;
    config
}

/// What went wrong, as operators were told.
pub type Problems = Arc<Mutex<Vec<String>>>;

/// One process's parts, over the shared contents.
pub fn process(memory: &MemoryStorage, config: &Config, clock: &Clock, told: &Problems) -> Parts {
    let storage = memory.shared().storage();
    let key = SigningKey::from_bytes(&[3; 32]);
    let publisher = Publisher::new(storage.coord.clone(), storage.blob.clone(), key.clone(), BASE);
    let told = told.clone();
    let events = Events::to(move |event| {
        if matches!(event, Event::Rejected { .. } | Event::Retrying { .. }) {
            told.lock().unwrap().push(event.sentence());
        }
    });
    let policy = config.round.clone();
    let desk =
        Desk::open(storage.clone(), publisher.clone(), policy, events.clone(), clock.unix_ms()).unwrap();
    Parts {
        config: Arc::new(config.clone()),
        storage,
        partials: Arc::new(PartialMemory::default()),
        publisher,
        desk,
        base: BASE,
        layout: layout(),
        signer: key.into(),
        clock: clock.clone(),
        events,
        pause: PausePoint::default(),
    }
}

/// What `init` leaves.
pub fn first_release(memory: &MemoryStorage, base: &Base) {
    let storage = memory.storage();
    let bytes = base.write(&Adapter::init(layout(), 0)).unwrap();
    let digest = Digest::of(&bytes);
    storage.blob.put_if_absent(&digest, bytes.len() as u64, &mut bytes.as_slice()).unwrap();
    let card = ReportCard::default();
    Record::of_base(&card, 0).append(storage.coord.as_ref()).unwrap();
    let publisher = Publisher::new(storage.coord, storage.blob, SigningKey::from_bytes(&[3; 32]), BASE);
    let state = OptimizerState::default();
    publisher.publish(Candidate { round: None, parent: None, digest, state, card }, 0).unwrap();
}
