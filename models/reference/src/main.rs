//! `train-reference`: trains, calibrates and evaluates the adapters of the bundled guard and reviser.
//!
//! Flow: `rows.rs` reads JSONL → `learn_guard.rs`, `learn_reviser.rs` make tokens → `batches.rs`, `learn.rs` train;
//! `learn_words.rs` learns the words by `linear.rs`, some in the clothes of `disguise.rs`, → `open_guard.rs` puts a guard together → `calibrate.rs` fills in `guard.toml` → `evaluate.rs` makes the table. Everything runs on the project's own runtime,
//! with the gradient graph that devices use.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed"))]

use std::{fs, num::NonZeroUsize, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use commonweal_adapter::disk::AdapterKind;
use commonweal_package::Package;
use commonweal_runtime::{
    DeviceError, Devices, Library, LibraryError, MemoryError, Model, OpenOptions,
    memory::{self, Shape},
};
use commonweal_safety::{
    ConfigError, Constitution, ConstitutionError, GuardConfig, Reviser, WordsError,
    calibrate::{CalibrateError, Target},
};
use serde_json::json;

mod show;
mod rows;
mod learn_guard;
mod learn_reviser;
mod batches;
mod learn;
mod disguise;
mod linear;
mod read_clusters;
mod learn_words;
mod open_guard;
mod calibrate;
mod evaluate;
mod loss;
mod adapter_file;
#[cfg(test)]
mod test_model;

use crate::{
    calibrate::OwnThresholds,
    learn::Recipe,
    learn_words::WordsRecipe,
    open_guard::{GuardFiles, read_adapter},
    show::Progress,
};

/// Room for a row of so many tokens must be there. A base's whole context may be a hundred times that.
const TOKENS_AT_LEAST: usize = 1024;

const EXAMPLES: &str = "Examples:
  train-reference guard --package P --config guard.toml --rows guard.train.jsonl --out guard.safetensors
  train-reference words --rows guard.train.jsonl --clusters clusters.tsv --out guard.words
  train-reference calibrate --package P --guard guard.safetensors --words guard.words --rows guard.dev.jsonl
  train-reference evaluate --package P --config guard.toml --guard guard.safetensors --rows guard.test.jsonl
  train-reference loss --package P --rows heldout.jsonl
  train-reference reviser --package P --rows reviser.train.jsonl --out reviser.safetensors

Exit codes: 0 done, 2 usage, 3 bad input, 5 runtime library, device or memory missing, 1 anything else.";

/// Trains, calibrates and evaluates the adapters of the bundled guard and reviser.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// One JSON object a line on stdout, no bar
    #[arg(long, global = true)]
    json: bool,
    /// Threads of the runtime [default: as many as the machine runs at once]
    #[arg(long, global = true)]
    threads: Option<NonZeroUsize>,
    /// The ONNX Runtime library
    #[arg(long, global = true, value_name = "FILE")]
    library: Option<PathBuf>,
    /// What the network runs on: auto, cpu, cuda:N, … or a list such as cuda:0,cpu
    #[arg(long, global = true, value_name = "DEVICE", default_value_t)]
    device: Devices,
    /// Provider of such devices that comes as a file of its own
    #[arg(long, global = true, value_name = "FILE")]
    provider: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Train the guard's adapter
    Guard {
        #[command(flatten)]
        files: TrainFiles,
        /// The guard's questions and labels
        #[arg(long, default_value = "models/reference/guard.toml")]
        config: PathBuf,
        #[command(flatten)]
        recipe: Recipe,
    },
    /// Train the reviser's adapter
    Reviser {
        #[command(flatten)]
        files: TrainFiles,
        /// The principles that the rows name
        #[arg(long, default_value = "models/reference/constitution.toml")]
        constitution: PathBuf,
        #[command(flatten)]
        recipe: Recipe,
    },
    /// Learn the guard's words, or measure how well they are learned for sources that are left out
    Words {
        /// Training rows
        #[arg(long)]
        rows: PathBuf,
        /// Where to write the words
        #[arg(long, required_unless_present = "by_source")]
        out: Option<PathBuf>,
        /// Leave each source out in turn and print what is found of it; the safe rows of DEV give the threshold
        #[arg(long, value_name = "DEV", conflicts_with = "out")]
        by_source: Option<PathBuf>,
        /// Clusters of words of like meaning, from cluster_words.py, so that words that no row has say something too
        #[arg(long)]
        clusters: Option<PathBuf>,
        #[command(flatten)]
        recipe: WordsRecipe,
    },
    /// Fit probabilities and thresholds on a dev split, and write them into the guard's configuration
    Calibrate {
        #[command(flatten)]
        guard: GuardFiles,
        /// Labelled rows that the guard was not trained on
        #[arg(long)]
        rows: PathBuf,
        /// What the thresholds are chosen for
        #[arg(long, value_enum, default_value = "f1")]
        target: TargetArg,
        /// The recall or precision to reach, or the share of false alarms to stay below; 0.9, and 0.02 for false alarms
        #[arg(long)]
        reach: Option<f64>,
        #[command(flatten)]
        own: OwnThresholds,
        /// Where to write the configuration [default: in place]
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Measure the base's loss on texts: chat JSONL (the assistant's tokens), JSONL with "text", or plain lines
    Loss {
        /// The compiled package
        #[arg(long)]
        package: PathBuf,
        /// The texts
        #[arg(long)]
        rows: PathBuf,
        /// Longest piece, in tokens; texts that are no chats are joined and cut
        #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
        length: u32,
        /// Tokens after which no more is read
        #[arg(long, default_value_t = usize::MAX, hide_default_value = true)]
        tokens: usize,
    },
    /// Measure guard, and reviser, on labelled rows
    Evaluate {
        #[command(flatten)]
        guard: GuardFiles,
        /// Labelled guard rows; may be given several times
        #[arg(long)]
        rows: Vec<PathBuf>,
        /// The reviser's adapter; revises the harmful replies of `--reviser-rows`
        #[arg(long, requires = "reviser_rows")]
        reviser: Option<PathBuf>,
        /// Reviser rows
        #[arg(long)]
        reviser_rows: Option<PathBuf>,
        /// Where to write each harmful reply with its rewriting, for `judge_rewrites.py`
        #[arg(long, requires = "reviser_rows")]
        rewrites: Option<PathBuf>,
        /// The principles
        #[arg(long, default_value = "models/reference/constitution.toml")]
        constitution: PathBuf,
    },
}

