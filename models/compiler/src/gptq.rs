//! Codes with little error in a layer's *outputs*, rather than in its weights: GPTQ (Frantar et al., arXiv 2210.17323).
//! `calibrate.rs` brings the Hessian of a layer's inputs; the grid and the packing are `quantize.rs`'s.
//!
//! A row `w` of the matrix becomes `v` with the error `(w - v) H (w - v)ᵀ`, `H = Σ x xᵀ` over the calibration's inputs.
//! Columns are rounded one after the other, and each takes over what the earlier ones left:
//!
//! ```text
//! H + damping = U D Uᵀ             U upper triangular with ones on its diagonal, D diagonal
//! v_k = round(w_k + Σ_{i<k} (w_i - v_i) U_ik)
//! ```
//!
//! This is the form of Chee et al. (arXiv 2307.13304, theorem 6), which gives the codes of the paper's form, updates by
//! the Cholesky factor of the inverse, and needs no inverse. `goldens/make_gptq.py` has the paper's form, and the tests
//! compare the two. A block's scale is chosen when its first column is reached, for the weights that make up best for
//! all earlier columns (the paper's groups).

use std::thread;

use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, Axis, s};

use crate::quantize::{BlockFormat, Quantized};

/// Added to the Hessian's diagonal, as a share of its mean: the paper's.
pub const DAMPING: f64 = 0.01;

/// Columns factored at a time: a panel of them stays in the cache.
const PANEL: usize = 64;

/// Columns of one product in the factorization's update; the part below the diagonal that is computed for nothing is
/// at most this wide.
const STRIP: usize = 256;

/// Inputs of a layer that have no factor.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum HessianError {
    /// An input was no number.
    #[error("calibration must give finite inputs, got {got} for input {column}")]
    NotFinite {
        /// The input.
        column: usize,
        /// Its sum of squares.
        got: f64,
    },
    /// Rounding errors outweigh the damping.
    #[error("the inputs' Hessian must be positive definite, got the pivot {got} for input {column}")]
    NotDefinite {
        /// The input.
        column: usize,
        /// Its pivot.
        got: f64,
    },
}

/// `Σ x xᵀ` over a layer's inputs, `[inputs, inputs]`.
#[derive(Clone, Debug)]
pub struct Hessian {
    sum: Array2<f64>,
}

/// How much of each earlier column's error a column takes over.
#[derive(Clone, Debug)]
pub struct Feedback {
    /// `U`; only what is above the diagonal is read.
    upper: Array2<f64>,
    /// Inputs that were always zero. Their weights do nothing and become zero.
    dead: Vec<usize>,
}

impl Hessian {
    /// The Hessian of no inputs yet.
    pub fn new(inputs: usize) -> Self {
        Self { sum: Array2::zeros((inputs, inputs)) }
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.sum.nrows()
    }

    /// Adds a batch's `Xᵀ X`, row-major.
    pub fn add(&mut self, gram: &[f32]) {
        debug_assert_eq!(self.sum.len(), gram.len());
        for (sum, &value) in self.sum.iter_mut().zip(gram) {
            *sum += f64::from(value);
        }
    }

    /// Its values, row-major.
    pub fn values(&self) -> impl Iterator<Item = f64> {
        self.sum.iter().copied()
    }

    /// Factors `H + damping · mean(diagonal)`.
    pub fn factor(self, damping: f64) -> Result<Feedback, HessianError> {
        let mut upper = self.sum;
        let inputs = upper.nrows();
        let mut dead = Vec::new();
        for column in 0..inputs {
            let got = upper[[column, column]];
            if !got.is_finite() {
                return Err(HessianError::NotFinite { column, got });
            }
            if got <= 0.0 {
                upper[[column, column]] = 1.0;
                dead.push(column);
            }
        }
        let added = damping * upper.diag().sum() / inputs.max(1) as f64;
        upper.diag_mut().mapv_inplace(|value| value + added);
        let mut end = inputs;
        while end > 0 {
            let start = end.saturating_sub(PANEL);
            factor_panel(&mut upper, start, end)?;
            end = start;
        }
        Ok(Feedback { upper, dead })
    }
}

