//! The program `torture`: `kill -9`, again and again, of an aggregator and its devices while they hold rounds and hostile peers
//! are at it, and disks that fill up and turn read-only under them. What was acknowledged must be there in the end, once.
//!
//! The aggregator and each device are processes of their own (`serving.rs`, `device.rs`); this one kills them at moments
//! that a seed draws (`kills.rs`), is the hostile peers meanwhile (`peers.rs`), spoils the aggregator's disk and a device's
//! (`disks.rs`), and looks at what both sides have on disk afterwards (`verdict.rs` of the tests). With `--fronts` the
//! aggregator is several processes over one PostgreSQL: so many that answer devices, and two of which one drives. There is
//! no model: nothing is trained, aligned or evaluated, so that thousands of rounds fit into minutes; `tests/kill.rs` kills
//! the real programs at chosen places.

mod device;
mod disks;
mod fleet;
mod kills;
mod peers;
mod serving;

use std::{path::PathBuf, process::ExitCode};

use aggregator::serve::Role;
use anyhow::Result;
use clap::{Parser, Subcommand};
use commonweal_tests::{child, verdict};
use serde::Serialize;

/// Kills an aggregator and its devices at random moments, and counts what was lost.
///
/// All the while, hostile peers are at the aggregator: strangers and a device that dribble and hold streams, a device that
/// says its frames again, one that sends damaged frames and garbage. Then the aggregator's disk is filled and made read-only,
/// and a device's. Ends with the counts of each part. Exit codes: 0 nothing was lost, 1 something was or a process ended by itself, 2
/// usage. What a part needs and this machine does not allow is skipped, and the last lines say so.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = "Examples:\n  torture\n  torture --cycles 50 --seed 7 --json")]
struct Arguments {
    /// Kills
    #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    cycles: u64,
    /// Devices
    #[arg(long, default_value_t = 6, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=64))]
    devices: u32,
    /// Processes that answer devices, over a PostgreSQL of their own, beside two that drive; 0 for one aggregator with all
    /// in its directory
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=8))]
    fronts: u32,
    /// Longest time between two kills, in ms
    #[arg(long, default_value_t = 400, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pause_ms: u64,
    /// Draws who is killed, and when; the processes' own timing stays the system's
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Where to keep everybody's files, and leave them [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

/// How the program calls itself.
#[derive(Clone, Debug, Subcommand)]
enum Part {
    /// Be the aggregator of a directory
    #[command(hide = true)]
    Serve { dir: PathBuf, port: u16, devices: u32, role: Role },
    /// Be the device of a directory
    #[command(hide = true)]
    Device { dir: PathBuf, number: u64 },
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Report {
    seed: u64,
    devices: u32,
    fronts: u32,
    kills: kills::Kills,
    killed: verdict::Found,
    peers: peers::Report,
    disks: Vec<disks::Spoiled>,
}

/// As the aggregator's program has it.
#[global_allocator]
static ALLOCATOR: aggregator::Allocator = aggregator::Allocator;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    child::program("error", || match &arguments.part {
        Some(Part::Serve { dir, port, devices, role }) => serving::serve(dir, *port, *devices, *role),
        Some(Part::Device { dir, number }) => device::run(dir, *number),
        None => torture(&arguments),
    })
}

fn torture(arguments: &Arguments) -> Result<()> {
    let &Arguments { cycles, devices, fronts, pause_ms, seed, .. } = arguments;
    let temporary = tempfile::tempdir()?;
    let place = arguments.dir.as_deref().unwrap_or(temporary.path());
    let (kills, killed, peers) =
        kills::kill(&place.join("kills"), (devices, fronts), cycles, pause_ms, seed)?;
    // A database has a disk of its own, which others have to see to.
    let disks = if fronts == 0 { disks::spoil(&place.join("disks"), devices)? } else { Vec::new() };
    let report = Report { seed, devices, fronts, kills, killed, peers, disks };
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    let Report { kills, killed, peers, disks, .. } = &report;
    println!(
        "{} kills in {:.0} s: {} of the aggregator, {} of devices; {killed}",
        kills.aggregator + kills.devices,
        kills.seconds,
        kills.aggregator,
        kills.devices
    );
    println!("{peers}");
    for spoiled in disks {
        println!("{spoiled}");
    }
    println!("nothing acknowledged was lost");
    Ok(())
}
