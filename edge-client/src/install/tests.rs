//! Tests of `install.rs`.

use super::*;
use std::time::{Duration, SystemTime};

use commonweal_adapter::{
    AdapterFacts, AdapterKind,
    layout::{Module, Target},
};
use commonweal_protocol::{
    AggregatorKey, CertificateChain, Csr, DeviceId, KeyNumber, Lineage, Open, Poll, PollReply, Release,
    ReportCard, SigningKey,
};
use commonweal_transport::Uploaded;

use crate::units::Limit;

const BASE: BaseHash = BaseHash([0xba; 32]);

/// Delivers these bytes, whatever is asked for.
struct Publisher(Vec<u8>);

impl Link for Publisher {
    async fn fetch(&self, _: Content, partial: &mut Vec<u8>) -> Result<(), LinkError> {
        partial.clone_from(&self.0);
        Ok(())
    }

    async fn poll(&self, _: Poll) -> Result<PollReply, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }

    async fn upload(&self, _: &Open, _: &[u8]) -> Result<Uploaded, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }

    async fn renew(&self, _: Csr) -> Result<CertificateChain, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }
}

/// Sends these bytes and then nothing more.
struct Silent(Vec<u8>);

impl Link for Silent {
    async fn fetch(&self, _: Content, partial: &mut Vec<u8>) -> Result<(), LinkError> {
        partial.clone_from(&self.0);
        std::future::pending().await
    }

    async fn poll(&self, _: Poll) -> Result<PollReply, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }

    async fn upload(&self, _: &Open, _: &[u8]) -> Result<Uploaded, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }

    async fn renew(&self, _: Csr) -> Result<CertificateChain, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }
}

#[tokio::test]
async fn what_came_is_kept_when_nobody_waits_for_the_rest() {
    let World { store, expected, _directory } = World::new();
    let content = Content { digest: Digest([1; 32]), length: 100 };
    let link = Silent(b"half".to_vec());
    tokio::select! {
        biased;
        _ = obtain(&link, &store, &expected, content) => panic!("there was more to come"),
        () = tokio::task::yield_now() => {}
    }
    let partial = format!("releases/{}.fetching", content.digest);
    assert_eq!(store.read(&partial).unwrap().unwrap(), b"half");
}

struct World {
    _directory: tempfile::TempDir,
    store: Store,
    expected: Expected,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let module = Module { target: Target::Q, inputs: 3, outputs: 4 };
        let layout = Arc::new(AdapterLayout::new(1, 2, 4.0, vec![module]).unwrap());
        let store = Store::open(directory.path()).unwrap();
        Self {
            _directory: directory,
            store,
            expected: Expected {
                trust: Trust::new(DeviceId([1; 16]), Lineage::new(KeyNumber(0), key(7))),
                base: BASE,
                layout,
            },
        }
    }

    /// An adapter's file, another one for another seed.
    fn adapter(&self, seed: u64) -> Vec<u8> {
        let adapter = Adapter::init(Arc::clone(&self.expected.layout), seed);
        disk::write(&adapter, &AdapterFacts { base: BASE.0, kind: AdapterKind::Assistant }).unwrap()
    }

    fn offer(&self, version: u64, bytes: &[u8]) -> Result<Installed, InstallError> {
        let link = Publisher(bytes.to_vec());
        let signed = SignedRelease::sign(&secret(7), release(version, bytes)).unwrap();
        block_on(install(&link, &self.store, &self.expected, &signed))
    }

    fn in_use(&self) -> Option<u64> {
        installed(&self.store, &self.expected).unwrap().map(|installed| installed.version.0)
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn secret(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

fn key(seed: u8) -> AggregatorKey {
    AggregatorKey::of(&secret(seed))
}

fn release(version: u64, bytes: &[u8]) -> Release {
    Release {
        version: Version(version),
        parent: None,
        round: None,
        base: BASE,
        digest: Digest::of(bytes),
        length: bytes.len() as u64,
        report_card: ReportCard::default(),
        created_ms: 0,
    }
}

#[test]
fn only_a_newer_release_takes_the_place_of_the_one_in_use() {
    let world = World::new();
    let (old, new) = (world.adapter(1), world.adapter(2));
    world.offer(5, &old).unwrap();
    world.offer(6, &new).unwrap();
    let error = world.offer(5, &old).unwrap_err();
    assert_eq!(error.to_string(), "release 5 is not newer than release 6, which is in use");
    assert!(matches!(world.offer(6, &old), Err(InstallError::NotNewer { .. })));
    assert_eq!(world.in_use(), Some(6));
    // A roll-back has the old bytes under a new version.
    world.offer(7, &old).unwrap();
    assert_eq!(world.in_use(), Some(7));
}

#[test]
fn where_the_disks_budget_is_short_older_releases_make_room_and_the_one_in_use_does_not() {
    let world = World::new();
    for version in 1..=3 {
        world.offer(version, &world.adapter(version)).unwrap();
    }
    let (used, one) = (world.store.disk_bytes().unwrap(), world.adapter(4).len() as u64);
    let world = World { store: world.store.within(Limit::of(used + one / 2)), ..world };
    world.offer(4, &world.adapter(4)).unwrap();
    assert_eq!(world.in_use(), Some(4));
    let adapters = || {
        let names = world.store.list("releases").unwrap();
        names.into_iter().filter(|name| name.ends_with(".adapter")).count()
    };
    assert_eq!(adapters(), 2, "the one before stays until there is no room for it");
    let world = World { store: world.store.within(Limit::of(one)), ..world };
    let error = world.offer(5, &world.adapter(5)).unwrap_err();
    assert!(matches!(error, InstallError::Store(StoreError::OverBudget { .. })), "{error}");
    assert_eq!(world.in_use(), Some(4));
}

/// Goes on from what there is of these bytes.
struct Rest(Vec<u8>);

impl Link for Rest {
    async fn fetch(&self, _: Content, partial: &mut Vec<u8>) -> Result<(), LinkError> {
        assert!(self.0.starts_with(partial) && !partial.is_empty());
        partial.clone_from(&self.0);
        Ok(())
    }

    async fn poll(&self, _: Poll) -> Result<PollReply, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }

    async fn upload(&self, _: &Open, _: &[u8]) -> Result<Uploaded, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }

    async fn renew(&self, _: Csr) -> Result<CertificateChain, LinkError> {
        Err(LinkError::OutOfPlace { expected: "nothing" })
    }
}

