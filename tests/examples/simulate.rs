//! `scripts/simulate`: many rounds with every fault, from seeds, on all cores; counts of what happened and of what was
//! checked. Ends with 1 and the command that replays the first seed that fails.
#![allow(missing_docs, dead_code, reason = "of what is shared with the test, a part is used here")]

#[path = "../tests/simulation/mod.rs"]
mod simulation;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aggregator::round::RoundMode;
use clap::Parser;
use simulation::{ROUNDS, Tally, run};

const EXAMPLES: &str = "\
Examples:
  scripts/simulate --rounds 100000
  scripts/simulate --mode buffered --seed 17 --rounds 25     one seed again

Exit codes: 0 every invariant held, 1 one did not, 2 usage.";

/// Rounds with crashes, cuts, repetition, delay, damage, a failing store and a wrong clock, from seeds.
#[derive(Parser)]
#[command(name = "simulate", after_help = EXAMPLES)]
struct Cli {
    /// Rounds to hold, rounded up to whole seeds of 25; half of them in each mode.
    #[arg(long, default_value_t = 100_000)]
    rounds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// One mode alone.
    #[arg(long)]
    mode: Option<RoundMode>,
    /// Threads; one for each core if absent.
    #[arg(long)]
    threads: Option<usize>,
    /// Counts as one JSON object.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let modes = cli.mode.map_or_else(|| vec![RoundMode::Synchronous, RoundMode::Buffered], |mode| vec![mode]);
    let seeds = cli.rounds.div_ceil(ROUNDS * modes.len() as u64).max(1);
    let threads = cli.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let mut failed = false;
    for mode in modes {
        let (total, failure) = simulate(mode, cli.seed, seeds, threads);
        report(mode, &total, cli.json);
        if let Some(seed) = failure {
            let mode = name(mode);
            eprintln!(
                "seed {seed} failed; again: scripts/simulate --mode {mode} --seed {seed} --rounds {ROUNDS}"
            );
            failed = true;
        }
    }
    ExitCode::from(u8::from(failed))
}

/// Runs seeds until one fails; gives the counts of those that did not, and the lowest that did.
fn simulate(mode: RoundMode, first: u64, seeds: u64, threads: usize) -> (Tally, Option<u64>) {
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let (total, failure) = (Mutex::new(Tally::default()), Mutex::new(None::<u64>));
    let begun = Instant::now();
    let told = Mutex::new(begun);
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::SeqCst);
            if number >= seeds || failure.lock().is_ok_and(|failure| failure.is_some()) {
                return;
            }
            let seed = first.saturating_add(number);
            match catch_unwind(AssertUnwindSafe(|| run(seed, mode))) {
                Ok(tally) => {
                    if let Ok(mut total) = total.lock() {
                        *total += tally;
                    }
                    let done = done.fetch_add(1, Ordering::SeqCst) + 1;
                    progress(&told, begun, mode, done, seeds);
                }
                Err(_) => {
                    if let Ok(mut failure) = failure.lock() {
                        *failure = Some(failure.map_or(seed, |before| before.min(seed)));
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(work);
        }
    });
    (total.into_inner().unwrap_or_default(), failure.into_inner().unwrap_or_default())
}

/// A line every two seconds.
fn progress(told: &Mutex<Instant>, begun: Instant, mode: RoundMode, done: u64, seeds: u64) {
    let Ok(mut told) = told.lock() else { return };
    if told.elapsed() >= Duration::from_secs(2) {
        *told = Instant::now();
        let seconds = begun.elapsed().as_secs_f64();
        let left = seconds / done as f64 * (seeds - done) as f64;
        eprintln!("{}: {} of {} rounds, {left:.0} s left", name(mode), done * ROUNDS, seeds * ROUNDS);
    }
}

fn name(mode: RoundMode) -> &'static str {
    match mode {
        RoundMode::Synchronous => "synchronous",
        RoundMode::Buffered => "buffered",
    }
}

fn report(mode: RoundMode, total: &Tally, json: bool) {
    let mut stdout = std::io::stdout().lock();
    let written = if json {
        let counts: serde_json::Map<_, _> =
            total.counts().into_iter().map(|(what, count)| (what.to_owned(), count.into())).collect();
        writeln!(stdout, "{}", serde_json::json!({ "mode": name(mode), "counts": counts }))
    } else {
        total
            .counts()
            .into_iter()
            .try_fold((), |(), (what, count)| writeln!(stdout, "{:<12} {what:<40} {count:>10}", name(mode)))
    };
    // A reader that went away is no failed simulation.
    drop(written);
}
