//! The `model-compiler` command: arguments in, one library call, a summary (`describe.rs`) or an error out. `calibration.rs`
//! reads the calibration text.

mod calibration;
mod describe;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use commonweal_adapter::Target;
use commonweal_compiler::compile::{CacheBits, CompileError, CompileOptions, Method, compile_with};
use commonweal_compiler::encoder::{self, EncoderOptions};
use commonweal_compiler::layers::Calibration;
use commonweal_compiler::random::{RandomError, RandomOptions, random};
use commonweal_compiler::{Accuracy, Bits};
use commonweal_package::{
    EncoderPackage, OpenError, Package, PackageKind, StagingError, WriteError, attach, package_kind,
};
use commonweal_runtime::{Library, LibraryError};
use describe::{describe, describe_encoder, say};
use indicatif::{ProgressBar, ProgressStyle};

const EXAMPLES: &str = "Examples:
  model-compiler compile --checkpoint SmolLM2-135M-Instruct --out smol.package
  model-compiler compile --checkpoint my-model --out my.package --bits 8 --rank 16 --targets q,v
  model-compiler compile --checkpoint my-model --out my.package --calibrate chats.jsonl
  model-compiler compile --checkpoint my-model --out my.package --calibrate chats.jsonl --cache 8
  model-compiler random --config config.json --tokenizer tokenizer.json --out random-checkpoint
  model-compiler inspect smol.package --json
  model-compiler attach smol.package --file guard.toml=guard.toml --file NOTICE=NOTICE.txt

Exit codes: 0 done, 2 usage, 3 bad input, 5 runtime library or memory missing, 1 anything else.";

/// Tokens of a calibration text, where none are asked for.
const CALIBRATION_TOKENS: usize = 16_384;

/// Compiles a Hugging Face checkpoint into a package that devices run and train.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compile a checkpoint directory into a package directory
    #[command(after_help = EXAMPLES)]
    Compile(CompileArgs),
    /// Make a random checkpoint of a given shape, to measure shapes without their weights
    Random(RandomArgs),
    /// Verify a package and show what it holds
    Inspect {
        /// The package directory
        package: PathBuf,
        /// Print the manifest as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Add a guard, a reviser, a constitution, a licence or a notice to a package
    Attach {
        /// The package directory
        package: PathBuf,
        /// NAME=FILE, where NAME is guard.toml, constitution.toml, adapters/guard.safetensors,
        /// adapters/guard.words, adapters/reviser.safetensors, LICENSE or NOTICE; repeatable
        #[arg(long = "file", value_name = "NAME=FILE", required = true, value_parser = name_and_file)]
        files: Vec<(String, PathBuf)>,
    },
}

