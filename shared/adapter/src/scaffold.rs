//! SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1): control variates that correct the drift of
//! devices whose data differ.
//!
//! The server keeps `c`, a device its own `cᵢ`; both have an adapter's form. A device trains along `g − cᵢ + c`, and
//! [`Correction`] keeps the mean of its plain gradients `g`, which becomes `cᵢ⁺`. For the plain gradient steps of the
//! paper that is its option II, `cᵢ − c + (x − yᵢ)/(K·η)`, to the letter: `yᵢ` is `x` less `η` times the sum of the
//! corrected gradients. For `AdamW`, for clipped steps and for a rate that is not constant it still is a gradient,
//! which the formula then is not.
//!
//! `Δcᵢ = cᵢ⁺ − cᵢ` is packed like a delta, and the device moves `cᵢ` by what the server will decode: the two agree
//! to the bit, and what packing lost is in the next difference (error feedback as in Richtárik et al. 2021, arXiv
//! 2106.05203).

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::{Adapter, AdapterError};
use crate::delta::{AdapterDelta, Trainable};

/// A device's side of a round: what is added to each gradient, and the mean of the gradients so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Correction {
    shift: Adapter,
    mean: Adapter,
    steps: u64,
}

impl Correction {
    /// From the server's control variate and the device's own, of one layout.
    pub fn new(server: &Adapter, own: &Adapter) -> Result<Self, AdapterError> {
        server.layout().require(own.layout())?;
        let shift = server.values().iter().zip(own.values()).map(|(server, own)| server - own).collect();
        Self::resume(
            Adapter::from_values(Arc::clone(own.layout()), shift)?,
            Adapter::zeros(Arc::clone(own.layout())),
            0,
        )
    }

    /// One that was interrupted: `c − cᵢ`, the mean of the gradients, and of how many.
    pub fn resume(shift: Adapter, mean: Adapter, steps: u64) -> Result<Self, AdapterError> {
        shift.layout().require(mean.layout())?;
        Ok(Self { shift, mean, steps })
    }

    /// `c − cᵢ`, to be added to each gradient.
    pub const fn shift(&self) -> &Adapter {
        &self.shift
    }

    /// Mean of the plain gradients so far.
    pub const fn mean(&self) -> &Adapter {
        &self.mean
    }

    /// Gradients so far.
    pub const fn steps(&self) -> u64 {
        self.steps
    }

    /// Takes a step's plain gradient into the mean, inside `trainable`.
    pub fn observe(&mut self, gradient: &[f32], trainable: &[Range<usize>]) {
        self.steps += 1;
        let share = 1.0 / self.steps as f64;
        let means = self.mean.values_mut();
        for range in trainable {
            let seen = gradient.get(range.clone()).unwrap_or_default();
            for (mean, seen) in means.get_mut(range.clone()).unwrap_or_default().iter_mut().zip(seen) {
                *mean = (f64::from(*mean) + share * (f64::from(*seen) - f64::from(*mean))) as f32;
            }
        }
    }

    /// `Δcᵢ = cᵢ⁺ − cᵢ` of the factors that were trained.
    pub fn change(&self, own: &Adapter, trainable: Trainable) -> Result<AdapterDelta, AdapterError> {
        AdapterDelta::between(own, &self.mean, trainable)
    }
}

/// The server's next control variate: `c + (|S|/N)·mean Δcᵢ`, of `received` devices out of `devices` in all.
pub fn advance(
    server: &Adapter,
    mean_change: &AdapterDelta,
    received: usize,
    devices: usize,
) -> Result<Adapter, AdapterError> {
    server.plus(mean_change, (received as f64 / devices.max(received).max(1) as f64) as f32)
}
