//! The operator's side: verbs, flags and exit codes. Each verb is a function that prints its result; `main`
//! only maps its error to a code.

mod flags;
mod progress;
mod init;
mod inspect;
mod show;
mod adapters;
mod tokens;
mod keys;
mod dashboard;
mod settings;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use commonweal_transport::Clock;

use crate::backup::BackupError;
use crate::config::{Config, ConfigError};
use crate::desk::DeskError;
use crate::directory::{Directory, DirectoryError};
use crate::events::Events;
use crate::laboratory::{Base, LaboratoryError, open_package};
use crate::publish::{PublishError, Publisher};
use crate::receive::enroll::EnrollError;
use crate::serve::ServeError;
use crate::store::{Access, Storage, StoreError};
use flags::Flags;

const EXAMPLES: &str = "\
Examples:
  aggregator init --dir state --package target/reference/package --address 192.0.2.7:4433
  aggregator token --dir state --count 4 --expires 1h
  aggregator serve --dir state
  aggregator rounds --dir state
  aggregator show 5 --dir state
  aggregator rollback 3 --dir state
  aggregator keys rotate --dir state
  aggregator export 5 --format peft --out adapter --dir state

Settings come from STATE/aggregator.toml (written by init), then the environment
(COMMONWEAL_AGGREGATOR_ROUND__GOAL=8), then flags, then --set round.goal=8; `aggregator config` prints them all.
Exit codes: 0 done, 2 usage, 3 bad input, 4 refused by a gate, 5 unavailable, 1 anything else.";

/// Rounds of federated fine-tuning: receive, merge, align, evaluate, publish.
#[derive(Debug, Parser)]
#[command(name = "aggregator", version, about, after_help = EXAMPLES)]
pub struct Cli {
    /// The state directory.
    #[arg(long, global = true, default_value = "aggregator-state", env = "COMMONWEAL_DIR")]
    dir: PathBuf,
    /// JSON lines in place of sentences: results on stdout, diagnostics on stderr.
    #[arg(long, global = true, env = "COMMONWEAL_JSON")]
    json: bool,
    /// Change a setting, such as round.goal=8; may be repeated, overrules all else.
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(subcommand)]
    verb: Verb,
}

impl Cli {
    /// Whether what is told is JSON and not sentences.
    pub fn is_json(&self) -> bool {
        self.json
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a state directory: authority, signing key, database and the first release.
    #[command(
        after_help = "Example:\n  aggregator init --dir state --package package --address fl.example.org:4433"
    )]
    Init(Box<init::Init>),
    /// Take devices' updates, hold rounds, publish releases; until a signal, or for some rounds.
    #[command(after_help = "Examples:\n  aggregator serve --dir state\n  \
        aggregator serve --dir state --rounds 3 --json\n  \
        aggregator serve --role front --dir state\n\n\
        COMMONWEAL_PAUSE_AT=upload|receipt|merge|merged|align|evaluate|publish|published halts there (kill tests).")]
    Serve(Box<ServeVerb>),
    /// Print single-use invitations for devices, or withdraw them.
    #[command(after_help = "Examples:\n  aggregator token --dir state --count 4 --expires 1h\n  \
        aggregator token --dir state --revoke commonweal://…\n  \
        aggregator token --dir state --revoke-all")]
    Token(tokens::TokenVerb),
    /// Where the federation stands.
    #[command(
        after_help = "Examples:\n  aggregator status --dir state\n  aggregator status --dir state --json"
    )]
    Status,
    /// Every round: outcome, measures, counts, seconds.
    #[command(
        after_help = "Examples:\n  aggregator rounds --dir state\n  aggregator rounds --from 10 --dir state --json"
    )]
    Rounds(inspect::RoundsVerb),
    /// One release: its report card, where it came from, and how its trial went.
    #[command(
        after_help = "Examples:\n  aggregator show 5 --dir state\n  aggregator show 5 --dir state --json"
    )]
    Show {
        /// Its version.
        version: u64,
    },
    /// Publish an earlier release's adapter again, as the newest release.
    #[command(after_help = "Example:\n  aggregator rollback 3 --dir state")]
    Rollback {
        /// The release to go back to.
        version: u64,
    },
    /// Write a release's adapter for other programs.
    #[command(after_help = "Example:\n  aggregator export 5 --format peft --out adapter --dir state")]
    Export(adapters::ExportVerb),
    /// Measure a release, or an adapter file, and judge it by the gates.
    #[command(after_help = "Examples:\n  aggregator evaluate --dir state\n  \
        aggregator evaluate --dir state --adapter candidate.safetensors\n\nExits with 4 if a gate fails.")]
    Evaluate(Box<adapters::EvaluateVerb>),
    /// The keys that sign receipts and releases: list them, or let a new one follow.
    #[command(subcommand)]
    Keys(keys::KeysVerb),
    /// Print every setting in force, and where it comes from; every problem, if there are any.
    #[command(after_help = "Examples:\n  aggregator config --dir state\n  \
        aggregator config --dir state --set round.goal=8 --json\n  \
        aggregator config --defaults --package package --address fl.example.org:4433\n\nExits with 3 if `serve` would not start with them.")]
    Config(Box<settings::ConfigVerb>),
    /// Print the dashboard's address, token included.
    #[command(after_help = "Examples:\n  aggregator dashboard --dir state\n  \
        aggregator dashboard --admin 127.0.0.1:4434 --dir state")]
    Dashboard(dashboard::DashboardVerb),
    /// Copy the state directory, also while it is served.
    #[command(after_help = "Examples:\n  aggregator backup /backup/2026-01-31 --dir state\n  \
        aggregator serve --dir /backup/2026-01-31")]
    Backup {
        /// Where to; no state directory may be there.
        to: PathBuf,
    },
    /// The enrolled devices.
    #[command(after_help = "Example:\n  aggregator devices --dir state")]
    Devices,
    /// Refuse a device from its next request on, and leave out what it sent from the next merge on.
    #[command(after_help = "Example:\n  aggregator revoke 3f2a9c41d07be85566aa01c9e2d4b7f0 --dir state")]
    Revoke {
        /// Its name, as `devices` prints it.
        device: String,
    },
}

