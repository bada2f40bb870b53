//! The bundled reference model with a cache of 8 bits beside the same with a cache of floats, through the command and the
//! runtime: held-out log-probabilities, and answers behind a shared prefix.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::path::{Path, PathBuf};
use std::process::Command;

use commonweal_package::{CacheForm, Package};
use commonweal_runtime::{Cancel, GenerateOptions, Library, Model, OpenOptions, Prompt, Texts, mean_loss};
use tempfile::TempDir;

/// Nats a token; measured is less than a tenth of it.
const LOSS_TOLERANCE: f64 = 0.01;
/// Mean difference of a token's log-probability in nats; measured is 0.017.
const MEAN_TOLERANCE: f64 = 0.03;

fn reference() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../reference")
}

fn compile(out: &Path, more: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_model-compiler"))
        .args(["compile", "--accuracy", "exact", "--method", "mse", "--checkpoint"])
        .args([reference().join("checkpoint").as_path(), Path::new("--out"), out])
        .args(more)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_bundled_model_says_nearly_the_same_with_an_8_bit_cache() {
    let folder = TempDir::new().unwrap();
    let (floats, bytes) = (folder.path().join("floats"), folder.path().join("bytes"));
    let text = reference().join("demo/device-1.jsonl");
    compile(&floats, &[]);
    compile(&bytes, &["--cache", "8", "--calibrate", text.to_str().unwrap(), "--calibration-tokens", "4096"]);
    let (floats, bytes) = (Package::open(floats).unwrap(), Package::open(bytes).unwrap());
    assert!(matches!(bytes.manifest().cache, CacheForm::Int8 { tokens: 4096, .. }));
    assert_eq!(floats.base(), bytes.base(), "adapters over the one are adapters over the other");

    // In several runs, so that what was kept is read back.
    let options = OpenOptions { prefill_tokens_max: 32, ..OpenOptions::default() };
    let library = Library::load(None).unwrap();
    let open = |package| Model::open(&library, package, options).unwrap();
    let (floats, bytes) = (open(&floats), open(&bytes));
    let rows = Texts::read(&reference().join("demo/heldout.jsonl"), floats.chat(), 3000).unwrap();
    let rows = rows.measured(512, floats.manifest().tokens.bos);
    let score =
        |model: &Model| model.score_rows(&model.prepare(None).unwrap(), &rows, &Cancel::new()).unwrap();
    let (full, kept) = (score(&floats), score(&bytes));
    let pairs = || full.iter().zip(&kept).flat_map(|(a, b)| a.token_logprobs.iter().zip(&b.token_logprobs));
    let mean = pairs().map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / pairs().count() as f64;
    let loss = mean_loss(&kept).unwrap() - mean_loss(&full).unwrap();
    println!("{} tokens: loss {loss:+.5}, mean difference {mean:.5}", pairs().count());
    assert!(mean > 0.0 && mean < MEAN_TOLERANCE, "{mean}");
    assert!(loss.abs() < LOSS_TOLERANCE, "{loss}");

    // The same answers behind a prefix, with guesses and side by side.
    let base = bytes.prepare(None).unwrap();
    let ids = |row: usize| rows[row].ids[..24].to_vec();
    let prompts = [0, 1, 2].map(|row| Prompt::from(ids(row)));
    let prefix = bytes.share_prefix(&base, &prompts[0].ids[..8], &Cancel::new()).unwrap();
    let answers = |prefix, copying| {
        let options = GenerateOptions { max_new_tokens: 24, copying, ..GenerateOptions::default() };
        let answers = bytes
            .generate_streaming(&base, prefix, &prompts, &options, &mut |_, _| (), &Cancel::new())
            .unwrap();
        answers.into_iter().map(|answer| answer.tokens).collect::<Vec<_>>()
    };
    let plain = answers(None, false);
    assert_eq!(answers(Some(&prefix), false), plain);
    assert_eq!(answers(None, true), plain);
}
