//! `bench` as an engineer runs it, on the bundled model: the lines that a script reads, and where the time went.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

const PACKAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/reference/package");

fn bench(directory: &Path, arguments: &[&str]) -> Output {
    assert!(fs::exists(PACKAGE).unwrap(), "{PACKAGE} is missing: run scripts/setup first");
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-client"));
    command.args(["bench", "--package", PACKAGE, "--repeats", "1", "--dir"]).arg(directory);
    command.args(arguments).output().unwrap()
}

#[test]
fn a_profile_says_in_which_operators_the_time_of_each_kind_of_work_went() {
    let directory = tempfile::tempdir().unwrap();
    let profiles = directory.path().join("profiles");
    let profile = ["--only", "prefill,train", "--profile", profiles.to_str().unwrap(), "--json"];
    let output = bench(directory.path(), &profile);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Value> =
        serde_json::Deserializer::from_slice(&output.stdout).into_iter().collect::<Result<_, _>>().unwrap();
    let [limits, prefill, train] = lines.as_slice() else { panic!("{lines:?}") };
    assert!(limits["limits"]["gflop_s"].as_f64() > Some(0.0), "{limits}");
    for (figure, work, product) in [(prefill, "prefill", "MatMulNBits"), (train, "train", "MatMul")] {
        assert_eq!(figure["work"], work);
        assert!(figure["rate"].as_f64() > Some(0.0), "{figure}");
        let parts = figure["profile"].as_array().unwrap();
        // What is between operators is little, and no operator is counted twice.
        let within = parts.iter().filter(|part| part["name"] != "between");
        let share: f64 = within.map(|part| part["share"].as_f64().unwrap()).sum();
        assert!((0.5..1.01).contains(&share), "{share} of the runs are in operators: {figure}");
        let called = parts.iter().find(|part| part["name"] == product).unwrap();
        assert!(called["calls"].as_u64() > Some(0) && called["ms"].as_f64() > Some(0.0), "{called}");
        assert!(profiles.join(work).is_dir());
    }
    // What is there already is of another run, and would be added up with this one's.
    let again = bench(directory.path(), &profile);
    assert_eq!(again.status.code(), Some(3), "{again:?}");
    let told = String::from_utf8_lossy(&again.stderr);
    assert!(told.contains("profiles/prefill: expected no profiles yet"), "{told}");
    assert!(again.stdout.is_empty(), "nothing was measured");
}
