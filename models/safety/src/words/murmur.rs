//! MurmurHash3, x86, 32 bits (Austin Appleby 2011, public domain): where a piece of text falls among the buckets.
//!
//! The function that scikit-learn's feature hashing uses, so that `tests/golden_words.py` can compute the same
//! buckets by another implementation. Not for secrets: whoever wants two pieces in one bucket finds them.

/// The hash of `bytes` with seed 0.
pub(crate) fn hash(bytes: &[u8]) -> u32 {
    let (blocks, tail) = bytes.as_chunks::<4>();
    let mut state = 0_u32;
    for block in blocks {
        state ^= mixed(u32::from_le_bytes(*block));
        state = state.rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
    }
    let rest = tail.iter().rev().fold(0_u32, |rest, byte| (rest << 8) | u32::from(*byte));
    // Without a rest this leaves the state as it is.
    state ^= mixed(rest);
    // The reference takes the length modulo 2³² as well.
    state ^= bytes.len() as u32;
    state = (state ^ (state >> 16)).wrapping_mul(0x85eb_ca6b);
    state = (state ^ (state >> 13)).wrapping_mul(0xc2b2_ae35);
    state ^ (state >> 16)
}

fn mixed(block: u32) -> u32 {
    block.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_values() {
        // With seed 0; from the test vectors that Wikipedia's article and Ian Boyd's answer on Stack Overflow give.
        for (text, expected) in [
            ("", 0_u32),
            ("test", 0xba6b_d213),
            ("Hello, world!", 0xc036_3e43),
            ("The quick brown fox jumps over the lazy dog", 0x2e4f_f723),
        ] {
            assert_eq!(hash(text.as_bytes()), expected, "{text:?}");
        }
        assert_eq!(hash(&[0xff; 4]), 0x7629_3b50);
        assert_eq!(hash(&[0x21, 0x43, 0x65]), 0x7e4a_8634);
    }
}