#[derive(Args)]
struct TrainFiles {
    /// The compiled package of the base
    #[arg(long)]
    package: PathBuf,
    /// Training rows
    #[arg(long)]
    rows: PathBuf,
    /// Where to write the adapter
    #[arg(long)]
    out: PathBuf,
    /// Where a run's state is kept, so that a killed run resumes [default: beside the adapter]
    #[arg(long)]
    state: Option<PathBuf>,
    /// Where to write the training log [default: the adapter's name with .log.jsonl]
    #[arg(long)]
    log: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum TargetArg {
    F1,
    Recall,
    Precision,
    FalseAlarms,
}

fn main() -> ExitCode {
    commonweal_runtime::library::forbid_telemetry();
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

/// What the contract of all commands says: 3 for bad input, 5 for a missing library.
fn exit_code(error: &anyhow::Error) -> u8 {
    let bad_input = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<rows::RowsError>()
            || cause.is::<commonweal_runtime::TextsError>()
            || cause.is::<ConfigError>()
            || cause.is::<CalibrateError>()
            || cause.is::<WordsError>()
            || cause.is::<read_clusters::ClustersError>()
            || cause.is::<ConstitutionError>()
            || cause.is::<commonweal_package::OpenError>()
    };
    let unavailable = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<LibraryError>()
            || cause.is::<DeviceError>()
            || cause.is::<MemoryError>()
            || matches!(cause.downcast_ref(), Some(commonweal_safety::OpenError::Memory(_)))
    };
    if error.chain().any(unavailable) {
        5
    } else if error.chain().any(bad_input) {
        3
    } else {
        1
    }
}

