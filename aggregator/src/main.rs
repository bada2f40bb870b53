//! The `aggregator` program: arguments in, exit code out.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: aggregator::Allocator = aggregator::Allocator;

fn main() -> ExitCode {
    commonweal_runtime::library::forbid_telemetry();
    let cli = aggregator::cli::Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("COMMONWEAL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let diagnostics = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if cli.is_json() {
        diagnostics.json().init();
    } else {
        diagnostics.init();
    }
    let done = aggregator::cli::run(cli);
    commonweal_runtime::settle();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.code();
            // A reader that went away is no reason to panic.
            let _ = writeln!(std::io::stderr(), "error: {:#}", anyhow::Error::new(error));
            ExitCode::from(code)
        }
    }
}
