//! One contract suite per trait, run on every backend.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use commonweal_protocol::Digest;

use super::*;

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(bytes)
}

fn coord(coord: &dyn Coord) {
    assert_eq!(coord.head("release").unwrap(), None);
    assert_eq!(coord.compare_and_set("release", 0, b"one").unwrap(), 1);
    assert!(matches!(
        coord.compare_and_set("release", 0, b"other").unwrap_err(),
        StoreError::Conflict { expected: 0, found: 1, .. }
    ));
    assert_eq!(coord.compare_and_set("release", 1, b"two").unwrap(), 2);
    assert_eq!(coord.compare_and_set("release", 2, b"three").unwrap(), 3);
    assert_eq!(coord.head("release").unwrap(), Some(Entry { sequence: 3, value: b"three".to_vec() }));
    let scanned = coord.scan("release", 2, 10).unwrap();
    assert_eq!(scanned.iter().map(|entry| entry.sequence).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(coord.scan("release", 1, 1).unwrap().len(), 1);
    assert!(coord.scan("release", u64::MAX, 10).unwrap().is_empty());

    coord.compare_and_set("device/b", 0, b"").unwrap();
    coord.compare_and_set("device/a", 0, b"").unwrap();
    coord.compare_and_set("device_", 0, b"").unwrap();
    assert_eq!(coord.logs("device/", "", 10).unwrap(), ["device/a", "device/b"]);
    assert_eq!(coord.logs("device/", "device/a", 10).unwrap(), ["device/b"]);
    assert_eq!(coord.logs("device/", "", 1).unwrap(), ["device/a"]);

    coord.truncate("release", 3).unwrap();
    assert_eq!(coord.scan("release", 0, 10).unwrap().len(), 1);
    coord.truncate("release", u64::MAX).unwrap();
    assert_eq!(coord.head("release").unwrap().unwrap().sequence, 3, "the head is never forgotten");
    coord.truncate("nothing", 1).unwrap();

    assert!(matches!(coord.compare_and_set("", 0, b""), Err(StoreError::Refused { .. })));
    assert!(coord.compare_and_set(&"x".repeat(NAME_BYTES_MAX + 1), 0, b"").is_err());
    assert!(coord.compare_and_set("big", 0, &vec![0; VALUE_BYTES_MAX + 1]).unwrap_err().is_determinate());
    assert_eq!(coord.head("big").unwrap(), None);
}

fn inbox(inbox: &dyn Inbox) {
    assert_eq!(inbox.append_once("round", "b", b"B").unwrap(), Append::Appended);
    assert_eq!(inbox.append_once("round", "a", b"A").unwrap(), Append::Appended);
    assert_eq!(inbox.append_once("round", "a", b"other").unwrap(), Append::Duplicate(b"A".to_vec()));
    assert_eq!(inbox.append_once("next", "a", b"C").unwrap(), Append::Appended);
    assert_eq!(inbox.find("round", "a").unwrap(), Some(b"A".to_vec()));
    assert_eq!(inbox.find("round", "z").unwrap(), None);
    let keys = |items: Vec<Item>| items.into_iter().map(|item| item.key).collect::<Vec<_>>();
    assert_eq!(keys(inbox.list("round", 10).unwrap()), ["a", "b"]);
    assert_eq!(keys(inbox.list("round", 1).unwrap()), ["a"]);

    assert_eq!(keys(inbox.claim("round", "first", 100, 50, 1).unwrap()), ["a"]);
    assert_eq!(keys(inbox.claim("round", "second", 149, 50, 10).unwrap()), ["b"]);
    assert_eq!(keys(inbox.claim("round", "first", 149, 1, 10).unwrap()), ["a"], "an owner may claim again");
    assert_eq!(keys(inbox.claim("round", "second", 150, 50, 10).unwrap()), ["a", "b"], "the lease ran out");
    assert!(matches!(inbox.ack("round", "a", "first"), Err(StoreError::LeaseLost { .. })));
    assert!(matches!(inbox.extend("round", "a", "first", 900), Err(StoreError::LeaseLost { .. })));
    inbox.extend("round", "a", "second", 900).unwrap();
    assert_eq!(keys(inbox.claim("round", "third", 899, 1, 10).unwrap()), ["b"]);
    inbox.ack("round", "a", "second").unwrap();
    inbox.ack("round", "a", "second").unwrap();
    assert!(keys(inbox.claim("round", "third", 10_000, 1, 10).unwrap()) == ["b"], "done is done");
    assert_eq!(inbox.find("round", "a").unwrap(), Some(b"A".to_vec()), "and can still be found");
    assert_eq!(inbox.append_once("round", "a", b"again").unwrap(), Append::Duplicate(b"A".to_vec()));

    // A queue whose turn was missed goes with the next one.
    inbox.append_once("past", "a", b"A").unwrap();
    inbox.append_once("upcoming", "a", b"A").unwrap();
    inbox.purge_through("round").unwrap();
    for gone in ["next", "past", "round"] {
        assert!(inbox.list(gone, 10).unwrap().is_empty(), "{gone}");
    }
    assert_eq!(keys(inbox.list("upcoming", 10).unwrap()), ["a"]);
    assert!(inbox.append_once("round", "big", &vec![0; VALUE_BYTES_MAX + 1]).is_err());
}

fn blob(blob: &dyn Blob) {
    let bytes = b"the quick brown fox".as_slice();
    let name = digest(bytes);
    assert_eq!(blob.length(&name).unwrap(), None);
    assert!(matches!(blob.read_range(&name, 0, 4), Err(StoreError::Missing { .. })));
    let put = |name: &Digest, length: u64, mut source: &[u8]| blob.put_if_absent(name, length, &mut source);
    assert!(put(&name, 18, bytes).unwrap_err().is_determinate(), "more bytes than promised");
    assert!(put(&name, 20, bytes).unwrap_err().is_determinate(), "fewer bytes than promised");
    assert!(put(&digest(b"other"), 19, bytes).unwrap_err().is_determinate(), "another digest");
    assert!(blob.list(None, 10).unwrap().is_empty(), "nothing refused is listed");
    assert_eq!(put(&name, 19, bytes).unwrap(), Put::Stored);
    assert_eq!(put(&name, 19, bytes).unwrap(), Put::Present);
    assert_eq!(blob.length(&name).unwrap(), Some(19));
    assert_eq!(blob.read_range(&name, 4, 5).unwrap(), b"quick");
    assert_eq!(blob.read_range(&name, 16, 100).unwrap(), b"fox");
    assert!(blob.read_range(&name, 100, 5).unwrap().is_empty());
    assert_eq!(blob.read_all(&name, 100).unwrap(), bytes);
    assert!(matches!(blob.read_all(&name, 18), Err(StoreError::Refused { .. })));

    let mut names = vec![name];
    for number in 0..5_u8 {
        let name = digest(&[number]);
        put(&name, 1, &[number]).unwrap();
        names.push(name);
    }
    names.sort_unstable_by_key(|name| name.0);
    assert_eq!(blob.list(None, 100).unwrap(), names);
    assert_eq!(blob.list(Some(&names[1]), 2).unwrap(), names[2..4]);
    blob.delete(&name).unwrap();
    blob.delete(&name).unwrap();
    assert_eq!(blob.length(&name).unwrap(), None);
    assert!(blob.free_bytes().unwrap() > 0);
}

fn watch(watch: &Arc<dyn Watch>) {
    let mark = watch.mark();
    watch.wait(mark, Duration::ZERO);
    watch.notify();
    // Already notified after the mark: returns at once, however long the timeout.
    watch.wait(mark, Duration::from_secs(3600));
    let mark = watch.mark();
    let other = watch.clone();
    let notifier = std::thread::spawn(move || other.notify());
    watch.wait(mark, Duration::from_secs(3600));
    notifier.join().unwrap();
}

fn suite(storage: &Storage) {
    coord(storage.coord.as_ref());
    inbox(storage.inbox.as_ref());
    blob(storage.blob.as_ref());
    watch(&storage.watch);
}

#[test]
fn memory_keeps_the_contract() {
    suite(&MemoryStorage::default().storage());
}

#[test]
fn disk_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    suite(&Storage::open(dir.path(), Access::Exclusive).unwrap());
}

