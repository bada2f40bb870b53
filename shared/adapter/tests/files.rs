//! Adapter files and layouts: exact names and bytes, and everything that a file can have wrong.
#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "a failed test may panic")]

use std::collections::HashMap;
use std::sync::Arc;

use commonweal_adapter::disk::{self, AdapterFacts, AdapterKind, ReadError};
use commonweal_adapter::{
    Adapter, AdapterDelta, AdapterError, AdapterLayout, LayoutError, Module, Part, Target, Trainable,
    export_peft,
};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::Value;

const FACTS: AdapterFacts = AdapterFacts { base: [0xab; 32], kind: AdapterKind::Guard };

fn layout() -> Arc<AdapterLayout> {
    let modules = vec![
        Module { target: Target::Down, inputs: 5, outputs: 3 },
        Module { target: Target::Q, inputs: 3, outputs: 4 },
    ];
    Arc::new(AdapterLayout::new(2, 2, 4.5, modules).unwrap())
}

fn adapter() -> Adapter {
    let mut adapter = Adapter::init(layout(), 1);
    adapter.values_mut().iter_mut().enumerate().for_each(|(place, value)| *value += place as f32 / 64.0);
    adapter
}

#[test]
fn tensors_come_in_canonical_order() {
    let tensors = layout().tensors();
    let names: Vec<String> =
        tensors.iter().map(|spec| format!("{} {:?}", spec.name(), spec.shape())).collect();
    let expected = [
        "layers.0.q.a [2, 3]",
        "layers.0.q.b [4, 2]",
        "layers.0.down.a [2, 5]",
        "layers.0.down.b [3, 2]",
        "layers.1.q.a [2, 3]",
        "layers.1.q.b [4, 2]",
        "layers.1.down.a [2, 5]",
        "layers.1.down.b [3, 2]",
    ];
    assert_eq!(names, expected);
    assert_eq!(tensors.last().unwrap().range.end, layout().parameters());
    assert!(tensors.windows(2).all(|pair| pair[0].range.end == pair[1].range.start));
    assert_eq!(layout().trainable_parameters(Trainable::BOnly), 2 * (8 + 6));
    assert_eq!(layout().scale(), 2.25);
}

#[test]
fn impossible_layouts_are_refused() {
    let module = |inputs| Module { target: Target::K, inputs, outputs: 8 };
    let refused =
        |layers, rank, alpha, modules| AdapterLayout::new(layers, rank, alpha, modules).unwrap_err();
    for error in [
        refused(0, 1, 1.0, vec![module(8)]),
        refused(257, 1, 1.0, vec![module(8)]),
        refused(1, 0, 1.0, vec![module(8)]),
        refused(1, usize::MAX, 1.0, vec![module(8)]),
        refused(1, 1, 1.0, vec![module(0)]),
        refused(1, 1, 1.0, vec![module(usize::MAX)]),
        refused(256, 512, 1.0, vec![module(1 << 18)]),
    ] {
        assert!(matches!(error, LayoutError::Dimension { .. }), "{error}");
    }
    for alpha in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(refused(1, 1, alpha, vec![module(8)]), LayoutError::Alpha { .. }));
    }
    assert!(matches!(refused(1, 1, 1.0, vec![]), LayoutError::Modules { .. }));
    assert!(matches!(refused(1, 1, 1.0, vec![module(8); 2]), LayoutError::Modules { .. }));
    let json = r#"{"layers":1,"rank":0,"alpha":1.0,"modules":[{"target":"k","inputs":8,"outputs":8}]}"#;
    let error = serde_json::from_str::<AdapterLayout>(json).unwrap_err();
    assert!(error.to_string().contains("adapter rank: expected 1 to 512, got 0"), "{error}");
}

#[test]
fn init_is_kaiming_uniform_in_a_and_zero_in_b() {
    let modules = vec![Module { target: Target::Up, inputs: 400, outputs: 100 }];
    let layout = Arc::new(AdapterLayout::new(4, 8, 16.0, modules).unwrap());
    let adapter = Adapter::init(Arc::clone(&layout), 42);
    assert_eq!(adapter, Adapter::init(Arc::clone(&layout), 42));
    assert_ne!(adapter, Adapter::init(Arc::clone(&layout), 43));
    for spec in layout.tensors() {
        let matrix = adapter.matrix(&spec).unwrap();
        match spec.part {
            Part::B => assert!(matrix.iter().all(|value| *value == 0.0)),
            Part::A => {
                // Uniform in ±1/√400 = ±0.05: deviation 0.05/√3; 3200 values, so its own is about 1 %.
                assert!(matrix.iter().all(|value| value.abs() <= 0.05));
                let deviation = (matrix.iter().map(|v| v * v).sum::<f32>() / matrix.len() as f32).sqrt();
                assert!((deviation * 3_f32.sqrt() / 0.05 - 1.0).abs() < 0.04, "{deviation}");
            }
        }
    }
    // The start that every device of a round computes for itself must not change with a library.
    assert_eq!(adapter.values()[..3], [-0.027_591_927, 0.018_189_615, -0.035_361_38]);
}

