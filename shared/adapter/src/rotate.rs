//! A random rotation that spreads outliers over their neighbours before quantization, and its inverse.
//!
//! Signs from a seed, then the Walsh–Hadamard transform of each segment divided by the root of its length:
//! orthonormal, so that errors keep their norm (Suresh et al. 2017, arXiv 1611.00429). Segments have at most
//! [`SEGMENT`] values; the rest at the end is split into falling powers of two, so that nothing is padded.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Values that are mixed with each other.
const SEGMENT: usize = 1024;

/// Rotates in place.
pub(crate) fn rotate(values: &mut [f32], seed: u64) {
    flip_signs(values, seed);
    transform_segments(values);
}

/// Undoes [`rotate`] with the same seed.
pub(crate) fn unrotate(values: &mut [f32], seed: u64) {
    transform_segments(values);
    flip_signs(values, seed);
}

fn flip_signs(values: &mut [f32], seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for chunk in values.chunks_mut(32) {
        let signs = random.next_u32();
        for (bit, value) in chunk.iter_mut().enumerate() {
            if signs >> bit & 1 == 1 {
                *value = -*value;
            }
        }
    }
}

fn transform_segments(mut values: &mut [f32]) {
    while !values.is_empty() {
        let length = SEGMENT.min(1 << values.len().ilog2());
        let (segment, rest) = values.split_at_mut(length);
        transform(segment);
        values = rest;
    }
}

/// Orthonormal Walsh–Hadamard transform of a power of two of values; it is its own inverse.
fn transform(segment: &mut [f32]) {
    let mut half = 1;
    while half < segment.len() {
        for pair in segment.chunks_mut(2 * half) {
            let (left, right) = pair.split_at_mut(half);
            for (a, b) in left.iter_mut().zip(right) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let norm = 1.0 / (segment.len() as f32).sqrt();
    for value in segment {
        *value *= norm;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rotation_keeps_the_norm_and_is_undone(
            values in prop::collection::vec(-1.0_f32..1.0, 0..2500),
            seed: u64,
        ) {
            let mut turned = values.clone();
            rotate(&mut turned, seed);
            let square = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            prop_assert!((square(&turned) - square(&values)).abs() <= 1e-4 * square(&values) + 1e-12);
            unrotate(&mut turned, seed);
            for (value, back) in values.iter().zip(&turned) {
                prop_assert!((value - back).abs() < 1e-4, "{value} came back as {back}");
            }
        }
    }

    #[test]
    fn an_outlier_is_spread_evenly() {
        let mut values = vec![0.0; 1024];
        values[17] = 32.0;
        rotate(&mut values, 1);
        assert!(values.iter().all(|value| value.abs() == 1.0));
    }

    #[test]
    fn transform_matches_the_definition() {
        // H[i][j] = (−1)^popcount(i & j), divided by √4.
        let mut values = [1.0, 2.0, 3.0, 4.0];
        transform(&mut values);
        assert_eq!(values, [5.0, -1.0, -2.0, 0.0]);
    }
}
