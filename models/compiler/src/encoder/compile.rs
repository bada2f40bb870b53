//! The whole way from an encoder's checkpoint directory to a package directory, as `compile.rs` goes it for decoders.

use std::path::PathBuf;

use commonweal_package::{
    Accuracy, Bits, EncoderFacts, EncoderManifest, PackageKind, PackageWriter, Quantization,
};

use super::{Config, graph, read_file, tensor_shapes, tensors};
use crate::checkpoint::CheckpointError;
use crate::compile::{CompileError, copy_notices, rename_and_shorten};
use crate::lower::lower;
use crate::plan::plan;
use crate::quantize::Scale;
use crate::tensors::Tensors;
use crate::tokenizer;
use crate::weights::{self, Codes, WeightTable};

/// What to compile, and how.
#[derive(Clone, Debug)]
pub struct EncoderOptions {
    /// A Hugging Face checkpoint directory.
    pub checkpoint: PathBuf,
    /// The package directory to make; it must be free or an empty directory.
    pub out: PathBuf,
    /// Bits of one stored weight.
    pub bits: Bits,
    /// Weights that share one scale: 32, 64 or 128.
    pub block_size: usize,
    /// How exactly the kernels multiply.
    pub accuracy: Accuracy,
    /// Longest sequence, where it should be shorter than the checkpoint's.
    pub context: Option<usize>,
    /// The SPDX expression of the model's licence.
    pub licence: Option<String>,
    /// A name for people, in place of the checkpoint directory's.
    pub name: Option<String>,
}

impl EncoderOptions {
    /// The defaults: 4 bits in blocks of 32, fast kernels.
    pub fn new(checkpoint: impl Into<PathBuf>, out: impl Into<PathBuf>) -> Self {
        Self {
            checkpoint: checkpoint.into(),
            out: out.into(),
            bits: Bits::Four,
            block_size: 32,
            accuracy: Accuracy::Fast,
            context: None,
            licence: None,
            name: None,
        }
    }
}

/// What was compiled.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderSummary {
    /// The package's manifest.
    pub manifest: EncoderManifest,
    /// Length of `weights.bin` in bytes.
    pub weights_bytes: u64,
}

/// A checkpoint whose every part is present and fits the others.
struct Checkpoint {
    config: Config,
    tokenizer: Vec<u8>,
    tensors: Tensors,
}

/// Compiles a checkpoint into a package.
pub fn compile(options: &EncoderOptions) -> Result<EncoderSummary, CompileError> {
    compile_with_progress(options, &mut |_, _| ())
}

/// Compiles a checkpoint into a package; `progress` is told bytes of weights written and bytes in all.
pub fn compile_with_progress(
    options: &EncoderOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<EncoderSummary, CompileError> {
    let &EncoderOptions { bits, block_size, accuracy, .. } = options;
    let quantization = Quantization { bits, block_size, accuracy };
    quantization.check()?;
    let Checkpoint { mut config, tokenizer, tensors: weights } = open(options)?;
    let encoder = &mut config.encoder;
    rename_and_shorten(options.name.as_ref(), options.context, &mut encoder.name, &mut encoder.context)?;
    let table = WeightTable::plan_list(tensors(&config), &quantization);
    let graph = graph(&config, &quantization)?;
    let classify = lower(&graph, &plan(&graph).order, "classify", &table)?;

    let mut package = PackageWriter::create_kind(PackageKind::Encoder, &options.out)?;
    package.write_bytes("classify.onnx", &classify)?;
    package.write_bytes("tokenizer.json", &tokenizer)?;
    copy_notices(&options.checkpoint, &mut package)?;
    let weights_bytes = table.length();
    package.write("weights.bin", |file, _| {
        let told = &mut |written| progress(written, weights_bytes);
        let codes = &mut Codes::Nearest(Scale::Search);
        weights::write_list(file, tensors(&config), &quantization, &weights, codes, told)
            .map_err(CompileError::from)
    })?;
    let facts = EncoderFacts { licence: options.licence.clone(), encoder: config.encoder, quantization };
    Ok(EncoderSummary { manifest: package.finish_encoder(facts)?, weights_bytes })
}

fn open(options: &EncoderOptions) -> Result<Checkpoint, CheckpointError> {
    let directory = &options.checkpoint;
    if !directory.is_dir() {
        return Err(CheckpointError::NoDirectory { path: directory.clone() });
    }
    let config = read_file(&directory.join("config.json"))?;
    let path = directory.join("tokenizer.json");
    let (bytes, tokenizer) = tokenizer::load(&path, config.encoder.vocab_size)?;
    tokenizer::check_frame(&path, &tokenizer)?;
    let tensors = Tensors::open(directory)?;
    for (name, shape) in tensor_shapes(&config) {
        tensors.check(&name, &shape)?;
    }
    Ok(Checkpoint { config, tokenizer: bytes, tensors })
}
