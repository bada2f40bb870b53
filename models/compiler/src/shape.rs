//! Sizes that are known when compiling, named when running, or products and chunks of those: the shapes of `graph.rs`.
//! Two shapes are equal exactly when they are equal for every batch, time and rank.

use std::collections::BTreeMap;
use std::fmt;

/// Sizes of the named dimensions of one run.
pub type Bindings = BTreeMap<&'static str, usize>;

/// One dimension: a factor times a product of symbols, such as `3`, `time` or `2*batch*time`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dim {
    factor: usize,
    symbols: Vec<Symbol>,
}

/// A size that is only known when running.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Symbol {
    /// A dimension of a graph input.
    Named(&'static str),
    /// One of `count` nearly equal consecutive pieces of a dimension, `floor((i+1)n/count) - floor(in/count)` long,
    /// which is zero for some pieces when `n < count`.
    Chunk {
        /// The dimension that is cut.
        of: Box<Dim>,
        /// Which piece.
        index: usize,
        /// Into how many.
        count: usize,
    },
}

impl Dim {
    /// A size known when compiling.
    pub fn fixed(size: usize) -> Self {
        Self { factor: size, symbols: Vec::new() }
    }

    /// A size that a graph input brings.
    pub fn named(name: &'static str) -> Self {
        Self { factor: 1, symbols: vec![Symbol::Named(name)] }
    }

    /// Piece `index` of `count` nearly equal pieces.
    #[must_use]
    pub fn chunk(&self, index: usize, count: usize) -> Self {
        Self { factor: 1, symbols: vec![Symbol::Chunk { of: Box::new(self.clone()), index, count }] }
    }

    /// All the pieces, in order.
    pub fn chunks(&self, count: usize) -> Vec<Self> {
        (0..count).map(|index| self.chunk(index, count)).collect()
    }

    /// The product.
    #[must_use]
    pub fn times(&self, other: &Self) -> Self {
        let mut symbols: Vec<_> = self.symbols.iter().chain(&other.symbols).cloned().collect();
        symbols.sort();
        Self { factor: self.factor.saturating_mul(other.factor), symbols }
    }

    /// The sum of sizes, where it is again a dimension: multiples of one product, or every chunk of one dimension.
    pub fn sum<'a>(dims: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let dims: Vec<&Self> = dims.into_iter().collect();
        let first = *dims.first()?;
        if let [Symbol::Chunk { of, count, .. }] = first.symbols.as_slice()
            && dims.len() == *count
            && dims.iter().enumerate().all(|(index, dim)| **dim == of.chunk(index, *count))
        {
            return Some((**of).clone());
        }
        let mut total = Self { factor: 0, symbols: first.symbols.clone() };
        for dim in dims {
            if dim.symbols != total.symbols {
                return None;
            }
            total.factor = total.factor.saturating_add(dim.factor);
        }
        Some(total)
    }

    /// The size, if it is known when compiling.
    pub fn as_fixed(&self) -> Option<usize> {
        self.symbols.is_empty().then_some(self.factor)
    }

    /// Whether it is the fixed size one, which broadcasts.
    pub fn is_one(&self) -> bool {
        self.as_fixed() == Some(1)
    }

    /// The known factor and the symbols that it multiplies.
    pub fn parts(&self) -> (usize, &[Symbol]) {
        (self.factor, &self.symbols)
    }

    /// The size in a run, or nothing if a name is not bound.
    pub fn evaluate(&self, bindings: &Bindings) -> Option<usize> {
        self.symbols.iter().try_fold(self.factor, |product, symbol| {
            let size = match symbol {
                Symbol::Named(name) => *bindings.get(name)?,
                Symbol::Chunk { of, index, count } => {
                    let whole = of.evaluate(bindings)?;
                    (index + 1) * whole / count - index * whole / count
                }
            };
            product.checked_mul(size)
        })
    }
}

impl From<usize> for Dim {
    fn from(size: usize) -> Self {
        Self::fixed(size)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if self.factor != 1 || self.symbols.is_empty() {
            write!(f, "{}", self.factor)?;
            separator = "*";
        }
        for symbol in &self.symbols {
            f.write_str(separator)?;
            separator = "*";
            match symbol {
                Symbol::Named(name) => f.write_str(name)?,
                Symbol::Chunk { of, index, count } => write!(f, "chunk({of},{index}/{count})")?,
            }
        }
        Ok(())
    }
}

