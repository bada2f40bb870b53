//! The program `edge-client`: parses the command line, runs a verb, turns an error into an exit code.

use std::process::ExitCode;

use clap::Parser;
use edge_client::cli::{self, Cli};

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,ort=warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let cli = Cli::parse();
    match cli::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::from(cli::exit::code(&error))
        }
    }
}
