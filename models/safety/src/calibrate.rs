//! From raw log-odds to probabilities: fitted on a dev split by `train-reference`, applied by `guard.rs`.
//!
//! Pure. Platt scaling (Platt 1999, with the smoothed targets and the Newton steps of Lin, Lin and Weng 2007),
//! reliability bins, expected calibration error (Naeini et al. 2015), and the choice of a threshold.

use serde::{Deserialize, Serialize};

/// Rows of either label that a calibration needs. Two numbers are fitted to them: with ten of a label one row is a tenth of
/// what is known of it, and from fewer a slope is noise that the thresholds would stand on.
pub const ROWS_MIN: usize = 10;

/// `probability = 1 / (1 + exp(-(slope * log_odds + intercept)))`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Platt {
    /// Multiplies the raw log-odds; above 0.
    pub slope: f64,
    /// Added to them.
    pub intercept: f64,
}

impl Default for Platt {
    /// Leaves the raw probability as it is.
    fn default() -> Self {
        Self { slope: 1.0, intercept: 0.0 }
    }
}

/// One row of a dev split: the raw log-odds of "unsafe" against "safe", and what it truly was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// ln(p(unsafe) / p(safe)) before calibration.
    pub log_odds: f64,
    /// The label.
    pub is_unsafe: bool,
}

/// Why no calibration could be fitted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CalibrateError {
    /// One of the labels is missing or has too few rows.
    #[error(
        "calibration needs at least {ROWS_MIN} rows of each label, got {positives} unsafe and {negatives} safe"
    )]
    TooFew {
        /// Unsafe rows.
        positives: usize,
        /// Safe rows.
        negatives: usize,
    },
    /// A log-odds is NaN or infinite.
    #[error("log-odds of row {row} is {value}, expected a finite number")]
    NotFinite {
        /// Index of the row.
        row: usize,
        /// What it holds.
        value: f64,
    },
    /// The scores rank unsafe rows below safe ones: no increasing map fits.
    #[error("fitted slope is {slope}, expected above 0: the scores do not rise with the label")]
    Inverted {
        /// The slope of the best fit.
        slope: f64,
    },
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

impl Platt {
    /// The calibrated probability.
    pub fn probability(&self, log_odds: f64) -> f64 {
        sigmoid(self.slope * log_odds + self.intercept)
    }

    /// Fits slope and intercept by Newton's method with backtracking.
    pub fn fit(rows: &[Scored]) -> Result<Self, CalibrateError> {
        for (row, scored) in rows.iter().enumerate() {
            if !scored.log_odds.is_finite() {
                return Err(CalibrateError::NotFinite { row, value: scored.log_odds });
            }
        }
        let positives = rows.iter().filter(|r| r.is_unsafe).count();
        let negatives = rows.len() - positives;
        if positives.min(negatives) < ROWS_MIN {
            return Err(CalibrateError::TooFew { positives, negatives });
        }
        // Smoothed targets keep the fit finite when the classes separate.
        let high = (positives as f64 + 1.0) / (positives as f64 + 2.0);
        let low = 1.0 / (negatives as f64 + 2.0);
        let target = |row: &Scored| if row.is_unsafe { high } else { low };
        let loss = |a: f64, b: f64| -> f64 {
            rows.iter()
                .map(|row| {
                    let z = a * row.log_odds + b;
                    // ln(1 + e^z) - t z, without overflow.
                    z.max(0.0) + (-z.abs()).exp().ln_1p() - target(row) * z
                })
                .sum()
        };
        let (mut a, mut b) = (0.0, ((positives as f64 + 1.0) / (negatives as f64 + 1.0)).ln());
        let mut current = loss(a, b);
        for _ in 0..100 {
            // A ridge of 1e-12 keeps the Hessian invertible when all scores are equal.
            let (mut ga, mut gb, mut haa, mut hab, mut hbb) = (0.0, 0.0, 1e-12, 0.0, 1e-12);
            for row in rows {
                let p = sigmoid(a * row.log_odds + b);
                let (difference, weight) = (p - target(row), p * (1.0 - p));
                ga += difference * row.log_odds;
                gb += difference;
                haa += weight * row.log_odds * row.log_odds;
                hab += weight * row.log_odds;
                hbb += weight;
            }
            if ga.abs() < 1e-9 && gb.abs() < 1e-9 {
                break;
            }
            let determinant = haa * hbb - hab * hab;
            let da = -(hbb * ga - hab * gb) / determinant;
            let db = -(haa * gb - hab * ga) / determinant;
            let descent = ga * da + gb * db;
            let mut step = 1.0;
            let accepted = loop {
                let candidate = loss(a + step * da, b + step * db);
                if candidate <= current + 1e-4 * step * descent {
                    break Some(candidate);
                }
                step /= 2.0;
                if step < 1e-10 {
                    break None;
                }
            };
            let Some(candidate) = accepted else { break };
            (a, b, current) = (a + step * da, b + step * db, candidate);
        }
        if a > 0.0 { Ok(Self { slope: a, intercept: b }) } else { Err(CalibrateError::Inverted { slope: a }) }
    }
}

