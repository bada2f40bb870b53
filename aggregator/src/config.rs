//! The operator's configuration: `aggregator.toml` in the state directory, then environment, then flags
//! (`settings.rs`).
//!
//! Every problem is listed at start, before a socket is opened. `plain` switches clipping, alignment and
//! gates off, for comparison; nothing else changes.

mod admin;
mod check;
mod device;
mod gates;
mod settings;
mod traces;
mod storage;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use commonweal_adapter::{Clip, MergeRule};
use commonweal_transport::Congestion;
use serde::{Deserialize, Serialize};

use crate::round::Policy;

pub use admin::{Admin, Listen};
pub use device::{Compress, Train};
pub use gates::Gates;
pub use settings::{PREFIX, Setting, Settings, Source};
pub(crate) use storage::LEAD_SECONDS_MAX;
pub use storage::Storage;
pub use traces::Traces;

/// Name of the file in the state directory.
pub const FILE: &str = "aggregator.toml";

/// All settings; every field has a default but the package.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where to listen (UDP).
    pub listen: SocketAddr,
    /// `HOST:PORT` that invitations name; the listening address if absent.
    pub address: Option<String>,
    /// The package directory.
    pub package: PathBuf,
    /// The ONNX Runtime library; found as the runtime finds it if absent.
    pub runtime_library: Option<PathBuf>,
    /// What the model runs on.
    pub device: commonweal_runtime::Devices,
    /// A provider of such devices that comes as a file of its own.
    pub provider: Option<PathBuf>,
    /// Threads of the model; the machine's cores if absent.
    pub threads: Option<usize>,
    /// No clipping, no alignment, no gates.
    pub plain: bool,
    /// Lifetime of a device's certificate.
    pub certificate_days: u32,
    /// When rounds open and close.
    pub round: Policy,
    /// What devices do.
    pub train: Train,
    /// How devices pack their update.
    pub compress: Compress,
    /// What is accepted from devices.
    pub receive: Receive,
    /// How updates become a candidate.
    pub merge: Merge,
    /// How the candidate is aligned.
    pub align: Align,
    /// How the candidate is measured.
    pub evaluate: Evaluate,
    /// How a release reaches the devices.
    pub release: Release,
    /// The operator's port.
    pub admin: Admin,
    /// Spans of rounds and updates.
    pub traces: Traces,
    /// Where state is kept.
    pub storage: Storage,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 4433)),
            address: None,
            package: PathBuf::new(),
            runtime_library: None,
            device: commonweal_runtime::Devices::Auto,
            provider: None,
            threads: None,
            plain: false,
            certificate_days: 30,
            round: Policy::default(),
            train: Train::default(),
            compress: Compress::default(),
            receive: Receive::default(),
            merge: Merge::default(),
            align: Align::default(),
            evaluate: Evaluate::default(),
            release: Release::default(),
            admin: Admin::default(),
            traces: Traces::default(),
            storage: Storage::default(),
        }
    }
}

/// Bounds on devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Receive {
    /// Requests that a device may make at once.
    pub requests_burst: u32,
    /// Requests a second after that.
    pub requests_per_second: f64,
    /// Updates' worth of bytes that a device may send in a round, repetitions included.
    pub resends_max: u32,
    /// Longest update, as a vector, that is taken at all.
    pub norm_max: f64,
    /// Free disk that uploads leave untouched.
    pub reserve_bytes: u64,
    /// Visits of devices a second that are wanted at most; more devices are sent away for longer.
    pub visits_per_second: f64,
    /// When a device comes back, at the earliest.
    pub reconnect_after_ms: u32,
    /// Over which time the devices' return is spread, at least.
    pub reconnect_spread_ms: u32,
    /// Releases whose adapters are kept for devices and roll-backs.
    pub releases_kept: u64,
    /// How fast adapters are sent: `cubic`, or `bbr` for links that lose packets at random and are not paid for by the byte.
    pub congestion: Congestion,
}

impl Default for Receive {
    fn default() -> Self {
        Self {
            requests_burst: 120,
            requests_per_second: 20.0,
            resends_max: 8,
            norm_max: 1e4,
            reserve_bytes: 256 << 20,
            visits_per_second: 200.0,
            reconnect_after_ms: 1_000,
            reconnect_spread_ms: 1_000,
            releases_kept: 100,
            congestion: Congestion::Cubic,
        }
    }
}

/// How updates become a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Merge {
    /// Which rule.
    pub rule: Rule,
    /// Share cut off at either end by `trimmed-mean`.
    pub trimmed_share: f64,
    /// Dishonest devices that `multi-krum` bears.
    pub byzantine: usize,
    /// An update is clipped to this multiple of the round's median norm; 0 for none.
    pub clip_median_factor: f64,
    /// An update is clipped to this norm; 0 for none. Takes precedence.
    pub clip_norm: f64,
    /// A device counts for at most this multiple of the median number of samples; 0 for no limit.
    pub weight_median_factor: f64,
    /// What the server makes of the merged delta.
    pub optimizer: Optimizer,
    /// Step of the server (`FedAvg`: 1; the adaptive ones move each value by about this much, so 1e-3 or so).
    pub server_learning_rate: f32,
    /// Momentum of `fedavgm`, decay of the first moment of `fedadam` and `fedyogi`.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Adaptivity `τ`: what is added to the second moment's root. Near the size of the merged delta's values.
    pub tau: f32,
}

impl Default for Merge {
    fn default() -> Self {
        Self {
            rule: Rule::Mean,
            trimmed_share: 0.2,
            byzantine: 1,
            clip_median_factor: 1.0,
            clip_norm: 0.0,
            weight_median_factor: 2.0,
            optimizer: Optimizer::Fedavg,
            server_learning_rate: 1.0,
            beta1: 0.9,
            beta2: 0.99,
            tau: 1e-3,
        }
    }
}

