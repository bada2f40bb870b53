//! The keys that sign for the aggregator: the one in force, and the chain that led to it.
//!
//! `directory` keeps them in one file, so that a rotation is one renaming and no kill leaves half of one. `publish`,
//! `receive` and `drive` sign with the one in force, by a [`Signer`] that looks at the file whenever it is asked: a
//! rotation beside a running server holds from the next request on. What an earlier key has signed stays what it is in
//! the store; on its way to a device it is signed anew, since a device takes nothing but the word of the key in force.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use commonweal_protocol::{
    AggregatorKey, Digest, KeyNumber, Lineage, SignatureError, SignedControl, SignedReceipt, SignedRelease,
    SignedSuccession, SigningKey, SuccessionError,
};
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{self, DecodePrivateKey, EncodePrivateKey};
use pem::{EncodeConfig, Pem};
use zeroize::Zeroizing;

use crate::directory::{Directory, DirectoryError};

const PRIVATE_KEY_END: &str = "-----END PRIVATE KEY-----";
/// The first of the keys, there if others followed it.
const FIRST_KEY: &str = "COMMONWEAL FIRST SIGNING KEY";
const SUCCESSION: &str = "COMMONWEAL SUCCESSION";

/// Why a file holds no signing keys.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// Not PEM, or a part of it is missing or another one.
    #[error("expected PEM with a private key, then the first key and each succession if there are any: {0}")]
    Part(&'static str),
    /// The private key.
    #[error("expected an Ed25519 private key")]
    Private(#[from] pkcs8::Error),
    /// A step of the chain.
    #[error(transparent)]
    Succession(#[from] SuccessionError),
    /// The chain is another key's.
    #[error("expected the private key that the chain of keys leads to")]
    OtherKey,
}

/// The private key in force and its lineage.
pub struct Keys {
    signing: SigningKey,
    lineage: Lineage,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Keys").field("number", &self.lineage.number()).finish_non_exhaustive()
    }
}

impl From<SigningKey> for Keys {
    /// A first key.
    fn from(signing: SigningKey) -> Self {
        let lineage = Lineage::new(KeyNumber(0), AggregatorKey::of(&signing));
        Self { signing, lineage }
    }
}

impl Keys {
    /// A first key, drawn now.
    pub fn draw() -> Self {
        drawn().into()
    }

    /// The private key in force.
    pub fn signing(&self) -> &SigningKey {
        &self.signing
    }

    /// All the public ones.
    pub fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    /// A new key, drawn now, for which the one in force has signed. That one's private half is not in it any more.
    pub fn rotated(&self, now_ms: u64) -> Result<Self, SuccessionError> {
        let (signing, mut lineage) = (drawn(), self.lineage.clone());
        lineage.succeed(&self.signing, AggregatorKey::of(&signing), now_ms)?;
        Ok(Self { signing, lineage })
    }

    /// The same value signed by the key in force, if any key of the lineage has signed it.
    pub fn again<T: Signed>(&self, signed: T) -> Result<T, SignatureError> {
        let in_force = signed.check(&self.lineage.key());
        if in_force.is_ok() {
            return Ok(signed);
        }
        if self.lineage.keys().any(|key| signed.check(&key).is_ok()) {
            return signed.signed_by(&self.signing);
        }
        in_force.map(|()| signed)
    }

    /// As they are kept. It is a secret.
    pub(crate) fn to_pem(&self) -> Result<Zeroizing<String>, KeysError> {
        let mut text = self.signing.to_pkcs8_pem(LineEnding::LF)?;
        if self.lineage.steps().is_empty() {
            return Ok(text);
        }
        let lines = EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        text.push_str(&pem::encode_config(&Pem::new(FIRST_KEY, self.lineage.first().0.0), lines));
        for step in self.lineage.steps() {
            let bytes = postcard::to_allocvec(step).map_err(|_| KeysError::Part(SUCCESSION))?;
            text.push_str(&pem::encode_config(&Pem::new(SUCCESSION, bytes), lines));
        }
        Ok(text)
    }

    /// Reads what was kept, with every step of the chain verified.
    pub(crate) fn from_pem(text: &str) -> Result<Self, KeysError> {
        // The private key, and what anybody may see.
        let private =
            text.find(PRIVATE_KEY_END).ok_or(KeysError::Part("a private key"))? + PRIVATE_KEY_END.len();
        let (private, public) = text.split_at(private);
        let signing = SigningKey::from_pkcs8_pem(private)?;
        let parts = pem::parse_many(public).map_err(|_| KeysError::Part("a chain of keys"))?;
        let lineage = match parts.split_first() {
            None => Lineage::new(KeyNumber(0), AggregatorKey::of(&signing)),
            Some((first, steps)) => {
                let bytes = tagged(first, FIRST_KEY)?.try_into().map_err(|_| KeysError::Part(FIRST_KEY))?;
                let step = |part| {
                    let step = postcard::from_bytes(tagged(part, SUCCESSION)?);
                    step.map_err(|_| KeysError::Part(SUCCESSION))
                };
                let steps: Vec<SignedSuccession> = steps.iter().map(step).collect::<Result<_, _>>()?;
                let mut lineage = Lineage::new(KeyNumber(0), AggregatorKey(Digest(bytes)));
                lineage.follow(&steps)?;
                lineage
            }
        };
        if lineage.key() == AggregatorKey::of(&signing) {
            Ok(Self { signing, lineage })
        } else {
            Err(KeysError::OtherKey)
        }
    }
}

fn tagged<'a>(part: &'a Pem, tag: &'static str) -> Result<&'a [u8], KeysError> {
    if part.tag() == tag { Ok(part.contents()) } else { Err(KeysError::Part(tag)) }
}

fn drawn() -> SigningKey {
    let mut seed = Zeroizing::new([0_u8; 32]);
    rand::RngCore::fill_bytes(&mut rand::rng(), seed.as_mut());
    SigningKey::from_bytes(&seed)
}

/// What the aggregator signs and hands out more than once.
pub trait Signed: Sized {
    /// Whether this key signed it.
    fn check(&self, key: &AggregatorKey) -> Result<(), SignatureError>;
    /// The same value under this key.
    fn signed_by(self, key: &SigningKey) -> Result<Self, SignatureError>;
}

macro_rules! signed {
    ($name:ident, $value:ident) => {
        impl Signed for $name {
            fn check(&self, key: &AggregatorKey) -> Result<(), SignatureError> {
                self.verify(key).map(drop)
            }

            fn signed_by(self, key: &SigningKey) -> Result<Self, SignatureError> {
                Self::sign(key, self.$value)
            }
        }
    };
}

signed!(SignedRelease, release);
signed!(SignedReceipt, receipt);
signed!(SignedControl, control);

/// Names one content of a file, as far as its renamings tell.
type Stamp = (u64, i64, i64, u64);

/// The keys as they are now. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Signer {
    held: Arc<RwLock<Held>>,
    /// Where they are looked for again; nowhere, if they were only lent.
    place: Option<PathBuf>,
}

