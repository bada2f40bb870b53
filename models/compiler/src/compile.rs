//! The whole way from a checkpoint directory to a package directory: checks, graphs, weights, manifest.
//! `main.rs` and other crates' tests call [`compile`]; the stages are the crate's other modules.

use std::io;
use std::path::{Path, PathBuf};

use commonweal_adapter::{LayoutError, Target};
use commonweal_package::{
    Accuracy, AdapterDefaults, Bits, CacheForm, Facts, Manifest, ModelConfig, ModelError, PackageWriter,
    Quantization, Rounding, StagingError, WriteError, layout,
};
use commonweal_runtime::memory::{self, Available};

use crate::cache_scales::CacheScales;
use crate::calibrate::{Calibrator, tokens_min};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::read_bounded;
use crate::graph::GraphError;
use crate::graphs::graphs;
use crate::layers::{CalibrateError, Calibration, needed_bytes};
use crate::quantize::{BlockFormat, Scale};
use crate::tensors::Tensors;
use crate::weights::{self, Codes, WeightTable, WeightsError};

/// Longest licence or notice copied.
const NOTICE_BYTES_MAX: u64 = 16 << 20;

/// What lowers what a calibration needs, with Hessians and without.
const LESS_MEMORY: [&str; 2] = [
    "fewer --calibration-tokens need less, and so does another --method than gptq",
    "fewer --calibration-tokens need less",
];

/// How the codes of quantized weights are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// Each weight to the nearest code; the block's extreme weight sets the scale.
    Rtn,
    /// Each weight to the nearest code; the scale with the least squared error of the weights.
    Mse,
    /// As `Mse`, but the squared error of a weight counts as often as the weight is large.
    #[default]
    Wmse,
    /// By what the layers see over a calibration text (`gptq.rs`). The embedding and the head as with `Wmse`: one matrix
    /// may be both, and an embedding's input is one row.
    Gptq,
}

/// How the inference graphs keep keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheBits {
    /// 32-bit floats.
    #[default]
    Full,
    /// 8-bit integers, a quarter of the memory, with scales from a calibration text (`cache_scales.rs`). The processor's
    /// kernel reads prompts more slowly with it.
    Eight,
}

/// What to compile, and how.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// A Hugging Face checkpoint directory.
    pub checkpoint: PathBuf,
    /// The package directory to make; it must be free or an empty directory.
    pub out: PathBuf,
    /// Bits of one stored weight.
    pub bits: Bits,
    /// Weights that share one scale: 32, 64 or 128.
    pub block_size: usize,
    /// How the codes are chosen; at 32 bits nothing is rounded, and GPTQ is refused.
    pub method: Method,
    /// How keys and values are kept.
    pub cache: CacheBits,
    /// How exactly the inference kernels multiply.
    pub accuracy: Accuracy,
    /// Default rank of a trained adapter.
    pub rank: usize,
    /// Default alpha of a trained adapter.
    pub alpha: f32,
    /// The linears that a trained adapter changes.
    pub targets: Vec<Target>,
    /// Longest sequence, where it should be shorter than the checkpoint's.
    pub context: Option<usize>,
    /// A Jinja chat template to use in place of the checkpoint's.
    pub chat_template: Option<PathBuf>,
    /// The SPDX expression of the model's licence.
    pub licence: Option<String>,
    /// A name for people, in place of the checkpoint directory's.
    pub name: Option<String>,
}

impl CompileOptions {
    /// The defaults: 4 bits in blocks of 32, a cache of floats, fast kernels, rank 8, alpha 16, every linear.
    pub fn new(checkpoint: impl Into<PathBuf>, out: impl Into<PathBuf>) -> Self {
        Self {
            checkpoint: checkpoint.into(),
            out: out.into(),
            bits: Bits::Four,
            block_size: 32,
            method: Method::default(),
            cache: CacheBits::default(),
            accuracy: Accuracy::Fast,
            rank: 8,
            alpha: 16.0,
            targets: Target::ALL.to_vec(),
            context: None,
            chat_template: None,
            licence: None,
            name: None,
        }
    }
}

