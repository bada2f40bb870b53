//! Stage 7, **install**: verifies a signed release, keeps it, and makes it the adapter in use, in one rename.
//!
//! The start of a round comes the same way. The device trusts the aggregator's key from its enrolment and nothing else:
//! signature, base, digest and layout are checked before a release is installed.

use std::sync::Arc;

use commonweal_adapter::{Adapter, AdapterLayout, ReadError, disk};
use commonweal_protocol::{AggregatorKey, BaseHash, Content, Digest, SignatureError, SignedRelease, Version};
use commonweal_transport::{Link, LinkError};

use crate::store::{Store, StoreError};

const INSTALLED: &str = "installed";
/// Releases kept besides the one in use, to go back to by hand.
const KEPT: usize = 2;

/// Why a release was not installed; the one before stays in use.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Not from the aggregator that enrolled this device.
    #[error("release {version} is not signed by the aggregator")]
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
    /// The aggregator's signing key.
    pub key: AggregatorKey,
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

/// Checks a release, fetches what it needs and installs it.
pub async fn install(
    link: &impl Link,
    store: &Store,
    expected: &Expected,
    signed: &SignedRelease,
) -> Result<Installed, InstallError> {
    let version = signed.release.version;
    let release =
        signed.verify(&expected.key).map_err(|source| InstallError::Signature { version, source })?;
    if release.base != expected.base {
        return Err(InstallError::Base { version, expected: expected.base, got: release.base });
    }
    let adapter = obtain(link, store, expected, release.content()).await?;
    let encoded = serde_json::to_vec(signed).map_err(|error| StoreError::Damaged {
        path: store.path("releases"),
        reason: format!("release does not encode: {error}"),
    })?;
    store.write(&format!("releases/{}.release", release.digest), &encoded)?;
    store.write(INSTALLED, format!("{} {}\n", version.0, release.digest).as_bytes())?;
    forget_old(store, release.digest)?;
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
    let name = format!("releases/{digest}.adapter");
    if let Some(bytes) = store.read(&name)?.filter(|bytes| Digest::of(bytes) == digest) {
        return read(&bytes, digest, expected);
    }
    let partial = format!("releases/{digest}.fetching");
    let mut bytes = store.read(&partial)?.unwrap_or_default();
    let fetched = link.fetch(content, &mut bytes).await;
    if let Err(source) = fetched {
        // What came is kept: the next try goes on from there.
        store.write(&partial, &bytes)?;
        return Err(InstallError::Fetch { digest, source });
    }
    let adapter = read(&bytes, digest, expected)?;
    store.write(&name, &bytes)?;
    store.remove(&partial)?;
    Ok(adapter)
}

/// What is in use, if anything is.
pub fn installed(store: &Store, expected: &Expected) -> Result<Option<Installed>, InstallError> {
    let Some(bytes) = store.read(INSTALLED)? else { return Ok(None) };
    let damaged = || StoreError::Damaged {
        path: store.path(INSTALLED),
        reason: "expected a version and a digest".into(),
    };
    let text = String::from_utf8(bytes).map_err(|_| damaged())?;
    let (version, digest) = text.trim().split_once(' ').ok_or_else(damaged)?;
    let version = Version(version.parse().map_err(|_| damaged())?);
    let digest: Digest = digest.parse().map_err(|_| damaged())?;
    // A damaged adapter file is as good as none: the next poll brings the release again.
    let bytes = store.read(&format!("releases/{digest}.adapter"))?;
    let Some(bytes) = bytes.filter(|bytes| Digest::of(bytes) == digest) else {
        tracing::warn!(%digest, "installed adapter is missing or damaged; it will be fetched again");
        return Ok(None);
    };
    // Nor is one for another package of use: whoever changed the package gets that one's release.
    match read(&bytes, digest, expected) {
        Ok(adapter) => Ok(Some(Installed { version, digest, adapter })),
        Err(error) => {
            tracing::warn!("installed release {version} is passed over: {error}");
            Ok(None)
        }
    }
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

/// Keeps the newest few by the time of their files, and nothing of what was never fetched to its end.
fn forget_old(store: &Store, in_use: Digest) -> Result<(), StoreError> {
    let mut kept = Vec::new();
    for name in store.list("releases")? {
        if name.ends_with(".fetching") {
            store.remove(&format!("releases/{name}"))?;
        }
        let Some(digest) = name.strip_suffix(".adapter") else { continue };
        if digest != in_use.to_string() {
            let modified = std::fs::metadata(store.path(&format!("releases/{name}")))
                .and_then(|metadata| metadata.modified())
                .ok();
            kept.push((modified, digest.to_owned()));
        }
    }
    kept.sort();
    for (_, digest) in kept.iter().rev().skip(KEPT) {
        for suffix in ["adapter", "release"] {
            store.remove(&format!("releases/{digest}.{suffix}"))?;
        }
    }
    Ok(())
}
