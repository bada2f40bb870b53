//! Samples as they are kept in the state directory: each once, with where it came from, when, and whether a round has
//! drawn it.
//!
//! Between `sample.rs`, whose checked conversations these are, and `work.rs`, which draws from them. `forget.rs` takes them
//! away. The files are sealed (`vault.rs`).

use std::{collections::BTreeSet, fs, io, time::UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::{
    control, owed,
    rows::{self, Parsed},
    sample::{Sample, SampleId},
    store::{Held, Store, StoreError, at},
};

const FOLDER: &str = "samples";
/// The samples that a round has drawn: what compression owes, and the rest that rounds leave, may come of them.
const USED: &str = "used.samples";
/// Held while samples are added or taken away.
const LOCK: &str = "samples.lock";
/// All samples of a device. A round draws from all of them, in memory.
const STORE_BYTES_MAX: u64 = rows::FILE_BYTES_MAX;
/// A longer name of a file is cut.
const SOURCE_CHARS_MAX: usize = 200;

/// A sample as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The conversation.
    pub sample: Sample,
    /// The name of the file it came in, or `serve`; unknown for those of a program of before.
    pub source: Option<String>,
    /// When, in milliseconds since 1970; for those of a program of before, when its file was last written.
    pub added_ms: u64,
}

/// A line of a file.
#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    sample: Sample,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(default)]
    added_ms: Option<u64>,
}

/// Adds what a file gave, as far as it is new; tells how much that was.
pub fn keep(store: &Store, parsed: &Parsed<Sample>, source: &str, now_ms: u64) -> Result<usize, StoreError> {
    let held = hold(store)?;
    add(store, &held, parsed, source, now_ms)
}

/// The same, for whoever holds the samples already.
pub(crate) fn add(
    store: &Store,
    _held: &Held,
    parsed: &Parsed<Sample>,
    source: &str,
    now_ms: u64,
) -> Result<usize, StoreError> {
    let mut known: BTreeSet<SampleId> = all(store)?.iter().map(|kept| kept.sample.id()).collect();
    let source: String = source.chars().take(SOURCE_CHARS_MAX).collect();
    let new = parsed.good.iter().filter(|(_, sample)| known.insert(sample.id())).map(|(_, sample)| Kept {
        sample: sample.clone(),
        source: Some(source.clone()),
        added_ms: now_ms,
    });
    let new: Vec<Kept> = new.collect();
    if !new.is_empty() {
        let text = encode(store, &new)?;
        store.require_room(FOLDER, text.len() as u64, STORE_BYTES_MAX)?;
        let next =
            store.list(FOLDER)?.last().and_then(|name| name.get(..6)?.parse::<u32>().ok()).unwrap_or(0) + 1;
        store.write_within(&format!("{FOLDER}/{next:06}.jsonl"), &text)?;
    }
    Ok(new.len())
}

fn encode(store: &Store, some: &[Kept]) -> Result<Vec<u8>, StoreError> {
    let mut text = Vec::new();
    for Kept { sample, source, added_ms } in some {
        let line = Line { sample: sample.clone(), source: source.clone(), added_ms: Some(*added_ms) };
        serde_json::to_writer(&mut text, &line).map_err(|error| StoreError::Damaged {
            path: store.path(FOLDER),
            reason: format!("sample does not encode: {error}"),
        })?;
        text.push(b'\n');
    }
    Ok(text)
}

/// Everything that is kept, in the order in which it came.
pub fn all(store: &Store) -> Result<Vec<Kept>, StoreError> {
    let mut kept = Vec::new();
    for name in store.list(FOLDER)? {
        kept.extend(read(store, &format!("{FOLDER}/{name}"))?);
    }
    Ok(kept)
}

/// The conversations alone.
pub fn samples(store: &Store) -> Result<Vec<Sample>, StoreError> {
    Ok(all(store)?.into_iter().map(|kept| kept.sample).collect())
}

fn read(store: &Store, name: &str) -> Result<Vec<Kept>, StoreError> {
    let path = store.path(name);
    let written = match fs::metadata(&path).and_then(|metadata| metadata.modified()) {
        Ok(time) => time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at("look at", &path)(error)),
    };
    let parse = |(line, text): (usize, &String)| {
        let Line { sample, source, added_ms } =
            serde_json::from_str(text).map_err(|error| StoreError::Damaged {
                path: path.clone(),
                reason: format!("line {}: {}", line + 1, rows::place(&error)),
            })?;
        Ok(Kept { sample, source, added_ms: added_ms.unwrap_or(written) })
    };
    store.lines(name)?.iter().enumerate().map(parse).collect()
}

/// Until it is dropped, nobody else adds samples or takes any away.
pub(crate) fn hold(store: &Store) -> Result<Held, StoreError> {
    store.hold(LOCK)
}

/// Takes samples away, a file at a time, and what writing files that a kill cut short has left; can be done again.
pub(crate) fn remove(store: &Store, ids: &BTreeSet<SampleId>) -> Result<(), StoreError> {
    let _held = hold(store)?;
    store.remove_parts()?;
    for name in store.list(FOLDER)? {
        let name = format!("{FOLDER}/{name}");
        let before = read(store, &name)?;
        let count = before.len();
        let left: Vec<Kept> = before.into_iter().filter(|kept| !ids.contains(&kept.sample.id())).collect();
        if left.is_empty() {
            store.remove(&name)?;
        } else if left.len() < count {
            store.write(&name, &encode(store, &left)?)?;
        }
    }
    Ok(())
}

