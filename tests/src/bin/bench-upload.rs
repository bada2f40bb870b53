//! The program `bench-upload`: what packing an update costs in held-out loss, by setting. Called by
//! `scripts/bench-upload`.
//!
//! Whole federations in this process: devices that filter, revise, train and pack with `edge-client`'s stages and keep
//! their residuals, updates that are merged and adapters that are measured by `aggregator`'s. Only the link is left
//! out. For one seed every setting starts from the same adapter and draws the same batches, so that what differs is
//! the packing.

use std::{
    fmt,
    fs::File,
    io::{self, BufReader},
    path::PathBuf,
    process::ExitCode,
};

use aggregator::{
    config::{self, Config},
    laboratory::{Laboratory, open_package},
    merge::{self, Member},
};
use anyhow::{Context, Result, bail};
use clap::Parser;
use commonweal_adapter::{
    Adapter, AdapterDelta, Bits, CompressOptions, PackedDelta, Residual, Trainable, Update, compress,
};
use commonweal_protocol::{DeviceId, DeviceReport};
use commonweal_runtime::{Cancel, TrainingRow, mean_loss};
use edge_client::{
    filter, forms,
    policy::Policy,
    revise::{self, TrainingPair},
    rows::{self, Form},
    sample::Sample,
    store::StoreError,
    train::{self, TrainTask},
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What packing an update costs in held-out loss, by setting, as a Markdown table.
#[derive(Debug, Parser)]
#[command(name = "bench-upload", version, about)]
struct Cli {
    /// The model package, with guard and reviser
    #[arg(long, default_value = "target/reference/package")]
    package: PathBuf,
    /// A folder with device-1.jsonl, device-2.jsonl … and heldout.jsonl
    #[arg(long, default_value = "models/reference/demo")]
    data: PathBuf,
    /// Federations of each setting
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(2..=100))]
    seeds: u64,
    /// Rounds of a federation
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: u64,
    /// Optimizer steps of a device and round
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    steps: u32,
    /// Peak learning rate
    #[arg(long, default_value_t = 2e-3)]
    learning_rate: f32,
    /// Threads of the model; the machine's cores if absent
    #[arg(long)]
    threads: Option<usize>,
}

/// A way of packing; the first is the one that the others are held against.
struct Setting {
    name: &'static str,
    /// `None` sends 32 bits a value.
    options: Option<CompressOptions>,
}

fn settings() -> Vec<Setting> {
    let three = CompressOptions::default();
    let four = CompressOptions { bits: Bits::Four, block: 64, stochastic: true, ..three };
    let two = CompressOptions { bits: Bits::Two, block: 64, ..three };
    let packed = |name, options| Setting { name, options: Some(options) };
    vec![
        Setting { name: "32 bits", options: None },
        packed("4 bits, blocks of 64, stochastic", four),
        packed("3 bits, blocks of 256, nearest (the default)", three),
        packed("2 bits, blocks of 64, nearest", two),
    ]
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::new("warn,ort=error");
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-upload: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let bench = Bench::open(cli)?;
    let settings = settings();
    let mut results: Vec<Vec<Ended>> = settings.iter().map(|_| Vec::new()).collect();
    for seed in 1..=cli.seeds {
        // What the first round trains does not depend on how it is then packed.
        let start = Adapter::init(bench.laboratory.model.layout().clone(), seed);
        let first = bench.train(&start, task_seed(seed, 1))?;
        for (setting, ended) in settings.iter().zip(&mut results) {
            let one = bench.federation(setting, seed, &start, &first)?;
            eprintln!("seed {seed}, {}: {one}", setting.name);
            ended.push(one);
        }
    }
    let devices = bench.devices.len();
    println!(
        "{devices} devices, {} rounds of {} steps, {} seeds, {} held-out conversations. Loss in nats a token; ± is the \
         standard deviation over seeds, of the difference that of the same seed's.\n",
        cli.rounds,
        cli.steps,
        cli.seeds,
        bench.held_out.len()
    );
    println!("| upload | bits a parameter | held-out loss | more than 32 bits |\n|---|---|---|---|");
    let whole: Vec<f64> = results[0].iter().map(|ended| ended.loss).collect();
    for (setting, ended) in settings.iter().zip(&results) {
        let bits = Spread::of(ended.iter().map(|ended| ended.bits_per_parameter));
        let loss = Spread::of(ended.iter().map(|ended| ended.loss));
        let more = Spread::of(ended.iter().zip(&whole).map(|(ended, whole)| ended.loss - whole));
        let more = if setting.options.is_some() { format!("{more:+}") } else { "–".into() };
        println!("| {} | {:.2} | {loss} | {more} |", setting.name, bits.mean);
    }
    Ok(())
}

