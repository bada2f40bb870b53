//! Where the time of a session's runs goes, by operator: ONNX Runtime's own profile, which it writes when a session ends.
//!
//! Once [`write_to`] was called, `opening.rs` opens sessions with a file each; [`read`] adds up what is in them. Each can be
//! looked at node by node in any viewer of Chrome's traces. To be measured this way costs a run some percent of its time.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufReader},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::Deserialize;

/// What the library calls an operator's own work.
const KERNEL: &str = "_kernel_time";
/// And a whole run of a session.
const RUN: &str = "model_run";

/// Where sessions write their profiles.
static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Lets sessions that are opened from now on write a profile into a folder when they end; `None` for no more of them.
pub fn write_to(folder: Option<PathBuf>) {
    *FOLDER.lock().unwrap_or_else(PoisonError::into_inner) = folder;
}

/// How the profile of a graph's session is to begin, to which the library adds the time and an ending.
pub(crate) fn prefix(graph: &Path) -> Option<PathBuf> {
    static OPENINGS: AtomicU64 = AtomicU64::new(0);
    let folder = FOLDER.lock().unwrap_or_else(PoisonError::into_inner);
    let number = OPENINGS.fetch_add(1, Ordering::Relaxed);
    let graph = graph.file_stem().unwrap_or_default().to_string_lossy();
    folder.as_ref().map(|folder| folder.join(format!("{graph}-{number}")))
}

/// What sessions did, all together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// All runs of all sessions.
    pub runs: Duration,
    /// By operator; what is not in them the runs spent between operators.
    pub operators: BTreeMap<String, Spent>,
}

/// What one operator did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// In so many calls.
    pub calls: u64,
    /// All of them.
    pub time: Duration,
}

#[derive(Deserialize)]
struct Event {
    name: String,
    /// Microseconds.
    #[serde(default)]
    dur: u64,
    #[serde(default)]
    args: Arguments,
}

#[derive(Default, Deserialize)]
struct Arguments {
    op_name: Option<String>,
}

impl Profile {
    fn add(&mut self, event: Event) {
        let Event { name, dur, args } = event;
        let time = Duration::from_micros(dur);
        if name == RUN {
            self.runs += time;
        } else if let (true, Some(operator)) = (name.ends_with(KERNEL), args.op_name) {
            let spent = self.operators.entry(operator).or_default();
            spent.calls += 1;
            spent.time += time;
        }
    }
}

/// Adds up the profiles in a folder. To be called when the sessions have ended.
///
/// # Errors
/// A file cannot be read, or is no profile.
pub fn read(folder: &Path) -> io::Result<Profile> {
    let mut profile = Profile::default();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|ending| ending != "json") {
            continue;
        }
        let events: Vec<Event> = serde_json::from_reader(BufReader::new(File::open(&path)?))
            .map_err(|error| io::Error::other(format!("{} is no profile: {error}", path.display())))?;
        for event in events {
            profile.add(event);
        }
    }
    Ok(profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_of_all_files_are_added_up_and_what_is_no_profile_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let event = |name: &str, dur: u64, operator: &str| {
            format!(
                r#"{{"cat":"Node","name":"{name}","dur":{dur},"ts":1,"args":{{"op_name":"{operator}","x":"1"}}}}"#
            )
        };
        let run = r#"{"cat":"Session","name":"model_run","dur":50,"args":{}}"#.to_owned();
        let opening = r#"{"cat":"Session","name":"model_loading_uri","dur":900}"#.to_owned();
        let write = |name: &str, events: &[String]| {
            fs::write(folder.path().join(name), format!("[{}]", events.join(","))).unwrap();
        };
        let product = event("a_kernel_time", 20, "MatMul");
        write("infer-0.json", &[opening, product.clone(), event("a_fence_before", 7, "MatMul"), run.clone()]);
        write("infer-1.json", &[product, event("b_kernel_time", 5, "Add"), run]);
        fs::write(folder.path().join("notes.txt"), "no profile").unwrap();
        let spent = |calls, micros| Spent { calls, time: Duration::from_micros(micros) };
        let operators = BTreeMap::from([("MatMul".into(), spent(2, 40)), ("Add".into(), spent(1, 5))]);
        assert_eq!(read(folder.path()).unwrap(), Profile { runs: Duration::from_micros(100), operators });
        write("train-2.json", &["}".to_owned()]);
        let error = read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("train-2.json is no profile"), "{error}");
    }
}
