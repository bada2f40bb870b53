//! Stage 7, **install**: verifies a signed release, keeps it, and makes it the adapter in use, in one rename.
//!
//! The start of a round comes the same way. The device trusts the aggregator's key in force (`trust.rs`) and nothing else:
//! signature, base, age, digest and layout are checked before a release is installed. An older release never comes
//! back: a roll-back is published under a new version.

use std::sync::{Arc, MutexGuard, PoisonError};

use commonweal_adapter::{Adapter, AdapterLayout, ReadError, disk};
use commonweal_protocol::{BaseHash, Content, Digest, SignatureError, SignedRelease, Version};
use commonweal_transport::{Link, LinkError};

use crate::{
    store::{Stamp, Store, StoreError},
    trust::Trust,
};

const INSTALLED: &str = "installed";
/// Releases kept besides the one in use, to go back to by hand.
const KEPT: usize = 2;

/// Why a release was not installed; the one before stays in use.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Not from the aggregator that enrolled this device, or by a key that it has retired.
    #[error("release {version} is not signed by the aggregator's key in force")]
    Signature {
        /// The release.
        version: Version,
        /// Why.
        #[source]
        source: SignatureError,
    },
    /// Made on another base.
    #[error("release {version} is for base {got}, this device has {expected}")]
    Base {
        /// The release.
        version: Version,
        /// This device's.
        expected: BaseHash,
        /// The release's.
        got: BaseHash,
    },
    /// Older than the one in use, or another of its version: whoever sends it does not know what was published since.
    #[error("release {version} is not newer than release {installed}, which is in use")]
    NotNewer {
        /// The release.
        version: Version,
        /// The one in use.
        installed: Version,
    },
    /// Its bytes could not be fetched.
    #[error("adapter {digest} could not be fetched")]
    Fetch {
        /// Which.
        digest: Digest,
        /// Why.
        #[source]
        source: LinkError,
    },
    /// Its bytes are no adapter.
    #[error("adapter {digest} cannot be read")]
    Adapter {
        /// Which.
        digest: Digest,
        /// Why.
        #[source]
        source: ReadError,
    },
    /// Its shape is not this package's.
    #[error("adapter {digest}: expected {expected}, got {got}")]
    Layout {
        /// Which.
        digest: Digest,
        /// The package's layout.
        expected: String,
        /// The adapter's.
        got: String,
    },
    /// The disk refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a device checks an adapter against.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Whose word it is to be.
    pub trust: Trust,
    /// The frozen base.
    pub base: BaseHash,
    /// The package's adapter layout; rank and alpha may differ, the linears may not.
    pub layout: Arc<AdapterLayout>,
}

/// The adapter in use.
#[derive(Clone, Debug)]
pub struct Installed {
    /// Its release.
    pub version: Version,
    /// BLAKE3 of its file.
    pub digest: Digest,
    /// Its values.
    pub adapter: Adapter,
}

/// A file that was read, hashed and found to be an adapter of this shape.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Seen {
    digest: Digest,
    stamp: Stamp,
    base: BaseHash,
    layout: Arc<AdapterLayout>,
}

/// Checks a release, fetches what it needs and installs it.
pub async fn install(
    link: &impl Link,
    store: &Store,
    expected: &Expected,
    signed: &SignedRelease,
) -> Result<Installed, InstallError> {
    let version = signed.release.version;
    let release =
        signed.verify(&expected.trust.key()).map_err(|source| InstallError::Signature { version, source })?;
    if release.base != expected.base {
        return Err(InstallError::Base { version, expected: expected.base, got: release.base });
    }
    // The one in use may come again: its file may have been damaged.
    match in_use(store)? {
        Some((installed, digest))
            if version < installed || version == installed && release.digest != digest =>
        {
            return Err(InstallError::NotNewer { version, installed });
        }
        _ => {}
    }
    let adapter = obtain(link, store, expected, release.content()).await?;
    let encoded = serde_json::to_vec(signed).map_err(|error| StoreError::Damaged {
        path: store.path("releases"),
        reason: format!("release does not encode: {error}"),
    })?;
    store.write(&format!("releases/{}.release", release.digest), &encoded)?;
    store.write(INSTALLED, format!("{} {}\n", version.0, release.digest).as_bytes())?;
    forget_old(store, [release.digest; 2], KEPT)?;
    Ok(Installed { version, digest: release.digest, adapter })
}

