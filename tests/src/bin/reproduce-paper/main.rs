//! The program `reproduce-paper`: the arms of the paper and ours as whole federations in this process, measured alike.
//! Called by `scripts/reproduce-paper`, which prepares the data and draws the report from `results.jsonl`.
//!
//! Standard output is what the devices tell (JSON lines); progress goes to standard error. What is done is kept
//! (`state.rs`): a killed run that is started again goes on with the round that it was in.

mod arms;
mod clients;
mod federation;
mod hostile;
mod judge;
mod measure;
mod contamination;
mod progress;
mod state;
#[cfg(test)]
mod script;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use aggregator::{
    config::Config,
    evaluate::{self, sets},
    laboratory::{Laboratory, open_package},
    round::Policy as RoundPolicy,
};
use anyhow::{Context, Result, ensure};
use arms::Arm;
use clap::Parser;
use clients::Pool;
use commonweal_runtime::{Cancel, Role};
use edge_client::sample::Sample;
use federation::{Carrier, Federation, Plan, Workshop};
use measure::Evaluation;
use progress::Progress;
use state::{Ended, Line, State};

/// The paper's arms and ours as federations in one process.
#[derive(Debug, Parser)]
#[command(name = "reproduce-paper", version, about)]
struct Cli {
    /// The model package, with guard and reviser
    #[arg(long, default_value = "target/reference/package")]
    package: PathBuf,
    /// Packages of other LoRA ranks, for their ablation
    #[arg(long, value_name = "RANK=DIR", value_parser = rank_package)]
    rank_package: Vec<(u32, PathBuf)>,
    /// What `models/reference/make_paper_data.py` wrote
    #[arg(long)]
    data: PathBuf,
    /// Results; a run that is started again goes on with them
    #[arg(long)]
    out: PathBuf,
    /// Federations of each arm
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    clients: u32,
    /// Clients of a round
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    chosen: u32,
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: u64,
    /// Samples of a client
    #[arg(long, default_value_t = 32)]
    rows: usize,
    /// Optimizer steps of a client and round
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    steps: u32,
    /// Rows of a step
    #[arg(long, default_value_t = 8)]
    batch: u32,
    /// Tokens of a row at most
    #[arg(long, default_value_t = 128)]
    row_tokens: u32,
    /// Peak learning rate of the clients
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f32,
    /// Red-team prompts that the server asks each round
    #[arg(long, default_value_t = 48)]
    redteam: usize,
    /// Rows of each evaluation set at most
    #[arg(long, default_value_t = 100)]
    evaluation_rows: usize,
    /// Rows of each of the operator's sets for the gates
    #[arg(long, default_value_t = 50)]
    gate_rows: usize,
    /// Factor on a hostile device's update
    #[arg(long, default_value_t = 2.0)]
    boost: f32,
    /// The table's, those that vary one setting at a time, or both
    #[arg(long, value_enum, default_value = "table")]
    arms: Arms,
    /// Federations of each arm that varies one setting
    #[arg(long, default_value_t = 1)]
    ablation_seeds: u64,
    /// Only arms with this in their name
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    #[arg(long, value_enum, default_value = "memory")]
    carrier: Carrier,
    /// Keep every answer that was judged, under the results
    #[arg(long)]
    answers: bool,
    /// Threads of the model; the machine's cores if absent
    #[arg(long)]
    threads: Option<usize>,
}

/// Which arms there are to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Arms {
    Table,
    Ablations,
    All,
}