#[derive(Args)]
struct CompileArgs {
    /// A Hugging Face checkpoint directory: config.json, safetensors, tokenizer.json, chat template
    #[arg(long, env = "COMMONWEAL_CHECKPOINT")]
    checkpoint: PathBuf,
    /// The package directory to make; it must not exist yet, or be empty
    #[arg(long, env = "COMMONWEAL_OUT")]
    out: PathBuf,
    /// Bits of one stored weight: 4, 8 or 32
    #[arg(long, env = "COMMONWEAL_BITS", default_value = "4", value_parser = bits)]
    bits: Bits,
    /// Weights that share one scale: 32, 64 or 128
    #[arg(long = "block", env = "COMMONWEAL_BLOCK", default_value_t = 32)]
    block_size: usize,
    /// Bits of a kept key or value, 32 or 8: 8 takes a quarter of the memory, reads prompts more slowly, and needs
    /// --calibrate
    #[arg(long = "cache", env = "COMMONWEAL_CACHE", value_name = "BITS", default_value = "32", value_parser = cache_bits)]
    cache: CacheBits,
    /// How 4-bit and 8-bit codes are chosen [default: gptq with --calibrate, else wmse]
    #[arg(long, env = "COMMONWEAL_METHOD")]
    method: Option<MethodArg>,
    /// A text like those that the model will see: chat JSONL ({"messages":[…]}), JSONL with "text", or plain lines
    #[arg(long, env = "COMMONWEAL_CALIBRATE", value_name = "FILE")]
    calibrate: Option<PathBuf>,
    /// Tokens of that text to read, of which whole sequences of 512 are used; at least as many as the widest layer has
    /// inputs [default: 16384]
    #[arg(long, env = "COMMONWEAL_CALIBRATION_TOKENS", value_name = "N")]
    calibration_tokens: Option<usize>,
    /// ONNX Runtime library, for --calibrate [default: what scripts/setup fetched]
    #[arg(long, env = "ORT_DYLIB_PATH", value_name = "FILE")]
    library: Option<PathBuf>,
    /// Fast kernels round activations to 8 bits; exact ones do not
    #[arg(long, env = "COMMONWEAL_ACCURACY", default_value = "fast")]
    accuracy: AccuracyArg,
    /// Default rank of a trained adapter [default: 8]
    #[arg(long, env = "COMMONWEAL_RANK")]
    rank: Option<usize>,
    /// Default alpha of a trained adapter [default: twice the rank]
    #[arg(long, env = "COMMONWEAL_ALPHA")]
    alpha: Option<f32>,
    /// The linears that a trained adapter changes [default: q,k,v,o,gate,up,down]
    #[arg(long, env = "COMMONWEAL_TARGETS", value_delimiter = ',')]
    targets: Option<Vec<Target>>,
    /// Longest sequence [default: the checkpoint's]
    #[arg(long, env = "COMMONWEAL_CONTEXT")]
    context: Option<usize>,
    /// A Jinja chat template to use in place of the checkpoint's
    #[arg(long, env = "COMMONWEAL_CHAT_TEMPLATE", value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// The SPDX expression of the model's licence
    #[arg(long, env = "COMMONWEAL_LICENCE", value_name = "SPDX")]
    licence: Option<String>,
    /// A name for people [default: the checkpoint directory's]
    #[arg(long, env = "COMMONWEAL_NAME")]
    name: Option<String>,
}

#[derive(Args)]
struct RandomArgs {
    /// A Hugging Face config.json that gives the shape
    #[arg(long)]
    config: PathBuf,
    /// A tokenizer.json whose tokens the shape has room for
    #[arg(long)]
    tokenizer: PathBuf,
    /// A Jinja chat template [default: a plain one, none for an encoder]
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// The checkpoint directory to make; it must not exist yet, or be empty
    #[arg(long)]
    out: PathBuf,
    /// Equal seeds give equal weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum AccuracyArg {
    Fast,
    Exact,
}