#[derive(Debug, clap::Args)]
struct ServeVerb {
    #[command(flatten)]
    flags: Flags,
    /// What this process does, where several share a database: answer devices (front), drive the rounds when it has the lead
    /// (drive), or both.
    #[arg(long, env = "COMMONWEAL_ROLE", value_enum, default_value = "all")]
    role: crate::serve::Role,
    /// Stop after this many rounds, counted from this start.
    #[arg(long, env = "COMMONWEAL_ROUNDS")]
    rounds: Option<u64>,
    /// After the last round, seconds to wait for its devices to install the release.
    #[arg(long, default_value_t = 30)]
    linger_seconds: u64,
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state directory.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The releases.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The package or the model.
    #[error(transparent)]
    Laboratory(#[from] LaboratoryError),
    /// The round's state.
    #[error(transparent)]
    Desk(#[from] DeskError),
    /// Tokens and devices.
    #[error(transparent)]
    Enroll(#[from] EnrollError),
    /// A copy of the state directory.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// The server.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// An argument that cannot be used.
    #[error("{0}")]
    Input(String),
    /// A gate failed.
    #[error("refused: {0}")]
    Gate(String),
    /// Anything else.
    #[error("{what}")]
    Other {
        /// What failed.
        what: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl CliError {
    fn other(what: impl Into<String>, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Other { what: what.into(), source: Box::new(source) }
    }

    /// The process's exit code.
    pub fn code(&self) -> u8 {
        match self {
            Self::Config(_)
            | Self::Input(_)
            | Self::Backup(BackupError::Elsewhere)
            | Self::Store(StoreError::Schema { .. } | StoreError::Foreign { .. })
            | Self::Publish(PublishError::Unknown { .. } | PublishError::OtherBase { .. })
            | Self::Enroll(
                EnrollError::DeviceUnknown { .. }
                | EnrollError::TokenUnknown
                | EnrollError::TokenSpent { .. },
            )
            | Self::Serve(
                ServeError::Config(_)
                | ServeError::Store(StoreError::Schema { .. } | StoreError::Foreign { .. })
                | ServeError::OtherBase { .. }
                | ServeError::NoRelease
                | ServeError::Exact(_)
                | ServeError::Desk(DeskError::Version { .. }),
            ) => 3,
            Self::Gate(_) => 4,
            Self::Serve(ServeError::Listen { .. } | ServeError::Admin { .. }) => 5,
            Self::Directory(error)
            | Self::Backup(BackupError::Directory(error))
            | Self::Serve(ServeError::Directory(error)) => directory_code(error),
            Self::Laboratory(error) | Self::Serve(ServeError::Laboratory(error)) => laboratory_code(error),
            _ => 1,
        }
    }
}

fn directory_code(error: &DirectoryError) -> u8 {
    match error {
        DirectoryError::Absent { .. }
        | DirectoryError::Present { .. }
        | DirectoryError::Unfinished { .. }
        | DirectoryError::Unconfigured { .. }
        | DirectoryError::File { .. }
        | DirectoryError::Shared { .. }
        | DirectoryError::Token { .. } => 3,
        DirectoryError::Locked { .. } => 5,
        DirectoryError::Keys { .. } | DirectoryError::Authority { .. } => 1,
    }
}

fn laboratory_code(error: &LaboratoryError) -> u8 {
    match error {
        // A guard in a package of its own.
        LaboratoryError::Safety(error) if matches!(**error, commonweal_safety::OpenError::Memory(_)) => 5,
        LaboratoryError::Package(_)
        | LaboratoryError::Set(_)
        | LaboratoryError::Adapter { .. }
        | LaboratoryError::Facts { .. }
        | LaboratoryError::Safety(_)
        | LaboratoryError::PromptTooLong { .. }
        | LaboratoryError::NoGuard => 3,
        LaboratoryError::Library(_) | LaboratoryError::Device(_) | LaboratoryError::Memory(_) => 5,
        _ => 1,
    }
}

/// What most verbs need.
struct Opened {
    directory: Directory,
    config: Config,
    storage: Storage,
}

impl Opened {
    fn open(dir: &Path, set: &[String]) -> Result<Self, CliError> {
        let directory = Directory::open(dir)?;
        let config = settings::of(dir)?.with_set(set).formed()?;
        let storage = Storage::of(dir, &config.storage, Access::Shared)?;
        Ok(Self { directory, config, storage })
    }

    /// The releases; the package's files are verified.
    fn publisher(&self) -> Result<(Publisher, Base), CliError> {
        let (_, base) = open_package(&self.config.package)?;
        let signer = self.directory.signer()?;
        let publisher =
            Publisher::new(self.storage.coord.clone(), self.storage.blob.clone(), signer, base.hash);
        Ok((publisher, base))
    }
}

/// Runs what was asked.
pub fn run(cli: Cli) -> Result<(), CliError> {
    let Cli { dir, json, set, verb } = cli;
    let opened = || Opened::open(&dir, &set);
    match verb {
        Verb::Init(init) => init::init(&dir, &init, &set, json),
        Verb::Serve(serve) => {
            Directory::open(&dir)?;
            let settings = settings::of(&dir)?;
            let config = settings.with_flags(|config| serve.flags.apply(config)).with_set(&set).checked()?;
            let options = crate::serve::Options {
                dir,
                config,
                role: serve.role,
                rounds: serve.rounds,
                linger_ms: serve.linger_seconds.saturating_mul(1_000),
            };
            Ok(crate::serve::serve(options, &Events::to_stdout(json, Clock::system()))?)
        }
        Verb::Token(token) => tokens::token(&opened()?, &token, json),
        Verb::Status => inspect::status(&opened()?, json),
        Verb::Rounds(rounds) => inspect::rounds(&opened()?, &rounds, json),
        Verb::Show { version } => show::show(&opened()?, version, json),
        Verb::Rollback { version } => adapters::rollback(&opened()?, version, json),
        Verb::Export(export) => adapters::export(&opened()?, &export, json),
        Verb::Evaluate(evaluate) => adapters::evaluate(opened()?, &evaluate, json),
        Verb::Keys(verb) => keys::keys(&Directory::open(&dir)?, &verb, json),
        Verb::Config(verb) => settings::config(&dir, &verb, &set, json),
        Verb::Dashboard(verb) => dashboard::dashboard(&dir, &verb, &set, json),
        Verb::Backup { to } => {
            let directory = Directory::open(&dir)?;
            let config = settings::of(&dir)?.with_set(&set).formed()?;
            let copied = crate::backup::back_up(&directory, &config.storage, &to)?;
            if json {
                return say_json(&copied);
            }
            say(&format!(
                "{}: {} adapters and updates, {} bytes; database, {} bytes; keys and settings",
                to.display(),
                copied.blobs,
                copied.blobs_bytes,
                copied.database_bytes
            ));
            Ok(())
        }
        Verb::Devices => inspect::devices(&opened()?, json),
        Verb::Revoke { device } => tokens::revoke(&opened()?, &device, json),
    }
}

fn now_ms() -> u64 {
    Clock::system().unix_ms()
}

/// A moment for a person.
fn moment(unix_ms: u64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z");
    i64::try_from(unix_ms / 1000)
        .ok()
        .and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|moment| moment.format(format).ok())
        .unwrap_or_else(|| format!("{unix_ms} ms"))
}

/// One line of stdout. A reader that went away ends nothing.
fn say(line: &str) {
    use std::io::Write;
    drop(writeln!(std::io::stdout().lock(), "{line}"));
}

fn say_json(value: &impl serde::Serialize) -> Result<(), CliError> {
    let line = serde_json::to_string(value).map_err(|error| CliError::other("the result", error))?;
    say(&line);
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_verb_shows_an_example_that_parses() {
        let command = Cli::command();
        let verbs = command.get_subcommands().flat_map(|verb| {
            let below: Vec<_> = verb.get_subcommands().collect();
            if below.is_empty() { vec![verb] } else { below }
        });
        let helps = verbs.map(|verb| (verb.get_name(), verb.get_after_help()));
        for (name, help) in helps.chain([("aggregator", command.get_after_help())]) {
            let help = help.unwrap_or_else(|| panic!("{name} has no example")).to_string();
            let mut examples =
                help.lines().map(str::trim).filter(|line| line.starts_with("aggregator ")).peekable();
            assert!(examples.peek().is_some(), "{name} has no example");
            for example in examples {
                Cli::try_parse_from(example.split(' ')).unwrap_or_else(|error| panic!("{example}: {error}"));
            }
        }
    }

    #[test]
    fn the_same_cause_has_the_same_code_in_every_verb() {
        let locked = || DirectoryError::Locked { path: "lock".into() };
        assert_eq!(
            (CliError::from(locked()).code(), CliError::from(ServeError::from(locked())).code()),
            (5, 5)
        );
        let no_guard = || LaboratoryError::NoGuard;
        assert_eq!(
            (CliError::from(no_guard()).code(), CliError::from(ServeError::from(no_guard())).code()),
            (3, 3)
        );
    }
}