/// A federation's end.
#[derive(Clone, Copy)]
struct Ended {
    /// Of all uploads, headers included.
    bits_per_parameter: f64,
    loss: f64,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} bits a parameter, held-out loss {:.4}", self.bits_per_parameter, self.loss)
    }
}

struct Spread {
    mean: f64,
    deviation: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Self {
        let count = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / count;
        let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
        Self { mean, deviation: (squares / (count - 1.0)).sqrt() }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.sign_plus() {
            write!(f, "{:+.4} ± {:.4}", self.mean, self.deviation)
        } else {
            write!(f, "{:.4} ± {:.4}", self.mean, self.deviation)
        }
    }
}

struct Bench<'c> {
    cli: &'c Cli,
    laboratory: Laboratory,
    devices: Vec<Vec<TrainingPair>>,
    held_out: Vec<TrainingRow>,
    policy: Policy,
}

impl<'c> Bench<'c> {
    /// Opens the model; screens and revises every device's samples, which no setting changes.
    fn open(cli: &'c Cli) -> Result<Self> {
        let (package, _) = open_package(&cli.package)?;
        let mut config = Config { package: cli.package.clone(), threads: cli.threads, ..Config::default() };
        config.evaluate.held_out = Some(cli.data.join("heldout.jsonl"));
        let laboratory = Laboratory::open(&package, &config, &Cancel::new())?;
        let (Some(guard), Some(reviser)) = (&laboratory.guard, &laboratory.reviser) else {
            bail!("{}: expected a package with a guard", cli.package.display());
        };
        let policy = Policy::default();
        let mut devices = Vec::new();
        for samples in read_devices(cli)? {
            let cancel = &laboratory.cancel;
            let screened = filter::screen(guard, &policy, samples, cancel, |_| ())?;
            devices.push(revise::revise(guard, reviser, &policy, screened, 0, cancel, |_| ())?.0);
        }
        let mut held_out = Vec::new();
        for conversation in &laboratory.sets.held_out {
            let row = laboratory.model.chat().training_row(conversation)?;
            held_out.push(row.truncated(laboratory.model.context()));
        }
        Ok(Self { cli, laboratory, devices, held_out, policy })
    }

    /// All rounds from `start`, whose first trained `first`.
    fn federation(
        &self,
        setting: &Setting,
        seed: u64,
        start: &Adapter,
        first: &[AdapterDelta],
    ) -> Result<Ended> {
        let mut adapter = start.clone();
        let mut residuals =
            vec![Residual::zeros(start.layout().clone(), Trainable::Both); self.devices.len()];
        let mut bits = Vec::new();
        for round in 1..=self.cli.rounds {
            let seed = task_seed(seed, round);
            let deltas = if round == 1 { first.to_vec() } else { self.train(&adapter, seed)? };
            adapter = match &setting.options {
                None => {
                    bits.push(32.0);
                    self.merge_whole(&adapter, deltas)?
                }
                Some(options) => {
                    let mut packed = Vec::new();
                    for (delta, residual) in deltas.iter().zip(&mut residuals) {
                        let mut random = ChaCha8Rng::seed_from_u64(seed);
                        packed.push(compress(delta, residual, options, &mut random)?);
                    }
                    bits.extend(packed.iter().map(PackedDelta::bits_per_parameter));
                    self.merge_packed(&adapter, &packed)?
                }
            };
        }
        let bits_per_parameter = bits.iter().sum::<f64>() / bits.len() as f64;
        Ok(Ended { bits_per_parameter, loss: self.loss(&adapter)? })
    }

