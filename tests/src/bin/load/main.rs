//! The program `load`: thousands of devices and one aggregator on this machine, over real QUIC with mutual TLS and real
//! disks. How much it answers, how fast, and what gives way first.
//!
//! The aggregator is a process of its own (`serving.rs`), or several over a PostgreSQL (`site.rs`); the devices are here (`devices.rs`). All enrol over the network
//! first. Then, for each number of them that visit at once, devices come for a while, each visit with a connection of its
//! own, or with `--reuse` over the one of the visit before, if there was room to keep it (`kept.rs`): it
//! asks for work, fetches the release if it has another, delivers an update if it got a task. There is no model. Devices
//! and aggregator share the processors, so the aggregator's own share of the time is told beside the rate.

mod devices;
mod kept;
mod process;
mod serving;
mod share;
mod site;

use std::{path::PathBuf, process::ExitCode};

use aggregator::serve::Role;
use anyhow::Result;
use clap::{Parser, Subcommand};
use commonweal_tests::child;
use serde::Serialize;

use devices::{Fleet, Level};
use process::Used;
use site::Site;

/// Sends thousands of devices to one aggregator, and measures what it answers.
///
/// Prints a line for each number of devices that visit at once. Exit codes: 0 done, 1 failed, 2 usage.
#[derive(Clone, Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  load\n  load --devices 500 --at-once 16,64 --seconds 5 --json\n  \
        load --devices 400 --at-once 8,32 --reuse"
)]
struct Arguments {
    /// Devices, all with an identity of their own
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=20_000))]
    devices: u32,
    /// How many of them visit at once, one measurement each
    #[arg(long, default_values_t = [8, 64, 256, 500, 1000], value_delimiter = ',', value_name = "N,…")]
    at_once: Vec<u32>,
    /// How long each measurement takes
    #[arg(long, default_value_t = 20, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Updates that a round wants [default: a tenth of the devices]
    #[arg(long, value_name = "N")]
    goal: Option<u32>,
    /// Devices keep their connection between visits: as many of them as the aggregator has connections for, two of each visit
    /// under way not counted. Those that find no room make a new one for each visit, as all do without this
    #[arg(long)]
    reuse: bool,
    /// Size of the adapter, in MB (10⁶ bytes) of 32-bit values; an update is a quarter of it
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=400))]
    adapter_mb: u32,
    /// Processes that answer devices, over a PostgreSQL of their own, beside one that drives; 0 for one aggregator with all
    /// in its directory
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=16))]
    fronts: u32,
    /// At most so much of a core for each of these, as on a small machine of its own [default: no bound]
    #[arg(long, value_name = "SHARE", requires = "fronts", value_parser = share_of_a_core)]
    front_cores: Option<f64>,
    /// Where to keep the aggregator's files, and leave them [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

fn share_of_a_core(text: &str) -> Result<f64, String> {
    let share = text.parse().map_err(|_| "expected a number".to_owned())?;
    if (0.05..=64.0).contains(&share) { Ok(share) } else { Err("expected 0.05 to 64".to_owned()) }
}

impl Arguments {
    fn goal(&self) -> u32 {
        self.goal.unwrap_or(self.devices / 10).max(1)
    }
}

/// How the program calls itself.
#[derive(Clone, Debug, Subcommand)]
enum Part {
    /// Be the aggregator of a directory
    #[command(hide = true)]
    Serve { dir: PathBuf, role: Role },
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    devices: u32,
    goal: u32,
    adapter_mb: u32,
    fronts: u32,
    front_cores: Option<f64>,
    /// Whether devices keep their connections between visits.
    reuse: bool,
    cores: usize,
    enrolling: Level,
    enrolling_used: Used,
    visiting: Vec<(Level, Used)>,
}

/// As the aggregator's program has it.
#[global_allocator]
static ALLOCATOR: aggregator::Allocator = aggregator::Allocator;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    child::program("error", || match &arguments.part {
        Some(Part::Serve { dir, role }) => serving::serve(&arguments, dir, *role),
        None => measure(&arguments),
    })
}

fn measure(arguments: &Arguments) -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let site = Site::start(arguments, arguments.dir.as_deref().unwrap_or(temporary.path()))?;

    let before = site.used()?;
    let (mut fleet, enrolling) = Fleet::enroll(arguments, &site.invitations, &site.ports)?;
    let enrolling_used = site.used()?.since(&before);
    eprintln!("{} devices enrolled, {:.0} a second", arguments.devices, enrolling.rate());
    let mut visiting = Vec::new();
    for &at_once in &arguments.at_once {
        let before = site.used()?;
        let level = fleet.visit(at_once, arguments.seconds)?;
        visiting.push((level, site.used()?.since(&before)));
        eprintln!("{at_once} at once: measured");
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let &Arguments { devices, adapter_mb, fronts, front_cores, reuse, .. } = arguments;
    let goal = arguments.goal();
    let report = Report {
        devices,
        goal,
        adapter_mb,
        fronts,
        front_cores,
        reuse,
        cores,
        enrolling,
        enrolling_used,
        visiting,
    };
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

impl std::fmt::Display for Report {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            devices,
            goal,
            adapter_mb,
            fronts,
            front_cores,
            reuse,
            cores,
            enrolling,
            enrolling_used,
            visiting,
        } = self;
        writeln!(
            formatter,
            "{devices} devices, rounds of {goal} updates, an adapter of {adapter_mb} MB; {cores} cores for both sides"
        )?;
        if *fronts > 0 {
            let each = front_cores.map_or_else(String::new, |cores| format!(" (each {cores} of a core)"));
            writeln!(
                formatter,
                "PostgreSQL, {fronts} processes that answer devices{each} and one that drives"
            )?;
        }
        let how = if *reuse {
            "over the connection of the one before, where it is kept"
        } else {
            "over a new connection"
        };
        writeln!(formatter, "each visit {how}")?;
        writeln!(
            formatter,
            "enrolling: {:.0} a second, p50 {:.0} ms, p99 {:.0} ms; the aggregator took {:.2} cores",
            enrolling.rate(),
            enrolling.visit.p50,
            enrolling.visit.p99,
            enrolling_used.cpu_seconds / enrolling.seconds
        )?;
        writeln!(formatter)?;
        writeln!(
            formatter,
            "| at once | visits/s | asking, ms p50 / p95 / p99 | whole visit, ms p50 / p99 | updates | releases fetched | refused, busy | failed | aggregator, cores | database, cores | peak MB |{}",
            if *reuse { " stay connected | visits over a kept connection |" } else { "" }
        )?;
        let columns = if *reuse { 13 } else { 11 };
        writeln!(formatter, "|{}", "---|".repeat(columns))?;
        for (level, used) in visiting {
            let Level { at_once, poll, visit, updates, fetched, busy, failed, seconds, .. } = level;
            write!(
                formatter,
                "| {at_once} | {:.0} | {:.0} / {:.0} / {:.0} | {:.0} / {:.0} | {updates} | {fetched} | {busy} | {failed} | {:.2} | {:.2} | {:.0} |",
                level.rate(),
                poll.p50,
                poll.p95,
                poll.p99,
                visit.p50,
                visit.p99,
                used.cpu_seconds / seconds,
                used.database_seconds / seconds,
                used.peak_mb
            )?;
            if *reuse {
                write!(formatter, " {} | {} |", level.connected, level.reused)?;
            }
            writeln!(formatter)?;
        }
        Ok(())
    }
}
