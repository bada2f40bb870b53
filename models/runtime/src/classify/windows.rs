//! The windows in which `classify.rs` reads a text that does not fit the network.

use tokenizers::{Encoding, TruncationDirection};

/// Neighbouring windows share one token in this many, so that a phrase cut by the end of one is whole in the next.
const OVERLAP: usize = 4;

/// What `room` tokens give to a text and to its pair: all that they need, or to the longer what the shorter leaves, or
/// half each.
pub(super) fn share(room: usize, [first, second]: [usize; 2]) -> [usize; 2] {
    let half = room / 2;
    if first + second <= room {
        [first, second]
    } else if first <= half {
        [first, room - first]
    } else if second <= room - half {
        [room - second, second]
    } else {
        [half, room - half]
    }
}

/// Windows of at most `size` tokens that cover `length` of them.
pub(super) fn window_count(length: usize, size: usize) -> usize {
    if length <= size { 1 } else { (length - size).div_ceil(size - size / OVERLAP) + 1 }
}

/// The windows of an encoded text.
pub(super) fn cut(mut encoding: Encoding, size: usize) -> Vec<Encoding> {
    if encoding.len() <= size {
        return vec![encoding];
    }
    encoding.truncate(size, size / OVERLAP, TruncationDirection::Right);
    let rest = encoding.take_overflowing();
    std::iter::once(encoding).chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_goes_to_whom_it_helps() {
        assert_eq!(share(10, [3, 7]), [3, 7]);
        assert_eq!(share(10, [3, 8]), [3, 7]);
        assert_eq!(share(10, [8, 3]), [7, 3]);
        assert_eq!(share(10, [20, 0]), [10, 0]);
        assert_eq!(share(11, [20, 20]), [5, 6]);
    }

    #[test]
    fn windows_cover_every_token_and_overlap() {
        for length in 0_u32..60 {
            for size in 1..20 {
                let ids: Vec<u32> = (0..length).collect();
                let count = ids.len();
                let encoding = Encoding::new(
                    ids,
                    vec![0; count],
                    vec![String::new(); count],
                    vec![None; count],
                    vec![(0, 0); count],
                    vec![0; count],
                    vec![1; count],
                    Vec::new(),
                    std::iter::empty().collect(),
                );
                let windows = cut(encoding, size);
                assert_eq!(windows.len(), window_count(count, size), "{length} in {size}");
                let mut next = 0;
                for window in &windows {
                    let ids = window.get_ids();
                    assert!(ids.len() <= size && ids.first().is_none_or(|&first| first <= next));
                    next = ids.last().map_or(next, |&last| last + 1);
                }
                assert_eq!(next, length);
                for pair in windows.windows(2) {
                    let shared = pair[0].get_ids().iter().filter(|id| pair[1].get_ids().contains(id)).count();
                    assert!(shared >= size / OVERLAP, "{length} in {size}: {shared} shared");
                }
            }
        }
    }
}
