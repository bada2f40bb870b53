//! The windows in which a text that does not fit is read, and which windows of a text meet which of its pair. Nothing is
//! left unread, and the number of readings is bounded. `classify.rs` reads by it, and so does a guard that is asked
//! (`commonweal-safety`).

use std::ops::Range;

use tokenizers::{Encoding, TruncationDirection};

/// Neighbouring windows share one token in this many, so that a phrase cut by the end of one is whole in the next.
const OVERLAP: usize = 4;

/// Up to this many readings every window of a text meets every window of its pair.
pub const CROSSED_MAX: usize = 64;

/// Readings of one text, or of a text and its pair. Two texts of 64 KiB with a token for each byte need 682 in windows
/// of 256 tokens.
pub const READINGS_MAX: usize = 1024;

/// What `room` tokens give to a text and to its pair: all that they need, or to the longer what the shorter leaves, or
/// half each.
pub(crate) fn share(room: usize, [first, second]: [usize; 2]) -> [usize; 2] {
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

/// Windows of at most `size` tokens that cover `length` of them; at least one.
pub fn window_count(length: usize, size: usize) -> usize {
    if length <= size { 1 } else { (length - size).div_ceil(stride(size)) + 1 }
}

/// Where those windows are.
pub fn windows(length: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..window_count(length, size)).map(move |index| {
        let from = index * stride(size);
        from..length.min(from + size)
    })
}

/// Readings of so many windows of a text and of its pair (1 where there is none).
pub fn reading_count([first, second]: [usize; 2], crossed_max: usize) -> usize {
    let crossed = first.saturating_mul(second);
    if crossed <= crossed_max { crossed } else { first.saturating_add(second).saturating_sub(1) }
}

/// Which windows of a text and of its pair are read together: each with each, up to `crossed_max`. Beyond, every window
/// of the text with the first of its pair, then every further one of the pair with the last of the text: those that
/// stand nearest to each other.
pub fn readings([first, second]: [usize; 2], crossed_max: usize) -> Vec<[usize; 2]> {
    if first.saturating_mul(second) <= crossed_max {
        return (0..first).flat_map(|one| (0..second).map(move |other| [one, other])).collect();
    }
    (0..first).map(|one| [one, 0]).chain((1..second).map(|other| [first - 1, other])).collect()
}

/// The windows of an encoded text.
pub(crate) fn cut(mut encoding: Encoding, size: usize) -> Vec<Encoding> {
    if encoding.len() <= size {
        return vec![encoding];
    }
    encoding.truncate(size, size - stride(size), TruncationDirection::Right);
    let rest = encoding.take_overflowing();
    std::iter::once(encoding).chain(rest).collect()
}

fn stride(size: usize) -> usize {
    size - size / OVERLAP
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
    fn every_window_is_read_and_their_number_is_bounded() {
        assert_eq!(readings([2, 2], 4), [[0, 0], [0, 1], [1, 0], [1, 1]]);
        assert_eq!(readings([2, 3], 4), [[0, 0], [1, 0], [1, 1], [1, 2]]);
        for first in 1..12 {
            for second in 1..12 {
                let read = readings([first, second], 16);
                assert_eq!(read.len(), reading_count([first, second], 16));
                assert!(read.len() <= 16.max(first + second - 1));
                assert!((0..first).all(|one| read.iter().any(|pair| pair[0] == one)));
                assert!((0..second).all(|other| read.iter().any(|pair| pair[1] == other)));
            }
        }
        assert!(reading_count([usize::MAX, 2], 64) >= usize::MAX - 1);
    }

    #[test]
    fn windows_cover_every_token_and_overlap() {
        for length in 0_u32..60 {
            for size in 1..20 {
                let ids: Vec<u32> = (0..length).collect();
                let count = ids.len();
                let encoding = Encoding::new(
                    ids.clone(),
                    vec![0; count],
                    vec![String::new(); count],
                    vec![None; count],
                    vec![(0, 0); count],
                    vec![0; count],
                    vec![1; count],
                    Vec::new(),
                    std::iter::empty().collect(),
                );
                let cut: Vec<Vec<u32>> =
                    cut(encoding, size).iter().map(|window| window.get_ids().to_vec()).collect();
                let spans: Vec<Vec<u32>> = windows(count, size).map(|span| ids[span].to_vec()).collect();
                assert_eq!(cut, spans, "{length} in {size}");
                assert_eq!(spans.len(), window_count(count, size), "{length} in {size}");
                let mut next = 0;
                for ids in &spans {
                    assert!(ids.len() <= size && ids.first().is_none_or(|&first| first <= next));
                    next = ids.last().map_or(next, |&last| last + 1);
                }
                assert_eq!(next, length);
                for pair in spans.windows(2) {
                    let shared = pair[0].iter().filter(|id| pair[1].contains(id)).count();
                    assert!(shared >= size / OVERLAP, "{length} in {size}: {shared} shared");
                }
            }
        }
    }
}
