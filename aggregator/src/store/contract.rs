//! The contract of the stores: one suite per trait, run on every backend, and that of a schema's change
//! (`contract/migration.rs`), run on every database. Behind the cargo feature `contract`, for the tests of backends that
//! need a server.
//!
//! A case panics where the contract is broken. Each begins with empty stores.

#![expect(clippy::unwrap_used, reason = "a case of the suite fails by panicking")]

mod migration;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use commonweal_protocol::Digest;

use super::{
    Append, Blob, Coord, Entry, Inbox, Item, Lead, NAME_BYTES_MAX, Put, Storage, StoreError, VALUE_BYTES_MAX,
    Watch, While,
};

pub use migration::migration;

/// All five traits, alone and from many threads.
pub fn suite(storage: &Storage) {
    coord(storage.coord.as_ref());
    inbox(storage.inbox.as_ref());
    blob(storage.blob.as_ref());
    watch(&storage.watch);
    lead(storage.lead.as_ref());
    conditions(storage);
    together(storage);
}

/// Who drives.
pub fn lead(lead: &dyn Lead) {
    let long = Duration::from_secs(3600);
    assert!(lead.lead("one", long).unwrap() && lead.lead("one", long).unwrap());
    if lead.is_shared() {
        assert!(!lead.lead("other", long).unwrap());
        lead.resign("other").unwrap();
        assert!(!lead.lead("other", long).unwrap(), "only its holder gives it up");
        lead.resign("one").unwrap();
        assert!(lead.lead("other", Duration::from_millis(1)).unwrap());
        // Whoever does not come back loses it.
        while !lead.lead("one", long).unwrap() {
            thread::sleep(Duration::from_millis(1));
        }
    }
    lead.resign("one").unwrap();
}

/// Writes that another log's head has to stand still for.
fn conditions(storage: &Storage) {
    let (coord, inbox) = (storage.coord.as_ref(), storage.inbox.as_ref());
    let door = |sequence| While { log: "door", sequence };
    let is_moved = |result: Result<_, StoreError>| matches!(result, Err(StoreError::Conflict { log, .. }) if log == "door");
    assert!(is_moved(coord.compare_and_set_while("kept", 0, b"", door(1)).map(drop)));
    assert!(is_moved(inbox.append_once_while("kept", "a", b"A", door(1)).map(drop)));
    coord.compare_and_set("door", 0, b"open").unwrap();
    assert_eq!(coord.compare_and_set_while("kept", 0, b"1", door(1)).unwrap(), 1);
    assert_eq!(coord.compare_and_set_while("kept", 1, b"2", door(1)).unwrap(), 2);
    assert!(matches!(
        coord.compare_and_set_while("kept", 1, b"", door(1)),
        Err(StoreError::Conflict { log, expected: 1, found: 2 }) if log == "kept"
    ));
    assert_eq!(inbox.append_once_while("kept", "a", b"A", door(1)).unwrap(), Append::Appended);
    let again = inbox.append_once_while("kept", "a", b"B", door(1)).unwrap();
    assert_eq!(again, Append::Duplicate(b"A".to_vec()));
    coord.compare_and_set("door", 1, b"shut").unwrap();
    for key in ["a", "b"] {
        assert!(is_moved(inbox.append_once_while("kept", key, b"", door(1)).map(drop)), "{key}");
    }
    assert!(is_moved(coord.compare_and_set_while("kept", 2, b"3", door(1)).map(drop)));
    assert!(is_moved(coord.compare_and_set_while("kept", 9, b"3", door(1)).map(drop)), "both have moved");
    assert_eq!((coord.head("kept").unwrap().unwrap().sequence, inbox.list("kept", 9).unwrap().len()), (2, 1));
    inbox.purge_through("kept").unwrap();

    // What was appended while it was open is seen by whoever shut it, however close they were.
    let appended = std::sync::atomic::AtomicUsize::new(0);
    for round in 1..=20_u64 {
        let queue = format!("late {round:02}");
        let sequence = coord.head("door").unwrap().unwrap().sequence;
        appended.store(0, std::sync::atomic::Ordering::SeqCst);
        let seen = thread::scope(|scope| {
            for writer in 0..4 {
                let (queue, appended) = (&queue, &appended);
                scope.spawn(move || {
                    for key in 0..1_000 {
                        match inbox.append_once_while(queue, &format!("{writer} {key}"), b"", door(sequence))
                        {
                            Ok(_) => appended.fetch_add(1, std::sync::atomic::Ordering::SeqCst),
                            Err(StoreError::Conflict { .. }) => return,
                            Err(error) => panic!("{error}"),
                        };
                    }
                });
            }
            thread::sleep(Duration::from_millis(round));
            coord.compare_and_set("door", sequence, b"").unwrap();
            inbox.list(&queue, 10_000).unwrap().len()
        });
        assert_eq!(seen, appended.load(std::sync::atomic::Ordering::SeqCst), "nothing came behind it");
        inbox.purge_through(&queue).unwrap();
    }
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::of(bytes)
}

