//! Shorthands for adding nodes to `graph.rs`, so that a model or a gradient rule reads like its formula.

use crate::graph::{Graph, GraphError, ValueId};
use crate::op::{Binary, Op, Reduction, Unary};
use crate::shape::Shape;

type Built = Result<ValueId, GraphError>;

impl Graph {
    /// `a + b`
    pub fn plus(&mut self, a: ValueId, b: ValueId) -> Built {
        self.add(Op::Binary(Binary::Add), &[a, b])
    }

    /// `a - b`
    pub fn minus(&mut self, a: ValueId, b: ValueId) -> Built {
        self.add(Op::Binary(Binary::Sub), &[a, b])
    }

    /// `a · b`, element by element
    pub fn times(&mut self, a: ValueId, b: ValueId) -> Built {
        self.add(Op::Binary(Binary::Mul), &[a, b])
    }

    /// `a / b`
    pub fn over(&mut self, a: ValueId, b: ValueId) -> Built {
        self.add(Op::Binary(Binary::Div), &[a, b])
    }

    /// A function of each element.
    pub fn unary(&mut self, function: Unary, x: ValueId) -> Built {
        self.add(Op::Unary(function), &[x])
    }

    /// `a b`, as matrices
    pub fn matmul(&mut self, a: ValueId, b: ValueId) -> Built {
        self.product((a, false), (b, false), 1.0)
    }

    /// `a bᵀ`
    pub fn matmul_transposed(&mut self, a: ValueId, b: ValueId) -> Built {
        self.product((a, false), (b, true), 1.0)
    }

    /// `alpha · a b`, each transposed if its flag says so
    pub fn product(&mut self, a: (ValueId, bool), b: (ValueId, bool), alpha: f32) -> Built {
        self.add(Op::MatMul { transpose_a: a.1, transpose_b: b.1, alpha }, &[a.0, b.0])
    }

    /// Elements `start .. start + length` of an axis of fixed size.
    pub fn sliced(&mut self, x: ValueId, axis: usize, start: usize, length: usize) -> Built {
        if start == 0 && self.shape(x).0[axis].as_fixed() == Some(length) {
            return Ok(x);
        }
        self.add(Op::Slice { axis, start, length }, &[x])
    }

    /// The first `columns` of the last axis: packed rows are filled up to whole blocks.
    pub fn narrowed(&mut self, x: ValueId, columns: usize) -> Built {
        self.sliced(x, self.shape(x).rank() - 1, 0, columns)
    }

    /// The same elements in another shape.
    pub fn reshape(&mut self, x: ValueId, shape: impl Into<Shape>) -> Built {
        let shape = shape.into();
        if *self.shape(x) == shape { Ok(x) } else { self.add(Op::Reshape(shape), &[x]) }
    }

    /// Axes in another order.
    pub fn transpose(&mut self, x: ValueId, permutation: &[usize]) -> Built {
        self.add(Op::Transpose { permutation: permutation.to_vec() }, &[x])
    }

    /// `cap · tanh(x / cap)`: within `cap`, and like `x` where that is small.
    pub fn soft_capped(&mut self, x: ValueId, cap: f32) -> Built {
        let (narrow, wide) = (self.scalar(cap.recip())?, self.scalar(cap)?);
        let share = self.times(x, narrow)?;
        let bent = self.unary(Unary::Tanh, share)?;
        self.times(bent, wide)
    }

    /// The sum over axes, which stay with size 1.
    pub fn sum_over(&mut self, x: ValueId, axes: Vec<usize>) -> Built {
        self.add(Op::Reduce { reduction: Reduction::Sum, axes, keep: true }, &[x])
    }

    /// The sum of all elements, a scalar.
    pub fn total(&mut self, x: ValueId) -> Built {
        let axes = (0..self.shape(x).rank()).collect();
        self.add(Op::Reduce { reduction: Reduction::Sum, axes, keep: false }, &[x])
    }

    /// One number everywhere.
    pub fn fill(&mut self, value: f32, shape: Shape) -> Built {
        self.add(Op::Fill { value, shape }, &[])
    }

    /// The sum over the axes along which `shape` was broadcast to become the shape of `x`.
    pub fn unbroadcast(&mut self, x: ValueId, shape: &Shape) -> Built {
        let from = self.shape(x).clone();
        let missing = from.rank().saturating_sub(shape.rank());
        let stretched = |axis: usize| axis < missing || shape.0[axis - missing] != from.0[axis];
        let axes: Vec<usize> = (0..from.rank()).filter(|&axis| stretched(axis)).collect();
        let summed = if axes.is_empty() { x } else { self.sum_over(x, axes)? };
        self.reshape(summed, shape.clone())
    }
}
