//! The WebGPU provider, on a real adapter or on Mesa's software one. Asked for by `COMMONWEAL_TEST_WEBGPU`, the library
//! that `scripts/fetch-webgpu` fetched; skipped loudly without it. One test, since a process loads one library.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use std::path::PathBuf;

use commonweal_adapter::Adapter;
use commonweal_runtime::{
    Cancel, Device, DeviceError, Library, Model, OpenOptions, TrainOptions, Trainer, TrainingRow,
};

#[test]
fn webgpu_computes_what_the_processor_computes() {
    let Some(path) = std::env::var_os("COMMONWEAL_TEST_WEBGPU").map(PathBuf::from) else {
        eprintln!("SKIPPED: webgpu is not tested; run scripts/fetch-webgpu and do what it says");
        return;
    };
    let (library, package) = (Library::load(Some(&path)).unwrap(), support::package());
    let (elsewhere, choice) = library.choose(&"webgpu".parse().unwrap(), &package).unwrap();
    assert_eq!((choice.device, elsewhere.device()), (Device::WebGpu, Device::WebGpu));
    let missing = library.choose(&"cuda:0".parse().unwrap(), &package).unwrap_err();
    assert!(
        matches!(&missing, DeviceError::Missing { offered, .. } if offered.contains("WebGpu")),
        "{missing}"
    );

    let open = |library: &Library, prefill_tokens_max| {
        let options = OpenOptions { prefill_tokens_max, ..OpenOptions::default() };
        Model::open(library, &package, options).unwrap()
    };
    let (here, there, in_pieces) = (open(&library, 512), open(&elsewhere, 512), open(&elsewhere, 7));
    let rows: Vec<TrainingRow> =
        ["a", "longer", "the longest"].iter().map(|text| support::row(&here, "read this: ", text)).collect();
    let scores = |model: &Model| {
        let adapter = model.prepare(Some(&support::adapter(model, 3))).unwrap();
        let scores = model.score_rows(&adapter, &rows, &Cancel::new()).unwrap();
        scores.into_iter().flat_map(|score| score.token_logprobs).collect::<Vec<f32>>()
    };
    let apart = |one: &[f32], other: &[f32]| {
        assert_eq!(one.len(), other.len());
        one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    // Its kernels of 4-bit products round more than the processor's exact ones; the cache must cost nothing.
    let whole = scores(&there);
    let (kernels, cache) = (apart(&scores(&here), &whole), apart(&scores(&in_pieces), &whole));
    eprintln!("largest difference of log-probabilities: to the processor {kernels:e}, by pieces {cache:e}");
    assert!(kernels < 0.15, "{kernels}");
    assert!(cache < 1e-4, "{cache}");
    // Answers, token by token, behind a shared prefix and without it.
    let adapter = there.prepare(None).unwrap();
    let prompts = support::prompts(&there, &["hello there, ", "hello there, you"]);
    let prefix = there.share_prefix(&adapter, &prompts[0].ids[..6], &Cancel::new()).unwrap();
    let answers = |prefix| {
        let (options, silent) = (support::greedy(6), &mut |_: usize, _: &str| ());
        let answers =
            there.generate_streaming(&adapter, prefix, &prompts, &options, silent, &Cancel::new()).unwrap();
        answers.into_iter().map(|answer| answer.tokens).collect::<Vec<_>>()
    };
    assert_eq!(answers(Some(&prefix)), answers(None));

    // The gradient graph has nodes that WebGPU lacks: refused alone, shared with the processor when that was asked for.
    let step = |model: &Model| {
        let start = Adapter::init(model.layout().clone(), 0);
        let mut trainer = Trainer::new(model, start, TrainOptions::default())?;
        trainer.step(&rows, &Cancel::new()).map(|report| (report.loss, trainer.finish()))
    };
    let refused = step(&there).unwrap_err();
    assert!(refused.to_string().contains("train.onnx"), "{refused}");
    let (shared, _) = library.choose(&"webgpu,cpu".parse().unwrap(), &package).unwrap();
    let shared = Model::open(&shared, &package, OpenOptions::default()).unwrap();
    let ((expected, here), (got, there)) = (step(&here).unwrap(), step(&shared).unwrap());
    let moved = here.values().iter().zip(there.values()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    eprintln!("loss {expected} and {got}; largest difference of the trained adapter {moved:e}");
    assert!((expected - got).abs() < 1e-2, "{expected} {got}");
}
