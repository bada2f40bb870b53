//! `Blob` in a store of objects that speaks S3, through the `object_store` crate: an object for each blob, named by its
//! digest below the prefix.
//!
//! An object appears whole or not at all, and only after its bytes hashed to its name: what is large goes up in parts, which
//! are put together at the end. Memory is two parts. Two who store the same blob at once store the same bytes.

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use commonweal_protocol::Digest;
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path;
use object_store::{
    Error, MultipartUpload, ObjectStore, ObjectStoreExt as _, PutMode, PutPayload, RetryConfig,
    limit::LimitStore,
};

use super::bridge::{Bridge, Unanswered};
use super::http::Carrier;
use super::{Blob, MARK, NAME_BYTES_MAX, PAGE_MAX, Put, StoreError, owner_of, place, refused, trust};
use crate::config;

/// Bytes of a part, and of what goes up in one piece.
const PART_BYTES: usize = 8 << 20;
/// Requests under way at once; more wait.
const REQUESTS_MAX: usize = 64;
/// How long a request may take, its repetitions included.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a deletion may take. A request that was given up may be carried out for about as long again.
const DELETION: Duration = Duration::from_secs(10);
/// The object that tells what time it is there.
const CLOCK: &str = "clock";
const RETRY: Duration = Duration::from_secs(30);
const RETRIES_MAX: usize = 4;

/// Blobs in a bucket.
pub struct ObjectBlob {
    bridge: Arc<Bridge>,
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    /// Whether listings come in the order of names, as S3's do.
    is_ordered: bool,
}

impl std::fmt::Debug for ObjectBlob {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("ObjectBlob").field(&self.store.to_string()).field(&self.prefix).finish()
    }
}

impl ObjectBlob {
    /// A bucket. Credentials come from the environment (`AWS_…`) or the machine's role, as the crate finds them.
    pub(super) fn bucket(
        name: &str,
        prefix: &str,
        settings: &config::Storage,
        bridge: Arc<Bridge>,
    ) -> Result<Self, StoreError> {
        let store = LimitStore::new(reach(AmazonS3Builder::from_env(), name, settings)?, REQUESTS_MAX);
        let blob = Self::over(Arc::new(store), Path::from(prefix), true, bridge);
        // Better known now than with the first device's update.
        blob.list(None, 1)?;
        Ok(blob)
    }

    /// Any store of the crate's.
    pub(super) fn over(
        store: Arc<dyn ObjectStore>,
        prefix: Path,
        is_ordered: bool,
        bridge: Arc<Bridge>,
    ) -> Self {
        Self { bridge, store, prefix, is_ordered }
    }

    fn path(&self, digest: &Digest) -> Path {
        self.prefix.clone().join(digest.to_string())
    }

    fn wait<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Trouble> {
        self.wait_for(PATIENCE, work)
    }

    fn wait_for<T: Send + 'static>(
        &self,
        patience: Duration,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Trouble> {
        match self.bridge.wait(patience, work) {
            Ok(answer) => answer.map_err(Trouble::Answer),
            Err(none) => Err(Trouble::None(none)),
        }
    }

    fn put(&self, digest: &Digest, payload: PutPayload) -> Result<(), StoreError> {
        let (store, path) = (self.store.clone(), self.path(digest));
        self.wait(async move { store.put(&path, payload).await.map(drop) })
            .map_err(|trouble| trouble.of_write("write blob", &digest.to_string()))
    }

    /// Sends what does not fit into one piece; `first` was read already.
    fn put_parts(&self, digest: &Digest, first: Vec<u8>, mut source: Checked<'_>) -> Result<(), StoreError> {
        let name = digest.to_string();
        // Until the parts are put together there is no object, whatever was sent.
        let failed = |trouble: Trouble| StoreError::not_done("write blob", &name, trouble);
        let (store, path) = (self.store.clone(), self.path(digest));
        let upload = self.wait(async move { store.put_multipart(&path).await }).map_err(failed)?;
        let mut parts = Parts { blob: self, upload: Some(upload) };
        let mut part = first;
        while !part.is_empty() {
            parts.send(part).map_err(failed)?;
            part = source.part()?;
        }
        source.check()?;
        parts.complete().map_err(|trouble| trouble.of_write("write blob", &name))
    }
}