#[test]
fn what_came_of_an_adapter_counts_once_under_the_disks_budget() {
    let world = World::new();
    let whole = world.adapter(1);
    let content = Content { digest: Digest::of(&whole), length: whole.len() as u64 };
    let part = whole.len() * 3 / 4;
    world.store.write(&partial_file(content.digest), &whole[..part]).unwrap();
    let used = world.store.disk_bytes().unwrap();
    let room = (whole.len() - part) as u64;
    let obtained = |world: &World| {
        block_on(obtain(&Rest(whole.clone()), &world.store, &world.expected, content)).map(|_| ())
    };
    let world = World { store: world.store.within(Limit::of(used + room - 1)), ..world };
    let error = obtained(&world).unwrap_err();
    assert!(matches!(error, InstallError::Store(StoreError::OverBudget { .. })), "{error}");
    let world = World { store: world.store.within(Limit::of(used + room)), ..world };
    obtained(&world).unwrap();
    assert_eq!(world.store.disk_bytes().unwrap(), used + room);
    assert_eq!(world.store.read(&adapter_file(content.digest)).unwrap().unwrap(), whole);
    assert_eq!(world.store.list("releases").unwrap().len(), 1);
}

#[test]
fn a_disk_without_room_is_asked_before_any_byte_is_moved() {
    let world = World::new();
    let content = Content { digest: Digest([1; 32]), length: 1 << 60 };
    let link = Publisher(b"something".to_vec());
    let error = block_on(obtain(&link, &world.store, &world.expected, content)).unwrap_err();
    assert!(matches!(&error, InstallError::Store(error) if error.is_want_of_room()), "{error}");
    assert!(world.store.list("releases").unwrap().is_empty());
}

#[test]
fn what_is_whole_and_of_no_use_leaves_nothing_behind() {
    let world = World::new();
    let bytes = b"no adapter, but all of it".to_vec();
    let content = Content { digest: Digest::of(&bytes), length: bytes.len() as u64 };
    // An earlier try was broken off.
    world.store.write(&partial_file(content.digest), &bytes[..5]).unwrap();
    let error = block_on(obtain(&Publisher(bytes), &world.store, &world.expected, content)).unwrap_err();
    assert!(matches!(error, InstallError::Adapter { .. }), "{error}");
    assert!(world.store.list("releases").unwrap().is_empty());
}

#[test]
fn what_lies_there_damaged_is_not_gone_on_with() {
    let world = World::new();
    let whole = world.adapter(1);
    let (digest, length) = (Digest::of(&whole), whole.len() as u64);
    for damaged in [&b"damaged"[..], &[7; 5_000]] {
        world.store.write(&partial_file(digest), damaged).unwrap();
        let link = Publisher(whole.clone());
        block_on(obtain(&link, &world.store, &world.expected, Content { digest, length })).unwrap();
        assert_eq!(world.store.read(&adapter_file(digest)).unwrap().unwrap(), whole);
        world.store.remove(&adapter_file(digest)).unwrap();
    }
}

