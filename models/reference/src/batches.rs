//! Which rows a step learns from: shuffled, of similar length, the same for the same seed.
//!
//! A step's batch depends on the seed and the step alone, so that a resumed run goes on where it was. Pure.

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// Batches that are sorted by length together: long enough to waste little padding, short enough to stay random.
const BUCKET_BATCHES: usize = 16;

/// The order of rows over several epochs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) rows: usize,
    pub(crate) batch: usize,
    pub(crate) seed: u64,
}

impl Plan {
    /// Steps of an epoch; the last batch may be shorter.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.batch) as u64
    }

    /// The batches of an epoch; `length` gives a row's tokens.
    pub(crate) fn epoch(&self, epoch: u64, length: impl Fn(usize) -> usize) -> Vec<Vec<usize>> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(epoch);
        let mut order: Vec<usize> = (0..self.rows).collect();
        order.shuffle(&mut random);
        for bucket in order.chunks_mut(self.batch * BUCKET_BATCHES) {
            bucket.sort_by_key(|&row| length(row));
        }
        let mut batches: Vec<Vec<usize>> = order.chunks(self.batch).map(<[usize]>::to_vec).collect();
        batches.shuffle(&mut random);
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan { rows: 103, batch: 8, seed: 5 };

    #[test]
    fn an_epoch_holds_every_row_once() {
        let batches = PLAN.epoch(0, |row| row % 7);
        assert_eq!(batches.len() as u64, PLAN.steps_per_epoch());
        let mut rows: Vec<usize> = batches.concat();
        rows.sort_unstable();
        assert_eq!(rows, (0..103).collect::<Vec<_>>());
    }

    #[test]
    fn the_order_depends_on_seed_and_epoch_alone() {
        let length = |row: usize| row % 7;
        assert_eq!(PLAN.epoch(3, length), PLAN.epoch(3, length));
        assert_ne!(PLAN.epoch(3, length), PLAN.epoch(4, length));
        assert_ne!(PLAN.epoch(3, length), Plan { seed: 6, ..PLAN }.epoch(3, length));
    }

    #[test]
    fn a_batch_holds_rows_of_similar_length() {
        let plan = Plan { rows: 1600, batch: 16, seed: 1 };
        let spread = |batch: &Vec<usize>| {
            let lengths = || batch.iter().map(|row| row % 100);
            lengths().max().unwrap() - lengths().min().unwrap()
        };
        let batches = plan.epoch(0, |row| row % 100);
        let mean = batches.iter().map(spread).sum::<usize>() / batches.len();
        assert!(mean < 15, "lengths in a batch spread over {mean} of 100");
    }
}
