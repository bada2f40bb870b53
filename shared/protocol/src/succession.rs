//! Rotation of the key that signs for the aggregator: each key signs for the one that follows it, and a device goes by
//! that chain from the key that it pinned at its enrolment to the one in force. Neighbours: `enrolment` says where a
//! device begins, a poll's reply (`task`) carries the steps that it does not know, `signature` says what is signed.

use crate::{
    AggregatorKey, Invalid, KeyNumber, Signature, SignatureError, SigningKey, bounds, signature::Domain,
};
use serde::{Deserialize, Serialize};

/// One step: the key that signs from now on, in the place of the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Succession {
    /// The new key's number, one more than that of the key before.
    pub number: KeyNumber,
    /// The new key.
    pub key: AggregatorKey,
    /// When the key before it was retired, ms since 1970.
    pub created_ms: u64,
}

/// A step and the signature of the key before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedSuccession {
    /// The step.
    pub succession: Succession,
    /// Over its canonical bytes.
    pub signature: Signature,
}

/// Why a chain is not followed. Nothing of it is.
#[derive(Debug, thiserror::Error)]
pub enum SuccessionError {
    /// It skips a key, or goes back.
    #[error("succession of keys: expected key number {expected} next, got number {got}")]
    Order {
        /// One more than the number of the key in force.
        expected: KeyNumber,
        /// The step's.
        got: KeyNumber,
    },
    /// One key signed for two: it is in other hands, or two aggregators share its file.
    #[error(
        "succession of keys: another key number {number} was followed before, and the same key signed for both"
    )]
    Fork {
        /// Of both.
        number: KeyNumber,
    },
    /// A key that signed before is to sign again.
    #[error("succession of keys: key number {number} is an earlier key again")]
    Repeated {
        /// The step's.
        number: KeyNumber,
    },
    /// Dated before the step that it follows.
    #[error("succession of keys: key number {number} is dated before the key that it follows")]
    Dated {
        /// The step's.
        number: KeyNumber,
    },
    /// Not the word of the key before it.
    #[error("succession of keys: key number {number} is not signed for by the key before it")]
    Signature {
        /// The step's.
        number: KeyNumber,
        /// Why.
        #[source]
        source: SignatureError,
    },
    /// More rotations than a lineage holds.
    #[error("succession of keys: expected at most {} rotations", bounds::SUCCESSIONS_MAX)]
    TooMany,
}

impl SignedSuccession {
    /// Signs for the next key, with the one that it follows.
    pub fn sign(key: &SigningKey, succession: Succession) -> Result<Self, SignatureError> {
        Ok(Self { signature: Domain::Succession.sign(key, &succession)?, succession })
    }

    /// The step, if this key signed for it.
    pub fn verify(&self, key: &AggregatorKey) -> Result<&Succession, SignatureError> {
        Domain::Succession.verify(key, &self.succession, &self.signature)?;
        Ok(&self.succession)
    }

    /// Whether a message may carry these.
    pub(crate) fn check(steps: &[Self]) -> Result<(), Invalid> {
        Invalid::unless_at_most("successions", steps.len() as u64, bounds::SUCCESSIONS_MAX as u64)
    }
}

/// A key and those that followed it: each step was signed for by the key before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lineage {
    number: KeyNumber,
    key: AggregatorKey,
    steps: Vec<SignedSuccession>,
}

impl Lineage {
    /// One that begins with this key, which is known otherwise.
    pub fn new(number: KeyNumber, key: AggregatorKey) -> Self {
        Self { number, key, steps: Vec::new() }
    }

    /// The number of the key that it begins with.
    pub fn first_number(&self) -> KeyNumber {
        self.number
    }

    /// The key that it begins with.
    pub fn first(&self) -> AggregatorKey {
        self.key
    }

    /// The number of the key in force.
    pub fn number(&self) -> KeyNumber {
        self.steps.last().map_or(self.number, |step| step.succession.number)
    }

    /// The key in force; those before it are retired.
    pub fn key(&self) -> AggregatorKey {
        self.steps.last().map_or(self.key, |step| step.succession.key)
    }

