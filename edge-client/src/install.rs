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
        store.remove(&partial)?;
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
        if bytes.is_empty() && had == 0 {
            return Ok(());
        }
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
    store.require_free(&name, more)?;
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
mod tests;