fn run(cli: Cli) -> Result<()> {
    let progress = Progress::new(cli.json);
    let library = || Library::load_with(cli.library.as_deref(), cli.threads);
    let open = |package: &PathBuf| -> Result<Model> {
        let library = library()?;
        if let Some(provider) = &cli.provider {
            library.add_provider(provider)?;
        }
        let package = Package::open_base(package)?;
        let lower = "a package of fewer bits or layers needs less";
        let options = Shape::of(&package)?.fit_for(
            TOKENS_AT_LEAST,
            "opening the package",
            OpenOptions::default(),
            memory::available_for_process(),
            lower,
        )?;
        let (library, choice) = library.choose(&cli.device, &package)?;
        eprintln!("{choice}");
        Ok(Model::open(&library, &package, options)?)
    };
    match cli.command {
        Command::Guard { files, config, recipe } => {
            let rows = rows::read(&files.rows)?;
            let config = GuardConfig::from_toml(&read_text(&config)?)?;
            let model = open(&files.package)?;
            let learned = learn_guard::guard_rows(&model, &config, &rows)?;
            files.train(&model, &learned, &recipe, AdapterKind::Guard, progress)
        }
        Command::Reviser { files, constitution, recipe } => {
            let rows = rows::read(&files.rows)?;
            let constitution = Constitution::from_toml(&read_text(&constitution)?)?;
            let model = open(&files.package)?;
            let learned = learn_reviser::reviser_rows(&model, &constitution, &rows)?;
            files.train(&model, &learned, &recipe, AdapterKind::Reviser, progress)
        }
        Command::Words { rows, out, by_source, clusters, recipe } => {
            let rows = rows::read(&rows)?;
            let clusters = clusters.map(|path| read_clusters::read(&path)).transpose()?;
            let clusters = clusters.as_ref();
            if let Some(dev) = by_source {
                for row in learn_words::by_source(&rows, &rows::read(&dev)?, clusters, recipe, progress)? {
                    progress.event(&row);
                }
                return Ok(());
            }
            let out = out.context("--out is missing")?;
            let bytes = learn_words::learn_words(&rows, clusters, recipe)?.write();
            learn::write_whole(&out, &bytes)?;
            progress
                .event(&json!({"event": "learned", "rows": rows.len(), "bytes": bytes.len(), "out": out}));
            Ok(())
        }
        Command::Calibrate { guard, rows: path, target, reach, own, out } => {
            let rows = rows::read(&path)?;
            let target = match target {
                TargetArg::F1 => Target::F1,
                TargetArg::Recall => Target::Recall(reach.unwrap_or(0.9)),
                TargetArg::Precision => Target::Precision(reach.unwrap_or(0.9)),
                TargetArg::FalseAlarms => Target::FalseAlarms(reach.unwrap_or(0.02)),
            };
            let text = read_text(&guard.config)?;
            let mut config = GuardConfig::from_toml(&text)?;
            // Every row gets a category, so that each category's rows can be counted.
            config.threshold = f64::MIN_POSITIVE;
            config.categories.iter_mut().for_each(|category| category.threshold = None);
            (config.prompt.threshold, config.pair.threshold) = (None, None);
            let words = guard.read_words(&config)?;
            let alone = GuardConfig { words: None, ..config.clone() };
            let (judge, _) = guard.open(&library()?, alone, None)?;
            let judgements = calibrate::judge(&judge, &rows, progress)?;
            let (calibrated, measured) =
                calibrate::calibrate(&config, &rows, &judgements, words.as_ref(), target, own)
                    .with_context(|| path.display().to_string())?;
            let out = out.unwrap_or(guard.config);
            learn::write_whole(&out, (heading(&text) + &calibrated.to_toml()?).as_bytes())?;
            progress.event(&json!({"event": "calibrated", "out": out, "measured": measured}));
            Ok(())
        }
        Command::Loss { package, rows, length, tokens } => {
            let model = open(&package)?;
            let loss = loss::loss(&model, &rows, length as usize, tokens, progress)?;
            let name = rows.file_name().unwrap_or_default().to_string_lossy();
            if progress.is_json() {
                println!("{}", loss.json(&name));
            } else {
                loss.print(&name);
            }
            Ok(())
        }
        Command::Evaluate { guard, rows, reviser, reviser_rows, rewrites, constitution } => {
            if rows.is_empty() && reviser_rows.is_none() {
                bail!("nothing to evaluate: give --rows or --reviser with --reviser-rows");
            }
            let config = GuardConfig::from_toml(&read_text(&guard.config)?)?;
            let words = guard.read_words(&config)?;
            let (judge, model) = guard.open(&library()?, config, words)?;
            for path in rows {
                let evaluation = evaluate::evaluate(&judge, &rows::read(&path)?, progress)?;
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if progress.is_json() {
                    println!("{}", evaluation.json(&name));
                } else {
                    evaluation.print(&name);
                }
            }
            if let Some(path) = reviser_rows {
                let constitution = Constitution::from_toml(&read_text(&constitution)?)?;
                let model = model.context("a classifier revises nothing: --package must be a base")?;
                let adapter =
                    reviser.map(|file| read_adapter(&file, &model, AdapterKind::Reviser)).transpose()?;
                let reviser = Reviser::open(&model, constitution, adapter.as_ref())?;
                let mut lines = String::new();
                let each = |rewrite: &evaluate::Rewrite| {
                    lines += &serde_json::to_string(rewrite)?;
                    lines.push('\n');
                    Ok(())
                };
                let counts =
                    evaluate::evaluate_reviser(&judge, &reviser, &rows::read(&path)?, progress, each)?;
                if let Some(path) = rewrites {
                    fs::write(&path, lines).with_context(|| format!("cannot write {}", path.display()))?;
                }
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if progress.is_json() {
                    println!("{}", counts.json(&name));
                } else {
                    counts.print(&name);
                }
            }
            Ok(())
        }
    }
}

