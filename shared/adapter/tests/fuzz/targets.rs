//! What must hold for any bytes at all. Run by `../fuzz.rs` and by the targets in `fuzz/`.

use std::sync::Arc;

use commonweal_adapter::{AdapterLayout, DecodeLimits, Module, PackedDelta, Target, Trainable, disk, pair};

/// The layout of the seeds: small, so that mutations reach every part.
pub(crate) fn layout() -> Arc<AdapterLayout> {
    let modules = vec![
        Module { target: Target::Q, inputs: 6, outputs: 5 },
        Module { target: Target::Up, inputs: 7, outputs: 8 },
    ];
    Arc::new(AdapterLayout::new(2, 3, 6.0, modules).expect("a valid layout"))
}

/// Bytes are refused, or make one or two deltas of the layout whose values can be merged.
pub(crate) fn packed_delta(bytes: &[u8]) {
    one_delta(bytes);
    if let Ok((delta, control)) = pair::split(bytes) {
        assert_eq!(delta.len() + control.len() + 5, bytes.len());
        one_delta(delta);
        one_delta(control);
    }
}

fn one_delta(bytes: &[u8]) {
    let limits = DecodeLimits { trainable: None, ..DecodeLimits::of(&layout(), Trainable::Both) };
    // The layout's mark is a hash that mutations would never meet, so it is put right here.
    let mut marked = bytes.to_vec();
    let mark = layout().digest();
    for (byte, right) in marked.iter_mut().skip(1).zip(&mark[..16]) {
        *byte = *right;
    }
    for bytes in [bytes, &marked] {
        if let Ok(delta) = PackedDelta::decode(bytes, &layout(), &limits) {
            assert_eq!(delta.values().len(), layout().trainable_parameters(delta.trainable()));
            assert!(delta.values().iter().all(|value| value.abs() < 3e6));
        }
    }
}

/// Bytes are refused with an error that can be shown, or make an adapter that is written and read back.
pub(crate) fn adapter_safetensors(bytes: &[u8]) {
    match disk::read(bytes) {
        Ok((adapter, facts)) => {
            let written = disk::write(&adapter, &facts).expect("an adapter that was read is finite");
            assert_eq!(disk::read(&written).expect("it is read back"), (adapter, facts));
        }
        Err(error) => assert!(error.to_string().len() < 1000, "{error}"),
    }
}