    /// All its keys, the one in force first.
    pub fn keys(&self) -> impl Iterator<Item = AggregatorKey> {
        self.steps.iter().rev().map(|step| step.succession.key).chain([self.key])
    }

    /// Its steps, the oldest first.
    pub fn steps(&self) -> &[SignedSuccession] {
        &self.steps
    }

    /// The steps that lead on from the key of this number. None, if that is the one in force or a later one.
    pub fn after(&self, number: KeyNumber) -> &[SignedSuccession] {
        let known = self.steps.partition_point(|step| step.succession.number <= number);
        self.steps.get(known..).unwrap_or_default()
    }

    /// Goes by these steps, all or none. Each must be the next one after the key in force, and that key's word.
    pub fn follow(&mut self, steps: &[SignedSuccession]) -> Result<(), SuccessionError> {
        let mut ahead = self.clone();
        steps.iter().try_for_each(|step| ahead.step(step))?;
        *self = ahead;
        Ok(())
    }

    /// Makes `next` the key in force. `key` is the one until now: it signs for this and for nothing any more.
    pub fn succeed(
        &mut self,
        key: &SigningKey,
        next: AggregatorKey,
        now_ms: u64,
    ) -> Result<(), SuccessionError> {
        let number = KeyNumber(self.number().0.saturating_add(1));
        // A clock that was set back is no reason to refuse.
        let created_ms = now_ms.max(self.dated_ms());
        let signed = SignedSuccession::sign(key, Succession { number, key: next, created_ms })
            .map_err(|source| SuccessionError::Signature { number, source })?;
        self.step(&signed)
    }

    fn dated_ms(&self) -> u64 {
        self.steps.last().map_or(0, |step| step.succession.created_ms)
    }

    fn step(&mut self, signed: &SignedSuccession) -> Result<(), SuccessionError> {
        let Succession { number, key, created_ms } = signed.succession;
        let expected = KeyNumber(self.number().0.saturating_add(1));
        if number != expected {
            return Err(if self.is_fork(signed) {
                SuccessionError::Fork { number }
            } else {
                SuccessionError::Order { expected, got: number }
            });
        }
        if self.steps.len() == bounds::SUCCESSIONS_MAX {
            return Err(SuccessionError::TooMany);
        }
        signed.verify(&self.key()).map_err(|source| SuccessionError::Signature { number, source })?;
        if self.keys().any(|known| known == key) {
            return Err(SuccessionError::Repeated { number });
        }
        if created_ms < self.dated_ms() {
            return Err(SuccessionError::Dated { number });
        }
        self.steps.push(*signed);
        Ok(())
    }