fn rank_package(text: &str) -> Result<(u32, PathBuf), String> {
    let (rank, path) = text.split_once('=').ok_or("expected RANK=DIR")?;
    Ok((rank.parse().map_err(|_| format!("expected a rank, got `{rank}`"))?, path.into()))
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("reproduce-paper: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let pool = Pool::read(&cli.data)?;
    let evaluation = Evaluation::read(&cli.data, cli.evaluation_rows, ANSWER_TOKENS_MAX)?;
    let pairs = contamination::check(&training_texts(&cli.data, &pool)?, &evaluation.prompts())?;
    eprintln!("no evaluation prompt is near a training text ({pairs} pairs compared)");
    let common = common(cli);
    let state = State::open(&cli.out, &plan(cli, &common, &evaluation)?)?;
    let mut workshops = Workshops { cli, common: &common, open: BTreeMap::new() };
    let workshop = workshops.of(None)?;
    let guard = workshop.laboratory.guard.as_ref().context("expected a guard")?;
    let screening = pool.screen(guard, SCREENED_ROWS, &workshop.laboratory.cancel)?;
    if !state.has_guard() {
        state.keep(&Line::Guard { screened: screening.confusion, kinds: &screening.kinds })?;
    }
    let arms = arms(cli, &common, screening.threshold(arms::PAPER_RECALL))?;
    let seeds_of = |arm: &Arm| if arm.family == arms::TABLE { cli.seeds } else { cli.ablation_seeds };
    let jobs: Vec<(u64, &Arm)> = (1..=cli.seeds.max(cli.ablation_seeds))
        .flat_map(|seed| arms.iter().filter(move |arm| seed <= seeds_of(arm)).map(move |arm| (seed, arm)))
        .collect();
    let mut progress = Progress::new(jobs.iter().map(|(_, arm)| 1 + if arm.trains { cli.rounds } else { 0 }));
    for (seed, arm) in jobs {
        if state.is_done(&arm.name, seed) {
            progress.skip();
            continue;
        }
        let workshop = workshops.of(arm.rank)?;
        let plan = Plan {
            arm,
            seed,
            common: &common,
            rounds: if arm.trains { cli.rounds } else { 0 },
            boost: cli.boost,
            carrier: cli.carrier,
        };
        let turns = federation::turns(cli.clients as usize, cli.chosen as usize, seed, cli.rounds);
        let clients = pool.deal(arm, &turns, cli.rows, seed)?;
        let folder = federation::folder(&cli.out, arm, seed);
        let begun = state.begun(&arm.name, seed);
        if begun.is_none() && folder.exists() {
            // A kill may have come between a device's enrolment and its certificate on disk: begun anew, it costs a round.
            fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        let mut federation = Federation::open(&plan, &workshop, &clients, &folder)
            .with_context(|| format!("{}, seed {seed}", arm.name))?;
        let mut device_seconds = begun.unwrap_or_default();
        federation
            .run(|record, seconds| {
                device_seconds += seconds;
                progress.round(&arm.name, seed, record);
                state.keep(&Line::Round { arm: &arm.name, seed, record, device_seconds: seconds })
            })
            .with_context(|| format!("{}, seed {seed}", arm.name))?;
        let answers = cli.answers.then(|| folder.with_extension("answers.jsonl"));
        let ended = end(&federation, &workshop, &evaluation, device_seconds, answers.as_deref())?;
        progress.end(&arm.name, seed, &ended.measures);
        state.keep(&Line::End { arm, seed, ended: &ended })?;
        drop(federation);
        // The results have what is wanted of it; every release of every arm would fill a disk.
        fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
    }
    Ok(())
}

/// Benign and harmful samples on which the filter is measured.
const SCREENED_ROWS: usize = 300;
/// Enough to tell a refusal from an answer.
const ANSWER_TOKENS_MAX: usize = 32;

fn end(
    federation: &Federation<'_>,
    workshop: &Workshop,
    evaluation: &Evaluation,
    device_seconds: f64,
    answers: Option<&Path>,
) -> Result<Ended> {
    let (digest, adapter) = federation.head()?;
    let records = federation.records()?;
    let updates: u64 = records.iter().map(|record| u64::from(record.updates)).sum();
    let uploaded_bytes = records.iter().map(|record| record.uploaded_bytes).sum();
    let mut stage_seconds: BTreeMap<String, f64> = BTreeMap::new();
    for (stage, seconds) in records.iter().flat_map(|record| &record.seconds) {
        *stage_seconds.entry(stage.clone()).or_default() += seconds;
    }
    let values = federation.trained_values() as f64 * updates as f64;
    Ok(Ended {
        measures: evaluation.measure(&workshop.laboratory, &adapter, answers)?,
        rounds: records.len() as u64,
        published: records.iter().filter(|record| record.published).count() as u64,
        uploaded_bytes,
        bits_per_parameter: (updates > 0).then(|| uploaded_bytes as f64 * 8.0 / values),
        samples: federation::sum(records.iter().map(|record| &record.samples)),
        device_seconds,
        stage_seconds,
        adapter: digest.to_string(),
    })
}

/// The arms that are wanted: those named, or with the text in their name if none is of that name.
fn arms(cli: &Cli, common: &Config, blunt: Option<f64>) -> Result<Vec<Arm>> {
    let mut arms = if cli.arms == Arms::Ablations { Vec::new() } else { arms::main_arms(blunt) };
    if cli.arms != Arms::Table {
        let ranks: Vec<u32> = cli.rank_package.iter().map(|(rank, _)| *rank).collect();
        let is_real = cli.data.join("eval_advbench.jsonl").is_file();
        arms.extend(arms::ablations(&ranks, is_real));
    }
    let exact = |text: &String| arms.iter().any(|arm| arm.name == *text);
    let names: Vec<(String, bool)> = cli.only.iter().map(|text| (text.clone(), exact(text))).collect();
    let wanted = |arm: &Arm| {
        let is_meant =
            |(text, exact): &(String, bool)| arm.name == *text || !exact && arm.name.contains(text);
        names.is_empty() || names.iter().any(is_meant)
    };
    arms.retain(wanted);
    ensure!(!arms.is_empty(), "no arm is named so");
    // Whatever cannot work is better known now than in the night.
    arms.retain(|arm| match arm.config(common).check() {
        Ok(()) => true,
        Err(error) => {
            eprintln!("{}, left out: {error}", arm.name);
            false
        }
    });
    Ok(arms)
}

/// The aggregator's settings of every arm.
fn common(cli: &Cli) -> Config {
    let in_data = |name: &str| Some(cli.data.join(name));
    let mut config = Config { package: cli.package.clone(), threads: cli.threads, ..Config::default() };
    config.round = RoundPolicy {
        goal: cli.chosen,
        over_selection: 1.0,
        quorum: 1,
        wait_ms: 600_000,
        deadline_ms: 1_200_000,
        ..RoundPolicy::default()
    };
    config.train.steps_max = cli.steps;
    config.train.warmup_steps = config.train.warmup_steps.min(cli.steps);
    config.train.accumulation = cli.batch;
    config.train.row_tokens_max = cli.row_tokens;
    config.train.learning_rate = cli.learning_rate;
    // Time stands still within a round, so no allowance comes back.
    config.receive.requests_burst = 100_000;
    config.align.redteam = in_data("redteam.jsonl");
    config.align.replay = in_data("replay.jsonl");
    config.align.prompts = cli.redteam;
    config.align.answer_tokens_max = ANSWER_TOKENS_MAX;
    config.evaluate.harmful = in_data("gate_harmful.jsonl");
    config.evaluate.benign = in_data("gate_benign.jsonl");
    config.evaluate.held_out = in_data("gate_held_out.jsonl");
    config.evaluate.rows_max = cli.gate_rows;
    config.evaluate.answer_tokens_max = ANSWER_TOKENS_MAX;
    config
}

/// Raised with whatever else changes results: who is dealt what, how it is measured.
const HARNESS: u32 = 2;

/// Of all files of a package, its adapters included.
fn folder_hash(folder: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let mut paths = Vec::new();
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            paths.push(entry?.path());
        }
        paths.sort();
        for path in paths {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
            hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// What results of one folder have in common: whatever changes them, and nothing of the machine.
fn plan(cli: &Cli, common: &Config, evaluation: &Evaluation) -> Result<serde_json::Value> {
    let mut hasher = blake3::Hasher::new();
    let mut names: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(&cli.data).with_context(|| cli.data.display().to_string())? {
        names.push(entry?.path());
    }
    names.sort();
    for path in names.iter().filter(|path| path.extension().is_some_and(|end| end == "jsonl")) {
        hasher.update(&fs::read(path).with_context(|| path.display().to_string())?);
    }
    let (_, base) = open_package(&cli.package)?;
    Ok(serde_json::json!({
        "harness": HARNESS, "package": folder_hash(&cli.package)?, "judge": judge::RefusalJudge::hash(),
        "clients": cli.clients, "chosen": cli.chosen, "rounds": cli.rounds, "rows": cli.rows, "steps": cli.steps,
        "batch": cli.batch, "row_tokens": cli.row_tokens, "learning_rate": cli.learning_rate,
        "redteam": cli.redteam, "align_batch": common.align.batch, "align_learning_rate": common.align.learning_rate,
        "gate_rows": cli.gate_rows, "boost": cli.boost, "answer_tokens": ANSWER_TOKENS_MAX,
        "evaluation": evaluation.sizes(), "data": hasher.finalize().to_hex().to_string(), "base": base.hash.to_string(),
    }))
}

/// Every text that anything learns from: clients, hostile ones, alignment, and what made base, guard and reviser.
fn training_texts(data: &Path, pool: &Pool) -> Result<Vec<contamination::Named>> {
    let mut texts = Vec::new();
    let mut add = |name: &str, text: &str| texts.push((name.to_owned(), text.to_owned()));
    for turn in pool.samples().flat_map(Sample::turns).filter(|turn| turn.role == Role::User) {
        add("clients", &turn.content);
    }
    let before = measure::files(data, "before_")?;
    ensure!(!before.is_empty(), "{}: expected what base, guard and reviser learned from", data.display());
    for path in before.iter().chain([&data.join("redteam.jsonl")]) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let rows = sets::read_prompts(path)?;
        rows.iter().flat_map(|row| measure::asked(row)).for_each(|text| add(&name, text));
    }
    let replay = sets::read_conversations(&data.join("replay.jsonl"))?;
    replay.iter().flat_map(|row| measure::asked(row)).for_each(|text| add("replay", text));
    ensure!(!texts.is_empty(), "{}: expected training texts", data.display());
    Ok(texts)
}

/// Opens each package once.
struct Workshops<'c> {
    cli: &'c Cli,
    common: &'c Config,
    open: BTreeMap<Option<u32>, Arc<Workshop>>,
}

impl Workshops<'_> {
    fn of(&mut self, rank: Option<u32>) -> Result<Arc<Workshop>> {
        if let Some(workshop) = self.open.get(&rank) {
            return Ok(workshop.clone());
        }
        let other = self.cli.rank_package.iter().find(|(other, _)| Some(*other) == rank);
        let path = other.map_or(&self.cli.package, |(_, path)| path);
        let (package, base) = open_package(path)?;
        let laboratory = Laboratory::open(&package, self.common, &Cancel::new())?;
        ensure!(laboratory.guard.is_some(), "{}: expected a package with a guard", path.display());
        let untrained = commonweal_adapter::Adapter::zeros(base.layout.clone());
        let figures = evaluate::measure(&laboratory, &self.common.evaluate, &untrained, &|_| ())?;
        let workshop = Arc::new(Workshop { base, laboratory, card: figures.report_card });
        self.open.insert(rank, workshop.clone());
        Ok(workshop)
    }
}