impl TrainFiles {
    fn train(
        &self,
        model: &Model,
        rows: &[commonweal_runtime::TrainingRow],
        recipe: &Recipe,
        kind: AdapterKind,
        progress: Progress,
    ) -> Result<()> {
        let beside = self.out.parent().map(PathBuf::from).unwrap_or_default();
        let state = self.state.clone().unwrap_or_else(|| beside.join("state"));
        let log = self.log.clone().unwrap_or_else(|| self.out.with_extension("log.jsonl"));
        let adapter = learn::learn(model, rows, recipe, &state, &log, progress)?;
        learn::write_whole(&self.out, &adapter_file::write(&adapter, model, kind)?)?;
        progress.event(&json!({"event": "trained", "kind": kind.name(), "out": self.out}));
        Ok(())
    }
}

/// The comment that a file opens with: writing TOML would lose it.
fn heading(text: &str) -> String {
    text.split_inclusive('\n').take_while(|line| line.starts_with('#')).collect()
}

fn read_text(path: &PathBuf) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_opening_comment_is_kept() {
        assert_eq!(heading("# one\n# two\nformat = 1\n# three\n"), "# one\n# two\n");
        assert_eq!(heading("format = 1\n"), "");
    }

    #[test]
    fn bad_input_and_a_missing_library_have_their_own_exit_codes() {
        let rows: anyhow::Error = rows::RowsError::Empty { path: "x".into() }.into();
        assert_eq!(exit_code(&rows.context("while reading")), 3);
        assert_eq!(exit_code(&GuardConfig::from_toml("?").unwrap_err().into()), 3);
        let few: anyhow::Error = CalibrateError::TooFew { positives: 1, negatives: 1 }.into();
        assert_eq!(exit_code(&few.context("layout pair").context("rows.jsonl")), 3);
        let missing = Library::load(Some("/nonexistent/libonnxruntime.so".as_ref()));
        assert_eq!(exit_code(&missing.unwrap_err().into()), 5);
        assert_eq!(exit_code(&anyhow::anyhow!("anything else")), 1);
    }
}
