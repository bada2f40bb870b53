//! SCAFFOLD's correction (Karimireddy et al. 2020): the aggregator's control variate as a round's task names it.
//! Neighbours: `task` carries it; its file is fetched as `content`; `signature` says what exactly is signed.

use crate::{
    AggregatorKey, BaseHash, Content, Digest, Invalid, RoundId, Signature, SignatureError, SigningKey,
    signature::Domain,
};
use serde::{Deserialize, Serialize};

/// Whether a round's gradients are corrected: `g − cᵢ + c`, with the device's own control variate `cᵢ`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scaffold {
    /// They are not.
    Off,
    /// They are, and no round has been merged into `c` yet: it is zero, and so is each `cᵢ`.
    Zero,
    /// They are, with this `c`.
    Control(SignedControl),
}

/// The aggregator's control variate `c`: the mean of the devices' own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// The last round that was merged into it.
    pub round: RoundId,
    /// Which rounds were, among the last 64: bit `k` is round `round − k`. Rounds that ended without a merge are not.
    pub merged: u64,
    /// The frozen base that it belongs to.
    pub base: BaseHash,
    /// BLAKE3 of its file, which has an adapter's form.
    pub digest: Digest,
    /// Bytes of its file.
    pub length: u64,
}

/// A control variate and the aggregator's signature over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedControl {
    /// The control variate.
    pub control: Control,
    /// Over its canonical bytes.
    pub signature: Signature,
}

impl Scaffold {
    /// Whether gradients are corrected.
    pub fn is_on(&self) -> bool {
        *self != Self::Off
    }

    pub(crate) fn check(&self) -> Result<(), Invalid> {
        match self {
            Self::Off | Self::Zero => Ok(()),
            Self::Control(signed) => signed.control.check(),
        }
    }
}

impl Control {
    /// Its file, to fetch.
    pub fn content(&self) -> Content {
        Content { digest: self.digest, length: self.length }
    }

    /// Whether what a device sent for `round` is in it. Of rounds that are too long ago to be listed it is assumed.
    pub fn includes(&self, round: RoundId) -> bool {
        match self.round.0.checked_sub(round.0) {
            None => false,
            Some(ago) => u32::try_from(ago)
                .ok()
                .and_then(|ago| self.merged.checked_shr(ago))
                .is_none_or(|bits| bits & 1 == 1),
        }
    }

    /// The rounds of a control variate into which `round` is merged next, after those of `before`.
    pub fn merged_with(before: Option<&Self>, round: RoundId) -> u64 {
        let earlier = before.and_then(|before| {
            let ago = u32::try_from(round.0.checked_sub(before.round.0)?).ok()?;
            before.merged.checked_shl(ago)
        });
        earlier.unwrap_or(0) | 1
    }

    pub(crate) fn check(&self) -> Result<(), Invalid> {
        if self.merged & 1 == 0 {
            return Err(Invalid::Contradiction { field: "control's rounds" });
        }
        self.content().check()
    }
}

impl SignedControl {
    /// Signs a control variate.
    pub fn sign(key: &SigningKey, control: Control) -> Result<Self, SignatureError> {
        control.check()?;
        Ok(Self { signature: Domain::Control.sign(key, &control)?, control })
    }

    /// The control variate, if the aggregator signed it.
    pub fn verify(&self, key: &AggregatorKey) -> Result<&Control, SignatureError> {
        Domain::Control.verify(key, &self.control, &self.signature)?;
        Ok(&self.control)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(round: u64, merged: u64) -> Control {
        Control { round: RoundId(round), merged, base: BaseHash([1; 32]), digest: Digest([2; 32]), length: 9 }
    }

    #[test]
    fn rounds_that_ended_without_a_merge_are_not_in_it() {
        let first = control(3, Control::merged_with(None, RoundId(3)));
        let second = control(5, Control::merged_with(Some(&first), RoundId(5)));
        let included: Vec<u64> = (0..8).filter(|round| second.includes(RoundId(*round))).collect();
        assert_eq!(included, [3, 5]);
    }

    #[test]
    fn what_is_too_long_ago_to_be_listed_counts_as_merged() {
        let first = control(1, 1);
        let later = control(70, Control::merged_with(Some(&first), RoundId(70)));
        assert_eq!(later.merged, 1, "the first is no longer listed");
        assert!(later.includes(RoundId(6)) && later.includes(RoundId(1)), "64 rounds ago and more");
        assert!(!later.includes(RoundId(7)) && !later.includes(RoundId(71)));
    }
}