#[test]
fn a_delta_added_to_where_it_began_is_what_was_trained() {
    let installed = Adapter::init(layout(), 3);
    let trained = adapter();
    let delta = AdapterDelta::between(&installed, &trained, Trainable::Both).unwrap();
    for (got, expected) in installed.plus(&delta, 1.0).unwrap().values().iter().zip(trained.values()) {
        assert!((got - expected).abs() < 1e-6);
    }
    let half = AdapterDelta::between(&installed, &trained, Trainable::BOnly).unwrap();
    let moved = installed.plus(&half, 1.0).unwrap();
    for spec in layout().tensors() {
        let from = if spec.part == Part::A { &installed } else { &trained };
        let (got, expected) = (moved.matrix(&spec).unwrap(), from.matrix(&spec).unwrap());
        assert!(got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{}", spec.name());
    }
    let mut diverged = trained.clone();
    diverged.values_mut()[5] = f32::NAN;
    let error = AdapterDelta::between(&installed, &diverged, Trainable::Both).unwrap_err();
    assert!(matches!(error, AdapterError::NotFinite { index: 5, .. }));
}

#[test]
fn files_round_trip_and_equal_adapters_give_equal_bytes() {
    let bytes = disk::write(&adapter(), &FACTS).unwrap();
    assert_eq!(bytes, disk::write(&adapter(), &FACTS).unwrap());
    assert_eq!(disk::read(&bytes).unwrap(), (adapter(), FACTS));
    // Read by the format's own crate.
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor("layers.1.down.a").unwrap();
    assert_eq!(tensor.shape(), [2, 5]);
    let first = f32::from_le_bytes(*tensor.data().first_chunk().unwrap());
    assert_eq!(first, adapter().tensor(6).unwrap()[[0, 0]]);
    let mut wrong = adapter();
    wrong.values_mut()[0] = f32::INFINITY;
    assert!(matches!(disk::write(&wrong, &FACTS), Err(AdapterError::NotFinite { index: 0, .. })));
}

type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// The file with its header changed by `edit` and its tensors by `data`.
fn edited(
    edit: impl Fn(&mut HashMap<String, String>),
    data: impl Fn(&str, Dtype, Vec<usize>, Vec<u8>) -> Option<Tensor>,
) -> Result<(Adapter, AdapterFacts), ReadError> {
    let bytes = disk::write(&adapter(), &FACTS).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut metadata = header.metadata().clone().unwrap();
    edit(&mut metadata);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<(String, Tensor)> = file
        .iter()
        .filter_map(|(name, view)| {
            let changed = data(name, view.dtype(), view.shape().to_vec(), view.data().to_vec());
            changed.map(|tensor| (name.to_owned(), tensor))
        })
        .collect();
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    disk::read(&serialize(views, Some(metadata)).unwrap())
}

#[test]
fn wrong_metadata_is_named() {
    let with = |key: &'static str, value: &'static str| {
        let set = |metadata: &mut HashMap<String, String>| {
            metadata.insert(key.to_owned(), value.to_owned());
        };
        edited(set, |_, dtype, shape, data| Some((dtype, shape, data)))
    };
    with("note", "unknown keys are left alone").unwrap();
    for (key, value) in [
        ("format", "pt"),
        ("rank", "-2"),
        ("layers", "two"),
        ("alpha", ""),
        ("base", "abab"),
        ("base", "zz"),
        ("kind", "Guard"),
    ] {
        let error = with(key, value).unwrap_err();
        assert!(
            matches!(&error, ReadError::Metadata { key: k, got, .. } if *k == key && got == value),
            "{error}"
        );
    }
    for (key, value) in
        [("alpha", "NaN"), ("rank", "0"), ("layers", "100000"), ("targets", "q,q"), ("targets", "x")]
    {
        assert!(matches!(with(key, value), Err(ReadError::Layout(_))), "{key} {value}");
    }
    let error = with("rank", "3").unwrap_err();
    assert_eq!(error.to_string(), "adapter file: tensor layers.0.q.a: expected F32 [3, 3], got F32 [2, 3]");
    assert!(matches!(with("targets", "q"), Err(ReadError::Count { expected: 4, got: 8 })));
    assert!(matches!(with("targets", "q,o"), Err(ReadError::Missing { name }) if name == "layers.0.o.a"));
    assert!(matches!(with("layers", "3"), Err(ReadError::Missing { name }) if name == "layers.2.q.a"));
    let removed = edited(
        |metadata| {
            metadata.remove("kind");
        },
        |_, dtype, shape, data| Some((dtype, shape, data)),
    );
    assert!(matches!(removed, Err(ReadError::Metadata { key: "kind", .. })));
}

#[test]
fn wrong_tensors_are_named() {
    let change = |name: &'static str, to: fn(Vec<usize>, Vec<u8>) -> Option<Tensor>| {
        edited(
            |_| {},
            move |n, dtype, shape, data| if n == name { to(shape, data) } else { Some((dtype, shape, data)) },
        )
        .unwrap_err()
        .to_string()
    };
    assert_eq!(
        change("layers.1.q.b", |_, data| Some((Dtype::F32, vec![2, 4], data))),
        "adapter file: tensor layers.1.q.b: expected F32 [4, 2], got F32 [2, 4]"
    );
    assert_eq!(
        change("layers.1.down.b", |shape, data| Some((Dtype::I32, shape, data))),
        "adapter file: tensor layers.1.down.b: expected F32 [3, 2], got I32 [3, 2]"
    );
    assert_eq!(
        change("layers.1.q.a", |_, _| None),
        "adapter file: expected the tensor layers.1.q.a, got none"
    );
    for value in [f32::NAN, f32::NEG_INFINITY] {
        let bytes = disk::write(&adapter(), &FACTS).unwrap();
        let mut bad = bytes;
        let end = bad.len();
        bad[end - 4..].copy_from_slice(&value.to_le_bytes());
        let error = disk::read(&bad).unwrap_err();
        assert!(matches!(&error, ReadError::NotFinite { name, .. } if name == "layers.1.down.b"), "{error}");
    }
}

