//! What a hostile device does to an honest one's work: it scales the update up and lies about how it came to be. Pure;
//! `bin/hostile-device.rs` carries it out over the real protocol, `bin/reproduce-paper/` within its federations.

use anyhow::Result;
use commonweal_adapter::{AdapterDelta, AdapterError, Residual};
use commonweal_protocol::{BaseHash, DeviceReport, Digest, Open, RoundId, RoundTask};
use edge_client::compress::{self, Packed};
use edge_client::train::Trained;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Samples that the attacker claims: its weight in a mean that believes it.
pub const CLAIMED_SAMPLES: u32 = 100_000;

/// An update that is ready to go.
#[derive(Debug)]
pub struct Poison {
    /// Its announcement.
    pub open: Open,
    /// Its bytes.
    pub packed: Packed,
    /// What packing made of it.
    pub bits_per_parameter: f64,
    /// Its true length.
    pub norm: f64,
}

/// Packs what was trained, `boost` times as long, behind a lie.
pub fn pack(task: &RoundTask, base: BaseHash, trained: &Trained, boost: f32) -> Result<Poison> {
    let delta = boosted(trained.delta(), boost)?;
    let mut residual = Residual::zeros(delta.layout().clone(), delta.trainable());
    let mut random = ChaCha8Rng::seed_from_u64(task.seed);
    let options = compress::options(&task.compress)?;
    let packed = commonweal_adapter::compress(&delta, &mut residual, &options, &mut random)?;
    let bits_per_parameter = packed.bits_per_parameter();
    let packed = Packed::from_disk(packed.into_bytes(), delta.layout(), delta.trainable(), false)?;
    let summary = trained.summary();
    let honest = DeviceReport {
        steps: summary.steps,
        trained_tokens: summary.tokens,
        loss_first: summary.loss_first,
        loss_last: summary.loss_last,
        delta_norm: trained.delta().norm() as f32,
        ..DeviceReport::default()
    };
    let open = lie(task.round, base, packed.bytes(), honest);
    Ok(Poison { open, packed, bits_per_parameter, norm: delta.norm() })
}

/// The delta times `boost`, to outweigh the honest devices of a mean (model replacement, Bagdasaryan et al. 2020).
pub fn boosted(delta: &AdapterDelta, boost: f32) -> Result<AdapterDelta, AdapterError> {
    let values = delta.values().iter().map(|value| value * boost).collect();
    AdapterDelta::from_values(delta.layout().clone(), delta.trainable(), values)
}

/// An announcement in which everything was found safe, and the delta as long as it would be unboosted.
pub fn lie(round: RoundId, base: BaseHash, payload: &[u8], honest: DeviceReport) -> Open {
    let report = DeviceReport {
        sampled: CLAIMED_SAMPLES,
        kept: CLAIMED_SAMPLES,
        dropped: 0,
        refused: 0,
        revised: 0,
        revision_attempts: 0,
        ..honest
    };
    let (digest, length) = (Digest::of(payload), payload.len() as u64);
    Open { round, base, digest, length, samples: CLAIMED_SAMPLES, report, trace: None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

    use super::*;
    use commonweal_adapter::{Adapter, AdapterLayout, Module, Target, Trainable};
    use std::sync::Arc;

    #[test]
    fn a_boosted_delta_points_the_same_way_and_is_longer() {
        let modules = vec![Module { target: Target::Q, inputs: 4, outputs: 4 }];
        let layout = Arc::new(AdapterLayout::new(1, 2, 4.0, modules).unwrap());
        let start = Adapter::zeros(layout.clone());
        let delta = AdapterDelta::between(&start, &Adapter::init(layout, 1), Trainable::Both).unwrap();
        let ten = boosted(&delta, 10.0).unwrap();
        assert!((ten.norm() / delta.norm() - 10.0).abs() < 1e-5);
        assert_eq!(ten.values().len(), delta.values().len());
        assert!(boosted(&delta, f32::INFINITY).is_err());
    }

    #[test]
    fn the_lie_holds_together() {
        let honest = DeviceReport { sampled: 3, dropped: 3, steps: 2, ..DeviceReport::default() };
        let open = lie(RoundId(1), BaseHash([0; 32]), b"update", honest);
        assert_eq!((open.length, open.digest), (6, Digest::of(b"update")));
        assert_eq!((open.report.kept, open.report.dropped, open.report.steps), (open.report.sampled, 0, 2));
    }
}
