//! What is done: one JSON line a finished round and a finished federation, appended and synced, so that a killed run goes
//! on where it was. A results file belongs to one plan; another plan is refused by name.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

use aggregator::desk::Record;
use anyhow::{Context, Result, bail};
use commonweal_safety::Confusion;
use serde::{Deserialize, Serialize};

use crate::{arms::Arm, measure::Measures};

const RESULTS: &str = "results.jsonl";
const PLAN: &str = "plan.json";

/// One line.
#[derive(Serialize)]
#[serde(tag = "line", rename_all = "lowercase")]
pub(crate) enum Line<'a> {
    /// A round is over.
    Round {
        arm: &'a str,
        seed: u64,
        /// The aggregator's own record.
        record: &'a Record,
        /// Wall time of the devices, together.
        device_seconds: f64,
    },
    /// How the filter does on what clients hold; of each kind of harmful sample how many it finds, and of how many.
    Guard { screened: Confusion, kinds: &'a BTreeMap<String, (u32, u32)> },
    /// A federation is over and measured.
    End { arm: &'a Arm, seed: u64, ended: &'a Ended },
}

/// A federation's end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Ended {
    pub(crate) measures: Measures,
    pub(crate) rounds: u64,
    /// Rounds whose candidate was published.
    pub(crate) published: u64,
    pub(crate) uploaded_bytes: u64,
    /// Of the uploads, headers included.
    pub(crate) bits_per_parameter: Option<f64>,
    /// Samples over all devices and rounds: kept, dropped, refused, revised; as the devices report them.
    pub(crate) samples: BTreeMap<String, u64>,
    pub(crate) device_seconds: f64,
    /// Of the aggregator, by stage.
    pub(crate) stage_seconds: BTreeMap<String, f64>,
    /// Names the adapter: the same for the same seed, whatever carries it.
    pub(crate) adapter: String,
}

/// The results' folder.
pub(crate) struct State {
    path: PathBuf,
    done: BTreeSet<(String, u64)>,
    /// Of each federation with a finished round, the devices' seconds.
    begun: BTreeMap<(String, u64), f64>,
    has_guard: bool,
}

#[derive(Deserialize)]
struct Read {
    line: String,
    #[serde(default)]
    arm: serde_json::Value,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    device_seconds: f64,
}

impl State {
    /// Takes up a folder; `plan` must be what its results were begun with.
    pub(crate) fn open(folder: &Path, plan: &serde_json::Value) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let known = folder.join(PLAN);
        match fs::read_to_string(&known) {
            Ok(text) => {
                let before: serde_json::Value =
                    serde_json::from_str(&text).with_context(|| known.display().to_string())?;
                if before != *plan {
                    bail!(
                        "{}: holds the results of another plan ({}); name another --out, or remove it",
                        folder.display(),
                        difference(&before, plan)
                    );
                }
            }
            Err(_) => {
                fs::write(&known, format!("{plan:#}\n")).with_context(|| known.display().to_string())?;
            }
        }
        let path = folder.join(RESULTS);
        let (mut done, mut begun, mut has_guard) = (BTreeSet::new(), BTreeMap::new(), false);
        if let Ok(file) = File::open(&path) {
            for line in BufReader::new(file).lines() {
                // A kill may have cut the last line; what it said is then done again.
                let Ok(read) = serde_json::from_str::<Read>(&line?) else { continue };
                has_guard |= read.line == "guard";
                if let ("round", Some(name)) = (read.line.as_str(), read.arm.as_str()) {
                    *begun.entry((name.to_owned(), read.seed)).or_default() += read.device_seconds;
                }
                if let ("end", Some(name)) = (read.line.as_str(), read.arm["name"].as_str()) {
                    done.insert((name.to_owned(), read.seed));
                }
            }
        }
        Ok(Self { path, done, begun, has_guard })
    }

    /// Whether a federation is over.
    pub(crate) fn is_done(&self, arm: &str, seed: u64) -> bool {
        self.done.contains(&(arm.to_owned(), seed))
    }

    /// The devices' seconds of a federation that has finished a round and not ended.
    pub(crate) fn begun(&self, arm: &str, seed: u64) -> Option<f64> {
        self.begun.get(&(arm.to_owned(), seed)).copied()
    }

    /// Whether the filter was measured.
    pub(crate) fn has_guard(&self) -> bool {
        self.has_guard
    }

    /// Appends a line.
    pub(crate) fn keep(&self, line: &Line<'_>) -> Result<()> {
        // A line that a kill cut short must not swallow this one.
        let cut = fs::read(&self.path).is_ok_and(|bytes| bytes.last().is_some_and(|last| *last != b'\n'));
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        file.write_all(if cut { b"\n" } else { b"" })?;
        file.write_all(text.as_bytes())?;
        file.sync_all().with_context(|| self.path.display().to_string())
    }
}

/// The fields in which two plans differ.
fn difference(before: &serde_json::Value, plan: &serde_json::Value) -> String {
    let empty = serde_json::Map::new();
    let (before, plan) = (before.as_object().unwrap_or(&empty), plan.as_object().unwrap_or(&empty));
    let names: BTreeSet<&String> = before.keys().chain(plan.keys()).collect();
    let other = names.into_iter().filter(|name| before.get(*name) != plan.get(*name));
    other.map(String::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

    use super::*;

    #[test]
    fn what_a_kill_cut_short_is_done_again_and_costs_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let plan = serde_json::json!({"rounds": 3});
        let arms = crate::arms::main_arms(None);
        let ended = Ended::default();
        let state = State::open(folder.path(), &plan).unwrap();
        state.keep(&Line::End { arm: &arms[0], seed: 1, ended: &ended }).unwrap();
        let round = Line::Round { arm: "begun", seed: 1, record: &Record::default(), device_seconds: 2.0 };
        state.keep(&round).unwrap();
        state.keep(&round).unwrap();
        let path = folder.path().join(RESULTS);
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{whole}{}", &whole[..whole.len() / 2])).unwrap();
        let state = State::open(folder.path(), &plan).unwrap();
        assert!(state.begun("begun", 1).is_some_and(|seconds| (seconds - 4.0).abs() < 1e-9));
        assert!(state.begun("begun", 2).is_none());
        assert!(state.is_done(&arms[0].name, 1) && !state.is_done(&arms[0].name, 2));
        state.keep(&Line::End { arm: &arms[1], seed: 1, ended: &ended }).unwrap();
        assert!(State::open(folder.path(), &plan).unwrap().is_done(&arms[1].name, 1));
    }

    #[test]
    fn another_plan_is_refused_by_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        State::open(folder.path(), &serde_json::json!({"rounds": 3, "steps": 5})).unwrap();
        let error = State::open(folder.path(), &serde_json::json!({"rounds": 4, "steps": 5})).err().unwrap();
        assert!(error.to_string().contains("(rounds)"), "{error}");
    }
}