#[test]
fn a_damaged_adapter_does_not_let_an_older_one_in_and_is_had_again() {
    let world = World::new();
    let (old, new) = (world.adapter(1), world.adapter(2));
    world.offer(6, &new).unwrap();
    world.store.write(&format!("releases/{}.adapter", Digest::of(&new)), b"damaged").unwrap();
    assert_eq!(world.in_use(), None);
    assert!(matches!(world.offer(5, &old), Err(InstallError::NotNewer { .. })));
    world.offer(6, &new).unwrap();
    assert_eq!(world.in_use(), Some(6));
    // Whoever enrols elsewhere begins with that federation's numbers.
    forget(&world.store).unwrap();
    world.offer(1, &old).unwrap();
    assert_eq!(world.in_use(), Some(1));
}

#[test]
fn the_version_is_told_without_reading_but_never_of_another_file() {
    let world = World::new();
    let version = |expected: &Expected| installed_version(&world.store, expected).unwrap();
    assert_eq!(version(&world.expected), None);
    let bytes = world.adapter(1);
    world.offer(6, &bytes).unwrap();
    assert_eq!(version(&world.expected), Some(Version(6)));
    // It does not fit another package.
    let module = Module { target: Target::Q, inputs: 4, outputs: 3 };
    let layout = Arc::new(AdapterLayout::new(1, 2, 4.0, vec![module]).unwrap());
    assert_eq!(version(&Expected { layout, ..world.expected.clone() }), None);
    assert_eq!(version(&world.expected), Some(Version(6)));
    // As long as before, and as old.
    let path = world.store.path(&adapter_file(Digest::of(&bytes)));
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
    let mut damaged = bytes.clone();
    *damaged.last_mut().unwrap() ^= 1;
    world.store.write(&adapter_file(Digest::of(&bytes)), &damaged).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    assert_eq!(version(&world.expected), None);
    world.offer(6, &bytes).unwrap();
    assert_eq!(version(&world.expected), Some(Version(6)));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(version(&world.expected), None);
}

#[test]
fn what_is_not_the_aggregators_own_changes_nothing() {
    let world = World::new();
    let (bytes, other) = (world.adapter(1), world.adapter(2));
    world.offer(1, &bytes).unwrap();
    let link = Publisher(other.clone());
    let offer = |signed| block_on(install(&link, &world.store, &world.expected, &signed));

    let forged = SignedRelease::sign(&secret(8), release(2, &other)).unwrap();
    assert!(matches!(offer(forged), Err(InstallError::Signature { version: Version(2), .. })));
    let mut altered = SignedRelease::sign(&secret(7), release(2, &bytes)).unwrap();
    altered.release.digest = Digest::of(&other);
    assert!(matches!(offer(altered), Err(InstallError::Signature { .. })));
    let elsewhere = Release { base: BaseHash([1; 32]), ..release(2, &other) };
    let elsewhere = SignedRelease::sign(&secret(7), elsewhere).unwrap();
    assert!(matches!(offer(elsewhere), Err(InstallError::Base { got: BaseHash([1, ..]), .. })));
    // Signed for, but other bytes come.
    let announced = SignedRelease::sign(&secret(7), release(2, b"what was signed")).unwrap();
    let error = offer(announced).unwrap_err();
    assert!(matches!(error, InstallError::Fetch { source: LinkError::Corrupt { .. }, .. }), "{error:?}");
    // Signed for and whole, but no adapter.
    let error = world.offer(2, b"no adapter").unwrap_err();
    assert!(matches!(error, InstallError::Adapter { .. }), "{error:?}");
    assert_eq!(world.in_use(), Some(1));
}

#[test]
fn the_newest_are_kept_and_above_all_the_one_in_use() {
    let world = World::new();
    let adapters: Vec<Vec<u8>> = (1..=6).map(|seed| world.adapter(seed)).collect();
    let name = |bytes: &[u8], suffix| format!("releases/{}.{suffix}", Digest::of(bytes));
    for (version, bytes) in (1..).zip(&adapters[..5]) {
        world.offer(version, bytes).unwrap();
        // Files of one test can have one time: they are set apart by hand, the last the newest.
        let file = std::fs::File::options().write(true).open(world.store.path(&name(bytes, "adapter")));
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000 * version);
        file.unwrap().set_modified(time).unwrap();
    }
    let has = |suffix| {
        let there = |bytes: &&Vec<u8>| world.store.path(&name(bytes, suffix)).exists();
        adapters.iter().map(|bytes| there(&bytes)).collect::<Vec<bool>>()
    };
    assert_eq!(has("adapter"), [false, false, true, true, true, false]);
    // A roll-back to the oldest that is left: its file is the oldest, and in use.
    world.store.write(&name(&adapters[5], "fetching"), b"a part").unwrap();
    world.offer(6, &adapters[2]).unwrap();
    world.offer(7, &adapters[2]).unwrap();
    assert_eq!(has("adapter"), [false, false, true, true, true, false]);
    assert_eq!(has("release"), [false, false, true, true, true, false]);
    assert_eq!((has("fetching")[5], world.in_use()), (false, Some(7)));
    world.offer(8, &adapters[5]).unwrap();
    assert_eq!(has("adapter"), [false, false, false, true, true, true]);
}
