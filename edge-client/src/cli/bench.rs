//! `bench`: what this device does a second, and how near that is to what the machine can do at all.
//!
//! The machine's limits are measured first (`bench/limits.rs`). Then each kind of work (`bench/work.rs`) runs in a process
//! of its own, so that its peak memory is its own; it is repeated, and the median counts. How soon a visit's work ends when
//! it is cancelled has no rate and no limit: `bench/stop.rs`.

mod limits;
mod stop;
mod work;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use commonweal_runtime::{
    Cancel, memory,
    profile::{self, Profile, Spent},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Shared, exit::BadInput, open};
use crate::events::Output;
use limits::Limits;
use stop::Stopped;
pub use work::Work;

/// What is measured and how often.
#[derive(Clone, Debug, clap::Args)]
pub struct Request {
    /// Only these kinds of work [default: all]
    #[arg(long, value_enum, value_name = "KIND", value_delimiter = ',')]
    only: Vec<Work>,
    /// Runs of each, the median of which counts
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = super::at_least_one())]
    repeats: usize,
    /// Write ONNX Runtime's profile of each kind of work into this directory, and tell the operators that took most; runs
    /// are some percent slower. Stop has none
    #[arg(long, value_name = "DIR")]
    profile: Option<PathBuf>,
    /// Measure in this process and print the bare figures: how `bench` calls itself
    #[arg(long, hide = true)]
    here: bool,
}

/// One measured kind of work.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Figure {
    work: String,
    /// Median, in `unit`.
    rate: f64,
    unit: String,
    /// Bytes of weights and cache that one unit of the rate must read.
    bytes: f64,
    /// Arithmetic that one unit of the rate needs, additions and multiplications.
    flops: f64,
    /// The most memory that the process held, its runtime and model included.
    peak_mb: Option<f64>,
    /// Where the time of the network's runs went, if that was asked for: the largest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    profile: Vec<Operator>,
}

/// An operator's part of the runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Operator {
    name: String,
    share: f64,
    calls: u64,
    ms: f64,
}

/// The time that is in no operator.
const BETWEEN: &str = "between";
/// Operators with less are told together.
const SHARE_TOLD: f64 = 0.01;