/// The client of a bucket; reaches nothing yet.
fn reach(builder: AmazonS3Builder, name: &str, settings: &config::Storage) -> Result<AmazonS3, StoreError> {
    let mut builder = builder.with_bucket_name(name).with_retry(RetryConfig {
        max_retries: RETRIES_MAX,
        retry_timeout: RETRY,
        ..RetryConfig::default()
    });
    if let Some(region) = &settings.region {
        builder = builder.with_region(region);
    }
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    let credentials = settings.credentials().map_err(|wrong| refused("storage.credentials_file", wrong))?;
    if let Some(credentials) = credentials {
        builder = builder
            .with_access_key_id(credentials.access_key_id)
            .with_secret_access_key(credentials.secret_access_key.as_str());
    }
    let is_clear = builder
        .get_config_value(&AmazonS3ConfigKey::Endpoint)
        .is_some_and(|endpoint| endpoint.starts_with("http://"));
    if let Some(endpoint) = builder.get_config_value(&AmazonS3ConfigKey::Endpoint) {
        place::check_endpoint(&endpoint).map_err(|wrong| refused("the object store's endpoint", wrong))?;
    }
    let carrier = Carrier { tls: trust::client(settings)? };
    let built = builder.with_allow_http(is_clear).with_http_connector(carrier).build();
    built.map_err(|error| StoreError::not_done("open", &format!("s3://{name}"), error))
}

/// Why a request brought nothing.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Answer(Error),
    #[error(transparent)]
    None(Unanswered),
}

impl Trouble {
    fn is_missing(&self) -> bool {
        matches!(self, Self::Answer(Error::NotFound { .. }))
    }

    /// Only what was never sent certainly did not happen: the last answer, whatever it says, may be to a repetition, and the
    /// request before it that nobody answered may have been carried out.
    fn of_write(self, operation: &'static str, subject: &str) -> StoreError {
        match self {
            Self::Answer(
                Error::InvalidPath { .. } | Error::NotSupported { .. } | Error::NotImplemented { .. },
            ) => StoreError::not_done(operation, subject, self),
            _ => StoreError::unsure(operation, subject, self),
        }
    }
}

/// An upload in parts; taken back unless it is completed.
struct Parts<'blob> {
    blob: &'blob ObjectBlob,
    upload: Option<Box<dyn MultipartUpload>>,
}

impl Parts<'_> {
    fn send(&mut self, part: Vec<u8>) -> Result<(), Trouble> {
        let Some(upload) = &mut self.upload else { return Ok(()) };
        self.blob.wait(upload.put_part(PutPayload::from(part)))
    }

    fn complete(mut self) -> Result<(), Trouble> {
        let Some(mut upload) = self.upload.take() else { return Ok(()) };
        self.blob.wait(async move { upload.complete().await.map(drop) })
    }
}

impl Drop for Parts<'_> {
    fn drop(&mut self) {
        let Some(mut upload) = self.upload.take() else { return };
        if let Err(error) = self.blob.wait(async move { upload.abort().await }) {
            tracing::warn!(%error, "parts of an upload are left over; the bucket's own rule ends them");
        }
    }
}

/// Reads a source piece by piece, and what it must be.
struct Checked<'source> {
    source: &'source mut dyn Read,
    hasher: blake3::Hasher,
    digest: Digest,
    length: u64,
    read: u64,
}

impl<'source> Checked<'source> {
    fn new(digest: &Digest, length: u64, source: &'source mut dyn Read) -> Self {
        Self { source, hasher: blake3::Hasher::new(), digest: *digest, length, read: 0 }
    }

    /// The next part; empty at the end. Never more than one byte beyond the promised length.
    fn part(&mut self) -> Result<Vec<u8>, StoreError> {
        let left = (self.length - self.read).saturating_add(1).min(PART_BYTES as u64);
        let mut bytes = Vec::with_capacity(left as usize);
        (&mut *self.source)
            .take(left)
            .read_to_end(&mut bytes)
            .map_err(|error| StoreError::not_done("write blob", &self.digest.to_string(), error))?;
        self.read += bytes.len() as u64;
        self.hasher.update(&bytes);
        if self.read > self.length {
            return Err(self.refused(format!("{} bytes", self.length), "more".to_owned()));
        }
        Ok(bytes)
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.read != self.length {
            return Err(self.refused(format!("{} bytes", self.length), self.read.to_string()));
        }
        let found = Digest::from(self.hasher.finalize());
        if found != self.digest {
            return Err(self.refused("that digest".to_owned(), found.to_string()));
        }
        Ok(())
    }

