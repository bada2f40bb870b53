//! What a package holds, in lines for people: `model-compiler compile` ends with it, `inspect` prints it.

use std::fmt::Display;
use std::io::{self, Write};

use commonweal_compiler::Quantization;
use commonweal_package::{CacheForm, EncoderManifest, Manifest, Rounding};

#[expect(clippy::needless_pass_by_value, reason = "callers make the text for this line alone")]
fn line(key: &str, value: String) {
    say(format_args!("  {key:<12} {value}"));
}

/// Prints a line. Standard output may be a pipe that nobody reads any more, as with `| head -1`; what was done stays done.
pub(crate) fn say(text: impl Display) {
    let _ = writeln!(io::stdout(), "{text}");
}

fn describe_weights(quantization: &Quantization, weights_bytes: u64) {
    let Quantization { bits, block_size, accuracy } = quantization;
    let megabytes = weights_bytes as f64 / 1e6;
    let text =
        format!("{} bits in blocks of {block_size}, {accuracy:?} kernels, {megabytes:.1} MB", bits.count());
    line("weights", text);
}

/// Prints an encoder's package.
pub(crate) fn describe_encoder(manifest: &EncoderManifest, weights_bytes: u64) {
    let EncoderManifest { encoder, quantization, .. } = manifest;
    line("name", encoder.name.clone());
    line("licence", manifest.licence.clone().unwrap_or("not stated".into()));
    line(
        "encoder",
        format!(
            "{:?}, {} layers, hidden {}, intermediate {}, {} heads",
            encoder.architecture,
            encoder.layers,
            encoder.hidden_size,
            encoder.intermediate_size,
            encoder.heads
        ),
    );
    line("vocabulary", format!("{} tokens, padding {}", encoder.vocab_size, encoder.pad));
    line("context", format!("{} tokens, {} kinds of them", encoder.context, encoder.token_types.max(1)));
    line("labels", format!("{}, {:?}", encoder.labels.join(", "), encoder.probabilities));
    describe_weights(quantization, weights_bytes);
    line("base", manifest.base.to_string());
    for (file, hash) in &manifest.files {
        line(file, hash.to_string());
    }
}

/// Prints a decoder's package.
pub(crate) fn describe(manifest: &Manifest, weights_bytes: u64) {
    let Manifest { model, quantization, rounding, cache, adapter, tokens, .. } = manifest;
    line("name", model.name.clone());
    line("licence", manifest.licence.clone().unwrap_or("not stated".into()));
    line(
        "model",
        format!(
            "{:?}, {} layers, hidden {}, intermediate {}, {} heads ({} for keys and values) of {}",
            model.architecture,
            model.layers,
            model.hidden_size,
            model.intermediate_size,
            model.heads,
            model.kv_heads,
            model.head_dim
        ),
    );
    line(
        "vocabulary",
        format!("{} tokens, {}", model.vocab_size, if model.tied { "tied head" } else { "separate head" }),
    );
    line("context", format!("{} tokens", model.context));
    line("parameters", format!("{:.1} million", parameters(manifest) as f64 / 1e6));
    describe_weights(quantization, weights_bytes);
    line(
        "rounding",
        match rounding {
            Rounding::Rtn => "rtn: to nearest, scales by the extreme weight".into(),
            Rounding::Mse => "mse: to nearest, scales by squared error".into(),
            Rounding::Wmse => "wmse: to nearest, scales by squared error, large weights first".into(),
            Rounding::Gptq { tokens, .. } => format!("gptq: calibrated on {tokens} tokens"),
        },
    );
    line(
        "cache",
        match cache {
            CacheForm::Float => "32 bits".into(),
            CacheForm::Int8 { tokens, .. } => format!("8 bits: calibrated on {tokens} tokens"),
        },
    );
    let targets: Vec<&str> = adapter.targets.iter().map(|target| target.name()).collect();
    let values = manifest.layout().map_or(0, |layout| layout.parameters());
    line(
        "adapter",
        format!("rank {}, alpha {}, {}, {values} values", adapter.rank, adapter.alpha, targets.join(" ")),
    );
    line("tokens", format!("bos {:?}, eos {:?}, pad {}", tokens.bos, tokens.eos, tokens.pad));
    line("base", manifest.base.to_string());
    for (file, hash) in &manifest.files {
        line(file, hash.to_string());
    }
}

fn parameters(manifest: &Manifest) -> u64 {
    let shapes = commonweal_compiler::architecture::tensor_shapes(&manifest.model);
    shapes.iter().map(|(_, shape)| shape.iter().map(|&size| size as u64).product::<u64>()).sum()
}
