//! Top-k: the places of the largest values, and their compact form.
//!
//! First step of [`compress`](fn@crate::compress) when a round asks for it. Places are written as gaps, each a LEB128 number:
//! gap `g` takes at most `1 + g/128` bytes and all gaps together are below the number of values, so `kept` places
//! out of `total` take at most `kept + total/128` bytes before zstd.

/// Places, in rising order, of the `kept` values of largest magnitude; of equal ones the earlier.
pub(crate) fn largest(values: &[f32], kept: usize) -> Vec<u32> {
    let mut places: Vec<(u32, f32)> =
        values.iter().enumerate().map(|(place, value)| (place as u32, value.abs())).collect();
    if kept < places.len() {
        places.select_nth_unstable_by(kept, |a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        places.truncate(kept);
    }
    let mut places: Vec<u32> = places.into_iter().map(|(place, _)| place).collect();
    places.sort_unstable();
    places
}

/// Most bytes that [`encode_places`] returns.
pub(crate) const fn encoded_bytes_max(kept: usize, total: usize) -> usize {
    kept + total / 128
}

/// Rising places as gaps.
pub(crate) fn encode_places(places: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(places.len() + places.len() / 8);
    let mut next = 0;
    for &place in places {
        let mut gap = place - next;
        next = place + 1;
        while gap >= 0x80 {
            bytes.push(gap as u8 | 0x80);
            gap >>= 7;
        }
        bytes.push(gap as u8);
    }
    bytes
}

/// The `kept` places that `bytes` hold; `None` unless these are exactly `kept` numbers, all below `total`.
pub(crate) fn decode_places(bytes: &[u8], kept: usize, total: usize) -> Option<Vec<u32>> {
    // Each place has at least a byte: what is allocated was already received.
    if bytes.len() < kept {
        return None;
    }
    let mut places = Vec::with_capacity(kept);
    let mut next = 0_u64;
    let mut bytes = bytes.iter();
    for _ in 0..kept {
        let mut gap = 0_u64;
        for shift in (0..35).step_by(7) {
            let byte = *bytes.next()?;
            gap |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                // Leading zeros would give one number two forms.
                if byte == 0 && shift > 0 {
                    return None;
                }
                break;
            }
            if shift == 28 {
                return None;
            }
        }
        let place = next + gap;
        if place >= total as u64 {
            return None;
        }
        places.push(place as u32);
        next = place + 1;
    }
    bytes.next().is_none().then_some(places)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn places_round_trip_within_the_bound(set in prop::collection::btree_set(0_u32..1_000_000, 0..200)) {
            let places: Vec<u32> = set.into_iter().collect();
            let bytes = encode_places(&places);
            prop_assert!(bytes.len() <= encoded_bytes_max(places.len(), 1_000_000));
            prop_assert_eq!(decode_places(&bytes, places.len(), 1_000_000), Some(places.clone()));
            if let Some(last) = places.last() {
                prop_assert_eq!(decode_places(&bytes, places.len(), *last as usize), None);
            }
        }

        #[test]
        fn arbitrary_places_never_panic(bytes: Vec<u8>, kept in 0_usize..50, total in 0_usize..1000) {
            if let Some(places) = decode_places(&bytes, kept, total) {
                prop_assert!(places.is_sorted_by(|a, b| a < b));
                prop_assert!(places.iter().all(|place| (*place as usize) < total));
            }
        }
    }

    #[test]
    fn a_gap_has_one_form() {
        assert_eq!(decode_places(&[5], 1, 10), Some(vec![5]));
        assert_eq!(decode_places(&[0x85, 0], 1, 10), None);
        assert_eq!(decode_places(&[0x80, 1], 1, 200), Some(vec![128]));
        assert_eq!(decode_places(&[0xff, 0xff, 0xff, 0xff, 0xff, 0], 1, 10), None);
    }

    #[test]
    fn the_largest_are_kept_and_ties_go_to_the_earlier() {
        assert_eq!(largest(&[0.5, -3.0, 1.0, -1.0, 2.0], 3), [1, 2, 4]);
        assert_eq!(largest(&[1.0; 2], 2), [0, 1]);
        assert!(largest(&[1.0; 1000], 500).into_iter().eq(0..500));
    }
}