#[derive(Debug)]
struct Held {
    keys: Arc<Keys>,
    stamp: Option<Stamp>,
    /// A file that was told to be none.
    told: Option<Stamp>,
}

impl From<Keys> for Signer {
    /// With keys that nothing will follow.
    fn from(keys: Keys) -> Self {
        let held = Held { keys: Arc::new(keys), stamp: None, told: None };
        Self { held: Arc::new(RwLock::new(held)), place: None }
    }
}

impl From<SigningKey> for Signer {
    fn from(signing: SigningKey) -> Self {
        Keys::from(signing).into()
    }
}

impl Signer {
    /// The keys of a state directory.
    pub(crate) fn open(directory: &Directory) -> Result<Self, DirectoryError> {
        let place = directory.signing_keys_path();
        let (stamp, keys) = (stamp(&place), Arc::new(directory.signing_keys()?));
        Ok(Self { held: Arc::new(RwLock::new(Held { keys, stamp, told: None })), place: Some(place) })
    }

    /// Those in force at this moment.
    pub fn keys(&self) -> Arc<Keys> {
        let found = self.place.as_deref().and_then(stamp);
        {
            let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
            if found == held.stamp || found.is_none() {
                return held.keys.clone();
            }
        }
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        if found != held.stamp {
            self.look(&mut held, found);
        }
        held.keys.clone()
    }

    /// Takes what is in the file now, if it goes on from what is held: a server's keys are never replaced by others. What
    /// cannot be read is looked at again, for the disk may only have been out of reach.
    fn look(&self, held: &mut Held, found: Option<Stamp>) {
        let Some(place) = &self.place else { return };
        let before = held.keys.lineage();
        let problem = match Directory::read_signing_keys(place) {
            Ok(keys) if goes_on(before, keys.lineage()) => {
                tracing::info!("signing with key {} from now on", keys.lineage().number());
                (held.keys, held.stamp) = (Arc::new(keys), found);
                return;
            }
            Ok(_) => format!("{} has other keys", place.display()),
            Err(error) => crate::receive::chain(&error),
        };
        if held.told != found {
            tracing::error!("signing with key {} as before: {problem}", before.number());
            held.told = found;
        }
    }
}

