//! The program `round-bench`: seconds a round of communication, over real QUIC with mutual TLS and real disks.
//!
//! One aggregator in a process of its own (`serving.rs`), some devices in this one (`device.rs`). A round is everything
//! that a round costs besides a model's work: each device fetches the release, verifies it and keeps it, offers an update
//! and gets a receipt once that is on disk; the aggregator merges, publishes and sweeps. There is no model: nothing is
//! trained, aligned or evaluated, as in the rounds of other frameworks that this is held against
//! (`scripts/bench-peers`). Updates are noise at 8 bits, which no compression makes smaller.
//!
//! The time of a round is that from one release to the next, the devices' waits included.

mod device;
mod serving;

use std::{ffi::OsString, io::Write as _, path::PathBuf, process::ExitCode, thread};

use anyhow::{Result, anyhow, bail, ensure};
use clap::Parser;
use commonweal_tests::child::{self, Child};
use serde::{Deserialize, Serialize};

/// Rounds before those that count.
const WARM_UP_ROUNDS: u64 = 1;

/// Measures rounds of communication between one aggregator and some devices on this machine.
#[derive(Clone, Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// Size of the adapter that goes down, in MB (10⁶ bytes) of 32-bit values
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=400))]
    adapter_mb: u32,
    /// Devices of a round
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    devices: u32,
    /// Rounds that count, after one that does not
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: u64,
    /// Where to keep everybody's files meanwhile [default: a temporary directory]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Be the aggregator of this directory: how the program calls itself
    #[arg(long, hide = true, value_name = "DIR")]
    serve: Option<PathBuf>,
}

impl Arguments {
    /// Rounds to hold: those that count, and before them the warm-up.
    fn rounds_in_all(&self) -> u64 {
        WARM_UP_ROUNDS + self.rounds
    }
}

/// What the aggregator's process tells this one, a line each.
#[derive(Debug, Serialize, Deserialize)]
enum Told {
    /// It listens; the devices may enrol.
    Invitations(Vec<String>),
    /// A round came to a release.
    Round(Times),
    /// All rounds are over: the most memory that the aggregator held, in MB.
    Peak(Option<f64>),
}

/// Where the time of a round went, in seconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Times {
    /// From the release before to this one.
    whole: f64,
    /// From the release before until enough devices had come for it and for work.
    gather: f64,
    /// Until the last update's receipt.
    receive: f64,
    /// Until the updates were one adapter.
    merge: f64,
    /// Until that was the release.
    publish: f64,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    adapter_mb: u32,
    devices: u32,
    /// Bytes to each device in a round.
    down_bytes: u64,
    /// Bytes from each device in a round.
    up_bytes: u64,
    /// Median of the rounds that count.
    seconds: f64,
    /// Each round that counts.
    rounds: Vec<Times>,
    /// The most memory that the aggregator held, in MB.
    aggregator_peak_mb: Option<f64>,
}

/// As the aggregator's program has it.
#[global_allocator]
static ALLOCATOR: aggregator::Allocator = aggregator::Allocator;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    child::program("warn", || match &arguments.serve {
        Some(directory) => serving::serve(&arguments, directory),
        None => measure(&arguments),
    })
}

fn measure(arguments: &Arguments) -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let directory = arguments.dir.as_deref().unwrap_or(temporary.path());
    let numbers = [
        ("--adapter-mb", u64::from(arguments.adapter_mb)),
        ("--devices", u64::from(arguments.devices)),
        ("--rounds", arguments.rounds),
    ];
    let mut given: Vec<OsString> =
        numbers.iter().flat_map(|(name, number)| [name.into(), number.to_string().into()]).collect();
    given.extend(["--serve".into(), directory.join("aggregator").into()]);
    let mut aggregator = Child::start(given)?;
    let Told::Invitations(invitations) = aggregator.hear()? else {
        bail!("the aggregator began with something else than invitations");
    };
    let devices = device::Fleet::enroll(arguments, directory, &invitations)?;
    let (down_bytes, up_bytes) = (devices.down_bytes()?, devices.up_bytes());
    // Devices that failed would never finish their round: the aggregator ends with its standard input, and with it the
    // wait below.
    let stdin = aggregator.take_stdin();
    let fleet = thread::spawn(move || devices.run().map(|()| stdin));
    let mut rounds = Vec::new();
    let peak_mb = loop {
        match aggregator.hear() {
            Ok(Told::Round(times)) => rounds.push(times),
            Ok(Told::Peak(peak_mb)) => break Ok(peak_mb),
            Ok(Told::Invitations(_)) => break Err(anyhow!("the aggregator invited twice")),
            Err(error) => break Err(error),
        }
    };
    // The devices' error says more than the aggregator's end.
    let _stdin = fleet.join().map_err(|_| anyhow!("the devices ended with a panic"))??;
    let aggregator_peak_mb = peak_mb?;
    rounds.drain(..WARM_UP_ROUNDS as usize);
    ensure!(
        rounds.len() as u64 == arguments.rounds,
        "expected {} rounds, got {}",
        arguments.rounds,
        rounds.len()
    );
    let seconds = median(rounds.iter().map(|times| times.whole));
    let (adapter_mb, devices) = (arguments.adapter_mb, arguments.devices);
    let report = Report { adapter_mb, devices, down_bytes, up_bytes, seconds, rounds, aggregator_peak_mb };
    let mut stdout = std::io::stdout().lock();
    if arguments.json {
        writeln!(stdout, "{}", serde_json::to_string(&report)?)?;
    } else {
        write!(stdout, "{report}")?;
    }
    Ok(())
}

impl std::fmt::Display for Report {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { devices, down_bytes, up_bytes, seconds, .. } = self;
        let (down, up) = (*down_bytes as f64 / 1e6, *up_bytes as f64 / 1e6);
        writeln!(formatter, "{devices} devices, each {down:.1} MB down and {up:.1} MB up")?;
        let part =
            |name: &str, of: fn(&Times) -> f64| format!("{name} {:.3}", median(self.rounds.iter().map(of)));
        let parts = [
            part("gather", |times| times.gather),
            part("receive", |times| times.receive),
            part("merge", |times| times.merge),
            part("publish", |times| times.publish),
        ];
        writeln!(
            formatter,
            "{seconds:.3} s a round, medians of {}: {}",
            self.rounds.len(),
            parts.join(", ")
        )?;
        match self.aggregator_peak_mb {
            Some(peak_mb) => writeln!(formatter, "the aggregator held {peak_mb:.0} MB at most"),
            None => Ok(()),
        }
    }
}

/// The middle one, or the mean of the two in the middle.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.len() % 2, sorted.get(middle), sorted.get(middle.wrapping_sub(1))) {
        (0, Some(above), Some(below)) => f64::midpoint(*above, *below),
        (_, Some(value), _) => *value,
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert!((median([3.0, 1.0, 2.0].into_iter()) - 2.0).abs() < 1e-12);
        assert!((median([4.0, 1.0, 2.0, 3.0].into_iter()) - 2.5).abs() < 1e-12);
        assert!(median(std::iter::empty()).is_nan());
    }
}