/// The adapter of this content: from disk when it is there and whole, else over the link.
pub async fn obtain(
    link: &impl Link,
    store: &Store,
    expected: &Expected,
    content: Content,
) -> Result<Adapter, InstallError> {
    let digest = content.digest;
    if let Some(bytes) = read_whole(store, digest)? {
        return read(&bytes, digest, expected);
    }
    let partial = partial_file(digest);
    make_room(store, content)?;
    let mut coming = Coming::of(store, &partial)?;
    let fetched =
        link.fetch(content, &mut coming.bytes).await.and_then(|()| match Digest::of(&coming.bytes) {
            got if got == digest => Ok(()),
            got => Err(LinkError::Corrupt { expected: digest, got }),
        });
    if let Err(source) = fetched {
        coming.keep()?;
        return Err(InstallError::Fetch { digest, source });
    }
    let read = read(&coming.bytes, digest, expected);
    let Ok(adapter) = read else {
        // What came to its end and is of no use is not kept.
        coming.bytes.clear();
        return read;
    };
    coming.keep()?;
    store.rename(&partial, &adapter_file(digest))?;
    see(store, expected, digest, store.stamp(&adapter_file(digest))?);
    Ok(adapter)
}

fn partial_file(digest: Digest) -> String {
    format!("releases/{digest}.fetching")
}

/// Bytes on their way. What came is kept, also when nobody waits for the rest any more: the next try goes on from there.
/// It lies on the disk once, behind what was there before.
struct Coming<'s> {
    store: &'s Store,
    name: &'s str,
    bytes: Vec<u8>,
    /// How many of them were there at the beginning, and their digest: the link drops them if the whole is not what it
    /// is to be.
    had: (usize, Digest),
}

impl<'s> Coming<'s> {
    fn of(store: &'s Store, name: &'s str) -> Result<Self, StoreError> {
        let bytes = store.read(name)?.unwrap_or_default();
        let had = (bytes.len(), Digest::of(&bytes));
        Ok(Self { store, name, bytes, had })
    }

    fn keep(&mut self) -> Result<(), StoreError> {
        let bytes = std::mem::take(&mut self.bytes);
        let (had, digest) = self.had;
        let is_still = bytes.get(..had).is_some_and(|first| Digest::of(first) == digest);
        self.store.extend(self.name, &bytes, if is_still { had } else { 0 })
    }
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        if !self.bytes.is_empty()
            && let Err(error) = self.keep()
        {
            tracing::warn!("what came of an adapter is lost: {error}");
        }
    }
}

/// What is in use, if anything is.
pub fn installed(store: &Store, expected: &Expected) -> Result<Option<Installed>, InstallError> {
    let Some((version, digest)) = in_use(store)? else { return Ok(None) };
    let stamp = store.stamp(&adapter_file(digest))?;
    // A damaged adapter file is as good as none: the next poll brings the release again.
    let Some(bytes) = read_whole(store, digest)? else {
        tracing::warn!(%digest, "installed adapter is missing or damaged; it will be fetched again");
        return Ok(None);
    };
    // Nor is one for another package of use: whoever changed the package gets that one's release.
    match read(&bytes, digest, expected) {
        Ok(adapter) => {
            see(store, expected, digest, stamp);
            Ok(Some(Installed { version, digest, adapter }))
        }
        Err(error) => {
            tracing::warn!("installed release {version} is passed over: {error}");
            Ok(None)
        }
    }
}

/// The version of what [`installed`] finds, which a poll tells the aggregator. The adapter is read for it only if its
/// file is not the very one that was read before: a device polls far more often than it installs.
pub fn installed_version(store: &Store, expected: &Expected) -> Result<Option<Version>, InstallError> {
    let Some((version, digest)) = in_use(store)? else { return Ok(None) };
    let stamp = store.stamp(&adapter_file(digest))?;
    if stamp.is_some_and(|stamp| *seen(store) == Some(Seen::new(expected, digest, stamp))) {
        return Ok(Some(version));
    }
    Ok(installed(store, expected)?.map(|installed| installed.version))
}

