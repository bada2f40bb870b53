//! Flags that change settings, shared by `init`, `serve` and `evaluate`; each also an environment variable.

use std::net::SocketAddr;
use std::path::PathBuf;

use commonweal_protocol::Mode;

use crate::config::{Config, Listen, Optimizer, Rule};
use crate::round::{RoundMode, Sampling};

/// See the module. What is absent leaves the setting as it is.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Settings")]
pub(super) struct Flags {
    /// The model package.
    #[arg(long, env = "COMMONWEAL_PACKAGE", value_name = "DIR")]
    package: Option<PathBuf>,
    /// Where to listen (UDP).
    #[arg(long, env = "COMMONWEAL_LISTEN", value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// The operator's port (TCP): health, metrics; `off` for none [default: 127.0.0.1:4434].
    #[arg(long, env = "COMMONWEAL_ADMIN", value_name = "ADDRESS:PORT")]
    admin: Option<Listen>,
    /// An OpenTelemetry collector that gets spans of rounds and updates [default: none].
    #[arg(long, env = "COMMONWEAL_TRACES", value_name = "http://HOST:PORT")]
    traces: Option<String>,
    /// Where devices find the aggregator, for invitations.
    #[arg(long, env = "COMMONWEAL_ADDRESS", value_name = "HOST:PORT")]
    address: Option<String>,
    /// The ONNX Runtime library.
    #[arg(long, env = "COMMONWEAL_LIBRARY", value_name = "FILE")]
    library: Option<PathBuf>,
    /// What the model runs on: auto, cpu, cuda:N, tensorrt:N, directml:N, coreml, webgpu, openvino[:CPU|GPU|NPU], or a
    /// list such as cuda:0,cpu, the first of which that works is taken.
    #[arg(long, env = "COMMONWEAL_DEVICE", value_name = "DEVICE")]
    device: Option<commonweal_runtime::Devices>,
    /// Provider of such devices that comes as a file of its own.
    #[arg(long, env = "COMMONWEAL_PROVIDER", value_name = "FILE")]
    provider: Option<PathBuf>,
    /// Threads of the model.
    #[arg(long, env = "COMMONWEAL_THREADS")]
    threads: Option<usize>,
    /// No clipping, no alignment, no gates: plain averaging, for comparison.
    #[arg(long, env = "COMMONWEAL_PLAIN")]
    plain: bool,
    /// Whom a round waits for: its own devices, or nobody (FedBuff).
    #[arg(long, env = "COMMONWEAL_ROUND_MODE")]
    round_mode: Option<RoundMode>,
    /// Releases that an update may lie behind, in buffered mode.
    #[arg(long, env = "COMMONWEAL_STALENESS_MAX", value_name = "N")]
    staleness_max: Option<u32>,
    /// Updates wanted in a round; in buffered mode the buffer's size.
    #[arg(long, env = "COMMONWEAL_DEVICES", value_name = "N")]
    devices: Option<u32>,
    /// Whom a round asks: whoever comes first, an even draw, or those that were asked longest ago.
    #[arg(long, env = "COMMONWEAL_SAMPLING")]
    sampling: Option<Sampling>,
    /// Visits of devices a second that are wanted at most.
    #[arg(long, env = "COMMONWEAL_VISITS_PER_SECOND", value_name = "RATE")]
    visits_per_second: Option<f64>,
    /// Updates without which a round ends with nothing [default: half of the devices].
    #[arg(long, env = "COMMONWEAL_QUORUM", value_name = "N")]
    quorum: Option<u32>,
    /// Tasks handed out for each update wanted.
    #[arg(long, env = "COMMONWEAL_OVER_SELECTION", value_name = "FACTOR")]
    over_selection: Option<f64>,
    /// Seconds to wait for all devices before a round begins with the quorum.
    #[arg(long, env = "COMMONWEAL_WAIT_SECONDS", value_name = "SECONDS")]
    wait_seconds: Option<u64>,
    /// Seconds that devices have.
    #[arg(long, env = "COMMONWEAL_DEADLINE_SECONDS", value_name = "SECONDS")]
    deadline_seconds: Option<u64>,
    /// How LoRA's factors are federated: fedit (A and B, averaged apart), ffa (B alone), rolora (B and A in turn) or
    /// exact (A and B, their products averaged).
    #[arg(long, env = "COMMONWEAL_MODE", value_parser = mode)]
    mode: Option<Mode>,
    /// Optimizer steps of a device and round.
    #[arg(long, env = "COMMONWEAL_STEPS", value_name = "N")]
    steps: Option<u32>,
    /// Peak learning rate of devices.
    #[arg(long, env = "COMMONWEAL_LEARNING_RATE", value_name = "RATE")]
    learning_rate: Option<f32>,
    /// Pull of devices towards the release (FedProx).
    #[arg(long, env = "COMMONWEAL_PROXIMAL_MU", value_name = "MU")]
    proximal_mu: Option<f32>,
    /// Correct gradients by control variates (SCAFFOLD).
    #[arg(long, env = "COMMONWEAL_SCAFFOLD")]
    scaffold: bool,
    /// Bits of an update's values: 8, 4, 3 or 2.
    #[arg(long, env = "COMMONWEAL_BITS")]
    bits: Option<u8>,
    /// How updates are merged.
    #[arg(long, env = "COMMONWEAL_RULE")]
    rule: Option<Rule>,
    /// What the server makes of the merged delta.
    #[arg(long, env = "COMMONWEAL_OPTIMIZER")]
    optimizer: Option<Optimizer>,
    /// Step of the server's optimizer.
    #[arg(long, env = "COMMONWEAL_SERVER_LEARNING_RATE", value_name = "RATE")]
    server_learning_rate: Option<f32>,
    /// Norm to which updates are clipped, in place of a multiple of the median.
    #[arg(long, env = "COMMONWEAL_CLIP_NORM", value_name = "NORM")]
    clip_norm: Option<f64>,
    /// No alignment.
    #[arg(long, env = "COMMONWEAL_NO_ALIGN")]
    no_align: bool,
    /// Red-team prompts answered in a round.
    #[arg(long, env = "COMMONWEAL_ALIGN_PROMPTS", value_name = "N")]
    align_prompts: Option<usize>,
    /// Optimizer steps of the alignment.
    #[arg(long, env = "COMMONWEAL_ALIGN_STEPS", value_name = "N")]
    align_steps: Option<u32>,
    /// Harmful prompts to measure by (CSV as AdvBench, or JSONL) [default: bundled].
    #[arg(long, env = "COMMONWEAL_EVAL_HARMFUL", value_name = "FILE")]
    eval_harmful: Option<PathBuf>,
    /// Share of the devices that a release is tried on before the others get it.
    #[arg(long, env = "COMMONWEAL_CANARY_SHARE", value_name = "SHARE")]
    canary_share: Option<f64>,
    /// Benign prompts to measure by [default: bundled].
    #[arg(long, env = "COMMONWEAL_EVAL_BENIGN", value_name = "FILE")]
    eval_benign: Option<PathBuf>,
    /// Held-out conversations (JSONL) [default: bundled].
    #[arg(long, env = "COMMONWEAL_HELDOUT", value_name = "FILE")]
    heldout: Option<PathBuf>,
    /// Red-team prompts to align by [default: bundled].
    #[arg(long, env = "COMMONWEAL_REDTEAM", value_name = "FILE")]
    redteam: Option<PathBuf>,
    /// Benign conversations to keep usefulness [default: a quarter of the held-out ones].
    #[arg(long, env = "COMMONWEAL_REPLAY", value_name = "FILE")]
    replay: Option<PathBuf>,
}