    /// As [`merge::merge`] would, of deltas that nothing was taken from.
    fn merge_whole(&self, start: &Adapter, deltas: Vec<AdapterDelta>) -> Result<Adapter> {
        let settings = config::Merge::default();
        let of = |(device, delta): (usize, AdapterDelta)| Update {
            device,
            weight: self.devices[device].len() as u64,
            delta,
        };
        let updates = deltas.into_iter().enumerate().map(of).collect();
        let (merged, _) = commonweal_adapter::merge(updates, settings.rule(), settings.clip())?;
        Ok(start.plus(&merged, settings.server_learning_rate)?)
    }

    fn merge_packed(&self, start: &Adapter, packed: &[PackedDelta]) -> Result<Adapter> {
        let member = |(device, packed): (usize, &PackedDelta)| Member {
            device: DeviceId([device as u8; 16]),
            samples: self.devices[device].len() as u32,
            length: packed.as_bytes().len() as u64,
            report: DeviceReport::default(),
            norm: None,
            staleness: 0,
        };
        let members: Vec<Member> = packed.iter().enumerate().map(member).collect();
        let options = merge::Options::new(&config::Merge::default(), Trainable::Both, false);
        let read = |device: &DeviceId| {
            let found = packed.get(usize::from(device.0[0])).ok_or(io::ErrorKind::NotFound);
            Ok::<_, io::Error>(found?.as_bytes().to_vec())
        };
        Ok(start.plus(&merge::merge(start.layout(), &members, &options, read)?.0, 1.0)?)
    }

    /// A round's training, device by device.
    fn train(&self, start: &Adapter, seed: u64) -> Result<Vec<AdapterDelta>> {
        let settings = config::Train::default().settings();
        let task = TrainTask {
            steps_max: self.cli.steps,
            warmup_steps: settings.warmup_steps.min(self.cli.steps),
            step_rows: settings.accumulation as usize,
            row_tokens_max: settings.row_tokens_max as usize,
            learning_rate: self.cli.learning_rate,
            weight_decay: settings.weight_decay,
            clip_norm: settings.clip_norm,
            proximal_mu: settings.proximal_mu,
            trainable: Trainable::Both,
            seed,
            correction: None,
            first_rank: 0,
        };
        let Laboratory { model, cancel, .. } = &self.laboratory;
        let policy = &self.policy.train;
        let one = |pairs: &Vec<TrainingPair>| {
            let trained = train::train(model, start, pairs, &task, policy, None, &mut Unwatched, cancel)?;
            Ok(trained.delta().clone())
        };
        self.devices.iter().map(one).collect()
    }

    fn loss(&self, adapter: &Adapter) -> Result<f64> {
        let Laboratory { model, cancel, .. } = &self.laboratory;
        let prepared = model.prepare(Some(adapter))?;
        mean_loss(&model.score_rows(&prepared, &self.held_out, cancel)?).context("no held-out token")
    }
}

/// All devices of a round have one seed.
fn task_seed(seed: u64, round: u64) -> u64 {
    seed << 32 | round
}

/// Nobody looks, and nothing is kept.
struct Unwatched;

impl train::Watch for Unwatched {
    fn step(&mut self, _: u32, _: f32) {}

    fn checkpoint(&mut self, _: Vec<u8>) -> Result<(), StoreError> {
        Ok(())
    }
}

fn read_devices(cli: &Cli) -> Result<Vec<Vec<Sample>>> {
    let mut devices = Vec::new();
    for number in 1..=255 {
        let path = cli.data.join(format!("device-{number}.jsonl"));
        if !path.is_file() {
            break;
        }
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        let parsed = rows::read(BufReader::new(file), Form::Jsonl, forms::sample_of)
            .with_context(|| path.display().to_string())?;
        devices.push(parsed.good.into_iter().map(|(_, sample)| sample).collect());
    }
    if devices.is_empty() {
        bail!("{}: expected device-1.jsonl", cli.data.display());
    }
    Ok(devices)
}