impl Seen {
    fn new(expected: &Expected, digest: Digest, stamp: Stamp) -> Self {
        Self { digest, stamp, base: expected.base, layout: Arc::clone(&expected.layout) }
    }
}

fn seen(store: &Store) -> MutexGuard<'_, Option<Seen>> {
    store.seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn see(store: &Store, expected: &Expected, digest: Digest, stamp: Option<Stamp>) {
    *seen(store) = stamp.map(|stamp| Seen::new(expected, digest, stamp));
}

fn adapter_file(digest: Digest) -> String {
    format!("releases/{digest}.adapter")
}

/// The bytes of an adapter's file, if it is there and undamaged.
fn read_whole(store: &Store, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
    Ok(store.read(&adapter_file(digest))?.filter(|bytes| Digest::of(bytes) == digest))
}

/// Leaves nothing installed; adapters on disk need not be fetched again.
pub fn forget(store: &Store) -> Result<(), StoreError> {
    store.remove(INSTALLED)
}

/// The release in use, whether or not its adapter is whole.
fn in_use(store: &Store) -> Result<Option<(Version, Digest)>, StoreError> {
    let Some(bytes) = store.read(INSTALLED)? else { return Ok(None) };
    let parse = || {
        let (version, digest) = std::str::from_utf8(&bytes).ok()?.trim().split_once(' ')?;
        Some((Version(version.parse().ok()?), digest.parse().ok()?))
    };
    let reason = "expected a version and a digest".into();
    parse().ok_or(StoreError::Damaged { path: store.path(INSTALLED), reason }).map(Some)
}

fn read(bytes: &[u8], digest: Digest, expected: &Expected) -> Result<Adapter, InstallError> {
    let (adapter, facts) = disk::read(bytes).map_err(|source| InstallError::Adapter { digest, source })?;
    let layout = |got: String, wanted: String| InstallError::Layout { digest, expected: wanted, got };
    if facts.base != expected.base.0 {
        return Err(layout(format!("base {}", BaseHash(facts.base)), format!("base {}", expected.base)));
    }
    let (ours, theirs) = (&expected.layout, adapter.layout());
    if ours.layers() != theirs.layers() || ours.modules() != theirs.modules() {
        return Err(layout(theirs.to_string(), ours.to_string()));
    }
    Ok(adapter)
}

/// Before an adapter's bytes are moved. If its owner's disk budget has no room for it, those that are kept to go back to by
/// hand make some.
fn make_room(store: &Store, content: Content) -> Result<(), StoreError> {
    let name = adapter_file(content.digest);
    // What came of it is there already, and grows to the whole.
    let more = content.length.saturating_sub(store.bytes_of(&partial_file(content.digest))?);
    match (store.require_disk(&name, more), in_use(store)?) {
        (Err(StoreError::OverBudget { .. }), Some((_, in_use))) => {
            forget_old(store, [in_use, content.digest], 0)?;
            store.require_disk(&name, more)
        }
        (asked, _) => asked,
    }
}

/// Keeps two, and the newest few of the others by the time of their files; nothing of what was never fetched to its end.
fn forget_old(store: &Store, kept_any: [Digest; 2], few: usize) -> Result<(), StoreError> {
    let is_kept_any = |digest: &str| kept_any.iter().any(|kept| kept.to_string() == digest);
    let mut kept = Vec::new();
    for name in store.list("releases")? {
        if name.strip_suffix(".fetching").is_some_and(|digest| !is_kept_any(digest)) {
            store.remove(&format!("releases/{name}"))?;
        }
        let Some(digest) = name.strip_suffix(".adapter") else { continue };
        if !is_kept_any(digest) {
            let modified = std::fs::metadata(store.path(&format!("releases/{name}")))
                .and_then(|metadata| metadata.modified())
                .ok();
            kept.push((modified, digest.to_owned()));
        }
    }
    kept.sort();
    for (_, digest) in kept.iter().rev().skip(few) {
        for suffix in ["adapter", "release"] {
            store.remove(&format!("releases/{digest}.{suffix}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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
}
