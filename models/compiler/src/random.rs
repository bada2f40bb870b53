//! Makes a random checkpoint of a given shape, for benchmarks of models that are too large to ship. It is an ordinary
//! Hugging Face checkpoint (F32) that `checkpoint.rs` opens like any other.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use commonweal_package::{Staging, StagingError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use crate::architecture::tensor_shapes;
use crate::config::{self, ConfigError, read_bounded};
use crate::encoder;
use crate::tokenizer::{self, TextError};

/// Values made at a time.
const CHUNK_VALUES: usize = 1 << 20;

/// The template of a random checkpoint when none is given. It needs no special tokens.
const CHAT_TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                             {% if add_generation_prompt %}assistant: {% endif %}";

/// What to make.
#[derive(Clone, Debug)]
pub struct RandomOptions {
    /// A Hugging Face `config.json` that gives the shape.
    pub config: PathBuf,
    /// A `tokenizer.json` whose tokens the shape has room for.
    pub tokenizer: PathBuf,
    /// A Jinja chat template; a plain one is used without. An encoder has none.
    pub chat_template: Option<PathBuf>,
    /// The checkpoint directory to make; it must be free or an empty directory.
    pub out: PathBuf,
    /// Equal seeds give equal weights.
    pub seed: u64,
}

/// Why a random checkpoint was not made. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum RandomError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tokenizer.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The target is taken, or the disk refuses.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// A chat template for a model that does not chat.
    #[error("chat template is for decoders, and the configuration is of an encoder")]
    NoChat,
    /// The chat template cannot be read.
    #[error("{} cannot be read", path.display())]
    Template {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes the checkpoint. `progress` is told bytes written and bytes in all.
pub fn random(options: &RandomOptions, progress: &mut dyn FnMut(u64, u64)) -> Result<(), RandomError> {
    let (shapes, vocab_size, template, norm) = if encoder::is_encoder(&options.config)? {
        if options.chat_template.is_some() {
            return Err(RandomError::NoChat);
        }
        let config = encoder::read_file(&options.config)?;
        (encoder::tensor_shapes(&config), config.encoder.vocab_size, None, 1.0)
    } else {
        let model = config::read_file(&options.config)?.model;
        // Gemma's norms multiply by one more than their weight.
        let norm = if model.gemma.is_some() { 0.0 } else { 1.0 };
        (tensor_shapes(&model), model.vocab_size, Some(template(options)?), norm)
    };
    let (tokens, _) = tokenizer::load(&options.tokenizer, vocab_size)?;
    let config = config::read_bytes(&options.config)?;
    let staging = Staging::create(&options.out)?;
    staging.write_bytes("config.json", &config)?;
    staging.write_bytes("tokenizer.json", &tokens)?;
    if let Some(template) = template {
        staging.write_bytes("chat_template.jinja", &template)?;
    }
    staging.write("model.safetensors", |file, path: &Path| {
        write_weights(file, &shapes, norm, options.seed, progress)
            .map_err(|source| StagingError::Write { path: path.into(), source })
    })?;
    staging.publish()?;
    Ok(())
}

/// Writes a safetensors file: `u64 LE length | JSON header | data`. Norms are `norm` and biases zero; matrices are uniform with the
/// variance `1 / columns`, the embedding's of variance one, so that activations keep their size through the layers.
fn write_weights(
    file: &mut impl Write,
    shapes: &[(String, Vec<usize>)],
    norm: f32,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> io::Result<()> {
    let (header, total) = header(shapes);
    let mut file = BufWriter::with_capacity(1 << 20, file);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut written = 0;
    for (name, shape) in shapes {
        let reach = match shape[..] {
            [_, _] if is_embedding(name) => 3.0_f32.sqrt(),
            [_, columns] => (3.0 / columns as f32).sqrt(),
            _ => 0.0,
        };
        let rest = if name.rsplit_once('.').is_some_and(|(_, kind)| kind == "bias") { 0.0 } else { norm };
        let values: usize = shape.iter().product();
        for start in (0..values).step_by(CHUNK_VALUES) {
            let count = CHUNK_VALUES.min(values - start);
            let mut bytes = Vec::with_capacity(4 * count);
            for _ in 0..count {
                let value = if reach > 0.0 { random.random_range(-reach..reach) } else { rest };
                bytes.extend(value.to_le_bytes());
            }
            file.write_all(&bytes)?;
            written += bytes.len() as u64;
            progress(written, total);
        }
    }
    file.flush()
}

fn template(options: &RandomOptions) -> Result<Vec<u8>, RandomError> {
    let Some(path) = &options.chat_template else { return Ok(CHAT_TEMPLATE.into()) };
    let read = |source| RandomError::Template { path: path.clone(), source };
    read_bounded(path, tokenizer::TEMPLATE_BYTES_MAX).map_err(read)
}

fn is_embedding(name: &str) -> bool {
    name == "model.embed_tokens.weight" || name.ends_with("embeddings.weight")
}

/// The JSON header, padded to a multiple of eight bytes, and the length of the data.
fn header(shapes: &[(String, Vec<usize>)]) -> (Vec<u8>, u64) {
    let mut start = 0;
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    for (name, shape) in shapes {
        let end = start + 4 * shape.iter().map(|&size| size as u64).product::<u64>();
        entries.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }));
        start = end;
    }
    let mut header = Value::Object(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    (header, start)
}
