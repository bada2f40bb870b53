//! AdamW over a flat vector of values, and the clipping of gradients. Pure; the numbers are PyTorch's
//! (`torch.optim.AdamW`, `torch.nn.utils.clip_grad_norm_`), so that a recipe carries over.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The constants of AdamW (Loshchilov and Hutter 2019).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// Decay of the mean of gradients, and of the mean of their squares.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Pull towards 0 per step, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's, without weight decay: a LoRA adapter's distance from the base is decayed by nothing else either.
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The running means of AdamW, one pair per value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Moments {
    /// Updates made.
    pub(crate) updates: u64,
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
}

impl Moments {
    pub(crate) fn new(length: usize) -> Self {
        Self { updates: 0, first: vec![0.0; length], second: vec![0.0; length] }
    }

    /// One update of the values inside `trainable`; nothing outside it changes.
    pub(crate) fn update(
        &mut self,
        constants: &AdamW,
        learning_rate: f64,
        trainable: &[Range<usize>],
        gradient: &[f32],
        values: &mut [f32],
    ) {
        self.updates += 1;
        let (beta1, beta2) = constants.betas;
        let correction = |beta: f64| 1.0 - beta.powf(self.updates as f64);
        // PyTorch keeps constants as doubles and rounds each product to the tensors' floats.
        let decay = (1.0 - learning_rate * constants.weight_decay) as f32;
        let (first_share, second_share) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
        let (step, root) = ((learning_rate / correction(beta1)) as f32, correction(beta2).sqrt() as f32);
        let (beta2, eps) = (beta2 as f32, constants.eps as f32);
        for range in trainable {
            let moments = self.first[range.clone()].iter_mut().zip(&mut self.second[range.clone()]);
            let places = values[range.clone()].iter_mut().zip(&gradient[range.clone()]);
            for ((first, second), (value, gradient)) in moments.zip(places) {
                *value *= decay;
                *first += (gradient - *first) * first_share;
                *second = *second * beta2 + gradient * gradient * second_share;
                *value -= step * (*first / (second.sqrt() / root + eps));
            }
        }
    }
}

/// The Euclidean norm of the values inside `trainable`.
pub(crate) fn norm(gradient: &[f32], trainable: &[Range<usize>]) -> f64 {
    let squares =
        |range: &Range<usize>| gradient[range.clone()].iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
    trainable.iter().map(squares).sum::<f64>().sqrt()
}

/// Scales a gradient of this norm down to `max` if it is longer. PyTorch adds 1e-6 to the norm.
pub(crate) fn clip(gradient: &mut [f32], norm: f64, max: f64) {
    let factor = max / (norm + 1e-6);
    if factor < 1.0 {
        for value in gradient {
            *value *= factor as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Golden values: torch 2.x, AdamW([p], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1).
    #[test]
    fn three_steps_equal_pytorch() {
        let mut values = [0.5, -1.25, 2.0, 0.0, -0.75];
        let gradients =
            [[0.1, -0.2, 0.3, 0.0, 1.5], [0.05, 0.4, -0.1, 0.002, -1.0], [-0.3, 0.1, 0.2, -0.004, 0.25]];
        let expected = [
            [0.489_500_02, -1.238_75, 1.988, 0.0, -0.759_25],
            [0.479_688_7, -1.241_172_3, 1.982_009_9, -0.007_441_315, -0.759_936],
            [0.482_681_27, -1.244_087_6, 1.973_996_9, -0.004_291_023_6, -0.761_160_85],
        ];
        let constants = AdamW { weight_decay: 0.1, ..AdamW::default() };
        let mut moments = Moments::new(5);
        for (gradient, expected) in gradients.iter().zip(&expected) {
            moments.update(&constants, 0.01, &[0..2, 2..5], gradient, &mut values);
            for (got, expected) in values.iter().zip(expected) {
                assert!((got - expected).abs() < 2e-7_f32, "{got} {expected}");
            }
        }
    }

    #[test]
    fn only_trainable_ranges_change() {
        let mut values = [1.0_f32; 6];
        let mut moments = Moments::new(6);
        let constants = AdamW { weight_decay: 0.5, ..AdamW::default() };
        moments.update(&constants, 0.1, &[1..3, 5..6], &[1.0; 6], &mut values);
        assert_eq!([values[0], values[3], values[4]], [1.0; 3]);
        assert!(values[1] < 1.0 && values[2] < 1.0 && values[5] < 1.0);
    }

    #[test]
    fn clipping_equals_pytorch() {
        let mut gradient = [3.0, -4.0, 12.0];
        let length = norm(&gradient, &[0..1, 1..3]);
        assert_eq!(length, 13.0);
        clip(&mut gradient, length, 1.0);
        for (got, expected) in gradient.iter().zip([0.230_769_22, -0.307_692_3, 0.923_076_87]) {
            assert!((got - expected).abs() < 1e-7, "{got}");
        }
        let before = gradient;
        clip(&mut gradient, 1.0, 2.0);
        assert_eq!(gradient, before);
    }
}
