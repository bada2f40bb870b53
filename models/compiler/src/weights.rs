//! `weights.bin`: where each frozen tensor lies ([`WeightTable`], known before any weight is read), and the streaming
//! writer that fills it from a checkpoint (`checkpoint.rs`) through quantization (`quantize.rs`).
//!
//! Both graphs refer to the entries as ONNX external data. Matrices keep Hugging Face's orientation, one row per
//! output: `[outputs, inputs]`, so a float matrix is used transposed and a quantized one is what `MatMulNBits` reads.
//!
//! | name | rows | columns |
//! |---|---|---|
//! | `layers.{i}.qkv` | queries, keys, values | hidden |
//! | `layers.{i}.o` | hidden | heads · head_dim |
//! | `layers.{i}.gate_up` | gate, up | hidden |
//! | `layers.{i}.down` | hidden | intermediate |
//! | `embed` | vocabulary | hidden; also the head of a tied model |
//! | `head` | vocabulary | hidden; untied models only |
//!
//! A quantized matrix has `{name}.q` (u8 `[rows, blocks, block · bits / 8]`) and `{name}.s` (f32 `[rows, blocks]`), each
//! row filled up with zeros to whole blocks; a float one has `{name}.w` (f32 `[rows, columns]`). Vectors are f32 `[hidden]`:
//! `layers.{i}.attn_norm.w`, `layers.{i}.mlp_norm.w`, `norm.w`; and where the architecture has them (`architecture.rs`)
//! `layers.{i}.qkv_bias.w`, `o_bias.w`, `q_norm.w` and `k_norm.w`, `attn_post_norm.w` and `mlp_post_norm.w`. Weights of
//! norms are what is multiplied by; of Gemma's that is one more than in the checkpoint. The rotary tables are f32
//! `[context, head_dim / 2]`: `rope.cos`, `rope.sin`; `rope.local.cos` and `.sin` where layers with a window have others.

use std::io::{self, BufWriter, Write};
use std::thread;

use commonweal_package::{Bits, ModelConfig, Quantization};

use crate::architecture::{self, Source};
use crate::calibrate::Calibrator;
use crate::layers::CalibrateError;
use crate::quantize::{BlockFormat, Quantized, Scale, UNCALIBRATED};
use crate::tensors::{TensorError, Tensors};

/// Entries begin at multiples of this, so that they can be memory-mapped one by one.
pub const ALIGNMENT: u64 = 4096;

/// The element type of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// 32-bit floats, little endian.
    F32,
    /// Bytes of packed quantized weights.
    U8,
}

/// One tensor of `weights.bin`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightEntry {
    /// The name, unique in the table.
    pub name: String,
    /// The element type.
    pub dtype: WeightType,
    /// The shape, row-major.
    pub shape: Vec<usize>,
    /// First byte in the file; a multiple of [`ALIGNMENT`].
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Where every frozen tensor lies in `weights.bin`. The default is a file without any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WeightTable {
    entries: Vec<WeightEntry>,
}