    fn refused(&self, expected: String, got: String) -> StoreError {
        StoreError::Refused { subject: format!("blob {}", self.digest), expected, got }
    }
}

impl Blob for ObjectBlob {
    fn put_if_absent(&self, digest: &Digest, length: u64, source: &mut dyn Read) -> Result<Put, StoreError> {
        // What is there is stored again, so that nobody takes it for an old one.
        let put = if self.length(digest)?.is_some() { Put::Present } else { Put::Stored };
        let mut source = Checked::new(digest, length, source);
        let first = source.part()?;
        if (first.len() as u64) < length && first.len() == PART_BYTES {
            self.put_parts(digest, first, source)?;
            return Ok(put);
        }
        // Nothing may follow.
        if source.read == length && !source.part()?.is_empty() {
            return Err(source.refused(format!("{length} bytes"), "more".to_owned()));
        }
        source.check()?;
        self.put(digest, PutPayload::from(first))?;
        Ok(put)
    }

    fn length(&self, digest: &Digest) -> Result<Option<u64>, StoreError> {
        let (store, path) = (self.store.clone(), self.path(digest));
        match self.wait(async move { store.head(&path).await }) {
            Ok(about) => Ok(Some(about.size)),
            Err(trouble) if trouble.is_missing() => Ok(None),
            Err(trouble) => Err(StoreError::not_done("look for blob", &digest.to_string(), trouble)),
        }
    }

    fn read_range(&self, digest: &Digest, offset: u64, length: usize) -> Result<Vec<u8>, StoreError> {
        let name = digest.to_string();
        let missing = || StoreError::Missing { subject: format!("blob {name}") };
        if length > 0 {
            let (store, path) = (self.store.clone(), self.path(digest));
            let range = offset..offset.saturating_add(length as u64);
            match self.wait(async move { store.get_range(&path, range).await }) {
                Ok(bytes) => return Ok(bytes.into()),
                Err(trouble) if trouble.is_missing() => return Err(missing()),
                // Beyond the end is no error here; stores differ in how they say it.
                Err(trouble) => match self.length(digest)? {
                    Some(held) if held > offset => {
                        return Err(StoreError::not_done("read blob", &name, trouble));
                    }
                    _ => {}
                },
            }
        }
        self.length(digest)?.map(|_| Vec::new()).ok_or_else(missing)
    }

    fn list_older(
        &self,
        age: Duration,
        after: Option<&Digest>,
        limit: usize,
    ) -> Result<Vec<Digest>, StoreError> {
        let limit = limit.min(PAGE_MAX);
        let (store, is_ordered) = (self.store.clone(), self.is_ordered);
        let prefix = (!self.prefix.is_root()).then(|| self.prefix.clone());
        let depth = self.prefix.parts_count() + 1;
        let (offset, after) = (after.map(|after| self.path(after)), after.copied());
        let clock = self.prefix.clone().join(CLOCK);
        let listed = self.wait(async move {
            let newest = if age.is_zero() {
                None
            } else {
                store.put(&clock, PutPayload::new()).await?;
                Some(store.head(&clock).await?.last_modified - age)
            };
            let mut objects = match &offset {
                Some(offset) => store.list_with_offset(prefix.as_ref(), offset),
                None => store.list(prefix.as_ref()),
            };
            // The smallest so many, in whatever order they come.
            let mut smallest = BTreeSet::<[u8; 32]>::new();
            while let Some(object) = objects.try_next().await? {
                // Whatever else an operator put here is not a blob.
                let name = object.location.filename().filter(|_| object.location.parts_count() == depth);
                let Some(Ok(digest)) = name.map(str::parse::<Digest>) else { continue };
                if newest.is_some_and(|newest| object.last_modified > newest) {
                    continue;
                }
                if after.is_none_or(|after| digest.0 > after.0) {
                    smallest.insert(digest.0);
                }
                if smallest.len() > limit {
                    smallest.pop_last();
                    if is_ordered {
                        break;
                    }
                }
            }
            Ok(smallest)
        });
        let smallest =
            listed.map_err(|trouble| StoreError::not_done("list", self.prefix.as_ref(), trouble))?;
        Ok(smallest.into_iter().map(Digest).collect())
    }