fn goes_on(before: &Lineage, now: &Lineage) -> bool {
    now.first() == before.first() && now.steps().starts_with(before.steps())
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonweal_protocol::{BaseHash, Control, RoundId};

    fn control() -> Control {
        Control { round: RoundId(1), merged: 1, base: BaseHash([1; 32]), digest: Digest([2; 32]), length: 9 }
    }

    #[test]
    fn keys_are_read_as_they_are_kept_also_those_of_before_there_were_rotations() {
        let first = Keys::draw();
        let text = first.to_pem().unwrap();
        assert_eq!(text.matches("BEGIN").count(), 1, "as it always was: {}", text.len());
        let second = Keys::from_pem(&text).unwrap().rotated(1).unwrap().rotated(2).unwrap();
        let read = Keys::from_pem(&second.to_pem().unwrap()).unwrap();
        assert_eq!(read.lineage(), second.lineage());
        assert_eq!(read.lineage().first(), first.lineage().key());
        assert_eq!(read.signing().to_bytes(), second.signing().to_bytes());
        assert!(!format!("{read:?}").contains(&format!("{:?}", read.signing().to_bytes())));
    }

    #[test]
    fn a_file_with_a_chain_that_does_not_hold_is_refused() {
        let keys = Keys::draw().rotated(1).unwrap().rotated(2).unwrap();
        let text = keys.to_pem().unwrap();
        let parts: Vec<&str> = text.split_inclusive("-----END ").collect();
        assert_eq!(parts.len(), 5, "a private key, a first key, two steps, and the end of the last");
        let steps: Vec<usize> =
            text.match_indices("-----BEGIN COMMONWEAL SUCC").map(|found| found.0).collect();
        let without_last = &text[..steps[1]];
        assert!(matches!(Keys::from_pem(without_last), Err(KeysError::OtherKey)));
        let without_first_step = [&text[..steps[0]], &text[steps[1]..]].concat();
        assert!(matches!(Keys::from_pem(&without_first_step), Err(KeysError::Succession(_))));
        let other = Keys::draw();
        let swapped =
            [other.to_pem().unwrap().as_str(), &text[text.find("-----BEGIN COMM").unwrap()..]].concat();
        assert!(matches!(Keys::from_pem(&swapped), Err(KeysError::OtherKey)));
        for nonsense in ["", "nonsense", &swapped[..100], &[&text[..], &text[..]].concat()] {
            assert!(Keys::from_pem(nonsense).is_err(), "{}", nonsense.len());
        }
    }

    #[test]
    fn what_an_earlier_key_signed_is_signed_anew_and_what_no_key_signed_is_not() {
        let old = Keys::draw();
        let new = old.rotated(1).unwrap();
        let signed = SignedControl::sign(old.signing(), control()).unwrap();
        let again = new.again(signed).unwrap();
        again.verify(&new.lineage().key()).unwrap();
        assert_eq!(new.again(again).unwrap(), again);
        let strangers = SignedControl::sign(Keys::draw().signing(), control()).unwrap();
        assert!(new.again(strangers).is_err());
        assert!(old.again(again).is_err(), "a key that followed is none of its own");
    }

    #[test]
    fn a_signer_sees_a_rotation_at_once_and_takes_no_other_keys() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::create(&dir.path().join("state"), 1).unwrap();
        let signer = directory.signer().unwrap();
        let first = signer.keys();
        assert_eq!(first.lineage().number(), KeyNumber(0));
        directory.rotate(2, |_| ()).unwrap();
        let second = signer.keys();
        assert_eq!(second.lineage().number(), KeyNumber(1));
        assert!(Arc::ptr_eq(&second, &signer.keys()), "read once");
        // A backup of before, somebody else's file, none: what holds goes on.
        let path = directory.signing_keys_path();
        for text in [first.to_pem().unwrap(), Keys::draw().to_pem().unwrap(), "x".to_owned().into()] {
            std::fs::remove_file(&path).unwrap();
            assert!(Arc::ptr_eq(&second, &signer.keys()));
            std::fs::write(&path, text.as_bytes()).unwrap();
            assert!(Arc::ptr_eq(&second, &signer.keys()));
        }
    }
}
