//! A device and an aggregator on a network where everything goes wrong, from seeds. Time is simulated: it jumps when
//! everybody waits. A seed that fails prints what was done to it, which [`Faults::scripted`] repeats.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reference;

use commonweal_protocol::{
    Content, Digest, Header, KeyNumber, Poll, Refusal, Reply, Request, decode, encode,
};
use commonweal_transport::{
    Authority, Clock, Credentials, DeviceKey, Fault, FaultRates, Faults, Link, LinkError, LinkLimits,
    Purpose, ServeLimits, Session, SimLink, SimNetwork, Wire as _,
};
use reference::{BASE, Reference, announce, bytes};
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const NOW_MS: u64 = 1_767_225_600_000;
const POLL: Poll = Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None };

struct World {
    handler: Arc<Reference>,
    network: Arc<SimNetwork<Arc<Reference>>>,
    credentials: Credentials,
    link: SimLink<Arc<Reference>>,
    faults: Faults,
}

async fn world(faults: Faults, seed: u64) -> World {
    let clock = Clock::manual(NOW_MS);
    let authority = Arc::new(Authority::create(NOW_MS).unwrap());
    let handler = Arc::new(Reference::new(Arc::clone(&authority), clock.clone()));
    let identity = || authority.issue_server(NOW_MS, 24 * 3600 * 1000).unwrap();
    let limits = ServeLimits::default();
    let quiet =
        SimNetwork::new(Arc::clone(&handler), identity(), clock.clone(), &limits, Faults::none()).unwrap();
    let key = DeviceKey::generate().unwrap();
    let stranger = Session::over(quiet.enrolment(authority.digest()), LinkLimits::default());
    let enrolled = stranger.enroll(handler.invite(), key.csr().unwrap()).await.unwrap();
    let credentials = Credentials::new(key, &enrolled, authority.digest()).unwrap();
    let network = SimNetwork::new(Arc::clone(&handler), identity(), clock, &limits, faults.clone()).unwrap();
    let limits = LinkLimits { seed, retries_max: 60, ..LinkLimits::default() };
    let link = Session::over(network.device(credentials.clone()).unwrap(), limits);
    World { handler, network, credentials, link, faults }
}

impl World {
    fn assert_accepted_once(&self, payload: &[u8], context: &str) {
        let state = self.handler.state();
        assert_eq!(state.accepted.len(), 1, "{context}");
        let (held, _) = state.accepted.values().next().unwrap();
        assert!(held == payload, "{context}");
    }
}

/// Whatever is cut, late or doubled: the update is accepted once and whole, and the release comes down as it is.
#[tokio::test(start_paused = true)]
async fn cuts_delays_and_duplicates_lose_nothing() {
    let rates = FaultRates {
        cut_before: 0.1,
        cut_inside: 0.1,
        cut_after: 0.1,
        duplicate: 0.1,
        delay: 0.1,
        delay_ms_max: 60_000,
        ..FaultRates::default()
    };
    let payload = bytes(2_500_000, 1);
    let mut happened = 0;
    for seed in 0..40 {
        let world = world(Faults::seeded(seed, rates, 30), seed).await;
        let context = || format!("seed {seed}: {:?}", world.faults.injected());
        let outcome = async {
            world.link.poll(POLL).await?;
            let uploaded = world.link.upload(&announce(&payload), &payload).await?;
            let mut fetched = Vec::new();
            let published = world.handler.published();
            let content = Content { digest: Digest::of(published), length: published.len() as u64 };
            world.link.fetch(content, &mut fetched).await?;
            assert!(fetched == published, "{}", context());
            Ok::<_, LinkError>(uploaded)
        };
        let uploaded = outcome.await.unwrap_or_else(|error| panic!("{error:?}, {}", context()));
        uploaded.receipt.verify(world.credentials.signing_key()).unwrap();
        world.network.settle().await;
        world.assert_accepted_once(&payload, &context());
        let again = world.link.upload(&announce(&payload), &payload).await;
        assert_eq!(
            again.unwrap_or_else(|error| panic!("{error:?}, {}", context())).receipt,
            uploaded.receipt
        );
        happened += world.faults.injected().len();
    }
    assert!(happened > 200, "{happened} faults in 40 runs test nothing");
}

/// Damaged bytes (which TLS would stop) end in an error or in the right thing, never in the wrong thing.
#[tokio::test(start_paused = true)]
async fn damage_is_never_accepted() {
    let rates = FaultRates { corrupt: 0.15, corrupt_answer: 0.15, cut_inside: 0.1, ..FaultRates::default() };
    let payload = bytes(2_500_000, 1);
    let (mut delivered, mut happened) = (0, 0);
    for seed in 0..40 {
        let world = world(Faults::seeded(seed, rates, 10), seed).await;
        let _ = world.link.poll(POLL).await;
        let uploaded = world.link.upload(&announce(&payload), &payload).await;
        let published = world.handler.published();
        let content = Content { digest: Digest::of(published), length: published.len() as u64 };
        let mut fetched = Vec::new();
        if world.link.fetch(content, &mut fetched).await.is_ok() {
            assert!(fetched == published, "seed {seed}: {:?}", world.faults.injected());
        }
        delivered += u32::from(uploaded.is_ok());
        happened += world.faults.injected().len();
        for (held, accepted) in world.handler.state().accepted.values() {
            assert!(*held == payload, "seed {seed}: {:?}", world.faults.injected());
            assert_eq!(accepted.receipt.receipt.digest, Digest::of(held));
        }
    }
    assert!(delivered > 0 && happened > 100, "{delivered} delivered, {happened} faults");
}