/// The sizes of a tensor, outermost first; empty for a scalar.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shape(pub Vec<Dim>);

impl Shape {
    /// A scalar's shape.
    pub fn scalar() -> Self {
        Self(Vec::new())
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// Number of elements.
    pub fn elements(&self) -> Dim {
        self.0.iter().fold(Dim::fixed(1), |product, dim| product.times(dim))
    }

    /// The sizes, if all are known when compiling.
    pub fn as_fixed(&self) -> Option<Vec<usize>> {
        self.0.iter().map(Dim::as_fixed).collect()
    }

    /// The sizes in a run, or nothing if a name is not bound.
    pub fn evaluate(&self, bindings: &Bindings) -> Option<Vec<usize>> {
        self.0.iter().map(|dim| dim.evaluate(bindings)).collect()
    }

    /// The shape that both broadcast to by the rules of ONNX (aligned at the end, ones stretch).
    pub fn broadcast(&self, other: &Self) -> Option<Self> {
        let rank = self.rank().max(other.rank());
        let one = Dim::fixed(1);
        let padded = |shape: &Self, axis: usize| {
            let missing = rank - shape.rank();
            if axis < missing { one.clone() } else { shape.0[axis - missing].clone() }
        };
        (0..rank)
            .map(|axis| match (padded(self, axis), padded(other, axis)) {
                (left, right) if left == right || right.is_one() => Some(left),
                (left, right) if left.is_one() => Some(right),
                _ => None,
            })
            .collect::<Option<Vec<_>>>()
            .map(Self)
    }
}

impl<D: Into<Dim>> FromIterator<D> for Shape {
    fn from_iter<I: IntoIterator<Item = D>>(dims: I) -> Self {
        Self(dims.into_iter().map(Into::into).collect())
    }
}

impl<const N: usize> From<[Dim; N]> for Shape {
    fn from(dims: [Dim; N]) -> Self {
        Self(dims.into())
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        dims.into_iter().collect()
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (axis, dim) in self.0.iter().enumerate() {
            write!(f, "{}{dim}", if axis == 0 { "" } else { ", " })?;
        }
        f.write_str("]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_do_not_depend_on_order() {
        let (batch, time) = (Dim::named("batch"), Dim::named("time"));
        assert_eq!(batch.times(&time), time.times(&batch));
        assert_eq!(Dim::fixed(2).times(&time).to_string(), "2*time");
        assert_ne!(batch.times(&batch), batch);
    }

    #[test]
    fn sums_are_dimensions_only_when_they_are_for_every_run() {
        let rank = Dim::named("rank");
        assert_eq!(Dim::sum([&rank, &rank]), Some(Dim::fixed(2).times(&rank)));
        assert_eq!(Dim::sum([&rank, &Dim::fixed(2)]), None);
        let rows = Dim::named("batch").times(&Dim::named("time"));
        let mut chunks = rows.chunks(3);
        assert_eq!(Dim::sum(&chunks), Some(rows));
        chunks.swap(0, 1);
        assert_eq!(Dim::sum(&chunks), None);
    }

    #[test]
    fn chunks_cover_any_length() {
        for length in 0..20 {
            let bindings = Bindings::from([("time", length)]);
            let sizes: Option<Vec<_>> =
                Dim::named("time").chunks(8).iter().map(|dim| dim.evaluate(&bindings)).collect();
            assert_eq!(sizes.map(|sizes| sizes.iter().sum()), Some(length));
        }
    }

    #[test]
    fn broadcasting_aligns_at_the_end() {
        let time = Dim::named("time");
        let left = Shape::from([time.clone(), 3.into()]);
        assert_eq!(left.broadcast(&Shape::from([3])), Some(left.clone()));
        assert_eq!(left.broadcast(&Shape::from([time, 1.into()])), Some(left.clone()));
        assert_eq!(left.broadcast(&Shape::from([2])), None);
    }
}
