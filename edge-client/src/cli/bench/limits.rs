//! What the machine can do at all: bytes read from memory and arithmetic, each second, on as many threads as the device
//! uses. `bench.rs` compares what the device reaches with it.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use ndarray::Array2;

use super::Figure;

/// Read by each thread: far more than any cache holds.
const BYTES_READ: usize = 256 << 20;
/// Rows and columns of the multiplied matrices: they fit in the second cache, so that arithmetic is what counts.
const MATRIX: usize = 256;
const PRODUCTS: usize = 40;
/// The best of these counts: a limit is what was reached once.
const ATTEMPTS: usize = 5;

/// What the machine can do in a second.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes read from memory.
    pub(super) bytes: f64,
    /// 32-bit additions and multiplications.
    pub(super) flops: f64,
}

impl Limits {
    pub(super) fn measure(threads: usize) -> Self {
        let read = || {
            let words = vec![1_u64; BYTES_READ / 8];
            let begun = Instant::now();
            black_box(words.iter().fold(0_u64, |sum, word| sum ^ word));
            BYTES_READ as f64 / begun.elapsed().as_secs_f64()
        };
        let multiply = || {
            let a = Array2::<f32>::from_elem((MATRIX, MATRIX), 0.5);
            let begun = Instant::now();
            for _ in 0..PRODUCTS {
                black_box(a.dot(black_box(&a)));
            }
            (PRODUCTS * 2 * MATRIX.pow(3)) as f64 / begun.elapsed().as_secs_f64()
        };
        Self { bytes: best(threads, read), flops: best(threads, multiply) }
    }

    /// The larger share of the two limits that a rate takes, and of which.
    pub(super) fn share(&self, figure: &Figure) -> Option<(f64, &'static str)> {
        let reads = (figure.bytes * figure.rate / self.bytes, "reading");
        let computes = (figure.flops * figure.rate / self.flops, "arithmetic");
        let larger = if reads.0 > computes.0 { reads } else { computes };
        (larger.0 > 0.0).then_some(larger)
    }
}

/// The sum over threads that run at once, at the best attempt.
fn best(threads: usize, measure: impl Fn() -> f64 + Sync) -> f64 {
    let attempt = || {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(&measure)).collect();
            workers.into_iter().map(|worker| worker.join().unwrap_or(0.0)).sum::<f64>()
        })
    };
    (0..ATTEMPTS).map(|_| attempt()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_of_the_limit_that_is_nearer() {
        let limits = Limits { bytes: 100.0, flops: 1000.0 };
        let figure = |bytes, flops| Figure {
            work: "decode".into(),
            rate: 2.0,
            unit: "tokens/s".into(),
            bytes,
            flops,
            peak_mb: None,
            profile: Vec::new(),
        };
        assert_eq!(limits.share(&figure(25.0, 100.0)), Some((0.5, "reading")));
        assert_eq!(limits.share(&figure(5.0, 100.0)), Some((0.2, "arithmetic")));
        assert_eq!(limits.share(&figure(0.0, 0.0)), None);
    }
}