    fn delete(&self, digest: &Digest) -> Result<(), StoreError> {
        let (store, path) = (self.store.clone(), self.path(digest));
        match self.wait_for(DELETION, async move { store.delete(&path).await }) {
            Err(trouble) if !trouble.is_missing() => {
                Err(trouble.of_write("delete blob", &digest.to_string()))
            }
            _ => Ok(()),
        }
    }

    fn delete_all(&self, digests: &[Digest], until: Option<Instant>) -> Result<(), StoreError> {
        let paths: Vec<_> = digests.iter().map(|digest| Ok(self.path(digest))).collect();
        let store = self.store.clone();
        let left = until.map_or(DELETION, |until| until.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return Err(StoreError::not_done("delete", "blobs", "the time is over"));
        }
        let deleted = self.wait_for(left.min(DELETION), async move {
            let mut deleted = store.delete_stream(futures_util::stream::iter(paths).boxed());
            while let Some(one) = deleted.next().await {
                match one {
                    Err(Error::NotFound { .. }) | Ok(_) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
        deleted.map_err(|trouble| StoreError::unsure("delete", "blobs", trouble))
    }

    fn deletion_lasts(&self) -> Duration {
        DELETION
    }

    fn mark(&self, owner: &str) -> Result<String, StoreError> {
        let failed = |trouble: Trouble| trouble.of_write("mark", self.prefix.as_ref());
        let (store, path, owner) = (self.store.clone(), self.prefix.clone().join(MARK), owner.to_owned());
        let found = self.wait(async move {
            let range = 0..NAME_BYTES_MAX as u64 + 1;
            match store.get_range(&path, range.clone()).await {
                Err(Error::NotFound { .. }) => {}
                found => return found,
            }
            match store.put_opts(&path, owner.into(), PutMode::Create.into()).await {
                Err(Error::AlreadyExists { .. }) | Ok(_) => {}
                Err(error) => return Err(error),
            }
            store.get_range(&path, range).await
        });
        owner_of(found.map_err(failed)?.into())
    }

    /// A bucket has no end that it would tell.
    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;

    use super::*;

    /// What a machine asks for its role, in clear: the session, the role's name, its keys.
    fn metadata() -> (String, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let keys = r#"{"AccessKeyId": "a", "SecretAccessKey": "b", "Token": "c", "Expiration": "2999-01-01T00:00:00Z"}"#;
        let served = std::thread::spawn(move || {
            let answer = |answer: &str| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    head.extend(byte);
                }
                let length = answer.len();
                write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{answer}"
                )
                .unwrap();
                let head = String::from_utf8(head).unwrap();
                head.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
            };
            ["session", "drive", keys].into_iter().map(answer).collect()
        });
        (address, served)
    }

    #[test]
    fn a_machine_s_role_opens_a_bucket_though_nothing_else_passes_in_clear() {
        let (address, served) = metadata();
        let settings = config::Storage {
            endpoint: Some("https://127.0.0.1:1".to_owned()),
            ..config::Storage::default()
        };
        let builder = AmazonS3Builder::new().with_metadata_endpoint(address);
        let store = Arc::new(reach(builder, "bucket", &settings).unwrap());
        let bridge = Bridge::start().unwrap();
        let blob = ObjectBlob::over(store, Path::default(), true, bridge);
        // Nobody is there; but by then the credentials were asked for.
        blob.length(&Digest([1; 32])).unwrap_err();
        let asked = served.join().unwrap();
        let roles = "/latest/meta-data/iam/security-credentials/";
        let wanted =
            ["PUT /latest/api/token".to_owned(), format!("GET {roles}"), format!("GET {roles}drive")];
        assert_eq!(asked, wanted);
    }

    #[test]
    fn only_what_was_never_sent_certainly_did_not_happen() {
        let written = |error| Trouble::Answer(error).of_write("write blob", "x").is_determinate();
        let (path, source) = (|| "x".to_owned(), || "no".into());
        assert!(!written(Error::PermissionDenied { path: path(), source: source() }));
        assert!(!written(Error::Unauthenticated { path: path(), source: source() }));
        assert!(!written(Error::Generic { store: "S3", source: source() }));
        assert!(written(Error::NotSupported { source: source() }));
    }
}