/// Why `weights.bin` was not written.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A tensor of the checkpoint cannot be read.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A matrix cannot be calibrated.
    #[error(transparent)]
    Calibrate(#[from] CalibrateError),
    /// The disk, or its space.
    #[error("weights.bin cannot be written")]
    Write(#[from] io::Error),
}

/// How the codes of quantized matrices are chosen.
pub(crate) enum Codes<'a> {
    /// Each weight by itself.
    Nearest(Scale),
    /// By what the layers see; the embedding and the head with [`UNCALIBRATED`].
    Calibrated(Box<Calibrator<'a>>),
}

/// Values quantized at a time: 16 MB of floats.
const CHUNK_VALUES: usize = 4 << 20;

impl WeightTable {
    /// Lays out the file for a model: in the order of the forward pass, each entry aligned to [`ALIGNMENT`].
    pub fn plan(model: &ModelConfig, quantization: &Quantization) -> Self {
        Self::plan_list(architecture::tensors(model), quantization)
    }

    /// Lays out the file for these entries, in their order.
    pub(crate) fn plan_list(list: Vec<(String, Source)>, quantization: &Quantization) -> Self {
        let mut table = Self { entries: Vec::new() };
        for (name, source) in list {
            match source {
                Source::Rotary(_, positions, frequencies) => {
                    table.push(name, WeightType::F32, vec![positions, frequencies.len()]);
                }
                Source::Plain(_, rows, columns) => {
                    table.push(format!("{name}.w"), WeightType::F32, vec![rows, columns]);
                }
                Source::OnePlus(_, length) => {
                    table.push(format!("{name}.w"), WeightType::F32, vec![length]);
                }
                Source::Vector(parts) => {
                    let length = parts.iter().map(|(_, length)| length).sum();
                    table.push(format!("{name}.w"), WeightType::F32, vec![length]);
                }
                Source::Matrix(parts, columns) => {
                    let rows = parts.iter().map(|(_, rows)| rows).sum();
                    table.matrix(&name, rows, columns, quantization);
                }
            }
        }
        table
    }

    /// The entries in the order of the file.
    pub fn entries(&self) -> &[WeightEntry] {
        &self.entries
    }

    /// The entry of that name.
    pub fn find(&self, name: &str) -> Option<&WeightEntry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// Length of the file in bytes.
    pub fn length(&self) -> u64 {
        self.entries.last().map_or(0, |last| last.offset + last.length)
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize, quantization: &Quantization) {
        let Quantization { bits, block_size, .. } = *quantization;
        if bits == Bits::Full {
            self.push(format!("{name}.w"), WeightType::F32, vec![rows, columns]);
            return;
        }
        let blocks = columns.div_ceil(block_size);
        self.push(format!("{name}.q"), WeightType::U8, vec![rows, blocks, block_size * bits.count() / 8]);
        self.push(format!("{name}.s"), WeightType::F32, vec![rows, blocks]);
    }

    fn push(&mut self, name: String, dtype: WeightType, shape: Vec<usize>) {
        let width = match dtype {
            WeightType::F32 => 4,
            WeightType::U8 => 1,
        };
        let length = shape.iter().map(|&size| size as u64).product::<u64>() * width;
        let offset = self.length().next_multiple_of(ALIGNMENT);
        self.entries.push(WeightEntry { name, dtype, shape, offset, length });
    }
}

/// Writes `weights.bin` as [`WeightTable::plan`] lays it out, a chunk of rows at a time. `progress` is told the number
/// of bytes written so far.
pub(crate) fn write(
    file: &mut impl Write,
    model: &ModelConfig,
    quantization: &Quantization,
    tensors: &Tensors,
    codes: &mut Codes<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), WeightsError> {
    write_list(file, architecture::tensors(model), quantization, tensors, codes, progress)
}

/// Writes these entries, as [`WeightTable::plan_list`] lays them out.
pub(crate) fn write_list(
    file: &mut impl Write,
    list: Vec<(String, Source)>,
    quantization: &Quantization,
    tensors: &Tensors,
    codes: &mut Codes<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), WeightsError> {
    let format = BlockFormat::of(quantization);
    let mut out = Output { file: BufWriter::with_capacity(1 << 20, file), written: 0, progress };
    for (name, source) in list {
        out.align()?;
        match source {
            Source::Vector(parts) => {
                for (name, length) in parts {
                    out.floats(&tensors.rows(&name, 0..length)?)?;
                }
            }
            Source::OnePlus(name, length) => out.floats(&one_plus(tensors.rows(&name, 0..length)?))?,
            Source::Plain(name, rows, columns) => {
                let step = (CHUNK_VALUES / columns).max(1);
                for start in (0..rows).step_by(step) {
                    out.floats(&tensors.rows(&name, start..rows.min(start + step))?)?;
                }
            }
            Source::Rotary(function, positions, frequencies) => {
                for position in 0..positions {
                    let row =
                        frequencies.iter().map(|frequency| function(position as f64 * frequency) as f32);
                    out.floats(&row.collect::<Vec<_>>())?;
                }
            }
            Source::Matrix(parts, columns) => {
                if let Codes::Calibrated(calibrator) = codes
                    && let Some(quantized) = calibrator.matrix(&name)?
                {
                    out.bytes(&quantized.codes)?;
                    out.align()?;
                    out.floats(&quantized.scales)?;
                    continue;
                }
                let scale = match codes {
                    Codes::Nearest(scale) => *scale,
                    Codes::Calibrated(_) => UNCALIBRATED,
                };
                let mut scales = Vec::new();
                for (name, rows) in parts {
                    let step = (CHUNK_VALUES / columns).max(1);
                    for start in (0..rows).step_by(step) {
                        let values = tensors.rows(&name, start..rows.min(start + step))?;
                        match format {
                            None => out.floats(&values)?,
                            Some(format) => {
                                let quantized = quantize_in_parallel(format, scale, &values, columns);
                                out.bytes(&quantized.codes)?;
                                scales.extend(quantized.scales);
                            }
                        }
                    }
                }
                if format.is_some() {
                    out.align()?;
                    out.floats(&scales)?;
                }
            }
        }
    }
    out.file.flush()?;
    Ok(())
}

/// The values of a [`Source::OnePlus`].
pub(crate) fn one_plus(mut values: Vec<f32>) -> Vec<f32> {
    for value in &mut values {
        *value += 1.0;
    }
    values
}

/// Quantizes rows on every core. Blocks do not depend on each other, so the result does not depend on the cores.
fn quantize_in_parallel(format: BlockFormat, scale: Scale, values: &[f32], columns: usize) -> Quantized {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let rows = (values.len() / columns).div_ceil(cores).max(1);
    let parts: Vec<Quantized> = thread::scope(|scope| {
        let chunks = values.chunks(rows * columns);
        let workers: Vec<_> = chunks
            .map(|chunk| scope.spawn(move || format.quantize(&format.filled(chunk, columns), scale)))
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    Quantized::joined(parts)
}

struct Output<'a, W: Write> {
    file: BufWriter<W>,
    written: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl<W: Write> Output<'_, W> {
    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        (self.progress)(self.written);
        Ok(())
    }

    fn floats(&mut self, values: &[f32]) -> io::Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.bytes(&bytes)
    }

    fn align(&mut self) -> io::Result<()> {
        let gap = self.written.next_multiple_of(ALIGNMENT) - self.written;
        self.bytes(&vec![0; gap as usize])
    }
}