#[test]
fn what_was_stored_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::open(dir.path(), Access::Exclusive).unwrap();
    storage.coord.compare_and_set("release", 0, b"one").unwrap();
    storage.inbox.append_once("round", "a", b"A").unwrap();
    storage.blob.put_if_absent(&digest(b"x"), 1, &mut b"x".as_slice()).unwrap();
    drop(storage);
    let storage = Storage::open(dir.path(), Access::Exclusive).unwrap();
    assert_eq!(storage.coord.head("release").unwrap().unwrap().value, b"one");
    assert_eq!(storage.inbox.find("round", "a").unwrap().unwrap(), b"A");
    assert_eq!(storage.blob.read_all(&digest(b"x"), 1).unwrap(), b"x");
}

#[test]
fn a_newer_schema_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aggregator.db");
    drop(SqliteStore::open(&path).unwrap());
    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let error = SqliteStore::open(&path).unwrap_err();
    assert!(error.to_string().contains("expected schema version 1, got 99"), "{error}");
}

#[test]
fn a_file_that_is_no_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aggregator.db");
    std::fs::write(&path, [7; 4096]).unwrap();
    assert!(SqliteStore::open(&path).unwrap_err().is_determinate());
}

/// A disk with room for `left` bytes.
#[derive(Debug)]
pub(crate) struct SmallDisk {
    left: std::sync::atomic::AtomicU64,
}