/// The samples that rounds have drawn; `None`, any of them, where nobody has written that down yet or it does not open.
pub fn used(store: &Store) -> Result<Option<BTreeSet<SampleId>>, StoreError> {
    store.read_remade(USED)?.map(|bytes| ids_of(store, USED, &bytes)).transpose()
}

/// Before a round works on them.
pub(crate) fn mark_used<'s>(
    store: &Store,
    drawn: impl Iterator<Item = &'s Sample>,
) -> Result<(), StoreError> {
    let before = match used(store)? {
        Some(used) => used,
        // A program of before left what it made of samples, and not of which.
        None if owed::is_any(store) || control::is_any(store) => {
            samples(store)?.iter().map(Sample::id).collect()
        }
        None => BTreeSet::new(),
    };
    let mut after = before.clone();
    after.extend(drawn.map(Sample::id));
    if after == before && store.exists(USED) { Ok(()) } else { write_ids(store, USED, &after) }
}

/// After they were forgotten.
pub(crate) fn unmark(store: &Store, ids: &BTreeSet<SampleId>) -> Result<(), StoreError> {
    match used(store)? {
        Some(used) if !used.is_disjoint(ids) => write_ids(store, USED, &(&used - ids)),
        _ => Ok(()),
    }
}

/// A file of samples' names, one after the other.
pub(crate) fn read_ids(store: &Store, name: &str) -> Result<Option<BTreeSet<SampleId>>, StoreError> {
    store.read(name)?.map(|bytes| ids_of(store, name, &bytes)).transpose()
}

fn ids_of(store: &Store, name: &str, bytes: &[u8]) -> Result<BTreeSet<SampleId>, StoreError> {
    let (ids, rest) = bytes.as_chunks();
    if !rest.is_empty() {
        let reason = "expected whole names of samples".into();
        return Err(StoreError::Damaged { path: store.path(name), reason });
    }
    Ok(ids.iter().copied().map(SampleId::from_bytes).collect())
}

pub(crate) fn write_ids(store: &Store, name: &str, ids: &BTreeSet<SampleId>) -> Result<(), StoreError> {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.bytes()).collect();
    store.write(name, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn some(numbers: std::ops::Range<usize>) -> Parsed<Sample> {
        let sample = |i| Sample::from_pair(format!("p{i}"), "r".into()).unwrap();
        Parsed { good: numbers.map(|i| (i, sample(i))).collect(), bad: Vec::new() }
    }

    #[test]
    fn each_sample_is_kept_once_with_its_source_and_its_date() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(keep(&store, &some(0..5), "a.jsonl", 1_000).unwrap(), 5);
        assert_eq!(keep(&store, &some(3..8), "b.jsonl", 2_000).unwrap(), 3);
        assert_eq!(keep(&store, &some(3..8), "c.jsonl", 3_000).unwrap(), 0);
        let all = all(&store).unwrap();
        let told: Vec<_> = all.iter().map(|kept| (kept.source.as_deref().unwrap(), kept.added_ms)).collect();
        assert_eq!(told[4..6], [("a.jsonl", 1_000), ("b.jsonl", 2_000)]);
        assert_eq!(all.len(), 8);
        assert_eq!(samples(&store).unwrap()[7], some(7..8).good[0].1);
    }

    #[test]
    fn samples_of_a_program_of_before_are_as_old_as_their_file() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let line = serde_json::to_string(&some(0..1).good[0].1).unwrap();
        store.write("samples/000001.jsonl", format!("{line}\n").as_bytes()).unwrap();
        let kept = all(&store).unwrap().remove(0);
        assert!(kept.source.is_none() && kept.added_ms > 1_700_000_000_000, "{kept:?}");
        // A neighbour that goes takes no date with it.
        keep(&store, &some(1..2), "a", 5).unwrap();
        remove(&store, &BTreeSet::from([some(1..2).good[0].1.id()])).unwrap();
        assert_eq!(all(&store).unwrap(), [kept]);
        assert_eq!(store.list(FOLDER).unwrap(), ["000001.jsonl"]);
    }

    #[test]
    fn sealing_what_a_program_of_before_left_makes_it_no_younger() {
        let directory = tempfile::tempdir().unwrap();
        let line = serde_json::to_string(&some(0..1).good[0].1).unwrap();
        let path = directory.path().join("samples/000001.jsonl");
        fs::create_dir(directory.path().join("samples")).unwrap();
        fs::write(&path, format!("{line}\n")).unwrap();
        let written = UNIX_EPOCH + std::time::Duration::from_secs(1_600_000_000);
        fs::File::options().write(true).open(&path).unwrap().set_modified(written).unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert!(crate::seal::is_sealed(&fs::read(&path).unwrap()));
        assert_eq!(all(&store).unwrap()[0].added_ms, 1_600_000_000_000);
    }

    #[test]
    fn what_a_round_drew_is_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        keep(&store, &some(0..4), "a", 1).unwrap();
        let all = samples(&store).unwrap();
        assert_eq!(used(&store).unwrap(), None);
        mark_used(&store, all[..2].iter()).unwrap();
        mark_used(&store, all[1..3].iter()).unwrap();
        let names = |some: &[Sample]| some.iter().map(Sample::id).collect::<BTreeSet<_>>();
        assert_eq!(used(&store).unwrap(), Some(names(&all[..3])));
        unmark(&store, &names(&all[..1])).unwrap();
        assert_eq!(used(&store).unwrap(), Some(names(&all[1..3])));
        // Of what a program of before owes, nobody knows the samples: it may be any.
        store.remove(USED).unwrap();
        store.write("residual.bin", b"x").unwrap();
        mark_used(&store, all[..1].iter()).unwrap();
        assert_eq!(used(&store).unwrap(), Some(names(&all)));
    }
}
