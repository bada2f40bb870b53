//! The command line of `edge-client`: what a person types becomes one call into the stages.
//!
//! Each verb has a function in a file below; `main.rs` turns the error into an exit code with [`exit::code`].

pub mod exit;
mod policy_file;
mod open;
mod identity;
mod enroll;
mod evaluate;
mod voices;
pub mod serve;
mod add;
pub mod samples;
mod offline;
mod member;
mod rounds;
mod status;
mod devices;
pub mod chat;
pub mod bench;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, builder::RangedU64ValueParser};
use commonweal_runtime::Devices;

use crate::{events::Output, keys::KeyPlace};

const EXAMPLES: &str = "\
Examples:
  edge-client enroll 'commonweal://aggregator.example:4433/?token=…&ca=…'
  edge-client add chats.jsonl            keep a file's conversations for training
  edge-client samples                    what is kept; `forget` deletes
  edge-client run                        take part in rounds until stopped
  edge-client once --json                one round, its stages as JSON lines
  edge-client filter chats.jsonl --json  what the guard says, without training
  edge-client chat                       talk to the installed model

Exit codes: 0 done, 1 failed, 2 usage, 3 bad input, 4 refused by the aggregator, 5 unavailable (network, library, device, memory).";

/// Numbers of which none makes no sense.
fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// Takes part in federated fine-tuning; a person's text never leaves this device.
#[derive(Debug, Parser)]
#[command(name = "edge-client", version, about, after_help = EXAMPLES)]
pub struct Cli {
    /// Options of every verb.
    #[command(flatten)]
    pub shared: Shared,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options of every verb. Each can also be set in `device.toml` in the state directory.
#[derive(Debug, Args)]
pub struct Shared {
    /// State directory: identity, samples, adapters [default: $XDG_DATA_HOME/commonweal/device]
    #[arg(long, global = true, env = "COMMONWEAL_DIR", value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Model package [default: target/reference/package]
    #[arg(long, global = true, env = "COMMONWEAL_PACKAGE", value_name = "DIR")]
    pub package: Option<PathBuf>,
    /// ONNX Runtime library [default: what scripts/setup fetched]
    #[arg(long, global = true, env = "ORT_DYLIB_PATH", value_name = "FILE")]
    pub library: Option<PathBuf>,
    /// What the network runs on: auto, cpu, cuda:N, tensorrt:N, directml:N, coreml, webgpu, openvino[:CPU|GPU|NPU], or a
    /// list such as cuda:0,cpu, the first of which that works is taken [default: auto]
    #[arg(long, global = true, env = "COMMONWEAL_DEVICE", value_name = "DEVICE")]
    pub device: Option<Devices>,
    /// Provider of devices that comes as a file of its own, such as onnxruntime-ep-webgpu's
    #[arg(long, global = true, env = "COMMONWEAL_PROVIDER", value_name = "FILE")]
    pub provider: Option<PathBuf>,
    /// Key that seals the state directory: a file of mode 600, or keyring:NAME [default: store.key in the state directory]
    #[arg(long, global = true, env = "COMMONWEAL_STORE_KEY", value_name = "PLACE")]
    pub store_key: Option<KeyPlace>,
    /// Policy file [default: policy.toml in the state directory, else built in]
    #[arg(long, global = true, env = "COMMONWEAL_POLICY", value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Constitution file [default: the package's]
    #[arg(long, global = true, env = "COMMONWEAL_CONSTITUTION", value_name = "FILE")]
    pub constitution: Option<PathBuf>,
    /// Threads that the network runs on [default: all cores]
    #[arg(long, global = true, env = "COMMONWEAL_THREADS", value_name = "N", value_parser = at_least_one())]
    pub threads: Option<usize>,
    /// Longest conversation in tokens, for answers and for training; fewer need less memory [default: the package's]
    #[arg(long, global = true, env = "COMMONWEAL_CONTEXT", value_name = "N", value_parser = at_least_one())]
    pub context: Option<usize>,
    /// OpenTelemetry collector that gets spans of this device's updates; their place then goes with each update, so that they
    /// can be followed to the release [default: none]
    #[arg(long, global = true, env = "COMMONWEAL_TRACES", value_name = "http://HOST:PORT")]
    pub traces: Option<String>,
    /// One JSON object a line: results on stdout, diagnostics on stderr
    #[arg(long, global = true)]
    pub json: bool,
}

impl Shared {
    /// How events are shown.
    pub fn output(&self) -> Output {
        if self.json { Output::Json } else { Output::Text }
    }
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Get an identity from an aggregator with a single-use invitation
    #[command(
        after_help = "Examples:\n  edge-client enroll 'commonweal://aggregator.example:4433/?token=…&ca=…'\n  edge-client enroll --dir /srv/device-2 'commonweal://…'   a second device on this machine\n  edge-client enroll --anew 'commonweal://…'                after its aggregator lost its keys, or somebody else has them"
    )]
    Enroll {
        /// `commonweal://HOST:PORT/?token=…&ca=…`, as `aggregator token` prints it
        invitation: String,
        /// Give up the identity that this directory holds, and whatever key of its aggregator it has followed
        #[arg(long)]
        anew: bool,
    },
    /// Take part in rounds until stopped
    #[command(
        after_help = "Examples:\n  edge-client run\n  edge-client run --json --rounds 3   three updates, events as JSON lines\n  edge-client run --always            also while the device is in use, on its battery, …\n\nIt works while the rules of policy.toml's [when] hold: nobody uses the device, mains power, an unmetered network, not\ntoo hot, memory left (docs/devices.md). `edge-client status` says why it waits."
    )]
    Run {
        /// Stop after this many accepted updates
        #[arg(long, value_name = "N")]
        rounds: Option<u64>,
        /// Work at any time and at normal priority: the policy's rules are not asked
        #[arg(long, env = "COMMONWEAL_ALWAYS", value_parser = clap::builder::FalseyValueParser::new())]
        always: bool,
    },
    /// Take part in one round, if there is one, and install what was published
    #[command(
        after_help = "Examples:\n  edge-client once\n  edge-client once --json || echo \"exit code $?\"   4: the update was refused, 5: nobody answers"
    )]
    Once {
        /// Only if the policy's rules of when to work hold, and as long as they do
        #[arg(long)]
        heed_rules: bool,
    },
    /// What the device is, has and did
    #[command(after_help = "Examples:\n  edge-client status\n  edge-client status --json")]
    Status,
    /// Keep a file's conversations for training (chat JSONL, chosen/rejected JSONL, goal,target CSV)
    #[command(
        after_help = "Examples:\n  edge-client add chats.jsonl\n  edge-client add hh-rlhf.jsonl harmful_behaviors.csv\n\nBad lines are named and left out; what is known already is not kept twice."
    )]
    Add {
        /// The files
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// List what is kept for training: name, date, whether a round has drawn it, size, source
    #[command(
        after_help = "Examples:\n  edge-client samples\n  edge-client samples --text | less\n  edge-client samples --json | jq 'select(.state == \"new\")'"
    )]
    Samples {
        /// With the conversations themselves
        #[arg(long)]
        text: bool,
    },
    /// Delete samples with everything on this device that was computed from them
    #[command(
        after_help = "Examples:\n  edge-client forget 3f9a17c2\n  edge-client forget --source chats.jsonl\n  edge-client forget --older-than 30d\n  edge-client forget --all        samples, rounds, personal adapter, and the key that sealed them\n\nWhat an aggregator has accepted stays there (docs/privacy.md). Within a second an endpoint that is\nrunning answers no more from the personal adapter, and with --all lets go of the chats that it holds; a chat before its\nnext answer."
    )]
    Forget(samples::Request),
    /// What the guard says of a file's conversations; nothing is kept
    #[command(
        after_help = "Examples:\n  edge-client filter chats.jsonl\n  edge-client filter chats.jsonl --json --policy strict.toml\n  edge-client filter labelled.jsonl --evaluate\n  edge-client filter harmful_behaviors.csv --evaluate --json"
    )]
    Filter {
        /// The file
        file: PathBuf,
        /// Judge against the rows' labels and print the confusion table (rows: prompt, response, label, source)
        #[arg(long)]
        evaluate: bool,
    },
    /// Filter a file and rewrite what is harmful; prints the pairs that training would use
    #[command(
        after_help = "Examples:\n  edge-client revise chats.jsonl > revised.jsonl\n  edge-client revise chats.jsonl --constitution ours.toml"
    )]
    Revise {
        /// The file
        file: PathBuf,
    },
    /// Filter, revise and train on a file; writes an adapter, sends nothing
    #[command(
        after_help = "Examples:\n  edge-client train chats.jsonl\n  edge-client train chats.jsonl --steps 300 --out mine.safetensors --json\n  edge-client train chats.jsonl --personal   an adapter of your own beside the release, on this device only"
    )]
    Train {
        /// The file
        file: PathBuf,
        /// Where the adapter goes
        #[arg(long, default_value = "adapter.safetensors", value_name = "FILE", conflicts_with = "personal")]
        out: PathBuf,
        /// Go on with the personal adapter, which `chat --personal` and `serve` use beside the installed release; it is
        /// never sent
        #[arg(long)]
        personal: bool,
        /// Begin the personal adapter anew
        #[arg(long, requires = "personal")]
        anew: bool,
        /// Optimizer steps
        #[arg(long, default_value_t = 100, value_name = "N")]
        steps: u32,
        /// Peak learning rate
        #[arg(long, default_value_t = 1e-3, value_name = "RATE")]
        learning_rate: f32,
    },
    /// Talk to the installed model
    #[command(
        after_help = "Examples:\n  edge-client chat\n  edge-client chat --prompt 'How long do eggs keep?' --temperature 0\n  printf 'hello\\n/save talk.jsonl\\n' | edge-client chat --json\n\nIn the chat, /help tells what can be typed. Ctrl-C stops an answer, Ctrl-D ends. Nothing is kept but by /save."
    )]
    Chat(chat::Request),
    /// An OpenAI-compatible endpoint on this machine for the installed model
    #[command(
        after_help = "Examples:\n  edge-client serve\n  edge-client serve --listen 127.0.0.1:0 --json   any free port, told as JSON\n  curl http://127.0.0.1:8080/v1/chat/completions -H 'content-type: application/json' \\\n       -d '{\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]}'\n\nNothing that is said is kept, unless policy.toml allows it and --keep-chats or the request asks for it (docs/serve.md)."
    )]
    Serve(serve::Request),
    /// Measure what this device does a second, kind by kind, and against the machine's limits
    #[command(
        after_help = "Examples:\n  edge-client bench\n  edge-client bench --only decode,train --json\n  edge-client bench --package smol.package --threads 2"
    )]
    Bench(bench::Request),
    /// What the runtime library can run the network on, and what would be taken
    #[command(
        after_help = "Examples:\n  edge-client devices\n  edge-client devices --device webgpu --provider libonnxruntime_providers_webgpu.so\n  edge-client devices --json"
    )]
    Devices,
    /// Take part in no more rounds until `resume`
    #[command(after_help = "Examples:\n  edge-client pause\n\nReturns when a visit under way has stopped.")]
    Pause,
    /// Take part again
    #[command(after_help = "Examples:\n  edge-client resume")]
    Resume,
}