/// The receipt was lost on its way: the device asks again and gets the same, and sends nothing twice.
#[tokio::test(start_paused = true)]
async fn a_receipt_lost_on_its_way_is_given_again() {
    // Frames of the upload: open, three chunks, finish.
    let world = world(Faults::scripted([(4, Fault::CutAfter)]), 0).await;
    let payload = bytes(2_500_000, 1);
    let uploaded = world.link.upload(&announce(&payload), &payload).await.unwrap();
    assert_eq!(uploaded.sent_bytes, payload.len() as u64);
    assert_eq!(world.faults.injected().len(), 1);
    world.assert_accepted_once(&payload, "");
}

/// The third chunk was cut in half: what came before is not sent again.
#[tokio::test(start_paused = true)]
async fn an_upload_cut_inside_a_chunk_loses_that_chunk_only() {
    let world = world(Faults::scripted([(3, Fault::CutInside)]), 0).await;
    let payload = bytes(2_500_000, 1);
    let uploaded = world.link.upload(&announce(&payload), &payload).await.unwrap();
    // Counted as sent: all, and the third chunk at most once more.
    assert!(uploaded.sent_bytes <= (payload.len() + payload.len() - (2 << 20)) as u64);
    world.assert_accepted_once(&payload, "");
}

/// A poll that arrives twice is served twice, which harms nothing; a whole upload that arrives twice is one upload.
#[tokio::test(start_paused = true)]
async fn what_arrives_twice_counts_once() {
    let world = world(Faults::scripted([(0, Fault::Duplicate), (1, Fault::Duplicate)]), 0).await;
    world.link.poll(POLL).await.unwrap();
    world.network.settle().await;
    assert_eq!(world.handler.state().polls, 2);
    let payload = bytes(2_500_000, 1);
    world.link.upload(&announce(&payload), &payload).await.unwrap();
    world.network.settle().await;
    world.assert_accepted_once(&payload, "");
}

/// A network that is away for a while is waited for; one that stays away is reported as such.
#[tokio::test(start_paused = true)]
async fn an_absent_network_is_waited_for() {
    let world = world(Faults::none(), 0).await;
    world.network.set_down(true);
    let (polled, ()) = tokio::join!(world.link.poll(POLL), async {
        tokio::time::sleep(std::time::Duration::from_secs(20)).await;
        world.network.set_down(false);
    });
    polled.unwrap();
    world.network.set_down(true);
    let error = world.link.poll(POLL).await.unwrap_err();
    assert!(matches!(error, LinkError::Unreachable { .. }) && error.is_unavailable(), "{error:?}");
}

/// With no slot left a request is refused as busy at once, with a window to come back in.
#[tokio::test(start_paused = true)]
async fn a_full_aggregator_says_when_to_come_back() {
    let world = world(Faults::none(), 0).await;
    let clock = Clock::manual(NOW_MS);
    let authority = Authority::create(NOW_MS).unwrap();
    let limits = ServeLimits { requests_max: 0, ..ServeLimits::default() };
    let identity = authority.issue_server(NOW_MS, 3_600_000).unwrap();
    let full = SimNetwork::new(Arc::clone(&world.handler), identity, clock, &limits, Faults::none()).unwrap();
    let key = DeviceKey::generate().unwrap();
    let stranger = Session::over(full.enrolment(authority.digest()), LinkLimits::default());
    let error = stranger.enroll(world.handler.invite(), key.csr().unwrap()).await.unwrap_err();
    let LinkError::Refused { reason: Refusal::Busy, reconnect } = error else { panic!("{error:?}") };
    assert!(reconnect.after_ms > 0);
}

/// A device that opens transfers and leaves them open has its share of the slots and no more.
#[tokio::test(start_paused = true)]
async fn one_device_does_not_take_every_transfer() {
    let world = world(Faults::none(), 0).await;
    let open = encode(&Request::Open(announce(&bytes(1_000, 1)))).unwrap();
    let mut held = Vec::new();
    let answer = loop {
        let mut stream = world.link.wire().open(Purpose::Transfer).await.unwrap();
        stream.sending.write_all(&open).await.unwrap();
        let mut header = [0; Header::BYTES];
        stream.receiving.read_exact(&mut header).await.unwrap();
        let mut body = vec![0; u32::from_le_bytes(header) as usize];
        stream.receiving.read_exact(&mut body).await.unwrap();
        match decode::<Reply>(&body).unwrap() {
            Reply::Offset(0) => held.push(stream),
            other => break other,
        }
        assert!(held.len() < ServeLimits::default().transfers_max / 4, "one device holds {}", held.len());
    };
    assert!(matches!(answer, Reply::Refused(refused) if refused.reason == Refusal::Busy), "{answer:?}");
    // A question is no transfer; and when the streams are gone, so are their seats.
    world.link.poll(POLL).await.unwrap();
    drop(held);
    world.network.settle().await;
    let payload = bytes(1_000, 1);
    world.link.upload(&announce(&payload), &payload).await.unwrap();
}