    /// Whether the same key signed for this step and for another of its number.
    fn is_fork(&self, signed: &SignedSuccession) -> bool {
        let Succession { number, key, .. } = signed.succession;
        let followed = self.steps.iter().position(|step| step.succession.number == number);
        followed.is_some_and(|place| {
            let before = place.checked_sub(1).and_then(|before| self.steps.get(before));
            let signer = before.map_or(self.key, |step| step.succession.key);
            self.steps.get(place).is_some_and(|step| step.succession.key != key)
                && signed.verify(&signer).is_ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn public(seed: u8) -> AggregatorKey {
        AggregatorKey::of(&secret(seed))
    }

    /// Key 0 and as many rotations.
    fn lineage(rotations: u8) -> Lineage {
        let mut lineage = Lineage::new(KeyNumber(0), public(0));
        for seed in 0..rotations {
            lineage.succeed(&secret(seed), public(seed + 1), u64::from(seed) * 10).unwrap();
        }
        lineage
    }

    /// A step as whoever holds this key can sign it.
    fn forged(by: u8, number: u64, next: u8, created_ms: u64) -> SignedSuccession {
        let step = Succession { number: KeyNumber(number), key: public(next), created_ms };
        SignedSuccession::sign(&secret(by), step).unwrap()
    }

    #[test]
    fn whoever_was_away_catches_up_from_any_key() {
        let whole = lineage(5);
        for known in 0..=5 {
            let mut device = Lineage::new(KeyNumber(u64::from(known)), public(known));
            device.follow(whole.after(device.number())).unwrap();
            assert_eq!((device.number(), device.key()), (KeyNumber(5), public(5)));
            device.follow(whole.after(device.number())).unwrap();
            assert_eq!(device.steps().len(), 5 - usize::from(known), "nothing is new");
        }
        assert!(whole.after(KeyNumber(9)).is_empty());
        assert!(whole.keys().eq((0..=5).rev().map(public)));
    }

    #[test]
    fn what_skips_goes_back_repeats_or_is_another_keys_word_is_not_followed_at_all() {
        let whole = lineage(4);
        let steps = whole.steps();
        let refused = |mut device: Lineage, steps: &[SignedSuccession]| {
            let before = device.clone();
            let error = device.follow(steps).unwrap_err();
            assert_eq!(device, before, "{error}");
            error
        };
        let order = |error| matches!(error, SuccessionError::Order { .. });
        assert!(order(refused(lineage(0), &steps[1..])), "skips");
        assert!(order(refused(lineage(0), &[steps[0], steps[2]])), "skips");
        assert!(order(refused(lineage(2), &steps[1..])), "goes back");
        assert!(order(refused(lineage(2), &[steps[2], steps[2]])), "the same twice");
        assert!(order(refused(lineage(2), &[steps[3], steps[2]])), "backwards");
        let mismatch = |error| matches!(error, SuccessionError::Signature { .. });
        assert!(mismatch(refused(lineage(1), &[forged(9, 2, 8, 10)])), "a stranger's word");
        assert!(mismatch(refused(lineage(1), &[forged(0, 2, 8, 10)])), "a retired key's word");
        assert!(mismatch(refused(lineage(1), &[steps[1], forged(1, 3, 8, 20)])), "the second is");
        let mut changed = steps[2];
        changed.succession.created_ms += 1;
        assert!(mismatch(refused(lineage(2), &[changed])), "a changed date");
        let repeated = |error| matches!(error, SuccessionError::Repeated { .. });
        assert!(repeated(refused(lineage(2), &[forged(2, 3, 0, 20)])), "the first key again");
        assert!(repeated(refused(lineage(2), &[forged(2, 3, 2, 20)])), "its own successor");
        let dated = refused(lineage(2), &[forged(2, 3, 8, 9)]);
        assert!(matches!(dated, SuccessionError::Dated { .. }), "{dated}");
    }

    #[test]
    fn two_successors_of_one_key_are_called_a_fork() {
        let whole = lineage(3);
        let fork = |mut device: Lineage, step| device.follow(&[step]).unwrap_err();
        for (by, number) in [(0, 1), (1, 2), (2, 3)] {
            let error = fork(whole.clone(), forged(by, number, 8, 50));
            assert!(
                matches!(error, SuccessionError::Fork { number: KeyNumber(got) } if got == number),
                "{error}"
            );
        }
        // Anybody can write such a step without the key: that is no sign that the key is in other hands.
        let error = fork(whole.clone(), forged(9, 2, 8, 50));
        assert!(matches!(error, SuccessionError::Order { .. }), "{error}");
        let again = fork(whole.clone(), whole.steps()[1]);
        assert!(matches!(again, SuccessionError::Order { .. }), "{again}");
    }

    #[test]
    fn rotations_are_bounded_and_a_clock_that_was_set_back_stops_none() {
        let mut lineage = lineage(2);
        lineage.succeed(&secret(2), public(3), 0).unwrap();
        assert_eq!(lineage.steps()[2].succession.created_ms, 10);
        let mut seed = 3;
        while lineage.steps().len() < bounds::SUCCESSIONS_MAX {
            lineage.succeed(&secret(seed), public(seed + 1), 100).unwrap();
            seed += 1;
        }
        let error = lineage.succeed(&secret(seed), public(seed + 1), 100).unwrap_err();
        assert!(matches!(error, SuccessionError::TooMany), "{error}");
        let error = lineage.succeed(&secret(0), public(200), 100).unwrap_err();
        assert!(!lineage.keys().any(|key| key == public(200)), "{error}");
    }
}