/// Names of [`MergeRule`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Weighted mean.
    Mean,
    /// Median of each coordinate.
    Median,
    /// Mean without the extremes of each coordinate.
    TrimmedMean,
    /// Mean of the updates nearest to each other.
    MultiKrum,
}

/// Names of the server's optimizers; formulas in docs/merging.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// A step along the merged delta.
    Fedavg,
    /// With momentum.
    Fedavgm,
    /// Adam's second moment.
    Fedadam,
    /// Yogi's second moment.
    Fedyogi,
}

impl Config {
    /// How rounds are merged, by the names of docs/merging.md, as report cards have it.
    pub fn method(&self) -> String {
        let rule = if self.plain { Rule::Mean } else { self.merge.rule };
        let scaffold = if self.train.scaffold { ", scaffold" } else { "" };
        let buffered = if self.round.is_buffered() { ", buffered" } else { "" };
        format!(
            "{}, {}, {}{scaffold}{buffered}",
            self.train.mode.name(),
            rule.name(),
            self.merge.optimizer.name()
        )
    }
}

impl Rule {
    /// Its name in configurations and report cards.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Median => "median",
            Self::TrimmedMean => "trimmed-mean",
            Self::MultiKrum => "multi-krum",
        }
    }
}

impl Merge {
    /// The rule with its parameters.
    pub fn rule(&self) -> MergeRule {
        match self.rule {
            Rule::Mean => MergeRule::Mean,
            Rule::Median => MergeRule::Median,
            Rule::TrimmedMean => MergeRule::TrimmedMean { share: self.trimmed_share },
            Rule::MultiKrum => MergeRule::MultiKrum { byzantine: self.byzantine },
        }
    }

    /// The clipping.
    pub fn clip(&self) -> Clip {
        if self.clip_norm > 0.0 {
            Clip::Norm(self.clip_norm)
        } else if self.clip_median_factor > 0.0 {
            Clip::Median { factor: self.clip_median_factor }
        } else {
            Clip::Off
        }
    }
}

/// The server's constitutional step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Align {
    /// Whether it is made.
    pub enabled: bool,
    /// Red-team prompts, JSONL or CSV; the bundled ones if absent.
    pub redteam: Option<PathBuf>,
    /// Benign conversations to keep usefulness. If absent, a quarter of the held-out ones, which are then
    /// not scored.
    pub replay: Option<PathBuf>,
    /// Prompts answered each round.
    pub prompts: usize,
    /// Optimizer steps each round.
    pub steps: u32,
    /// Rows of a step; half of them are replayed.
    pub batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Critiques and rewritings of an answer before it becomes a refusal.
    pub attempts_max: u32,
    /// Longest answer.
    pub answer_tokens_max: usize,
}

impl Default for Align {
    fn default() -> Self {
        Self {
            enabled: true,
            redteam: None,
            replay: None,
            prompts: 48,
            steps: 50,
            batch: 8,
            learning_rate: 1e-3,
            attempts_max: 2,
            answer_tokens_max: 64,
        }
    }
}

/// Evaluation sets and gates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluate {
    /// Harmful prompts, CSV as AdvBench or JSONL; the bundled ones if absent.
    pub harmful: Option<PathBuf>,
    /// Benign prompts; the bundled ones if absent.
    pub benign: Option<PathBuf>,
    /// Held-out conversations; the bundled ones if absent.
    pub held_out: Option<PathBuf>,
    /// Rows of each set that are used.
    pub rows_max: usize,
    /// Longest answer.
    pub answer_tokens_max: usize,
    /// What a candidate must reach.
    pub gates: Gates,
}

impl Default for Evaluate {
    fn default() -> Self {
        Self {
            harmful: None,
            benign: None,
            held_out: None,
            rows_max: 200,
            answer_tokens_max: 48,
            gates: Gates::default(),
        }
    }
}

/// How a release reaches the devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Release {
    /// Share of the devices that a release is tried on before the others get it; 0 for no trial.
    pub canary_share: f64,
    /// Reports of devices that end a trial, of the release on trial and of the one before it.
    pub canary_reports: u32,
    /// After so many hours without a verdict all devices get it.
    pub canary_hours: f64,
    /// By how much the loss on devices' own pairs may rise.
    pub canary_loss_rise: f64,
    /// A release is rolled back if more than this share of the devices that said whether they can install it cannot, when
    /// its time is over; at once, if that holds of all that were told of it.
    pub canary_failures: f64,
}

impl Default for Release {
    fn default() -> Self {
        Self {
            canary_share: 0.0,
            canary_reports: 8,
            canary_hours: 24.0,
            canary_loss_rise: 0.02,
            canary_failures: 0.25,
        }
    }
}

impl Release {
    /// Whether releases are tried on a share first.
    pub fn is_canary(&self) -> bool {
        self.canary_share > 0.0
    }
}

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read or written.
    #[error("{}: cannot be read or written", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML of this form.
    #[error("{}: expected an aggregator's configuration", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// Line and reason.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Values that cannot be used, all of them.
    #[error("configuration: {}", .0.join("; "))]
    Values(Vec<String>),
}

impl Config {
    /// The file of a state directory.
    pub fn read(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        Self::of_text(&Self::text(&path)?, &path)
    }

    fn text(path: &Path) -> Result<String, ConfigError> {
        std::fs::read_to_string(path).map_err(|source| ConfigError::File { path: path.to_owned(), source })
    }

    fn of_text(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text)
            .map_err(|source| ConfigError::Form { path: path.to_owned(), source: Box::new(source) })
    }
}