/// Logs.
pub fn coord(coord: &dyn Coord) {
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

    coord.compare_and_set("device/a", 1, b"A").unwrap();
    let head = |sequence, value: &[u8]| Entry { sequence, value: value.to_vec() };
    let heads = [("device/a".to_owned(), head(2, b"A")), ("device/b".to_owned(), head(1, b""))];
    assert_eq!(coord.heads("device/", "", 10).unwrap(), heads);
    assert_eq!(coord.heads("device/", "device/a", 10).unwrap(), heads[1..]);
    assert_eq!(coord.heads("device/", "", 1).unwrap(), heads[..1]);

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

/// Queues.
pub fn inbox(inbox: &dyn Inbox) {
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

/// Content by digest.
pub fn blob(blob: &dyn Blob) {
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
    large(blob);
    assert_eq!(blob.list_older(Duration::from_secs(3600), None, 100).unwrap(), [], "all of it is new");
    let [past, future] = [Instant::now(), Instant::now() + Duration::from_secs(3600)].map(Some);
    assert!(blob.delete_all(&names, past).unwrap_err().is_determinate(), "begun too late");
    assert_eq!(blob.list(None, 100).unwrap(), names);
    blob.delete_all(&[names[0], digest(b"never stored")], future).unwrap();
    assert_eq!(blob.list(None, 100).unwrap(), names[1..]);
    blob.delete_all(&[], None).unwrap();
    blob.delete(&name).unwrap();
    blob.delete(&name).unwrap();
    assert_eq!(blob.length(&name).unwrap(), None);
    assert_eq!(blob.mark("one").unwrap(), blob.mark("other").unwrap(), "whose it is does not change");
    assert!(blob.free_bytes().unwrap().is_none_or(|free| free > 0));
}

/// Hints.
pub fn watch(watch: &Arc<dyn Watch>) {
    let mark = watch.mark();
    watch.wait(mark, Duration::ZERO);
    watch.notify();
    // Already notified after the mark: returns at once, however long the timeout.
    watch.wait(mark, Duration::from_secs(3600));
    let mark = watch.mark();
    let other = watch.clone();
    let notifier = thread::spawn(move || other.notify());
    watch.wait(mark, Duration::from_secs(3600));
    notifier.join().unwrap();
}

/// What does not fit into one piece of whatever a backend sends at once.
fn large(blob: &dyn Blob) {
    let bytes: Vec<u8> = (0..20_000_003_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (name, length) = (digest(&bytes), bytes.len() as u64);
    let put = |name: &Digest, length: u64| blob.put_if_absent(name, length, &mut bytes.as_slice());
    for (name, length) in [(name, length - 1), (name, length + 1), (digest(b"another"), length)] {
        assert!(put(&name, length).unwrap_err().is_determinate());
        assert_eq!(blob.length(&name).unwrap(), None, "nothing of what is refused is there");
    }
    assert_eq!(put(&name, length).unwrap(), Put::Stored);
    assert_eq!(blob.length(&name).unwrap(), Some(length));
    assert_eq!(blob.read_range(&name, length - 3, 1 << 20).unwrap(), bytes[bytes.len() - 3..]);
    assert_eq!(digest(&blob.read_all(&name, length).unwrap()), name);
    blob.delete(&name).unwrap();
}

const WRITERS: usize = 8;
const WRITES: usize = 25;

/// Several threads at once: every head is moved by one of them, every key is stored and held by one.
fn together(storage: &Storage) {
    let each = |work: &(dyn Fn(usize) + Sync)| {
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                scope.spawn(move || work(writer));
            }
        });
    };
    each(&|writer| {
        let mut moved = 0;
        while moved < WRITES {
            let head = storage.coord.head("contended").unwrap().map_or(0, |entry| entry.sequence);
            let value = format!("{writer} {moved}");
            match storage.coord.compare_and_set("contended", head, value.as_bytes()) {
                Ok(sequence) => {
                    assert_eq!(sequence, head + 1);
                    moved += 1;
                }
                Err(StoreError::Conflict { expected, found, .. }) => {
                    assert!(expected == head && found > head);
                }
                Err(error) => panic!("{error}"),
            }
            storage.coord.truncate("contended", 0).unwrap();
        }
    });
    let entries = storage.coord.scan("contended", 1, WRITERS * WRITES + 1).unwrap();
    let values: BTreeSet<_> = entries.iter().map(|entry| entry.value.clone()).collect();
    assert_eq!(
        (entries.len(), values.len()),
        (WRITERS * WRITES, WRITERS * WRITES),
        "each write is there once"
    );

    let appended = std::sync::atomic::AtomicUsize::new(0);
    each(&|writer| {
        for key in 0..WRITES {
            let value = format!("{writer}");
            match storage.inbox.append_once("contended", &format!("{key:02}"), value.as_bytes()).unwrap() {
                Append::Appended => drop(appended.fetch_add(1, std::sync::atomic::Ordering::SeqCst)),
                Append::Duplicate(found) => assert_ne!(found, value.as_bytes()),
            }
        }
    });
    assert_eq!(appended.into_inner(), WRITES, "each key is stored once");
    let held = std::sync::Mutex::new(Vec::new());
    each(&|writer| {
        let items = storage.inbox.claim("contended", &format!("{writer}"), 1, 1_000, WRITES).unwrap();
        held.lock().unwrap().extend(items.into_iter().map(|item| item.key));
    });
    let held = held.into_inner().unwrap();
    let keys: BTreeSet<_> = held.iter().collect();
    assert_eq!((held.len(), keys.len()), (WRITES, WRITES), "each item is held by one");
    storage.inbox.purge_through("contended").unwrap();

    let bytes = vec![7; 100_000];
    each(&|_| {
        storage.blob.put_if_absent(&digest(&bytes), 100_000, &mut bytes.as_slice()).unwrap();
    });
    assert_eq!(storage.blob.read_all(&digest(&bytes), 100_000).unwrap(), bytes);
}
