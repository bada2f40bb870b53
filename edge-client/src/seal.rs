//! A file of ours as it lies on the disk: encrypted and authenticated, and bound to its name.
//!
//! Of `store.rs`, which says which files are sealed; the key is of `keys.rs`. Pure: the nonce is an argument. Whoever has
//! the disk without the key learns the names, the sizes and the times of the files. A file that was changed, cut short or
//! put in another's place does not open; an older one of the same name does.
//!
//! ```text
//! 8 bytes  CWSEALED
//! 1 byte   version, 1
//! 24 bytes nonce, random
//! …        XChaCha20-Poly1305 of the content, as long as that; the associated data is the first 9 bytes and the name
//! 16 bytes tag
//! ```

use chacha20poly1305::{AeadInOut, KeyInit, Tag, XChaCha20Poly1305, XNonce};

use crate::keys::Key;

const MAGIC: &[u8; 8] = b"CWSEALED";
const VERSION: u8 = 1;
/// Magic and version.
const HEAD_BYTES: usize = MAGIC.len() + 1;
/// Of a nonce, which never comes twice: 192 random bits.
pub const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
/// What sealing adds to a file.
pub const ADDED_BYTES: usize = HEAD_BYTES + NONCE_BYTES + TAG_BYTES;

/// Why bytes do not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// They were never sealed.
    #[error("it is not sealed")]
    Plain,
    /// Not even a head, a nonce and a tag.
    #[error("it has {got} bytes, expected at least {ADDED_BYTES}")]
    Short {
        /// How many there are.
        got: usize,
    },
    /// Of another program.
    #[error("it is sealed in version {got}, this program opens version {VERSION}")]
    Version {
        /// The file's.
        got: u8,
    },
    /// Changed, cut short, put in another's place, or sealed with another key.
    #[error("it was changed, cut short, renamed, or sealed with another key")]
    Forged,
}

/// Whether these bytes say that they are sealed.
pub fn is_sealed(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Seals a file's content under its name.
pub fn seal(key: &Key, name: &str, nonce: [u8; NONCE_BYTES], content: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(content.len() + ADDED_BYTES);
    sealed.extend_from_slice(MAGIC);
    sealed.push(VERSION);
    sealed.extend_from_slice(&nonce);
    sealed.extend_from_slice(content);
    let text = &mut sealed[HEAD_BYTES + NONCE_BYTES..];
    let tag = cipher(key)
        .encrypt_inout_detached(&XNonce::from(nonce), &bound_to(name), text.into())
        .expect("a content that is in memory is far below the cipher's 256 GiB");
    sealed.extend_from_slice(&tag);
    sealed
}

/// The content of a file that was sealed under this name.
pub fn open(key: &Key, name: &str, mut sealed: Vec<u8>) -> Result<Vec<u8>, SealError> {
    if !is_sealed(&sealed) {
        return Err(SealError::Plain);
    }
    let got = sealed.len();
    let text = got.checked_sub(TAG_BYTES).and_then(|end| sealed.split_at_mut_checked(end));
    let Some((text, tag)) = text else { return Err(SealError::Short { got }) };
    let Some((head, text)) = text.split_at_mut_checked(HEAD_BYTES + NONCE_BYTES) else {
        return Err(SealError::Short { got });
    };
    if head[MAGIC.len()] != VERSION {
        return Err(SealError::Version { got: head[MAGIC.len()] });
    }
    let (Ok(nonce), Ok(tag)) = (XNonce::try_from(&head[HEAD_BYTES..]), Tag::try_from(&*tag)) else {
        return Err(SealError::Short { got });
    };
    cipher(key)
        .decrypt_inout_detached(&nonce, &bound_to(name), text.into(), &tag)
        .map_err(|_| SealError::Forged)?;
    sealed.truncate(got - TAG_BYTES);
    sealed.drain(..HEAD_BYTES + NONCE_BYTES);
    Ok(sealed)
}

fn cipher(key: &Key) -> XChaCha20Poly1305 {
    XChaCha20Poly1305::new(key.bytes().into())
}

/// What is authenticated beside the content.
fn bound_to(name: &str) -> Vec<u8> {
    [MAGIC, &[VERSION][..], name.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: [u8; NONCE_BYTES] = [9; NONCE_BYTES];

    fn key(byte: u8) -> Key {
        Key::from_bytes([byte; 32])
    }

    #[test]
    fn what_was_sealed_opens_under_its_name_and_its_key_alone() {
        for content in [&b""[..], b"secret words", &[7; 10_000]] {
            let sealed = seal(&key(1), "samples/1", NONCE, content);
            assert_eq!(sealed.len(), content.len() + ADDED_BYTES);
            assert!(is_sealed(&sealed) && !sealed.windows(6).any(|window| window == b"secret"));
            assert_eq!(open(&key(1), "samples/1", sealed.clone()).unwrap(), content);
            assert_eq!(open(&key(1), "samples/2", sealed.clone()), Err(SealError::Forged));
            assert_eq!(open(&key(2), "samples/1", sealed), Err(SealError::Forged));
        }
    }

    #[test]
    fn no_flipped_bit_and_no_shorter_file_opens() {
        let sealed = seal(&key(1), "a", NONCE, b"some words");
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut other = sealed.clone();
                other[at] ^= 1 << bit;
                assert!(open(&key(1), "a", other).is_err(), "byte {at}, bit {bit}");
            }
            assert!(open(&key(1), "a", sealed[..at].to_vec()).is_err(), "{at} bytes");
        }
        assert_eq!(open(&key(1), "a", b"{\"messages\":[]}".to_vec()), Err(SealError::Plain));
        assert_eq!(open(&key(1), "a", MAGIC.to_vec()), Err(SealError::Short { got: 8 }));
        let mut later = sealed;
        later[MAGIC.len()] = 2;
        assert_eq!(open(&key(1), "a", later), Err(SealError::Version { got: 2 }));
    }

    /// Numbers of libsodium, by way of PyNaCl: `tests/golden/seal.py`.
    #[test]
    fn the_bytes_are_those_of_an_independent_implementation() {
        let golden = include_bytes!("../tests/golden/sealed.bin");
        let nonce = std::array::from_fn(|at| at as u8);
        let key = Key::from_bytes(std::array::from_fn(|at| 255 - at as u8));
        let content = "A person's words: größer als 3 €.";
        assert_eq!(seal(&key, "samples/000001.jsonl", nonce, content.as_bytes()), golden);
    }
}