impl From<AccuracyArg> for Accuracy {
    fn from(accuracy: AccuracyArg) -> Self {
        match accuracy {
            AccuracyArg::Fast => Self::Fast,
            AccuracyArg::Exact => Self::Exact,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum MethodArg {
    /// Round to nearest, the scale by the block's extreme weight
    Rtn,
    /// Round to nearest, the scale with the least squared error
    Mse,
    /// The same, the error of a large weight counting more
    Wmse,
    /// Least squared error of the layers' outputs over the calibration text
    Gptq,
}

impl From<MethodArg> for Method {
    fn from(method: MethodArg) -> Self {
        match method {
            MethodArg::Rtn => Self::Rtn,
            MethodArg::Mse => Self::Mse,
            MethodArg::Wmse => Self::Wmse,
            MethodArg::Gptq => Self::Gptq,
        }
    }
}

fn bits(text: &str) -> Result<Bits, String> {
    let bits: u8 = text.parse().map_err(|_| "must be 4, 8 or 32".to_owned())?;
    Bits::try_from(bits).map_err(|error| error.to_string())
}

fn cache_bits(text: &str) -> Result<CacheBits, String> {
    match text {
        "32" => Ok(CacheBits::Full),
        "8" => Ok(CacheBits::Eight),
        _ => Err("must be 32 or 8".into()),
    }
}

fn name_and_file(text: &str) -> Result<(String, PathBuf), String> {
    let (name, file) = text.split_once('=').ok_or("must be NAME=FILE")?;
    Ok((name.to_owned(), file.into()))
}

fn main() -> ExitCode {
    commonweal_runtime::library::forbid_telemetry();
    let matches = Cli::command().get_matches();
    // The variable may be set for other programs: only what was written in the command must have an effect.
    let compile = matches.subcommand_matches("compile");
    let library = compile.and_then(|compile| compile.value_source("library"));
    let names_library = library == Some(ValueSource::CommandLine);
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match cli.command {
        Command::Compile(args) => run_compile(args, names_library),
        Command::Random(args) => run_random(args),
        Command::Inspect { package, json } => inspect(package, json),
        Command::Attach { package, files } => run_attach(package, &files),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let is_unavailable =
                error.is::<LibraryError>() || error.downcast_ref().is_some_and(CompileError::is_unavailable);
            ExitCode::from(if is_unavailable {
                5
            } else if is_bad_input(&error) {
                3
            } else {
                1
            })
        }
    }
}

/// An option that would have no effect.
#[derive(Debug, thiserror::Error)]
enum IdleOption {
    #[error("{0} is for decoders, and the checkpoint is of an encoder")]
    OnlyForDecoders(&'static str),
    #[error("{0} is for --calibrate, which is not given")]
    WithoutCalibrate(&'static str),
    #[error("--method is for 4 and 8 bits, and --bits is 32")]
    NotRounded,
}

/// Whether what was given is to blame, rather than the disk or this program.
fn is_bad_input(error: &anyhow::Error) -> bool {
    if let Some(error) = error.downcast_ref::<CompileError>() {
        error.is_bad_input()
    } else if let Some(error) = error.downcast_ref::<RandomError>() {
        !matches!(error, RandomError::Staging(StagingError::Write { .. }))
    } else if let Some(error) = error.downcast_ref::<WriteError>() {
        matches!(error, WriteError::Name { .. } | WriteError::Manifest(_))
    } else {
        error.is::<OpenError>()
            || error.is::<IdleOption>()
            || error.is::<calibration::TextError>()
            || error.is::<io::Error>()
    }
}

fn run_compile(args: CompileArgs, names_library: bool) -> Result<()> {
    let config = args.checkpoint.join("config.json");
    // What is no checkpoint at all is refused by the stage that opens it.
    if config.is_file()
        && encoder::is_encoder(&config).map_err(|error| CompileError::Checkpoint(error.into()))?
    {
        return run_compile_encoder(args, names_library);
    }
    if args.calibrate.is_none() {
        let given =
            [("--calibration-tokens", args.calibration_tokens.is_some()), ("--library", names_library)];
        if let Some((option, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(IdleOption::WithoutCalibrate(option).into());
        }
    }
    if args.method.is_some() && args.bits == Bits::Full {
        return Err(IdleOption::NotRounded.into());
    }
    let rank = args.rank.unwrap_or(8);
    let calibrated = args.calibrate.is_some() && args.bits != Bits::Full;
    let default = if calibrated { Method::Gptq } else { Method::default() };
    let options = CompileOptions {
        bits: args.bits,
        block_size: args.block_size,
        method: args.method.map_or(default, Method::from),
        cache: args.cache,
        accuracy: args.accuracy.into(),
        rank,
        alpha: args.alpha.unwrap_or(2.0 * rank as f32),
        targets: args.targets.unwrap_or_else(|| Target::ALL.to_vec()),
        context: args.context,
        chat_template: args.chat_template,
        licence: args.licence,
        name: args.name,
        ..CompileOptions::new(args.checkpoint, args.out)
    };
    let mut text = match &args.calibrate {
        None => None,
        Some(file) => {
            let (checkpoint, template) = (&options.checkpoint, options.chat_template.as_deref());
            let count = args.calibration_tokens.unwrap_or(CALIBRATION_TOKENS);
            let tokens = calibration::read_tokens(file, count, checkpoint, template)?;
            Some((tokens, Library::load(args.library.as_deref())?))
        }
    };
    let calibration = text.as_mut().map(|(tokens, engine)| Calibration { tokens, engine });
    let bar = progress_bar("quantize");
    let summary = compile_with(&options, calibration, &mut |written, total| show(&bar, written, total))?;
    bar.finish_and_clear();
    say(options.out.display());
    describe(&summary.manifest, summary.weights_bytes);
    Ok(())
}

fn run_compile_encoder(args: CompileArgs, names_library: bool) -> Result<()> {
    for (option, given) in [
        ("--method", args.method.is_some()),
        ("--calibrate", args.calibrate.is_some()),
        ("--calibration-tokens", args.calibration_tokens.is_some()),
        ("--library", names_library),
        ("--rank", args.rank.is_some()),
        ("--alpha", args.alpha.is_some()),
        ("--targets", args.targets.is_some()),
        ("--chat-template", args.chat_template.is_some()),
        ("--cache", args.cache != CacheBits::Full),
    ] {
        if given {
            return Err(IdleOption::OnlyForDecoders(option).into());
        }
    }
    let options = EncoderOptions {
        bits: args.bits,
        block_size: args.block_size,
        accuracy: args.accuracy.into(),
        context: args.context,
        licence: args.licence,
        name: args.name,
        ..EncoderOptions::new(args.checkpoint, args.out)
    };
    let bar = progress_bar("quantize");
    let summary = encoder::compile_with_progress(&options, &mut |written, total| show(&bar, written, total))?;
    bar.finish_and_clear();
    say(options.out.display());
    describe_encoder(&summary.manifest, summary.weights_bytes);
    Ok(())
}

fn run_random(args: RandomArgs) -> Result<()> {
    let RandomArgs { config, tokenizer, chat_template, out, seed } = args;
    let options = RandomOptions { config, tokenizer, chat_template, out, seed };
    let bar = progress_bar("random");
    random(&options, &mut |written, total| show(&bar, written, total))?;
    bar.finish_and_clear();
    say(options.out.display());
    Ok(())
}

fn inspect(package: PathBuf, json: bool) -> Result<()> {
    if package_kind(&package)? == PackageKind::Encoder {
        return inspect_encoder(package, json);
    }
    let package = Package::open(package)?;
    if json {
        say(serde_json::to_string(package.manifest())?);
    } else {
        let weights = package.weights();
        let bytes = fs::metadata(&weights).with_context(|| weights.display().to_string())?.len();
        describe(package.manifest(), bytes);
    }
    Ok(())
}

fn inspect_encoder(package: PathBuf, json: bool) -> Result<()> {
    let package = EncoderPackage::open(package)?;
    if json {
        say(serde_json::to_string(package.manifest())?);
    } else {
        let weights = package.weights();
        let bytes = fs::metadata(&weights).with_context(|| weights.display().to_string())?.len();
        describe_encoder(package.manifest(), bytes);
    }
    Ok(())
}

fn run_attach(package: PathBuf, files: &[(String, PathBuf)]) -> Result<()> {
    let package = Package::open_base(package)?;
    let mut read = Vec::new();
    for (name, path) in files {
        read.push((
            name.as_str(),
            fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?,
        ));
    }
    let files: Vec<(&str, &[u8])> = read.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    attach(&package, &files)?;
    Ok(())
}

fn progress_bar(stage: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    let bar = ProgressBar::new(0).with_message(stage);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn show(bar: &ProgressBar, written: u64, total: u64) {
    bar.set_length(total);
    bar.set_position(written);
}