#[test]
fn cut_or_swollen_files_are_refused() {
    let bytes = disk::write(&adapter(), &FACTS).unwrap();
    for length in 0..bytes.len() {
        assert!(disk::read(&bytes[..length]).is_err(), "cut to {length}");
    }
    assert!(disk::read(&[&bytes[..], &[0]].concat()).is_err());
    let mut long = bytes;
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(disk::read(&long), Err(ReadError::Header { got: u64::MAX })));
}

proptest! {
    #[test]
    fn any_layout_round_trips(
        layers in 1_usize..4, rank in 1_usize..5, alpha in 0.01_f32..100.0, seed: u64,
        targets in prop::sample::subsequence(Target::ALL.to_vec(), 1..=7),
        kind in prop::sample::select(vec![AdapterKind::Assistant, AdapterKind::Guard, AdapterKind::Reviser]),
        base: [u8; 32],
    ) {
        let modules = targets.into_iter().map(|target| {
            Module { target, inputs: 3 + target as usize, outputs: 9 - target as usize }
        });
        let layout = Arc::new(AdapterLayout::new(layers, rank, alpha, modules.collect()).unwrap());
        let (adapter, facts) = (Adapter::init(layout, seed), AdapterFacts { base, kind });
        prop_assert_eq!(disk::read(&disk::write(&adapter, &facts).unwrap()).unwrap(), (adapter, facts));
    }
}

#[test]
fn peft_files_have_its_keys_and_names() {
    let files = export_peft(&adapter(), "someone/base").unwrap();
    let config: Value = serde_json::from_slice(&files.config_json).unwrap();
    for (key, expected) in [
        ("peft_type", Value::from("LORA")),
        ("task_type", Value::from("CAUSAL_LM")),
        ("base_model_name_or_path", Value::from("someone/base")),
        ("r", Value::from(2)),
        ("lora_alpha", Value::from(4.5)),
        ("bias", Value::from("none")),
        ("fan_in_fan_out", Value::from(false)),
        ("inference_mode", Value::from(true)),
        ("use_rslora", Value::from(false)),
        ("target_modules", Value::from(vec!["q_proj", "down_proj"])),
    ] {
        assert_eq!(config[key], expected, "{key}");
    }
    let file = SafeTensors::deserialize(&files.model_safetensors).unwrap();
    assert_eq!(file.len(), 8);
    let attention = file.tensor("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight").unwrap();
    let feed_forward = file.tensor("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight").unwrap();
    assert_eq!((attention.shape(), feed_forward.shape()), (&[2, 3][..], &[3, 2][..]));
    let expected: Vec<u8> =
        adapter().tensor(4).unwrap().iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(attention.data(), expected);
    let whole = Arc::new(AdapterLayout::new(1, 2, 16.0, layout().modules().to_vec()).unwrap());
    let config: Value =
        serde_json::from_slice(&export_peft(&Adapter::zeros(whole), "b").unwrap().config_json).unwrap();
    assert_eq!(config["lora_alpha"], Value::from(16));
}
