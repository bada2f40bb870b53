//! The key and value cache: one buffer per layer that the graph reads and extends in place. `infer.rs` binds it.

use commonweal_package::{CacheForm, Manifest};
use ort::{
    memory::Allocator,
    value::{DynTensor, PrimitiveTensorElementType, Tensor},
};

use crate::{device::Device, model::OpenError};

/// Keys and values of a batch, `[batch, kv_heads, capacity, head_dim]` per layer, in the package's form. Positions past a
/// row's length hold whatever was there: attention never looks past the length it is given.
#[derive(Debug)]
pub(crate) struct Cache {
    pub(crate) batch: usize,
    pub(crate) capacity: usize,
    kv_heads: usize,
    head_dim: usize,
    form: CacheForm,
    /// Key and value of each layer.
    pub(crate) layers: Vec<(DynTensor, DynTensor)>,
}

impl Cache {
    pub(crate) fn new(manifest: &Manifest, batch: usize, capacity: usize) -> Result<Self, ort::Error> {
        let (model, form) = (&manifest.model, manifest.cache);
        let (kv_heads, head_dim) = (model.kv_heads, model.head_dim);
        let shape = [batch, kv_heads, capacity, head_dim];
        let buffer = || match form {
            CacheForm::Float => empty::<f32>(shape),
            CacheForm::Int8 { .. } => empty::<i8>(shape),
        };
        let layers =
            (0..model.layers).map(|_| Ok((buffer()?, buffer()?))).collect::<Result<_, ort::Error>>()?;
        Ok(Self { batch, capacity, kv_heads, head_dim, form, layers })
    }

    /// Bytes of a row of `capacity` tokens.
    pub(crate) fn row_bytes(manifest: &Manifest, capacity: usize) -> usize {
        // layers ≤ 2^10, kv_size ≤ 2^20, capacity ≤ 2^20 (`commonweal_package`'s bounds): below 2^54.
        let Manifest { model, cache, .. } = manifest;
        model.layers * 2 * model.kv_size() * capacity * cache.component_bytes()
    }

    /// Copies the first `length` positions of a row of another cache of the same package into a row of this one.
    pub(crate) fn copy_row(
        &mut self,
        row: usize,
        from: &Self,
        from_row: usize,
        length: usize,
    ) -> Result<(), ort::Error> {
        match self.form {
            CacheForm::Float => self.copy::<f32>(row, from, from_row, length),
            CacheForm::Int8 { .. } => self.copy::<i8>(row, from, from_row, length),
        }
    }

    fn copy<T: PrimitiveTensorElementType + Copy>(
        &mut self,
        row: usize,
        from: &Self,
        from_row: usize,
        length: usize,
    ) -> Result<(), ort::Error> {
        let wanted = length * self.head_dim;
        let (stride, from_stride) = (self.capacity * self.head_dim, from.capacity * from.head_dim);
        for (to, from) in self.layers.iter_mut().zip(&from.layers) {
            for (to, from) in [(&mut to.0, &from.0), (&mut to.1, &from.1)] {
                let (to, from) = (to.try_extract_tensor_mut::<T>()?.1, from.try_extract_tensor::<T>()?.1);
                for head in 0..self.kv_heads {
                    let start = (row * self.kv_heads + head) * stride;
                    let source = (from_row * self.kv_heads + head) * from_stride;
                    to[start..start + wanted].copy_from_slice(&from[source..source + wanted]);
                }
            }
        }
        Ok(())
    }
}

/// A buffer of zeros.
fn empty<T: PrimitiveTensorElementType + Default + Copy + std::fmt::Debug>(
    shape: [usize; 4],
) -> Result<DynTensor, ort::Error> {
    let mut tensor = Tensor::<T>::new(&Allocator::default(), shape)?;
    // Fresh memory may hold NaN, and 0 · NaN of a masked position would be NaN.
    tensor.extract_tensor_mut().1.fill(T::default());
    Ok(tensor.upcast())
}

/// Whether a device's attention takes the package's cache. Only the processor's is known to read 8-bit keys and values
/// with 32-bit queries.
pub(crate) fn check_device(form: CacheForm, device: Device) -> Result<(), OpenError> {
    match (form, device) {
        (CacheForm::Float, _) | (CacheForm::Int8 { .. }, Device::Cpu) => Ok(()),
        (CacheForm::Int8 { .. }, device) => Err(OpenError::Cache { device }),
    }
}

#[cfg(test)]
mod tests {
    use commonweal_package::Hash;

    use super::*;

    #[test]
    fn an_8_bit_cache_is_refused_by_name_on_other_devices() {
        let int8 = CacheForm::Int8 { tokens: 512, text: Hash([0; 32]) };
        for device in Device::AUTOMATIC {
            assert!(check_device(CacheForm::Float, device).is_ok());
            let told = check_device(int8, device).map_err(|error| error.to_string());
            assert!(told.is_err_and(|told| told.contains(&format!("got {device}; "))));
        }
        assert!(check_device(int8, Device::Cpu).is_ok());
    }
}
