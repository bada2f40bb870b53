//! Logistic regression over sparse rows: what `learn_words.rs` trains.
//!
//! Minimizes |w|²/2 + b²/2 + C · Σ weight · ln(1 + exp(∓(w·x + b))), with safe and unsafe rows weighing the same in sum:
//! liblinear's objective with balanced classes, and its method but for the region of trust: Newton's steps, each found by
//! conjugate gradients and shortened until the objective falls (Nocedal and Wright 2006, algorithm 7.1), so that the same
//! rows always give the same weights and no step needs choosing.

use commonweal_safety::Sparse;

/// Newton's steps after which it ends; ten or so are needed.
const STEPS_MAX: usize = 100;
/// The largest derivative at which it ends before. Weights are off by no more, since the objective bends by at least 1; they
/// are rounded to 8 bits after.
const DERIVATIVE_MIN: f64 = 1e-5;
/// Conjugate gradients within a step.
const INNER_STEPS_MAX: usize = 250;
/// Halvings of a step.
const HALVINGS_MAX: usize = 40;

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

/// The objective over rows; a point is the weights and, behind them, the bias.
struct Objective<'e> {
    examples: &'e [Example],
    /// What each row counts.
    counts: Vec<f64>,
}

impl Objective<'_> {
    fn product(example: &Example, point: &[f64]) -> f64 {
        let sum: f64 = example.vector.iter().map(|(at, value)| point[*at] * f64::from(*value)).sum();
        sum + point[point.len() - 1]
    }

    fn products(&self, point: &[f64]) -> Vec<f64> {
        self.examples.iter().map(|example| Self::product(example, point)).collect()
    }

    /// `point` + Σ factor · row.
    fn plus_rows(&self, point: &[f64], factors: impl Iterator<Item = f64>) -> Vec<f64> {
        let mut sum = point.to_vec();
        let bias = sum.len() - 1;
        for (example, factor) in self.examples.iter().zip(factors) {
            example.vector.iter().for_each(|(at, value)| sum[*at] += factor * f64::from(*value));
            sum[bias] += factor;
        }
        sum
    }

    fn value(&self, point: &[f64], products: &[f64]) -> f64 {
        let rows = self.examples.iter().zip(&self.counts).zip(products);
        let loss = rows.map(|((example, count), product)| {
            let margin = if example.is_unsafe { *product } else { -product };
            // ln(1 + e^-margin) without overflow.
            count * ((-margin).max(0.0) + (-margin.abs()).exp().ln_1p())
        });
        dot(point, point) / 2.0 + loss.sum::<f64>()
    }

    /// Where a step from a point with this gradient should go: nearly the solution of H · step = −gradient.
    fn step(&self, gradient: &[f64], curvatures: &[f64]) -> Vec<f64> {
        let bent = |direction: &[f64]| {
            let factors = self.examples.iter().zip(curvatures);
            self.plus_rows(direction, factors.map(|(example, c)| c * Self::product(example, direction)))
        };
        let length = dot(gradient, gradient).sqrt();
        // The nearer the end, the more exact.
        let enough = length * length.sqrt().min(0.1);
        let mut step = vec![0.0; gradient.len()];
        let mut residual: Vec<f64> = gradient.iter().map(|g| -g).collect();
        let mut direction = residual.clone();
        let mut square = dot(&residual, &residual);
        for _ in 0..INNER_STEPS_MAX {
            if square.sqrt() <= enough {
                break;
            }
            let bent = bent(&direction);
            let along = square / dot(&direction, &bent);
            add(&mut step, along, &direction);
            add(&mut residual, -along, &bent);
            let next = dot(&residual, &residual);
            direction.iter_mut().zip(&residual).for_each(|(d, r)| *d = r + next / square * *d);
            square = next;
        }
        step
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn add(to: &mut [f64], factor: f64, what: &[f64]) {
    to.iter_mut().zip(what).for_each(|(to, what)| *to += factor * what);
}

/// Fits examples of `width` columns; `strength` is the C of the objective.
pub(crate) fn fit(examples: &[Example], width: usize, strength: f64) -> Linear {
    let positives = examples.iter().filter(|example| example.is_unsafe).count();
    let share = |of: usize| strength * examples.len() as f64 / (2 * of.max(1)) as f64;
    let count = |example: &Example| {
        if example.is_unsafe { share(positives) } else { share(examples.len() - positives) }
    };
    let objective = Objective { examples, counts: examples.iter().map(count).collect() };
    let mut point = vec![0.0; width + 1];
    let mut products = objective.products(&point);
    for _ in 0..STEPS_MAX {
        let probabilities: Vec<f64> = products.iter().map(|product| 1.0 / (1.0 + (-product).exp())).collect();
        let rows = examples.iter().zip(&objective.counts).zip(&probabilities);
        let errors =
            rows.map(|((example, count), p)| count * (p - if example.is_unsafe { 1.0 } else { 0.0 }));
        let gradient = objective.plus_rows(&point, errors);
        if gradient.iter().all(|derivative| derivative.abs() < DERIVATIVE_MIN) {
            break;
        }
        let bends = objective.counts.iter().zip(&probabilities).map(|(count, p)| count * p * (1.0 - p));
        let step = objective.step(&gradient, &bends.collect::<Vec<f64>>());
        let (value, along) = (objective.value(&point, &products), objective.products(&step));
        let falls = dot(&gradient, &step);
        let candidate = |size: f64| {
            let (mut point, mut products) = (point.clone(), products.clone());
            add(&mut point, size, &step);
            add(&mut products, size, &along);
            (objective.value(&point, &products) <= value + 1e-4 * size * falls).then_some((point, products))
        };
        let sizes = std::iter::successors(Some(1.0), |size| Some(size / 2.0)).take(HALVINGS_MAX);
        // At the limit of f64 no step is better than none.
        let Some(better) = sizes.map(candidate).find_map(|found| found) else { break };
        (point, products) = better;
    }
    let bias = point.pop().unwrap_or_default();
    Linear { weights: point, bias }
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
        assert!(fitted.weights[0].is_finite() && fitted.weights[0] + fitted.bias > 0.0);
    }
}