/// Runs a verb to its end.
pub fn run(cli: &Cli) -> anyhow::Result<()> {
    let shared = &cli.shared;
    match &cli.verb {
        Verb::Enroll { invitation, anew } => enroll::enroll(shared, invitation, *anew),
        Verb::Run { rounds, always } => rounds::run(shared, *rounds, !always),
        Verb::Once { heed_rules } => rounds::once(shared, *heed_rules),
        Verb::Status => status::status(shared),
        Verb::Add { files } => add::add(shared, files),
        Verb::Samples { text } => samples::samples(shared, *text),
        Verb::Forget(request) => samples::forget(shared, request),
        Verb::Filter { file, evaluate: false } => offline::filter(shared, file),
        Verb::Filter { file, evaluate: true } => evaluate::evaluate(shared, file),
        Verb::Revise { file } => offline::revise(shared, file),
        Verb::Train { file, out, personal, anew, steps, learning_rate } => {
            let goal = match (personal, anew) {
                (false, _) => offline::Goal::File(out.clone()),
                (true, anew) => offline::Goal::Personal { anew: *anew },
            };
            let (steps, learning_rate) = (*steps, *learning_rate);
            offline::train(shared, &offline::TrainRequest { file: file.clone(), goal, steps, learning_rate })
        }
        Verb::Chat(request) => chat::chat(shared, request),
        Verb::Serve(request) => serve::serve(shared, request),
        Verb::Bench(request) => bench::bench(shared, request),
        Verb::Devices => devices::devices(shared),
        Verb::Pause => status::pause(shared),
        Verb::Resume => status::resume(shared),
    }
}