fn mode(text: &str) -> Result<Mode, String> {
    [Mode::Fedit, Mode::Ffa, Mode::Rolora, Mode::Exact]
        .into_iter()
        .find(|mode| mode.name() == text)
        .ok_or_else(|| "expected fedit, ffa, rolora or exact".to_owned())
}

fn set<T: Clone>(setting: &mut T, flag: Option<&T>) {
    if let Some(value) = flag {
        setting.clone_from(value);
    }
}

/// Paths are kept absolute, since the configuration outlives the current directory.
fn set_path(setting: &mut Option<PathBuf>, flag: Option<&PathBuf>) {
    if let Some(path) = flag {
        *setting = Some(std::path::absolute(path).unwrap_or_else(|_| path.clone()));
    }
}

impl Flags {
    /// Changes what was given.
    pub(super) fn apply(&self, config: &mut Config) {
        let mut package = Some(config.package.clone());
        set_path(&mut package, self.package.as_ref());
        config.package = package.unwrap_or_default();
        set(&mut config.listen, self.listen.as_ref());
        set(&mut config.admin.listen, self.admin.as_ref());
        if self.traces.is_some() {
            config.traces.endpoint.clone_from(&self.traces);
        }
        if self.address.is_some() {
            config.address.clone_from(&self.address);
        }
        set_path(&mut config.runtime_library, self.library.as_ref());
        set(&mut config.device, self.device.as_ref());
        set_path(&mut config.provider, self.provider.as_ref());
        if self.threads.is_some() {
            config.threads = self.threads;
        }
        config.plain |= self.plain;
        if let Some(devices) = self.devices {
            config.round.goal = devices;
            config.round.quorum = devices.div_ceil(2);
        }
        set(&mut config.round.mode, self.round_mode.as_ref());
        set(&mut config.round.sampling, self.sampling.as_ref());
        set(&mut config.receive.visits_per_second, self.visits_per_second.as_ref());
        set(&mut config.round.staleness_max, self.staleness_max.as_ref());
        set(&mut config.round.quorum, self.quorum.as_ref());
        set(&mut config.round.over_selection, self.over_selection.as_ref());
        let milliseconds = |seconds: Option<u64>| seconds.map(|seconds| seconds.saturating_mul(1_000));
        set(&mut config.round.wait_ms, milliseconds(self.wait_seconds).as_ref());
        set(&mut config.round.deadline_ms, milliseconds(self.deadline_seconds).as_ref());
        set(&mut config.train.mode, self.mode.as_ref());
        if let Some(steps) = self.steps {
            config.train.steps_max = steps;
            config.train.warmup_steps = config.train.warmup_steps.min(steps);
        }
        set(&mut config.train.learning_rate, self.learning_rate.as_ref());
        set(&mut config.train.proximal_mu, self.proximal_mu.as_ref());
        config.train.scaffold |= self.scaffold;
        set(&mut config.compress.bits, self.bits.as_ref());
        set(&mut config.merge.rule, self.rule.as_ref());
        set(&mut config.merge.optimizer, self.optimizer.as_ref());
        set(&mut config.merge.server_learning_rate, self.server_learning_rate.as_ref());
        set(&mut config.merge.clip_norm, self.clip_norm.as_ref());
        config.align.enabled &= !self.no_align;
        set(&mut config.align.prompts, self.align_prompts.as_ref());
        set(&mut config.align.steps, self.align_steps.as_ref());
        set(&mut config.release.canary_share, self.canary_share.as_ref());
        set_path(&mut config.evaluate.harmful, self.eval_harmful.as_ref());
        set_path(&mut config.evaluate.benign, self.eval_benign.as_ref());
        set_path(&mut config.evaluate.held_out, self.heldout.as_ref());
        set_path(&mut config.align.redteam, self.redteam.as_ref());
        set_path(&mut config.align.replay, self.replay.as_ref());
    }
}
