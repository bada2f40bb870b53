//! What an update counts that was trained from an older release than the one it is merged into (`FedBuff`, Nguyen et al.
//! 2022, arXiv 2106.06639: `s(τ) = 1/√(1 + τ)`). Used by `merge` before clipping and the rule.
//!
//! The delta itself is shortened, and not its weight: the mean is then `Σ wᵢ·s(τᵢ)·Δᵢ / Σ wᵢ` as in the paper, so that a
//! buffer of old updates takes a shorter step, and the robust rules, which know no weights, discount as well.

use commonweal_adapter::{AdapterDelta, AdapterError};

/// `(1 + τ)^-exponent` for an update that lies τ releases behind.
pub(super) fn discount(staleness: u32, exponent: f64) -> f64 {
    (1.0 + f64::from(staleness)).powf(-exponent)
}

/// The delta times a factor; untouched if that is 1.
pub(super) fn shorten(delta: AdapterDelta, factor: f64) -> Result<AdapterDelta, AdapterError> {
    // Exactly 1 for an update that is not behind, whatever the exponent.
    if factor >= 1.0 {
        return Ok(delta);
    }
    let (layout, trainable) = (delta.layout().clone(), delta.trainable());
    let mut values = delta.into_values();
    for value in &mut values {
        *value = (f64::from(*value) * factor) as f32;
    }
    AdapterDelta::from_values(layout, trainable, values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_behind_counts_fully_and_what_is_counts_less_and_less() {
        for exponent in [0.0, 0.3, 0.5, 1.0, 4.0] {
            assert_eq!(discount(0, exponent).to_bits(), 1.0_f64.to_bits());
        }
        assert!((discount(3, 0.5) - 0.5).abs() < 1e-15);
        assert!((discount(1, 1.0) - 0.5).abs() < 1e-15);
        assert_eq!(discount(15, 0.0).to_bits(), 1.0_f64.to_bits(), "all alike");
        let discounts: Vec<_> = (0..16).map(|staleness| discount(staleness, 0.5)).collect();
        assert!(discounts.windows(2).all(|pair| pair[1] < pair[0] && pair[1] > 0.0), "{discounts:?}");
    }
}