/// What was compiled.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The package's manifest.
    pub manifest: Manifest,
    /// Length of `weights.bin` in bytes.
    pub weights_bytes: u64,
}

/// Why nothing was compiled. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The quantization is impossible.
    #[error("the quantization is impossible")]
    Quantization(#[from] ModelError),
    /// What was asked for and the calibration do not go together.
    #[error(
        "method {method:?} at {bits} bits with a cache of {cache_bits} must have {expected} calibration text, got {got}"
    )]
    Calibration {
        /// The method.
        method: Method,
        /// Bits of one weight.
        bits: usize,
        /// Bits of a component of a key or a value.
        cache_bits: usize,
        /// What they need.
        expected: &'static str,
        /// What there is.
        got: &'static str,
    },
    /// GPTQ has nothing to choose.
    #[error("method Gptq is for 4 and 8 bits, got 32, which are not rounded")]
    Unrounded,
    /// The calibration text cannot be used.
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
    /// The adapter is impossible.
    #[error("the adapter is impossible")]
    Adapter(#[from] LayoutError),
    /// A longer context than the checkpoint's.
    #[error("context must be between 1 and the checkpoint's {max}, got {got}")]
    Context {
        /// The checkpoint's.
        max: usize,
        /// What was asked for.
        got: usize,
    },
    /// A graph cannot be built.
    #[error("the graphs cannot be built")]
    Graph(#[from] GraphError),
    /// The weights cannot be read or written.
    #[error("the weights cannot be compiled")]
    Weights(#[from] WeightsError),
    /// A licence or notice of the checkpoint cannot be read.
    #[error("{} cannot be read", path.display())]
    Notice {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The package cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A file of the package cannot be written.
    #[error(transparent)]
    Staging(#[from] StagingError),
}

impl CompileError {
    /// Whether the machine lacks what is needed, memory in this case.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Calibrate(CalibrateError::Memory(_)))
    }

    /// Whether what was given is to blame, rather than the disk or this program.
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Weights(WeightsError::Write(_)) | Self::Graph(_) => false,
            Self::Weights(WeightsError::Calibrate(error)) | Self::Calibrate(error) => !matches!(
                error,
                CalibrateError::Engine { .. }
                    | CalibrateError::Output { .. }
                    | CalibrateError::Graph(_)
                    | CalibrateError::Memory(_)
            ),
            Self::Write(error) => matches!(error, WriteError::Staging(StagingError::Occupied { .. })),
            Self::Staging(error) => matches!(error, StagingError::Occupied { .. }),
            _ => true,
        }
    }
}

/// Compiles a checkpoint into a package.
pub fn compile(options: &CompileOptions) -> Result<Summary, CompileError> {
    compile_with(options, None, &mut |_, _| ())
}

/// Compiles a checkpoint into a package, by a calibration text where the method or the cache needs one. `progress` is told
/// bytes of weights written and bytes in all.
pub fn compile_with(
    options: &CompileOptions,
    calibration: Option<Calibration<'_>>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Summary, CompileError> {
    let &CompileOptions { bits, block_size, accuracy, rank, alpha, .. } = options;
    let quantization = Quantization { bits, block_size, accuracy };
    quantization.check()?;
    let checkpoint = Checkpoint::open(&options.checkpoint, options.chat_template.as_deref())?;
    let Checkpoint { mut model, tokens, tokenizer, chat_template, tensors } = checkpoint;
    rename_and_shorten(options.name.as_ref(), options.context, &mut model.name, &mut model.context)?;
    let adapter = AdapterDefaults { rank, alpha, targets: options.targets.clone() };
    let layout = layout(&model, &adapter)?;
    let table = WeightTable::plan(&model, &quantization);
    check_calibration(options, calibration.is_some())?;
    if let Some(Calibration { tokens, .. }) = &calibration {
        check_memory(&model, options.method, tokens.len(), memory::available_for_process())?;
    }
    // Ties the engine to this function, where what it runs over lives.
    let mut calibration = calibration.map(|Calibration { tokens, engine }| Calibration { tokens, engine });
    let (cache, scales) = cache(options, &model, &tensors, calibration.as_mut())?;
    let (rounding, mut codes) = codes(options, &model, &quantization, &tensors, calibration)?;
    let graphs = graphs(&model, &quantization, scales.as_ref(), &layout, &table)?;

    let mut package = PackageWriter::create(&options.out)?;
    for (name, bytes) in &graphs {
        package.write_bytes(name, bytes)?;
    }
    package.write_bytes("tokenizer.json", &tokenizer)?;
    package.write_bytes("chat_template.jinja", chat_template.as_bytes())?;
    copy_notices(&options.checkpoint, &mut package)?;
    let weights_bytes = table.length();
    package.write("weights.bin", |file, _| {
        let told = &mut |written| progress(written, weights_bytes);
        weights::write(file, &model, &quantization, &tensors, &mut codes, told).map_err(CompileError::from)
    })?;
    drop(codes);
    let licence = options.licence.clone();
    let manifest =
        package.finish(Facts { licence, model, quantization, rounding, cache, adapter, tokens })?;
    Ok(Summary { manifest, weights_bytes })
}

/// Puts what was asked for in the place of the checkpoint's name and context.
pub(crate) fn rename_and_shorten(
    asked_name: Option<&String>,
    asked_context: Option<usize>,
    name: &mut String,
    context: &mut usize,
) -> Result<(), CompileError> {
    if let Some(got) = asked_context {
        let max = *context;
        *context =
            Some(got).filter(|got| (1..=max).contains(got)).ok_or(CompileError::Context { max, got })?;
    }
    if let Some(asked) = asked_name {
        name.clone_from(asked);
    }
    Ok(())
}

/// Copies the licence and the notice of a checkpoint that has them.
pub(crate) fn copy_notices(checkpoint: &Path, package: &mut PackageWriter) -> Result<(), CompileError> {
    for name in ["LICENSE", "NOTICE"] {
        let path = checkpoint.join(name);
        if path.exists() {
            let bytes = read_bounded(&path, NOTICE_BYTES_MAX)
                .map_err(|source| CompileError::Notice { path, source })?;
            package.write_bytes(name, &bytes)?;
        }
    }
    Ok(())
}

/// Refuses a calibration that does not fit in memory. A text that is too short, which is refused anyhow, needs none.
fn check_memory(
    model: &ModelConfig,
    method: Method,
    tokens: usize,
    available: Option<Available>,
) -> Result<(), CalibrateError> {
    let with_hessians = method == Method::Gptq;
    if with_hessians && tokens < tokens_min(model) {
        return Ok(());
    }
    let [with, without] = LESS_MEMORY;
    let lower = if with_hessians { with } else { without };
    let needed = needed_bytes(model, tokens, with_hessians);
    Ok(memory::check("calibration", needed, available, lower)?)
}

/// Refuses a calibration that nothing takes, its absence where something does, and a method with nothing to choose.
fn check_calibration(options: &CompileOptions, given: bool) -> Result<(), CompileError> {
    let &CompileOptions { method, bits, cache, .. } = options;
    if method == Method::Gptq && bits == Bits::Full {
        return Err(CompileError::Unrounded);
    }
    let takes_one = cache == CacheBits::Eight || method == Method::Gptq;
    if takes_one == given {
        return Ok(());
    }
    let (expected, got) = if given { ("no", "one") } else { ("a", "none") };
    let cache_bits = if cache == CacheBits::Eight { 8 } else { 32 };
    Err(CompileError::Calibration { method, bits: bits.count(), cache_bits, expected, got })
}

/// How keys and values will be kept, as the manifest says it and as the graphs do it.
fn cache(
    options: &CompileOptions,
    model: &ModelConfig,
    tensors: &Tensors,
    calibration: Option<&mut Calibration<'_>>,
) -> Result<(CacheForm, Option<CacheScales>), CompileError> {
    match (options.cache, calibration) {
        (CacheBits::Eight, Some(Calibration { tokens, engine })) => {
            let calibration = Calibration { tokens, engine: &mut **engine };
            let (tokens, text) = calibration.used(model);
            Ok((CacheForm::Int8 { tokens, text }, Some(CacheScales::observe(model, tensors, calibration)?)))
        }
        _ => Ok((CacheForm::Float, None)),
    }
}

/// How the codes will be chosen, as the manifest says it and as `weights.rs` does it.
fn codes<'a>(
    options: &CompileOptions,
    model: &'a ModelConfig,
    quantization: &Quantization,
    tensors: &'a Tensors,
    calibration: Option<Calibration<'a>>,
) -> Result<(Rounding, Codes<'a>), CompileError> {
    match (options.method, BlockFormat::of(quantization), calibration) {
        (Method::Gptq, Some(format), Some(calibration)) => {
            let (tokens, text) = calibration.used(model);
            let calibrator = Calibrator::new(model, format, tensors, calibration)?;
            Ok((Rounding::Gptq { tokens, text }, Codes::Calibrated(Box::new(calibrator))))
        }
        (Method::Rtn, Some(_), _) => Ok((Rounding::Rtn, Codes::Nearest(Scale::Extreme))),
        (Method::Mse, Some(_), _) => Ok((Rounding::Mse, Codes::Nearest(Scale::Search))),
        (Method::Wmse, Some(_), _) => Ok((Rounding::Wmse, Codes::Nearest(Scale::Weighted))),
        // Floats have no codes. GPTQ without a text, or of floats, was refused before.
        _ => Ok((Rounding::default(), Codes::Nearest(Scale::Search))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failed test may panic")]
mod tests {
    use commonweal_runtime::memory::Bound;

    use super::*;

    #[test]
    fn a_calibration_that_does_not_fit_is_refused_with_both_figures_and_the_remedy() {
        let model: ModelConfig = serde_json::from_value(serde_json::json!({
            "architecture": "llama", "name": "x", "hidden_size": 576, "intermediate_size": 1536,
            "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab_size": 49_152,
            "context": 2048, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "tied": true,
        }))
        .unwrap();
        let with = |method, tokens, bytes| {
            check_memory(&model, method, tokens, Some(Available { bytes, bound: Bound::Machine }))
        };
        let refused = with(Method::Gptq, 16_384, 100_000_000).unwrap_err();
        let told = refused.to_string();
        assert!(told.contains("calibration needs about") && told.contains("100 MB left"), "{told}");
        assert!(told.contains("--calibration-tokens") && told.contains("--method"), "{told}");
        let refused = CompileError::from(refused);
        assert!(refused.is_unavailable() && !refused.is_bad_input());
        with(Method::Gptq, 16_384, 1 << 30).unwrap();
        // Without Hessians it is less, and no other method makes it so.
        let told = with(Method::Mse, 16_384, 100_000_000).unwrap_err().to_string();
        assert!(!told.contains("--method"), "{told}");
        assert!(
            needed_bytes(&model, 16_384, true) > needed_bytes(&model, 16_384, false)
                && needed_bytes(&model, 16_384, false) > needed_bytes(&model, 2048, false)
        );
        // Peaks of `compile --calibrate --calibration-tokens 4096` on this shape in MB: `--method gptq`, and `--method mse
        // --cache 8`.
        for (with_hessians, measured) in [(true, 224.0), (false, 117.0)] {
            let factor = needed_bytes(&model, 4096, with_hessians) as f64 / 1e6 / measured;
            assert!((1.0 / 1.3..1.3).contains(&factor), "{measured} MB, {factor} times that was estimated");
        }
        // What is too short is refused for that.
        with(Method::Gptq, 10, 1).unwrap();
    }
}