/// One step of the factorization, from the last columns to the first: `U` of columns `start..end`, then the rest of the
/// matrix less what they explain.
fn factor_panel(matrix: &mut Array2<f64>, start: usize, end: usize) -> Result<(), HessianError> {
    for column in (start..end).rev() {
        let got = matrix[[column, column]];
        if !(got.is_finite() && got > 0.0) {
            return Err(HessianError::NotDefinite { column, got });
        }
        for row in start..column {
            let factor = matrix[[row, column]] / got;
            for other in start..=row {
                let product = factor * matrix[[other, column]];
                matrix[[other, row]] -= product;
            }
        }
        for row in start..column {
            matrix[[row, column]] /= got;
        }
    }
    // Above the panel: U D of it, solved from the last column on, then U.
    let (above, panel) = matrix.view_mut().split_at(Axis(0), start);
    let diagonal = panel.slice(s![.., start..end]);
    let (mut rest, mut scaled) = above.split_at(Axis(1), start);
    let mut scaled = scaled.slice_mut(s![.., ..end - start]);
    for mut row in scaled.rows_mut() {
        for column in (0..end - start).rev() {
            let later = (column + 1..end - start).map(|next| row[next] * diagonal[[column, next]]);
            row[column] -= later.sum::<f64>();
        }
    }
    let mut upper = scaled.to_owned();
    for mut row in upper.rows_mut() {
        for column in 0..end - start {
            row[column] /= diagonal[[column, column]];
        }
    }
    for left in (0..start).step_by(STRIP) {
        let right = (left + STRIP).min(start);
        let mut strip = rest.slice_mut(s![..right, left..right]);
        general_mat_mul(
            -1.0,
            &scaled.slice(s![..right, ..]),
            &upper.slice(s![left..right, ..]).t(),
            1.0,
            &mut strip,
        );
    }
    scaled.assign(&upper);
    Ok(())
}

impl Feedback {
    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.upper.nrows()
    }

    /// Chooses the codes of a matrix, `[rows, inputs]` row-major, each row filled up to whole blocks. Rows do not depend on
    /// each other: they are shared among the cores, and the result does not depend on how many there are.
    pub fn round(&self, format: BlockFormat, weights: &[f32]) -> Quantized {
        let inputs = self.upper.nrows();
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let share = (weights.len() / inputs).div_ceil(cores).max(1);
        let parts: Vec<Quantized> = thread::scope(|scope| {
            let chunks = weights.chunks(share * inputs);
            let workers: Vec<_> =
                chunks.map(|chunk| scope.spawn(move || self.round_rows(format, chunk))).collect();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        Quantized::joined(parts)
    }

    fn round_rows(&self, format: BlockFormat, weights: &[f32]) -> Quantized {
        let inputs = self.upper.nrows();
        let (rows, size) = (weights.len() / inputs, format.block_size());
        let mut weights =
            Array2::from_shape_fn((rows, inputs), |(row, column)| f64::from(weights[row * inputs + column]));
        for &column in &self.dead {
            weights.column_mut(column).fill(0.0);
        }
        let mut errors = Array2::<f64>::zeros((rows, inputs));
        let mut taken = Array2::<f64>::zeros((rows, size));
        let blocks = inputs.div_ceil(size);
        let width = blocks * size;
        let mut scales = vec![0.0; rows * blocks];
        let mut offsets = vec![0; rows * width];
        for block in 0..blocks {
            let columns = block * size..inputs.min((block + 1) * size);
            let mut taken = taken.slice_mut(s![.., ..columns.len()]);
            let upper = self.upper.slice(s![.., columns.clone()]);
            let before = columns.start;
            general_mat_mul(
                1.0,
                &errors.slice(s![.., ..before]),
                &upper.slice(s![..before, ..]),
                0.0,
                &mut taken,
            );
            let corner = upper.slice(s![columns.clone(), ..]);
            for row in 0..rows {
                let (weights, errors) =
                    (weights.slice(s![row, columns.clone()]), errors.slice_mut(s![row, columns.clone()]));
                let places = &mut offsets[row * width + columns.start..row * width + columns.end];
                let taken = taken.row_mut(row);
                scales[row * blocks + block] = round_block(format, &corner, &weights, taken, errors, places);
            }
        }
        let mut codes = Vec::with_capacity(rows * blocks * format.block_bytes());
        for block in offsets.chunks_exact(size) {
            format.pack(block, &mut codes);
        }
        Quantized { codes, scales }
    }
}

/// Rounds one block of a row: gives its scale, and leaves its codes less the zero point and its errors. `taken` is what
/// the block takes over from earlier ones.
fn round_block(
    format: BlockFormat,
    upper: &ArrayView2<'_, f64>,
    weights: &ArrayView1<'_, f64>,
    mut taken: ArrayViewMut1<'_, f64>,
    mut errors: ArrayViewMut1<'_, f64>,
    offsets: &mut [i32],
) -> f32 {
    let size = weights.len();
    // The weights that make up best for the earlier blocks, if this one were not rounded.
    let mut best: Vec<f64> = taken.to_vec();
    for column in 0..size {
        for next in column + 1..size {
            best[next] -= best[column] * upper[[column, next]];
        }
    }
    let best: Vec<f32> = best.iter().zip(weights).map(|(&best, weight)| (best + weight) as f32).collect();
    let scale = format.fit(&best, |_| 1.0, offsets);
    let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
    for column in 0..size {
        let wanted = (weights[column] + taken[column]) as f32;
        offsets[column] = format.offset(wanted, inverse);
        errors[column] = weights[column] - f64::from(scale) * f64::from(offsets[column]);
        for next in column + 1..size {
            taken[next] += errors[column] * upper[[column, next]];
        }
    }
    scale
}