pub(super) fn bench(shared: &Shared, request: &Request) -> Result<()> {
    let kinds = if request.only.is_empty() { Work::all() } else { request.only.clone() };
    if request.here {
        return measure_here(shared, request, &kinds);
    }
    let place = open::Place::find(shared)?;
    // Whatever is wrong with the package is said before anything is measured.
    open::open_package(shared, &place)?;
    if let Some(directory) = &request.profile {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let taken = kinds.iter().map(|kind| directory.join(kind.name())).find(|place| place.exists());
        if let Some(place) = taken {
            let text = format!("{}: expected no profiles yet, they are of another run", place.display());
            return Err(BadInput(text).into());
        }
    }
    let threads = open::threads(shared, &place);
    let limits = Limits::measure(threads);
    let output = shared.output();
    let (read_gb_s, gflop_s) = (limits.bytes / 1e9, limits.flops / 1e9);
    match output {
        Output::Json => {
            let limits = json!({"threads": threads, "read_gb_s": read_gb_s, "gflop_s": gflop_s});
            output.say(&json!({ "limits": limits }));
        }
        Output::Text => {
            let machine = format!("the machine reads {read_gb_s:.1} GB/s and computes {gflop_s:.0} GFLOP/s");
            output.say(&format!("{threads} threads; {machine} (32 bits)\n"));
            let (work, rate, peak, share) = ("work", "rate", "peak MB", "share of limit");
            output.say(&format!("{work:14} {rate:>10} {:14} {peak:>9} {share:>16}", ""));
        }
    }
    let bar = open::bar("bench", kinds.len());
    for kind in kinds {
        let told = measure_apart(shared, request, kind)?;
        let lines =
            read(&told, kind, &limits, output).with_context(|| format!("figures of {}", kind.name()))?;
        bar.suspend(|| lines.iter().for_each(|line| output.say(line)));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// What a process told of a kind of work, as lines.
fn read(told: &[u8], kind: Work, limits: &Limits, output: Output) -> Result<Vec<String>> {
    if kind == Work::Stop {
        let each = serde_json::Deserializer::from_slice(told).into_iter::<Stopped>();
        return each.map(|stopped| stopped?.row(output)).collect();
    }
    let figure: Figure = serde_json::from_slice(told)?;
    Ok(vec![row(&figure, limits.share(&figure), output)?])
}

/// A figure as a line, with its share of a limit and of which.
fn row(figure: &Figure, share: Option<(f64, &str)>, output: Output) -> Result<String> {
    if output == Output::Json {
        let mut object = serde_json::to_value(figure)?;
        object["share"] = json!(share.map(|(share, _)| share));
        object["bound"] = json!(share.map(|(_, bound)| bound));
        return Ok(object.to_string());
    }
    let Figure { work, rate, unit, profile, .. } = figure;
    let peak = figure.peak_mb.map_or("–".into(), |peak| format!("{peak:.0}"));
    let share = share.map_or("–".into(), |(share, bound)| format!("{:.0} % of {bound}", 100.0 * share));
    let line = format!("{work:14} {rate:>10.1} {unit:14} {peak:>9} {share:>16}");
    if profile.is_empty() {
        return Ok(line);
    }
    let told = profile.iter().filter(|operator| operator.share >= SHARE_TOLD);
    let mut parts: Vec<String> = told
        .map(|Operator { name, share, calls, ms }| {
            format!("{name} {:.1} % ({ms:.0} ms, {calls} calls)", 100.0 * share)
        })
        .collect();
    let rest: f64 = profile.iter().map(|operator| operator.share).filter(|share| *share < SHARE_TOLD).sum();
    parts.push(format!("the others {:.1} %", 100.0 * rest));
    Ok(format!("{line}\n  {}", parts.join(", ")))
}

/// The parts of all runs whose profiles are in a directory.
fn parts(directory: &Path) -> Result<Vec<Operator>> {
    let Profile { runs, operators } = profile::read(directory)?;
    if runs.is_zero() {
        return Ok(Vec::new());
    }
    let between = runs.saturating_sub(operators.values().map(|spent| spent.time).sum());
    let all = operators.into_iter().map(|(name, Spent { calls, time })| (name, calls, time));
    let mut parts: Vec<Operator> = all
        .chain([(BETWEEN.to_owned(), 0, between)])
        .map(|(name, calls, time)| {
            let share = time.as_secs_f64() / runs.as_secs_f64();
            Operator { name, share, calls, ms: time.as_secs_f64() * 1e3 }
        })
        .collect();
    parts.sort_by(|one, other| other.share.total_cmp(&one.share));
    Ok(parts)
}

/// In a process of its own, with the same options; what it told.
fn measure_apart(shared: &Shared, request: &Request, kind: Work) -> Result<Vec<u8>> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", "--here", "--json", "--only", kind.name()]);
    command.args(["--repeats", &request.repeats.to_string()]);
    // It tells figures as JSON, and would so tell each time what it runs on.
    if std::env::var_os("RUST_LOG").is_none() {
        command.env("RUST_LOG", "warn");
    }
    for (flag, path) in [
        ("--dir", &shared.dir),
        ("--package", &shared.package),
        ("--library", &shared.library),
        ("--provider", &shared.provider),
        ("--policy", &shared.policy),
        ("--constitution", &shared.constitution),
    ] {
        if let Some(path) = path {
            command.arg(flag).arg(path);
        }
    }
    if let Some(directory) = &request.profile {
        command.arg("--profile").arg(directory);
    }
    if let Some(context) = shared.context {
        command.args(["--context", &context.to_string()]);
    }
    if let Some(device) = &shared.device {
        command.args(["--device", &device.to_string()]);
    }
    if let Some(threads) = shared.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    let done = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !done.status.success() {
        bail!("bench of {} ended with {}", kind.name(), done.status);
    }
    Ok(done.stdout)
}

fn measure_here(shared: &Shared, request: &Request, kinds: &[Work]) -> Result<()> {
    let place = open::Place::find(shared)?;
    for &kind in kinds {
        if kind == Work::Stop {
            for stopped in stop::measure(shared, &place, request.repeats)? {
                shared.output().say(&stopped.row(Output::Json)?);
            }
            continue;
        }
        let directory = request.profile.as_ref().map(|directory| directory.join(kind.name()));
        if let Some(directory) = &directory {
            fs::create_dir(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        }
        // Whatever is tried to choose a device is no part of the work.
        let open = || {
            profile::write_to(None);
            let mut opener = open::Opener::find(shared, &place)?;
            opener.choose(&Cancel::new())?;
            profile::write_to(directory.clone());
            opener.open()
        };
        let mut figure = kind.measure(request.repeats, &open)?;
        figure.peak_mb = memory().map(|memory| memory.resident_bytes_max as f64 / 1e6);
        if let Some(directory) = &directory {
            // The sessions have ended with the work.
            profile::write_to(None);
            figure.profile = parts(directory)?;
        }
        shared.output().say(&serde_json::to_string(&figure)?);
    }
    Ok(())
}