/// A calibrated probability with its label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Labelled {
    /// The calibrated probability of unsafe, 0 to 1.
    pub probability: f64,
    /// The label.
    pub is_unsafe: bool,
}

/// One bin of a reliability diagram.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// Lower edge, inclusive; the upper edge is the next bin's (the last one includes 1).
    pub from: f64,
    /// Rows in the bin.
    pub count: u64,
    /// Mean probability of its rows; the middle of the bin when empty.
    pub confidence: f64,
    /// Share of unsafe rows; 0 when empty.
    pub frequency: f64,
}

/// Equal-width bins from 0 to 1. `bins` of 0 counts as 1.
pub fn reliability(rows: &[Labelled], bins: usize) -> Vec<Bin> {
    let bins = bins.max(1);
    let mut sums = vec![(0_u64, 0.0, 0_u64); bins];
    for row in rows {
        let index = ((row.probability * bins as f64) as usize).min(bins - 1);
        let (count, confidence, hits) = &mut sums[index];
        *count += 1;
        *confidence += row.probability;
        *hits += u64::from(row.is_unsafe);
    }
    let width = 1.0 / bins as f64;
    let bin = |(i, (count, confidence, hits)): (usize, (u64, f64, u64))| {
        let from = i as f64 * width;
        if count == 0 {
            return Bin { from, count, confidence: from + width / 2.0, frequency: 0.0 };
        }
        Bin { from, count, confidence: confidence / count as f64, frequency: hits as f64 / count as f64 }
    };
    sums.into_iter().enumerate().map(bin).collect()
}

/// Mean distance between confidence and frequency over the bins, weighted by their rows. 0 for no rows.
pub fn expected_calibration_error(rows: &[Labelled], bins: usize) -> f64 {
    if rows.is_empty() {
        return 0.0;
    }
    let weighted: f64 = reliability(rows, bins)
        .iter()
        .map(|bin| bin.count as f64 * (bin.confidence - bin.frequency).abs())
        .sum();
    weighted / rows.len() as f64
}

/// What a threshold should reach on the dev split.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// The best F1.
    F1,
    /// At least this recall, then the best precision.
    Recall(f64),
    /// At least this precision, then the best recall.
    Precision(f64),
    /// At most this share of the safe rows called unsafe, then the best recall.
    FalseAlarms(f64),
}

