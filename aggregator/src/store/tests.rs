//! Every backend that needs no server keeps the contract; and what each owes beyond it.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use commonweal_protocol::Digest;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;

use super::bridge::Bridge;
use super::contract::{migration, suite};
use super::*;

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(bytes)
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
fn objects_keep_the_contract_wherever_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let files = LocalFileSystem::new_with_prefix(dir.path()).unwrap().with_fsync(true);
    let bridge = Bridge::start().unwrap();
    let stores: [Arc<dyn object_store::ObjectStore>; 2] = [Arc::new(files), Arc::new(InMemory::new())];
    for (store, prefix) in stores.into_iter().zip(["a/prefix", ""]) {
        let blob = ObjectBlob::over(store.clone(), prefix.into(), false, bridge.clone());
        // Somebody else's objects beside them are none of ours.
        let path = object_store::path::Path::from(prefix).join("notes.txt");
        let put = async move { object_store::ObjectStoreExt::put(&store, &path, "hello".into()).await };
        bridge.wait(Duration::from_secs(60), put).unwrap().unwrap();
        suite(&Storage { blob: Arc::new(blob), ..MemoryStorage::default().storage() });
    }
}

#[test]
fn a_folder_that_is_shared_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let objects = Some(format!("file://{}", dir.path().join("objects").display()));
    let settings = config::Storage { objects, ..config::Storage::default() };
    suite(&Storage::of(dir.path(), &settings, Access::Exclusive).unwrap());
    assert!(dir.path().join("objects/temporary").is_dir() && !dir.path().join("blobs").exists());
}

#[test]
fn objects_of_another_federation_are_refused() {
    let [one, other, shared] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let open = |dir: &tempfile::TempDir, prefix: &str| {
        let objects = Some(format!("file://{}", shared.path().join(prefix).display()));
        let settings = config::Storage { objects, ..config::Storage::default() };
        Storage::of(dir.path(), &settings, Access::Exclusive)
    };
    open(&one, "a").unwrap();
    let error = open(&other, "a").unwrap_err();
    assert!(error.to_string().starts_with("storage.objects: expected objects of this database's"), "{error}");
    open(&other, "b").unwrap();
    open(&one, "a").unwrap();
    std::fs::write(shared.path().join("a").join(MARK), [b'x'; 1_000]).unwrap();
    assert!(open(&one, "a").is_err());
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
fn a_later_versions_schema_keeps_what_is_stored_or_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aggregator.db");
    migration(
        |further| SqliteStore::open_later(&path, further),
        "ALTER TABLE inbox ADD COLUMN note TEXT NOT NULL DEFAULT 'later'; UPDATE inbox SET note = 'before'",
        "CREATE TABLE half (whole INTEGER NOT NULL); INSERT INTO half VALUES (NULL)",
    );
    let connection = rusqlite::Connection::open(&path).unwrap();
    let count = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(count("PRAGMA user_version"), 2);
    assert_eq!(
        count("SELECT count(*) FROM inbox WHERE note = 'before'"),
        30,
        "the change was made of what was there"
    );
    assert_eq!(count("SELECT count(*) FROM inbox WHERE note = 'later'"), 2);
    assert_eq!(count("SELECT count(*) FROM sqlite_schema WHERE name = 'half'"), 0);
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

/// Two hours ago, as far as its file says.
fn make_old(file: &Path) {
    let then = std::time::SystemTime::now() - Duration::from_secs(7_200);
    std::fs::File::options().write(true).open(file).unwrap().set_modified(then).unwrap();
}

#[test]
fn what_is_stored_again_is_new_again_where_others_might_delete_it() {
    const HOUR: Duration = Duration::from_secs(3_600);
    let dir = tempfile::tempdir().unwrap();
    let name = digest(b"x");
    let at = |folder: &str| dir.path().join(folder).join(&name.to_string()[..2]).join(name.to_string());
    let files = |folder: &str, access| -> (Arc<dyn Blob>, std::path::PathBuf) {
        (Arc::new(FileBlob::open(&dir.path().join(folder), Arc::new(RealDisk), access).unwrap()), at(folder))
    };
    let bridge = Bridge::start().unwrap();
    let objects = dir.path().join("objects");
    std::fs::create_dir(&objects).unwrap();
    let store = Arc::new(LocalFileSystem::new_with_prefix(&objects).unwrap());
    let bucket: Arc<dyn Blob> = Arc::new(ObjectBlob::over(store, "".into(), false, bridge));
    for ((blob, file), is_shared) in [
        (files("alone", Access::Exclusive), false),
        (files("shared", Access::Shared), true),
        ((bucket, objects.join(name.to_string())), true),
    ] {
        let put = || blob.put_if_absent(&name, 1, &mut b"x".as_slice()).unwrap();
        assert_eq!(put(), Put::Stored);
        assert!(blob.list_older(HOUR, None, 9).unwrap().is_empty());
        make_old(&file);
        assert_eq!(blob.list_older(HOUR, None, 9).unwrap(), [name]);
        assert_eq!(put(), Put::Present);
        assert_eq!(blob.list_older(HOUR, None, 9).unwrap().is_empty(), is_shared, "{}", file.display());
        assert_eq!(blob.list(None, 9).unwrap(), [name]);
    }
}
