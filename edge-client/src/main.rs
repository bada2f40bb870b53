//! The program `edge-client`: parses the command line, runs a verb, turns an error into an exit code.

use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
};

use clap::Parser;
use edge_client::cli::{self, Cli};

fn main() -> ExitCode {
    commonweal_runtime::library::forbid_telemetry();
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,ort=warn"));
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let diagnostics = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    if cli.shared.json {
        diagnostics.json().init();
    } else {
        diagnostics.with_ansi(colours).init();
    }
    let done = cli::run(&cli);
    commonweal_runtime::settle();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::from(cli::exit::code(&error))
        }
    }
}
