//! Runs the gradient graph: loss, log-probabilities and the gradient of every adapter value for a batch of rows.
//! `train.rs` and `preference.rs` decide what the rows weigh and what becomes of the gradient.

use std::borrow::Cow;

use commonweal_adapter::Adapter;
use ort::{
    session::SessionInputValue,
    value::{Tensor, TensorRef},
};

use crate::{
    cancel::Run,
    conversation::TrainingRow,
    model::Model,
    train::{TrainError, TrainOptions},
};

/// The result of one run of the gradient graph.
pub(crate) struct Gradient {
    /// `−Σ weight · log-probability` over all rows.
    pub(crate) loss: f64,
    /// Per row `Σ weight · log-probability`.
    pub(crate) logprobs: Vec<f64>,
    /// `∂loss/∂value`, flat in the adapter's order.
    pub(crate) values: Vec<f32>,
}

/// The gradient of some rows; `signs` multiplies each row's weights. It is zero where the options train nothing.
pub(crate) fn gradient(
    model: &Model,
    adapter: &Adapter,
    rows: &[&TrainingRow],
    signs: &[f32],
    options: &TrainOptions,
    run: &Run,
) -> Result<Gradient, TrainError> {
    let (batch, time) = (rows.len(), rows.iter().map(|row| row.ids.len() - 1).max().unwrap_or(0));
    let pad = i64::from(model.manifest().tokens.pad);
    let (mut ids, mut targets, mut weights) =
        (vec![pad; batch * time], vec![pad; batch * time], vec![0.0; batch * time]);
    for (index, (row, sign)) in rows.iter().zip(signs).enumerate() {
        for (at, pair) in row.ids.windows(2).enumerate() {
            let place = index * time + at;
            ids[place] = i64::from(pair[0]);
            targets[place] = i64::from(pair[1]);
            weights[place] = row.weights[at + 1] * sign;
        }
    }
    let shape = [batch, time];
    let mut inputs: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = vec![
        ("input_ids".into(), Tensor::from_array((shape, ids))?.into()),
        ("targets".into(), Tensor::from_array((shape, targets))?.into()),
        ("weights".into(), TensorRef::from_array_view((shape, weights.as_slice()))?.into()),
        ("lora_scale".into(), Tensor::from_array(((), vec![adapter.layout().scale()]))?.into()),
    ];
    let specs = adapter.layout().tensors();
    for spec in &specs {
        let values = &adapter.values()[spec.range.clone()];
        inputs.push((spec.name().into(), TensorRef::from_array_view((spec.shape(), values))?.into()));
    }
    let layers = adapter.layout().layers();
    model.with_train_session(options.graph, run.cancel(), |session| {
        let outputs = run.explain(session.run_with_options(inputs, run.options()))?;
        let mut values = vec![0.0; adapter.values().len()];
        // What is not trained has no gradient in some graphs, and needs none.
        for spec in specs.iter().filter(|spec| options.trains(spec, layers)) {
            let name = format!("grad.{}", spec.name());
            let (_, part) =
                outputs.get(&name).ok_or(TrainError::Output { name })?.try_extract_tensor::<f32>()?;
            let place = &mut values[spec.range.clone()];
            if part.len() != place.len() {
                return Err(TrainError::Output { name: format!("grad.{}", spec.name()) });
            }
            place.copy_from_slice(part);
        }
        let output =
            |name: &str| outputs.get(name).ok_or_else(|| TrainError::Output { name: name.to_owned() });
        let loss =
            f64::from(output("loss")?.try_extract_tensor::<f32>()?.1.first().copied().unwrap_or(f32::NAN));
        let token_logprobs = output("token_logprob")?.try_extract_tensor::<f32>()?.1;
        if token_logprobs.len() != batch * time {
            return Err(TrainError::Output { name: "token_logprob".into() });
        }
        let logprob = |(row, logprobs): (&&TrainingRow, &[f32])| {
            let scored = row.weights.iter().skip(1).zip(logprobs).filter(|(weight, _)| **weight != 0.0);
            scored.map(|(weight, logprob)| f64::from(*weight) * f64::from(*logprob)).sum::<f64>()
        };
        let logprobs = rows.iter().zip(token_logprobs.chunks_exact(time.max(1))).map(logprob).collect();
        Ok(Gradient { loss, logprobs, values })
    })
}
