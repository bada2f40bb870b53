//! The contract of a database whose schema a later version changes: what was stored is there afterwards, or nothing has
//! changed. Of `contract.rs`; each backend brings a change in its own SQL.

use std::thread;

use crate::store::{Append, Coord, Entry, Inbox, Item, PAGE_MAX, StoreError};

/// Entries of the longest log.
const RELEASES: u64 = 40;

/// `open` opens one database, empty at first, as a program does that has these migrations behind this one's. `change` can
/// be made once only; `failing` begins and then fails.
pub fn migration<S: Coord + Inbox>(
    open: impl Fn(&[&'static str]) -> Result<S, StoreError> + Sync,
    change: &'static str,
    failing: &'static str,
) {
    let before = open(&[]).unwrap();
    fill(&before);
    let stored = contents(&before);

    // What went well before the failure is undone with it: this version would refuse the next one's tables.
    let error = open(&[change, failing]).map(drop).unwrap_err();
    assert!(error.is_determinate(), "{error}");
    assert_eq!(contents(&open(&[]).unwrap()), stored);

    // Of several that start at once, one makes the change.
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(contents(&open(&[change]).unwrap()), stored));
        }
    });

    // What was free, leased and done is so still, and a program of before that runs goes on beside one of after.
    let after = open(&[change]).unwrap();
    let keys = |items: Vec<Item>| items.into_iter().map(|item| item.key).collect::<Vec<_>>();
    let numbered = |from: u8, to: u8| (from..to).map(key).collect::<Vec<_>>();
    assert_eq!(keys(after.claim("updates", "second", 149, 50, 100).unwrap()), numbered(20, 30));
    assert_eq!(keys(before.claim("updates", "second", 150, 50, 100).unwrap()), numbered(10, 30));
    assert!(matches!(after.ack("updates", &key(10), "first"), Err(StoreError::LeaseLost { .. })));
    assert_eq!(before.compare_and_set("release", RELEASES, b"before").unwrap(), RELEASES + 1);
    assert_eq!(after.compare_and_set("release", RELEASES + 1, b"after").unwrap(), RELEASES + 2);
    assert_eq!(before.append_once("updates", &key(30), b"before").unwrap(), Append::Appended);
    assert_eq!(after.append_once("updates", &key(31), b"after").unwrap(), Append::Appended);
    assert_eq!(contents(&after), contents(&before));

    // But none of before starts any more.
    match open(&[]).map(drop) {
        Err(StoreError::Schema { expected, got, .. }) => assert_eq!(got, expected + 1),
        other => panic!("expected a refusal of the newer schema, got {other:?}"),
    }
}

fn key(number: u8) -> String {
    format!("{number:02}")
}

/// Logs, of one of which the beginning is forgotten; and a queue: ten items done, ten leased until 150 ms, ten free.
fn fill<S: Coord + Inbox>(store: &S) {
    for (log, entries) in [("release", RELEASES), ("round", 7), ("device/a", 1)] {
        for sequence in 0..entries {
            let value: Vec<u8> = (0..1_000).map(|at| (at + sequence) as u8).collect();
            store.compare_and_set(log, sequence, &value).unwrap();
        }
    }
    store.truncate("release", 21).unwrap();
    for number in 0..30 {
        store.append_once("updates", &key(number), &[number; 1_000]).unwrap();
    }
    assert_eq!(store.claim("updates", "first", 100, 50, 20).unwrap().len(), 20);
    for number in 0..10 {
        store.ack("updates", &key(number), "first").unwrap();
    }
}

/// All of it, by the name of its log; and the queue.
fn contents<S: Coord + Inbox>(store: &S) -> (Vec<(String, Vec<Entry>)>, Vec<Item>) {
    let logs = store.logs("", "", PAGE_MAX).unwrap().into_iter();
    let entries = |log: String| {
        let entries = store.scan(&log, 0, PAGE_MAX).unwrap();
        (log, entries)
    };
    (logs.map(entries).collect(), store.list("updates", PAGE_MAX).unwrap())
}
