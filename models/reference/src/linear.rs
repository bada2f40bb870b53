//! Logistic regression over sparse rows: what `learn_words.rs` trains.
//!
//! Minimizes |w|²/2 + b²/2 + C · Σ weight · ln(1 + exp(∓(w·x + b))), with safe and unsafe rows weighing the same in sum:
//! liblinear's objective with balanced classes. By Nesterov's accelerated gradient for strongly convex functions
//! (Nesterov 2004, scheme 2.2.11), so that the same rows always give the same weights and no step needs choosing.

use commonweal_safety::Sparse;

/// Steps after which it ends. The error falls by e^(-1/√κ) a step, with κ of some 1,000 for 10,000 rows.
const STEPS_MAX: usize = 3000;
/// The largest change of a weight at which it ends before: the weights are rounded to 8 bits after.
const CHANGE_MIN: f64 = 1e-5;
const CURVATURE_STEPS: usize = 20;

/// A row and whether it is unsafe.
pub(crate) struct Example {
    pub(crate) vector: Sparse,
    pub(crate) is_unsafe: bool,
}

/// Weights, and what is added to every product.
pub(crate) struct Linear {
    pub(crate) weights: Vec<f64>,
    pub(crate) bias: f64,
}

impl Linear {
    pub(crate) fn score(&self, vector: &Sparse) -> f64 {
        vector.iter().map(|(at, value)| self.weights[*at] * f64::from(*value)).sum::<f64>() + self.bias
    }
}

/// The largest second derivative of the objective, by the power method on the rows' own: that of a row's loss is at most
/// a quarter of x·xᵀ. Rows have no negative values, so that a beginning of ones is near the answer; a twentieth more
/// makes up for what is left.
fn curvature(examples: &[Example], width: usize, weight: impl Fn(&Example) -> f64) -> f64 {
    let mut at = Linear { weights: vec![1.0; width], bias: 1.0 };
    let mut largest = 0.0;
    for _ in 0..CURVATURE_STEPS {
        let mut next = Linear { weights: vec![0.0; width], bias: 0.0 };
        for example in examples {
            let product = weight(example) / 4.0 * at.score(&example.vector);
            example.vector.iter().for_each(|(i, x)| next.weights[*i] += product * f64::from(*x));
            next.bias += product;
        }
        let squares = next.weights.iter().map(|weight| weight * weight).sum::<f64>() + next.bias * next.bias;
        largest = squares.sqrt();
        if largest > 0.0 {
            next.weights.iter_mut().for_each(|weight| *weight /= largest);
            next.bias /= largest;
        }
        at = next;
    }
    1.0 + 1.05 * largest
}

/// Fits examples of `width` columns; `strength` is the C of the objective.
pub(crate) fn fit(examples: &[Example], width: usize, strength: f64) -> Linear {
    let positives = examples.iter().filter(|example| example.is_unsafe).count();
    let share = |of: usize| examples.len() as f64 / (2 * of.max(1)) as f64;
    let balance = |is_unsafe: bool| {
        strength * if is_unsafe { share(positives) } else { share(examples.len() - positives) }
    };
    let curvature = curvature(examples, width, |example| balance(example.is_unsafe));
    let momentum = (curvature.sqrt() - 1.0) / (curvature.sqrt() + 1.0);
    let mut at = Linear { weights: vec![0.0; width], bias: 0.0 };
    let mut ahead = Linear { weights: vec![0.0; width], bias: 0.0 };
    for _ in 0..STEPS_MAX {
        let mut gradient = Linear { weights: ahead.weights.clone(), bias: ahead.bias };
        for example in examples {
            let target = if example.is_unsafe { 1.0 } else { 0.0 };
            let probability = 1.0 / (1.0 + (-ahead.score(&example.vector)).exp());
            let error = balance(example.is_unsafe) * (probability - target);
            example.vector.iter().for_each(|(i, x)| gradient.weights[*i] += error * f64::from(*x));
            gradient.bias += error;
        }
        let mut change_max: f64 = 0.0;
        let mut step = |at: &mut f64, ahead: &mut f64, gradient: f64| {
            let next = *ahead - gradient / curvature;
            change_max = change_max.max((next - *at).abs());
            *ahead = next + momentum * (next - *at);
            *at = next;
        };
        let weights = at.weights.iter_mut().zip(&mut ahead.weights).zip(&gradient.weights);
        weights.for_each(|((at, ahead), gradient)| step(at, ahead, *gradient));
        step(&mut at.bias, &mut ahead.bias, gradient.bias);
        if change_max < CHANGE_MIN {
            break;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// Written by `models/safety/tests/golden_words.py` (scikit-learn's liblinear).
    const GOLDEN: &str = include_str!("../../safety/tests/data/golden_linear.json");

    #[derive(Deserialize)]
    struct Golden {
        rows: Vec<Sparse>,
        is_unsafe: Vec<bool>,
        strength: f64,
        weights: Vec<f64>,
        bias: f64,
    }

    #[test]
    fn weights_agree_with_liblinear() {
        let golden: Golden = serde_json::from_str(GOLDEN).unwrap();
        let examples: Vec<Example> = golden
            .rows
            .into_iter()
            .zip(golden.is_unsafe)
            .map(|(vector, is_unsafe)| Example { vector, is_unsafe })
            .collect();
        let fitted = fit(&examples, golden.weights.len(), golden.strength);
        assert!((fitted.bias - golden.bias).abs() < 1e-4, "{} {}", fitted.bias, golden.bias);
        for (got, expected) in fitted.weights.iter().zip(&golden.weights) {
            assert!((got - expected).abs() < 1e-4, "{got}, expected {expected}");
        }
    }

    #[test]
    fn one_class_alone_is_fitted_without_nonsense() {
        let examples = [Example { vector: vec![(0, 1.0)], is_unsafe: true }];
        let fitted = fit(&examples, 1, 1.0);
        assert!(fitted.weights[0].is_finite() && fitted.score(&vec![(0, 1.0)]) > 0.0);
    }
}
