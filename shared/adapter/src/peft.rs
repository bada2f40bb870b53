//! Export for Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! At the end of the flow: `aggregator export --format peft` writes these bytes, and
//! `PeftModel.from_pretrained` loads them. PEFT's `A`, `B` and scale are ours, so no value changes.

use serde_json::json;

use crate::adapter::{Adapter, AdapterError, check_values};
use crate::disk::safetensors_bytes;
use crate::layout::{Part, Target, TensorSpec};

/// The two files of a PEFT adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeftAdapter {
    /// Bytes of `adapter_config.json`.
    pub config_json: Vec<u8>,
    /// Bytes of `adapter_model.safetensors`.
    pub model_safetensors: Vec<u8>,
}

/// Files for the base that Hugging Face calls `base_model`. Refuses values that are not finite.
pub fn export_peft(adapter: &Adapter, base_model: &str) -> Result<PeftAdapter, AdapterError> {
    let layout = adapter.layout();
    check_values(adapter.values(), layout.parameters())?;
    let targets: Vec<&str> = layout.modules().iter().map(|module| module_name(module.target)).collect();
    let alpha = if layout.alpha().fract() == 0.0 && layout.alpha() < 1e9 {
        json!(layout.alpha() as u64)
    } else {
        json!(layout.alpha())
    };
    let config = json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": layout.rank(),
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    });
    Ok(PeftAdapter {
        config_json: format!("{config:#}\n").into_bytes(),
        model_safetensors: safetensors_bytes(adapter, &json!({ "format": "pt" }), tensor_name),
    })
}

fn module_name(target: Target) -> &'static str {
    match target {
        Target::Q => "q_proj",
        Target::K => "k_proj",
        Target::V => "v_proj",
        Target::O => "o_proj",
        Target::Gate => "gate_proj",
        Target::Up => "up_proj",
        Target::Down => "down_proj",
    }
}

fn tensor_name(spec: &TensorSpec) -> String {
    let part = match spec.part {
        Part::A => "lora_A",
        Part::B => "lora_B",
    };
    let parent = match spec.target {
        Target::Q | Target::K | Target::V | Target::O => "self_attn",
        Target::Gate | Target::Up | Target::Down => "mlp",
    };
    format!(
        "base_model.model.model.layers.{}.{parent}.{}.{part}.weight",
        spec.layer,
        module_name(spec.target)
    )
}
