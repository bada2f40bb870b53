//! A device whose owner allows it little of the network, over real QUIC: a release and an update wait for another day and
//! then go on, and the account on disk is what a relay between both saw go by.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterFacts, AdapterKind, AdapterLayout, Bits, CompressOptions, Module, Residual,
    Target, Trainable, disk,
};
use commonweal_protocol::{
    Accepted, AggregatorKey, BaseHash, CertificateChain, Chunk, Csr, DeviceId, DeviceReport, Digest, Enroll,
    Enrolled, Fetch, KeyNumber, Lineage, Open, Poll, PollReply, Receipt, ReconnectWindow, Refusal, Refused,
    Release, ReportCard, RoundId, SignedReceipt, SignedRelease, SigningKey, UploadKey, Version,
};
use commonweal_transport::{
    Authority, Clock, ContentPart, Credentials, DeviceKey, Handler, Link, LinkLimits, Opened, Peer, PutOff,
    QuicLink, QuicServer, ServeLimits,
};
use edge_client::{
    budget::{BudgetPolicy, Used},
    compress::Packed,
    install::{self, Expected, InstallError},
    spend::{self, Spending},
    store::Store,
    trust::Trust,
    units::Limit,
    upload::{self, UploadError},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::net::UdpSocket;

const NOON_MS: u64 = 1_767_268_800_000; // 1 January 2026
const DAY_MS: u64 = 24 * 3_600_000;
const BASE: BaseHash = BaseHash([0xba; 32]);
const DEVICE: DeviceId = DeviceId([7; 16]);
const LIMIT: u64 = 16_000_000;
/// Of IPv4 and UDP.
const HEADER_BYTES: u64 = 28;
/// One in so many: what the sockets of a busy machine drop was sent and did not come, and one of the two sees it.
const DROPPED: u64 = 10;

fn key() -> SigningKey {
    SigningKey::from_bytes(&[5; 32])
}

/// Publishes one file and takes one update.
struct Desk {
    published: Vec<u8>,
    held: Mutex<Vec<u8>>,
}

impl Handler for Desk {
    async fn admit(&self, _: &Peer) -> Result<(), Refused> {
        Ok(())
    }

    async fn poll(&self, _: &Peer, _: Poll) -> Result<PollReply, Refused> {
        Ok(PollReply {
            task: None,
            release: None,
            successions: Vec::new(),
            reconnect: ReconnectWindow::default(),
        })
    }

    async fn open(&self, _: &Peer, _: Open) -> Result<Opened, Refused> {
        Ok(Opened::Resume(self.held.lock().unwrap().len() as u64))
    }

    async fn chunk(&self, _: &Peer, _: UploadKey, chunk: Chunk) -> Result<u64, Refused> {
        let mut held = self.held.lock().unwrap();
        held.extend_from_slice(&chunk.bytes);
        Ok(held.len() as u64)
    }

    async fn finish(&self, peer: &Peer, upload: UploadKey) -> Result<Accepted, Refused> {
        let UploadKey { round, digest } = upload;
        let length = self.held.lock().unwrap().len() as u64;
        let receipt = Receipt { round, device: peer.device, digest, length, received_ms: 0 };
        let receipt = SignedReceipt::sign(&key(), receipt).map_err(|_| Refusal::Internal)?;
        Ok(Accepted { receipt, reconnect: ReconnectWindow::default() })
    }

    async fn read(&self, _: &Peer, fetch: Fetch, length_max: usize) -> Result<ContentPart, Refused> {
        let rest = &self.published[fetch.offset as usize..];
        let bytes = rest[..rest.len().min(length_max)].to_vec();
        Ok(ContentPart { length: self.published.len() as u64, bytes })
    }

    async fn renew(&self, _: &Peer, _: Csr) -> Result<CertificateChain, Refused> {
        Err(Refusal::Internal.into())
    }

    async fn enroll(&self, _: Enroll) -> Result<Enrolled, Refused> {
        Err(Refusal::Internal.into())
    }
}

/// Carries datagrams between devices and a server, and counts them with their headers.
async fn relay(server: SocketAddr, counted: Arc<AtomicU64>) -> SocketAddr {
    let front = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
    let address = front.local_addr().unwrap();
    tokio::spawn(async move {
        let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
        let mut buffer = vec![0; 65_536];
        loop {
            let Ok((bytes, device)) = front.recv_from(&mut buffer).await else { continue };
            counted.fetch_add(bytes as u64 + HEADER_BYTES, Ordering::SeqCst);
            if let Some(back) = backs.get(&device) {
                let _ = back.send(&buffer[..bytes]).await;
                continue;
            }
            let back = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
            back.connect(server).await.unwrap();
            let _ = back.send(&buffer[..bytes]).await;
            backs.insert(device, Arc::clone(&back));
            let (front, counted) = (Arc::clone(&front), Arc::clone(&counted));
            tokio::spawn(async move {
                let mut buffer = vec![0; 65_536];
                loop {
                    let Ok(bytes) = back.recv(&mut buffer).await else { continue };
                    counted.fetch_add(bytes as u64 + HEADER_BYTES, Ordering::SeqCst);
                    let _ = front.send_to(&buffer[..bytes], device).await;
                }
            });
        }
    });
    address
}

/// Of an adapter of so many MB of 32-bit values.
fn layout(mb: usize) -> Arc<AdapterLayout> {
    let modules = [Target::Q, Target::O].map(|target| Module { target, inputs: 313 * mb, outputs: 312 * mb });
    Arc::new(AdapterLayout::new(25, 8, 16.0, modules.to_vec()).unwrap())
}

/// An update of about a quarter of that.
fn update(mb: usize) -> Packed {
    let (layout, mut random) = (layout(mb), ChaCha8Rng::seed_from_u64(1));
    let values = (0..layout.parameters()).map(|_| random.random_range(-1e-3..1e-3)).collect();
    let delta = AdapterDelta::from_values(Arc::clone(&layout), Trainable::Both, values).unwrap();
    let mut residual = Residual::zeros(Arc::clone(&layout), Trainable::Both);
    let options = CompressOptions { bits: Bits::Eight, ..CompressOptions::default() };
    let bytes = commonweal_adapter::compress(&delta, &mut residual, &options, &mut random).unwrap();
    Packed::from_disk(bytes.into_bytes(), &layout, Trainable::Both, false).unwrap()
}

struct World {
    clock: Clock,
    store: Store,
    expected: Expected,
    signed: SignedRelease,
    spending: Arc<Spending>,
    link: QuicLink,
    /// What the relay saw.
    counted: Arc<AtomicU64>,
    desk: Arc<Desk>,
    _server: QuicServer,
    _directory: tempfile::TempDir,
}

impl World {
    async fn start(release_mb: usize) -> Self {
        let clock = Clock::manual(NOON_MS);
        let authority = Authority::create(NOON_MS).unwrap();
        let device_key = DeviceKey::generate().unwrap();
        let chain = authority.issue_device(&device_key.csr().unwrap(), DEVICE, NOON_MS, 30 * DAY_MS).unwrap();
        let signing_key = AggregatorKey::of(&key());
        let enrolled = Enrolled { device: DEVICE, chain, signing_key, key_number: KeyNumber(0) };
        let credentials = Credentials::new(device_key, &enrolled, authority.digest()).unwrap();

        let layout = layout(release_mb);
        let facts = AdapterFacts { base: BASE.0, kind: AdapterKind::Assistant };
        let published = disk::write(&Adapter::init(Arc::clone(&layout), 1), &facts).unwrap();
        let release = Release {
            version: Version(1),
            parent: None,
            round: None,
            base: BASE,
            digest: Digest::of(&published),
            length: published.len() as u64,
            report_card: ReportCard::default(),
            created_ms: 0,
        };
        let signed = SignedRelease::sign(&key(), release).unwrap();
        let desk = Arc::new(Desk { published, held: Mutex::default() });
        let identity = authority.issue_server(NOON_MS, 60 * DAY_MS).unwrap();
        let (any, limits) = ((Ipv4Addr::LOCALHOST, 0).into(), ServeLimits::default());
        let server = QuicServer::bind(any, identity, Arc::clone(&desk), limits, clock.clone()).unwrap();

        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let budget = BudgetPolicy { bytes_per_day: Limit::of(LIMIT), ..BudgetPolicy::default() };
        let zone = jiff::tz::TimeZone::UTC;
        let spending = Arc::new(Spending::open(&store, budget, clock.clone(), zone).unwrap());
        let counted = Arc::new(AtomicU64::new(0));
        let port = relay(server.local_addr(), Arc::clone(&counted)).await.port();
        let (limits, meter) = (LinkLimits::default(), Arc::clone(&spending));
        let link = QuicLink::metered("127.0.0.1", port, credentials, limits, clock.clone(), meter).unwrap();
        let trust = Trust::new(DEVICE, Lineage::new(KeyNumber(0), signing_key));
        let expected = Expected { trust, base: BASE, layout };
        Self {
            clock,
            store,
            expected,
            signed,
            spending,
            link,
            counted,
            desk,
            _server: server,
            _directory: directory,
        }
    }

    fn counted(&self) -> u64 {
        self.counted.load(Ordering::SeqCst)
    }

    /// What was moved today and in this month, as the account has it.
    fn account(&self) -> Used {
        self.spending.rest();
        let day = (self.clock.unix_ms() - (NOON_MS - DAY_MS / 2)) / DAY_MS;
        let today = jiff::civil::date(2026, 1, 1 + i8::try_from(day).unwrap());
        Used::of(&spend::read(&self.store).unwrap().unwrap(), today)
    }

    async fn install(&self) -> Result<(), InstallError> {
        install::install(&self.link, &self.store, &self.expected, &self.signed).await.map(|_| ())
    }

    async fn upload(&self, packed: &Packed) -> Result<(), UploadError> {
        let open = upload::announce(RoundId(3), BASE, packed, DeviceReport::default(), 1);
        let trust = &self.expected.trust;
        upload::upload(&self.link, trust, DEVICE, &self.store, &open, packed).await.map(|_| ())
    }

    fn next_day(&self) {
        self.clock.set(self.clock.unix_ms() + DAY_MS);
    }
}

fn is_until_tomorrow(world: &World, put_off: &PutOff) {
    let midnight = (world.clock.unix_ms() / DAY_MS + 1) * DAY_MS;
    assert_eq!(put_off.until_ms, midnight, "{put_off:?}");
    let text = &put_off.reason;
    assert!(text.starts_with("until tomorrow: ") && text.contains("of today's 16MB are used"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_and_an_update_wait_for_another_day_and_then_go_on() {
    // A release of more than a day's bytes, an update that fits into a day and not into what the release leaves of one.
    let (world, packed) = (World::start(20).await, update(40));
    assert!(packed.bytes().len() > 9_000_000, "{}", packed.bytes().len());
    world.link.poll(Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None }).await.unwrap();

    let Err(InstallError::Fetch { source, .. }) = world.install().await else { panic!("it does not fit") };
    is_until_tomorrow(&world, source.put_off().unwrap());
    assert!(world.counted() >= LIMIT / 2, "{}", world.counted());
    let partial = world.store.list("releases").unwrap();
    assert!(partial.len() == 1 && partial[0].ends_with(".fetching"), "{partial:?}");
    // For as long as the day lasts there is an answer from the device's own account.
    assert!(world.install().await.is_err() && world.upload(&packed).await.is_err());
    assert!(world.counted() <= LIMIT, "{}", world.counted());

    world.next_day();
    let before = world.counted();
    world.install().await.unwrap();
    let Err(error) = world.upload(&packed).await else { panic!("it does not fit") };
    is_until_tomorrow(&world, error.link().unwrap().put_off().unwrap());
    assert!(world.desk.held.lock().unwrap().is_empty(), "it waits as a whole");
    let second_day = world.counted() - before;
    assert!(second_day <= LIMIT, "{second_day}");
    // What came on the first day did not come again.
    let content = world.signed.release.length;
    assert!(world.counted() < content + content / 4, "{} of {content}", world.counted());

    world.next_day();
    world.upload(&packed).await.unwrap();
    assert!(upload::is_delivered(&world.store, &world.expected.trust, RoundId(3)).unwrap());
    assert!(*world.desk.held.lock().unwrap() == packed.bytes());

    world.spending.end();
    let (told, counted) = (world.account().bytes_month, world.counted());
    eprintln!(
        "the account says {told} bytes, the relay saw {counted}, content was {} and {}",
        content,
        packed.bytes().len()
    );
    assert!(told.abs_diff(counted) <= counted / DROPPED, "{told}, {counted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_where_its_day_ended() {
    // Of more than a day's bytes.
    let (world, packed) = (World::start(1).await, update(80));
    let length = packed.bytes().len();
    assert!(length as u64 > LIMIT + 2_000_000, "{length}");
    let Err(error) = world.upload(&packed).await else { panic!("it does not fit") };
    is_until_tomorrow(&world, error.link().unwrap().put_off().unwrap());
    let held = world.desk.held.lock().unwrap().len();
    assert!(held > length / 3 && world.counted() <= LIMIT, "{held} of {length}, {}", world.counted());
    world.next_day();
    world.upload(&packed).await.unwrap();
    assert!(*world.desk.held.lock().unwrap() == packed.bytes());
    assert!(world.counted() < (length + length / 4) as u64, "{}", world.counted());
    assert!(world.account().bytes_today <= LIMIT);
}