impl SmallDisk {
    pub(crate) fn with_room(left: u64) -> Arc<Self> {
        Arc::new(Self { left: left.into() })
    }
}

impl Disk for SmallDisk {
    fn write(&self, file: &mut std::fs::File, bytes: &[u8]) -> std::io::Result<()> {
        use std::sync::atomic::Ordering::SeqCst;
        let room = self.left.load(SeqCst);
        // As a real disk does: what fits is written, then the error comes.
        let fits = room.min(bytes.len() as u64);
        self.left.store(room - fits, SeqCst);
        std::io::Write::write_all(file, &bytes[..fits as usize])?;
        if fits < bytes.len() as u64 {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn free_bytes(&self, _dir: &Path) -> std::io::Result<u64> {
        Ok(self.left.load(std::sync::atomic::Ordering::SeqCst))
    }
}

#[test]
fn a_full_disk_leaves_no_blob_and_no_temporary_file() {
    let dir = tempfile::tempdir().unwrap();
    let blob = FileBlob::open(dir.path(), SmallDisk::with_room(100), Access::Exclusive).unwrap();
    let bytes = [5_u8; 150];
    let error = blob.put_if_absent(&digest(&bytes), 150, &mut bytes.as_slice()).unwrap_err();
    assert!(error.is_determinate());
    assert_eq!(blob.length(&digest(&bytes)).unwrap(), None);
    assert_eq!(std::fs::read_dir(dir.path().join("temporary")).unwrap().count(), 0);
}

#[test]
fn damage_on_disk_is_found_when_a_blob_is_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let blob = FileBlob::open(dir.path(), Arc::new(RealDisk), Access::Exclusive).unwrap();
    let name = digest(b"intact");
    blob.put_if_absent(&name, 6, &mut b"intact".as_slice()).unwrap();
    std::fs::write(dir.path().join(&name.to_string()[..2]).join(name.to_string()), b"broken").unwrap();
    assert!(matches!(blob.read_all(&name, 6), Err(StoreError::Refused { .. })));
}

#[test]
fn a_source_that_fails_leaves_nothing() {
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _buffer: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::ConnectionReset.into())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let blob = FileBlob::open(dir.path(), Arc::new(RealDisk), Access::Exclusive).unwrap();
    assert!(blob.put_if_absent(&digest(b"x"), 1, &mut Failing).unwrap_err().is_determinate());
    assert!(blob.list(None, 1).unwrap().is_empty());
}

#[test]
fn injected_faults_say_what_a_caller_may_conclude() {
    let memory = MemoryStorage::default();
    memory.inject(1, Faults { determinate: 0.3, indeterminate: 0.3 });
    let storage = memory.storage();
    let mut applied_though_unsure = 0;
    for number in 0..200 {
        let key = format!("{number}");
        match storage.inbox.append_once("q", &key, b"v") {
            Ok(_) => assert!(storage.inbox.find("q", &key).unwrap().is_some()),
            Err(error) if error.is_determinate() => {
                assert!(storage.inbox.find("q", &key).unwrap().is_none());
            }
            Err(_) => applied_though_unsure += usize::from(storage.inbox.find("q", &key).unwrap().is_some()),
        }
    }
    assert!((10..60).contains(&applied_though_unsure), "{applied_though_unsure}");
}
