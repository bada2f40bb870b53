//! The key and value cache: one buffer per layer that the graph reads and extends in place. `infer.rs` binds it.

use commonweal_package::ModelConfig;
use ort::{memory::Allocator, value::Tensor};

/// Keys and values of a batch, `[batch, kv_heads, capacity, head_dim]` per layer. Positions past a row's length
/// hold whatever was there: attention never looks past the length it is given.
#[derive(Debug)]
pub(crate) struct Cache {
    pub(crate) batch: usize,
    pub(crate) capacity: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Key and value of each layer.
    pub(crate) layers: Vec<(Tensor<f32>, Tensor<f32>)>,
}

impl Cache {
    pub(crate) fn new(config: &ModelConfig, batch: usize, capacity: usize) -> Result<Self, ort::Error> {
        let (kv_heads, head_dim) = (config.kv_heads, config.head_dim);
        let allocator = Allocator::default();
        let buffer = || -> Result<Tensor<f32>, ort::Error> {
            let mut tensor = Tensor::<f32>::new(&allocator, [batch, kv_heads, capacity, head_dim])?;
            // Fresh memory may hold NaN, and 0 · NaN of a masked position would be NaN.
            tensor.extract_tensor_mut().1.fill(0.0);
            Ok(tensor)
        };
        let layers =
            (0..config.layers).map(|_| Ok((buffer()?, buffer()?))).collect::<Result<_, ort::Error>>()?;
        Ok(Self { batch, capacity, kv_heads, head_dim, layers })
    }

    /// Bytes of a row of `capacity` tokens.
    pub(crate) fn row_bytes(config: &ModelConfig, capacity: usize) -> usize {
        // layers ≤ 2^10, kv_size ≤ 2^20, capacity ≤ 2^20 (`commonweal_package`'s bounds): below 2^54.
        config.layers * 2 * config.kv_size() * capacity * size_of::<f32>()
    }

    /// Copies the first `length` positions of a row of another cache into a row of this one.
    pub(crate) fn copy_row(&mut self, row: usize, from: &Self, from_row: usize, length: usize) {
        let wanted = length * self.head_dim;
        let (stride, from_stride) = (self.capacity * self.head_dim, from.capacity * from.head_dim);
        for (to, from) in self.layers.iter_mut().zip(&from.layers) {
            for (to, from) in [(&mut to.0, &from.0), (&mut to.1, &from.1)] {
                let (to, from) = (to.extract_tensor_mut().1, from.extract_tensor().1);
                for head in 0..self.kv_heads {
                    let start = (row * self.kv_heads + head) * stride;
                    let source = (from_row * self.kv_heads + head) * from_stride;
                    to[start..start + wanted].copy_from_slice(&from[source..source + wanted]);
                }
            }
        }
    }
}