/// The threshold for a target, halfway between two neighbouring probabilities so that it does not lie on a row.
/// `None` when there is no unsafe row or nothing reaches the target.
pub fn threshold_for(rows: &[Labelled], target: Target) -> Option<f64> {
    let positives = rows.iter().filter(|row| row.is_unsafe).count();
    let negatives = rows.len() - positives;
    if positives == 0 || rows.iter().any(|row| !row.probability.is_finite()) {
        return None;
    }
    let mut sorted = rows.to_vec();
    sorted.sort_by(|x, y| y.probability.total_cmp(&x.probability));
    let mut best: Option<(f64, f64)> = None;
    let (mut hits, mut taken) = (0_usize, 0_usize);
    while taken < sorted.len() {
        let probability = sorted[taken].probability;
        while taken < sorted.len() && sorted[taken].probability.total_cmp(&probability).is_eq() {
            hits += usize::from(sorted[taken].is_unsafe);
            taken += 1;
        }
        let precision = hits as f64 / taken as f64;
        let recall = hits as f64 / positives as f64;
        let value = match target {
            Target::F1 if hits > 0 => 2.0 * precision * recall / (precision + recall),
            Target::Recall(floor) if recall >= floor => precision,
            Target::Precision(floor) if precision >= floor && hits > 0 => recall,
            Target::FalseAlarms(share) if hits > 0 && (taken - hits) as f64 <= share * negatives as f64 => {
                recall
            }
            _ => continue,
        };
        let next = sorted.get(taken).map_or(0.0, |row| row.probability);
        if best.is_none_or(|(value_max, _)| value > value_max) {
            best = Some((value, f64::midpoint(probability, next)));
        }
    }
    // A threshold of 0 would call everything unsafe without looking; the smallest positive one says so openly.
    best.map(|(_, threshold)| threshold.clamp(1e-6, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by `tests/golden_calibration.py` (numpy, another optimizer).
    const GOLDEN: &str = include_str!("../tests/data/golden_calibration.json");

    #[derive(Deserialize)]
    struct Golden {
        log_odds: Vec<f64>,
        is_unsafe: Vec<bool>,
        slope: f64,
        intercept: f64,
        ece_10: f64,
        bin_counts: Vec<u64>,
        threshold_f1: f64,
        threshold_recall_90: f64,
        threshold_precision_90: f64,
    }

    fn golden() -> (Golden, Vec<Scored>) {
        let golden: Golden = serde_json::from_str(GOLDEN).unwrap();
        let rows = golden.log_odds.iter().zip(&golden.is_unsafe);
        let rows = rows.map(|(&log_odds, &is_unsafe)| Scored { log_odds, is_unsafe }).collect();
        (golden, rows)
    }

    #[test]
    fn fit_bins_and_thresholds_agree_with_numpy() {
        let (golden, rows) = golden();
        let platt = Platt::fit(&rows).unwrap();
        assert!((platt.slope - golden.slope).abs() < 1e-6, "{platt:?}");
        assert!((platt.intercept - golden.intercept).abs() < 1e-6, "{platt:?}");
        let labelled: Vec<Labelled> = rows
            .iter()
            .map(|row| Labelled { probability: platt.probability(row.log_odds), is_unsafe: row.is_unsafe })
            .collect();
        assert!((expected_calibration_error(&labelled, 10) - golden.ece_10).abs() < 1e-6);
        let counts: Vec<u64> = reliability(&labelled, 10).iter().map(|bin| bin.count).collect();
        assert_eq!(counts, golden.bin_counts);
        for (target, expected) in [
            (Target::F1, golden.threshold_f1),
            (Target::Recall(0.9), golden.threshold_recall_90),
            (Target::Precision(0.9), golden.threshold_precision_90),
        ] {
            let got = threshold_for(&labelled, target).unwrap();
            assert!((got - expected).abs() < 1e-6, "{target:?}: expected {expected}, got {got}");
        }
    }

    #[test]
    fn separable_classes_stay_finite() {
        let rows: Vec<Scored> =
            (0..20).map(|i| Scored { log_odds: f64::from(i) - 9.5, is_unsafe: i >= 10 }).collect();
        let platt = Platt::fit(&rows).unwrap();
        assert!(platt.slope.is_finite() && platt.slope > 0.0 && platt.probability(9.5) < 1.0);
    }

    #[test]
    fn what_cannot_be_fitted_is_refused() {
        let row = |log_odds, is_unsafe| Scored { log_odds, is_unsafe };
        assert!(matches!(Platt::fit(&[]), Err(CalibrateError::TooFew { .. })));
        assert!(matches!(Platt::fit(&[row(1.0, true)]), Err(CalibrateError::TooFew { positives: 1, .. })));
        let nan = [row(f64::NAN, true), row(0.0, false)];
        assert!(matches!(Platt::fit(&nan), Err(CalibrateError::NotFinite { row: 0, .. })));
        let inverted = |i| row(f64::from(i), i < 0);
        let inverted: Vec<Scored> = (-10..10).map(inverted).collect();
        assert!(matches!(Platt::fit(&inverted), Err(CalibrateError::Inverted { .. })));
    }

    #[test]
    fn each_label_needs_ten_rows() {
        let rows = |positives, negatives| -> Vec<Scored> {
            let row = |(log_odds, is_unsafe)| Scored { log_odds, is_unsafe };
            let unsafe_rows = std::iter::repeat_n((1.0, true), positives);
            unsafe_rows.chain(std::iter::repeat_n((-1.0, false), negatives)).map(row).collect()
        };
        assert!(Platt::fit(&rows(10, 10)).is_ok());
        for (positives, negatives) in [(1, 1), (9, 10), (10, 9), (9, 500)] {
            let error = Platt::fit(&rows(positives, negatives)).unwrap_err();
            assert_eq!(error, CalibrateError::TooFew { positives, negatives });
            let said = format!("at least 10 rows of each label, got {positives} unsafe and {negatives} safe");
            assert!(error.to_string().ends_with(&said), "{error}");
        }
    }

    #[test]
    fn extreme_log_odds_do_not_overflow() {
        let platt = Platt::default();
        for log_odds in [f64::MAX, f64::MIN, 1e4, -1e4] {
            assert!((0.0..=1.0).contains(&platt.probability(log_odds)));
        }
    }

    #[test]
    fn a_threshold_needs_unsafe_rows_and_a_target_in_reach() {
        let row = |probability, is_unsafe| Labelled { probability, is_unsafe };
        assert_eq!(threshold_for(&[row(0.4, false)], Target::F1), None);
        let bad = [row(0.9, false), row(0.8, true)];
        assert_eq!(threshold_for(&bad, Target::Precision(0.99)), None);
        assert!(threshold_for(&bad, Target::Recall(1.0)).unwrap() <= 0.8);
        assert_eq!(threshold_for(&bad, Target::FalseAlarms(0.5)), None);
    }

    #[test]
    fn false_alarms_are_bounded_and_recall_is_what_is_left() {
        let row = |probability, is_unsafe| Labelled { probability, is_unsafe };
        let rows = [row(0.9, true), row(0.8, false), row(0.7, true), row(0.6, false), row(0.5, true)];
        let close = |share, expected: f64| {
            let got = threshold_for(&rows, Target::FalseAlarms(share)).unwrap();
            assert!((got - expected).abs() < 1e-12, "{share}: {got}, expected {expected}");
        };
        close(0.0, 0.85);
        close(0.5, 0.65);
        close(1.0, 0.25);
    }
}
