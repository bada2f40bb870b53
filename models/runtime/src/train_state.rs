//! Saves a training in progress and resumes it bit for bit: a device that is unplugged goes on where it was. The bytes
//! are a safetensors file, so that any tool can look inside. `train.rs` makes the steps.

use std::{collections::HashMap, sync::Arc};

use commonweal_adapter::{Adapter, AdapterError, AdapterLayout, scaffold::Correction};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{
    model::Model,
    optimizer::Moments,
    train::{TrainError, TrainOptions, Trainer},
};

const FORMAT: &str = "commonweal-training-1";

impl Trainer {
    /// Everything needed to go on: the adapter now and at the start, the optimizer's state, the options and the base.
    pub fn checkpoint(&self) -> Result<Vec<u8>, TrainError> {
        let failed = |what: &str, got: String| TrainError::State { expected: what.to_owned(), got };
        let json = |result: Result<String, serde_json::Error>| {
            result.map_err(|e| failed("plain numbers", e.to_string()))
        };
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("base".to_owned(), self.model.manifest().base.to_string()),
            ("layout".to_owned(), json(serde_json::to_string(&**self.adapter.layout()))?),
            ("options".to_owned(), json(serde_json::to_string(&self.options))?),
            ("updates".to_owned(), self.moments.updates.to_string()),
        ]);
        let mut tensors = vec![
            ("adapter", bytes(self.adapter.values())),
            ("start", bytes(self.start.values())),
            ("first_moment", bytes(&self.moments.first)),
            ("second_moment", bytes(&self.moments.second)),
        ];
        if let Some(correction) = &self.correction {
            tensors.push(("correction", bytes(correction.shift().values())));
            tensors.push(("gradient_mean", bytes(correction.mean().values())));
        }
        let views = tensors
            .iter()
            .map(|(name, data)| Ok((*name, TensorView::new(Dtype::F32, vec![data.len() / 4], data)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
        views
            .and_then(|views| safetensors::serialize(views, Some(metadata)))
            .map_err(|error| failed("tensors that serialize", error.to_string()))
    }

    /// Resumes what [`Trainer::checkpoint`] saved, on the same base.
    pub fn restore(model: &Model, bytes: &[u8]) -> Result<Self, TrainError> {
        let state = |expected: &str, got: String| TrainError::State { expected: expected.to_owned(), got };
        let broken = |error: safetensors::SafeTensorError| state("a safetensors file", error.to_string());
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let fields = header.metadata().clone().unwrap_or_default();
        let field = |name: &str| fields.get(name).map(String::as_str).unwrap_or_default();
        let base = model.manifest().base.to_string();
        if field("format") != FORMAT {
            return Err(state(&format!("format {FORMAT}"), format!("{:?}", field("format"))));
        }
        if field("base") != base {
            return Err(state(&format!("base {base}"), field("base").to_owned()));
        }
        let layout: AdapterLayout = serde_json::from_str(field("layout"))
            .map_err(|error| state("an adapter layout", error.to_string()))?;
        let options: TrainOptions = serde_json::from_str(field("options"))
            .map_err(|error| state("training options", error.to_string()))?;
        let updates = field("updates")
            .parse()
            .map_err(|_| state("a number of updates", field("updates").to_owned()))?;
        let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;
        let values = |name: &str| {
            let tensor = tensors.tensor(name).map_err(|error| state(name, error.to_string()))?;
            if tensor.dtype() != Dtype::F32 {
                return Err(state("F32 tensors", format!("{name} of {:?}", tensor.dtype())));
            }
            let floats = tensor.data().chunks_exact(4).filter_map(|bytes| bytes.try_into().ok());
            Ok(floats.map(f32::from_le_bytes).collect::<Vec<f32>>())
        };
        let layout = Arc::new(layout);
        let adapter = |name: &str| {
            let wrong = |error: AdapterError| state(name, error.to_string());
            Adapter::from_values(Arc::clone(&layout), values(name)?).map_err(wrong)
        };
        // Moments have as many values as the adapter, and are finite like it.
        let moments = Moments {
            updates,
            first: adapter("first_moment")?.into_values(),
            second: adapter("second_moment")?.into_values(),
        };
        // A mean of squares: the root of a negative one would be NaN, and the adapter with it.
        if let Some(negative) = moments.second.iter().find(|square| **square < 0.0) {
            return Err(state("a second_moment of at least 0", negative.to_string()));
        }
        let trainer = Self::resume(model, adapter("start")?, adapter("adapter")?, moments, options)?;
        if tensors.tensor("correction").is_err() {
            return Ok(trainer);
        }
        let correction = Correction::resume(adapter("correction")?, adapter("gradient_mean")?, updates)
            .map_err(|error| state("a correction", error.to_string()))?;
        trainer.corrected(correction)
    }
}

/// Little-endian bytes of values, in one allocation and one pass: a checkpoint is written while a person waits.
fn bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(values)];
    for (to, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *to = value.to_le_bytes();
    }
    bytes
}
