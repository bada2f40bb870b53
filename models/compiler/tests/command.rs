//! The `model-compiler` command as a person meets it: what it prints, what it leaves, how it exits.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use commonweal_package::{CacheForm, Package, Rounding};
use tempfile::TempDir;

fn goldens(variant: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(variant)
}

fn model_compiler(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_model-compiler")).args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn compiles_inspects_and_attaches() {
    let directory = TempDir::new().unwrap();
    let package = directory.path().join("new/package");
    let checkpoint = goldens("untied");
    let arguments = ["compile", "--checkpoint", text(&checkpoint), "--out", text(&package)];
    let output =
        model_compiler(&[&arguments[..], &["--bits", "8", "--targets", "q,v", "--licence", "MIT"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = model_compiler(&["inspect", text(&package)]);
    let shown = String::from_utf8(output.stdout).unwrap();
    for words in ["8 bits in blocks of 32", "separate head", "rank 8, alpha 16, q v", "MIT"] {
        assert!(shown.contains(words), "{shown}");
    }
    let base = Package::open(&package).unwrap().base();
    let notice = checkpoint.join("config.json");
    let file = format!("NOTICE={}", text(&notice));
    assert!(model_compiler(&["attach", text(&package), "--file", &file]).status.success());
    let output = model_compiler(&["inspect", text(&package), "--json"]);
    let manifest: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(manifest["base"], base.to_string());
    assert!(manifest["files"]["NOTICE"].is_string());
    let file = format!("weights.bin={}", text(&notice));
    assert_eq!(model_compiler(&["attach", text(&package), "--file", &file]).status.code(), Some(3));
}

#[test]
fn compiles_by_a_calibration_text() {
    let directory = TempDir::new().unwrap();
    let (package, texts) = (directory.path().join("package"), directory.path().join("texts"));
    fs::write(&texts, "a line of text to calibrate by\n".repeat(20)).unwrap();
    let checkpoint = goldens("tied");
    let compile = |more: &[&str]| {
        let arguments = ["compile", "--checkpoint", text(&checkpoint), "--out", text(&package)];
        model_compiler(&[&arguments[..], more].concat())
    };
    let calibrate = ["--calibrate", text(&texts), "--calibration-tokens"];
    let refused = |more: &[&str], words: &[&str]| {
        let output = compile(more);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
        assert!(!package.exists());
    };
    refused(&[&calibrate[..], &["10000"]].concat(), &["needs 10000 tokens", "--calibration-tokens"]);
    refused(&[&calibrate[..], &["40"]].concat(), &["at least 64 tokens", "got 40"]);
    refused(
        &[&calibrate[..], &["128", "--method", "rtn"]].concat(),
        &["Rtn", "no calibration text, got one"],
    );
    refused(&["--calibrate", "/nowhere"], &["/nowhere cannot be read"]);
    refused(&["--method", "gptq"], &["a calibration text, got none"]);
    refused(&["--cache", "8"], &["cache of 8 must have a calibration text, got none"]);
    refused(
        &[&["--cache", "8", "--method", "rtn"], &calibrate[..], &["40"]].concat(),
        &["at least 64", "got 40"],
    );
    let missing = compile(&[&calibrate[..], &["128", "--library", "/nowhere.so"]].concat());
    assert_eq!(missing.status.code(), Some(5));

    let output = compile(&[&calibrate[..], &["128"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8(output.stdout).unwrap().contains("gptq: calibrated on 128 tokens"));
    let rounding = Package::open(&package).unwrap().manifest().rounding;
    assert!(matches!(rounding, Rounding::Gptq { tokens: 128, .. }));
    // What is left after whole sequences of 64 is not used, and not claimed.
    fs::remove_dir_all(&package).unwrap();
    assert!(compile(&[&calibrate[..], &["150"]].concat()).status.success());
    assert_eq!(Package::open(&package).unwrap().manifest().rounding, rounding);
}

#[test]
fn options_without_effect_are_refused_by_name() {
    let directory = TempDir::new().unwrap();
    let (package, texts) = (directory.path().join("package"), directory.path().join("texts"));
    fs::write(&texts, "a line of text to calibrate by\n".repeat(20)).unwrap();
    let refused = |checkpoint: &str, more: &[&str], words: &[&str]| {
        let checkpoint = goldens(checkpoint);
        let arguments = ["compile", "--checkpoint", text(&checkpoint), "--out", text(&package)];
        let output = model_compiler(&[&arguments[..], more].concat());
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{message}");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
        assert!(!package.exists());
    };
    refused("tied", &["--calibration-tokens", "128"], &["--calibration-tokens is for --calibrate"]);
    refused("tied", &["--library", "/nowhere.so"], &["--library is for --calibrate"]);
    for method in ["gptq", "rtn"] {
        refused("tied", &["--method", method, "--bits", "32"], &["--method is for 4 and 8 bits"]);
    }
    let calibrate = ["--calibrate", text(&texts), "--calibration-tokens", "64"];
    refused("tied", &[&calibrate[..], &["--bits", "32"]].concat(), &["no calibration text, got one"]);
    for option in [
        ["--method", "rtn"],
        ["--calibrate", text(&texts)],
        ["--calibration-tokens", "9"],
        ["--library", "x"],
        ["--cache", "8"],
    ] {
        refused("encoders/bert", &option, &[option[0], "is for decoders"]);
    }
}

/// As `inspect | head -1` leaves it.
#[test]
fn a_pipe_that_nobody_reads_is_no_failure() {
    let directory = TempDir::new().unwrap();
    let package = directory.path().join("package");
    let checkpoint = goldens("tied");
    let output = model_compiler(&["compile", "--checkpoint", text(&checkpoint), "--out", text(&package)]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut inspect = Command::new(env!("CARGO_BIN_EXE_model-compiler"))
        .args(["inspect", text(&package)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(inspect.stdout.take());
    let output = inspect.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn compiles_for_an_8_bit_cache() {
    let directory = TempDir::new().unwrap();
    let texts = directory.path().join("texts");
    fs::write(&texts, "a line of text to calibrate by\n".repeat(20)).unwrap();
    let checkpoint = goldens("tied");
    let mut bases = Vec::new();
    // A text is read for the cache alone where the method or the bits need none.
    for (name, more) in [("nearest", &["--method", "mse"][..]), ("floats", &["--bits", "32"]), ("gptq", &[])]
    {
        let package = directory.path().join(name);
        let arguments =
            ["compile", "--checkpoint", text(&checkpoint), "--out", text(&package), "--cache", "8"];
        // Of which two whole sequences of 64 are used.
        let calibrate = ["--calibrate", text(&texts), "--calibration-tokens", "150"];
        let output = model_compiler(&[&arguments[..], &calibrate, more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8(output.stdout).unwrap().contains("8 bits: calibrated on 128 tokens"));
        let package = Package::open(&package).unwrap();
        assert!(matches!(package.manifest().cache, CacheForm::Int8 { tokens: 128, .. }));
        bases.push((package.base(), package.manifest().rounding));
    }
    assert_eq!((bases[0].1, bases[1].1), (Rounding::Mse, Rounding::Mse));
    assert!(matches!(bases[2].1, Rounding::Gptq { .. }));
    // The same base as without: what was trained over the one fits the other.
    let plain = directory.path().join("plain");
    let arguments = ["compile", "--checkpoint", text(&checkpoint), "--out", text(&plain), "--method", "mse"];
    assert!(model_compiler(&arguments).status.success());
    assert_eq!(Package::open(&plain).unwrap().base(), bases[0].0);
    let other = model_compiler(&[&arguments[..], &["--cache", "16"]].concat());
    assert_eq!(other.status.code(), Some(2));
}

#[test]
fn random_checkpoints_compile_and_repeat() {
    let directory = TempDir::new().unwrap();
    let (config, tokenizer) = (goldens("tied").join("config.json"), goldens("tied").join("tokenizer.json"));
    let make = |name: &str, seed: &str| {
        let out = directory.path().join(name);
        let output = model_compiler(&[
            "random",
            "--config",
            text(&config),
            "--tokenizer",
            text(&tokenizer),
            "--out",
            text(&out),
            "--seed",
            seed,
        ]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read(out.join("model.safetensors")).unwrap()
    };
    let first = make("first", "7");
    assert!(first == make("again", "7") && first != make("other", "8"));
    let (checkpoint, package) = (directory.path().join("first"), directory.path().join("package"));
    let output = model_compiler(&["compile", "--checkpoint", text(&checkpoint), "--out", text(&package)]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn exit_codes_tell_usage_from_bad_input() {
    let directory = TempDir::new().unwrap();
    let out = directory.path().join("package");
    let bits = ["compile", "--checkpoint", ".", "--out", text(&out), "--bits", "5"];
    assert_eq!(model_compiler(&bits).status.code(), Some(2));
    let nowhere = model_compiler(&["compile", "--checkpoint", "/nowhere", "--out", text(&out)]);
    assert_eq!(nowhere.status.code(), Some(3));
    assert!(String::from_utf8(nowhere.stderr).unwrap().contains("/nowhere is not a directory"));
    assert_eq!(model_compiler(&["inspect", "/nowhere"]).status.code(), Some(3));
    assert!(model_compiler(&["--help"]).status.success());
}

/// A limit on the size of files stands for a full disk: writing fails in the middle of the package.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let directory = TempDir::new().unwrap();
    let out = directory.path().join("package");
    let script = "trap '' XFSZ; ulimit -f 40; exec \"$0\" compile --checkpoint \"$1\" --out \"$2\" --bits 32";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_model-compiler"), text(&goldens("tied")), text(&out)])
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("cannot be written"), "{message}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// ONNX's own checker, where Python has it: set `COMMONWEAL_PYTHON`, or have `onnx` in `python3`.
#[test]
fn the_onnx_checker_accepts_the_graphs() {
    let python = std::env::var("COMMONWEAL_PYTHON").unwrap_or_else(|_| "python3".into());
    let present = Command::new(&python).args(["-c", "import onnx"]).output();
    if !present.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: {python} has no onnx; set COMMONWEAL_PYTHON to a Python that does");
        return;
    }
    let directory = TempDir::new().unwrap();
    for (variant, bits) in [("tied", "4"), ("untied", "8"), ("untied", "32")] {
        let out = directory.path().join(format!("{variant}{bits}"));
        let checkpoint = goldens(variant);
        let output = model_compiler(&[
            "compile",
            "--checkpoint",
            text(&checkpoint),
            "--out",
            text(&out),
            "--bits",
            bits,
        ]);
        assert!(output.status.success());
        for graph in ["infer.onnx", "train.onnx"] {
            let script = "import onnx, sys; onnx.checker.check_model(sys.argv[1])";
            let output = Command::new(&python).args(["-c", script, text(&out.join(graph))]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}
