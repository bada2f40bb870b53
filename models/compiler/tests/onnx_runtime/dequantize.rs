//! From a package at 4 bits to a checkpoint of 32-bit floats with the values that its codes stand for, so that quantized
//! kernels can be held against a network that has none. `architectures.rs` does so for every architecture.

use std::path::Path;

use commonweal_compiler::ModelConfig;
use commonweal_compiler::architecture::tensor_shapes;
use commonweal_compiler::tensors::Tensors;
use commonweal_compiler::weights::WeightTable;
use commonweal_package::Package;
use serde_json::{Map, Value, json};

use super::relative_error;

/// Codes of 4 bits leave about 8% of a matrix that is normally distributed; a wrong row or block leaves all of it.
const ROUNDING: f64 = 0.12;

/// Writes the checkpoint: matrices from the package, vectors and texts from the checkpoint that it was compiled from.
pub(crate) fn dequantize(package: &Package, original: &Path, out: &Path) {
    let manifest = package.manifest();
    let table = WeightTable::plan(&manifest.model, &manifest.quantization);
    let weights = std::fs::read(package.weights()).unwrap();
    let tensors = Tensors::open(original).unwrap();
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, shape) in tensor_shapes(&manifest.model) {
        let before = tensors.rows(&name, 0..shape[0]).unwrap();
        let values = match shape[..] {
            [rows, columns] => {
                let (entry, first_row) = place(&name, &manifest.model);
                let bytes = |part: &str| {
                    let entry = table.find(&format!("{entry}.{part}")).unwrap();
                    &weights[entry.offset as usize..(entry.offset + entry.length) as usize]
                };
                let (codes, scales) = (bytes("q"), bytes("s").as_chunks().0);
                let block = manifest.quantization.block_size;
                let blocks = columns.div_ceil(block);
                let value = |row: usize, column: usize| {
                    let at = (first_row + row) * blocks * block + column;
                    let code = (codes[at / 2] >> (4 * (at % 2))) & 15;
                    (f32::from(code) - 8.0) * f32::from_le_bytes(scales[at / block])
                };
                (0..rows * columns).map(|at| value(at / columns, at % columns)).collect()
            }
            _ => before.clone(),
        };
        let error = relative_error(&values, &before);
        assert!(error < ROUNDING, "{name}: {error:.2} of the values lost");
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        header.insert(name, json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] }));
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(out.join("model.safetensors"), file).unwrap();
    for name in ["config.json", "tokenizer.json", "chat_template.jinja"] {
        std::fs::copy(original.join(name), out.join(name)).unwrap();
    }
}

/// The entry of `weights.bin` that holds a matrix of the checkpoint, and its first row there.
fn place(name: &str, model: &ModelConfig) -> (String, usize) {
    let parts: Vec<&str> = name.split('.').collect();
    let (query, kv) = (model.query_size(), model.kv_size());
    match parts[..] {
        ["model", "embed_tokens", _] => ("embed".into(), 0),
        ["lm_head", _] => ("head".into(), 0),
        ["model", "layers", layer, _, part, _] => {
            let (entry, row) = match part {
                "q_proj" => ("qkv", 0),
                "k_proj" => ("qkv", query),
                "v_proj" => ("qkv", query + kv),
                "o_proj" => ("o", 0),
                "gate_proj" => ("gate_up", 0),
                "up_proj" => ("gate_up", model.intermediate_size),
                _ => ("down", 0),
            };
            (format!("layers.{layer}.{entry}"), row)
        }
        _ => panic!("{name} is no matrix"),
    }
}
