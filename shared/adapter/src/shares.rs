//! Levels of any size to few bytes and back: an asymmetric numeral system with a table of shares.
//!
//! The entropy coder of 3-bit levels, called by [`crate::entropy`]. The table holds how often each level from the
//! lowest to the highest comes, in units of 2⁻¹⁴: coarse enough for a decoder's table of 32 KB, which stays in the
//! nearest cache, and within 0.2 % of the entropy on normal values.

use constriction::stream::Decode;
use constriction::stream::model::ContiguousCategoricalEntropyModel;
use constriction::stream::stack::DefaultAnsCoder;
use serde::{Deserialize, Serialize};

use crate::entropy::Malformed;

const PRECISION: usize = 14;
const WHOLE: u16 = 1 << PRECISION;

type Model = ContiguousCategoricalEntropyModel<u16, Vec<u16>, PRECISION>;

/// Coded levels with their table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Shared {
    /// The level of the first share.
    pub(crate) lowest: i8,
    /// Shares of `lowest`, `lowest + 1` …, u16 little-endian; none is 0 and their sum is 2¹⁴.
    #[serde(with = "serde_bytes")]
    pub(crate) shares: Vec<u8>,
    /// The coder's words, u32 little-endian.
    #[serde(with = "serde_bytes")]
    pub(crate) words: Vec<u8>,
}

/// Codes levels from −127 to 127.
pub(crate) fn encode(levels: &[i8]) -> Shared {
    // With −1 and 1 in it, no table is of a single level, which the coder has no form for.
    let lowest = levels.iter().fold(-1, |lowest, level| lowest.min(*level));
    let highest = levels.iter().fold(1, |highest, level| highest.max(*level));
    let shares = shares(levels, lowest, highest);
    let mut coder = DefaultAnsCoder::new();
    let coded = model(&shares).and_then(|model| {
        let symbols = levels.iter().map(|level| (i16::from(*level) - i16::from(lowest)) as usize);
        coder.encode_iid_symbols_reverse(symbols, &model).ok()
    });
    debug_assert!(coded.is_some(), "every level has a share");
    let words = match coder.into_compressed() {
        Ok(words) => words.into_iter().flat_map(u32::to_le_bytes).collect(),
    };
    Shared { lowest, shares: shares.into_iter().flat_map(u16::to_le_bytes).collect(), words }
}

/// The `count` levels behind `coded`. Allocates `count` bytes, the decoder's table and a copy of what came.
pub(crate) fn decode(coded: &Shared, count: usize) -> Result<Vec<i8>, Malformed> {
    let (shares, rest) = coded.shares.as_chunks::<2>();
    let highest = i64::from(coded.lowest) + shares.len() as i64 - 1;
    if !rest.is_empty() || !(-127..=-1).contains(&coded.lowest) || !(1..=127).contains(&highest) {
        return Err(Malformed);
    }
    let shares: Vec<u16> = shares.iter().map(|share| u16::from_le_bytes(*share)).collect();
    let model = model(&shares).ok_or(Malformed)?.to_lookup_decoder_model();
    let (words, rest) = coded.words.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(Malformed);
    }
    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let mut coder = DefaultAnsCoder::from_compressed(words).map_err(|_| Malformed)?;
    let mut levels = Vec::with_capacity(count);
    for symbol in coder.decode_iid_symbols(count, model.as_view()) {
        match symbol {
            Ok(symbol) => levels.push((i16::from(coded.lowest) + symbol as i16) as i8),
        }
    }
    // An encoder starts empty, so an honest message is used up by its last level.
    if coder.is_empty() { Ok(levels) } else { Err(Malformed) }
}

/// Counts as shares: rounded down but to 1 at least; the most frequent level takes what is left or owed. It can: at
/// most 255 levels are owed 1 each, and were it so small that this is too much, none would have been rounded up.
fn shares(levels: &[i8], lowest: i8, highest: i8) -> Vec<u16> {
    let mut counts = [0_u64; 256];
    for level in levels {
        counts[usize::from(level.cast_unsigned() ^ 0x80)] += 1;
    }
    let place = |level: i8| usize::from(level.cast_unsigned() ^ 0x80);
    let counts = counts.get(place(lowest)..=place(highest)).unwrap_or_default();
    let total = (levels.len() as u64).max(1);
    let mut shares: Vec<u16> =
        counts.iter().map(|count| (count * u64::from(WHOLE) / total).max(1) as u16).collect();
    let sum: u32 = shares.iter().map(|share| u32::from(*share)).sum();
    // Of equally frequent ones the lowest level.
    let most = counts.iter().enumerate().rev().max_by_key(|(_, count)| **count).map_or(0, |(place, _)| place);
    if let Some(most) = shares.get_mut(most) {
        *most = (u32::from(*most) + u32::from(WHOLE) - sum) as u16;
    }
    shares
}

/// `None` unless no share is 0 and together they are whole: the constructor's own checks wrap around.
fn model(shares: &[u16]) -> Option<Model> {
    let sum: u32 = shares.iter().map(|share| u32::from(*share)).sum();
    if shares.contains(&0) || sum != u32::from(WHOLE) {
        return None;
    }
    Model::from_nonzero_fixed_point_probabilities(shares, false).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn whole(shares: &[u16]) -> bool {
        !shares.contains(&0) && shares.iter().map(|share| u32::from(*share)).sum::<u32>() == 1 << 14
    }

    fn bytes(shares: &[u16]) -> Vec<u8> {
        shares.iter().flat_map(|share| share.to_le_bytes()).collect()
    }

    proptest! {
        #[test]
        fn levels_round_trip(levels in prop::collection::vec(-127_i8..=127, 0..600), narrow in 0_u32..7) {
            let levels: Vec<i8> = levels.iter().map(|level| level >> narrow).collect();
            let coded = encode(&levels);
            prop_assert_eq!(decode(&coded, levels.len()), Ok(levels));
        }

        /// Many levels that come once beside some that come often: what rounding up owes is largest.
        #[test]
        fn shares_are_whole(often in 0_usize..60, times in 1_usize..3000, rare in 0_usize..255) {
            let mut levels: Vec<i8> = (0..rare).map(|place| (place as i16 - 127) as i8).collect();
            levels.extend((0..often).flat_map(|place| std::iter::repeat_n(place as i8, times)));
            let shares = shares(&levels, -127, 127);
            prop_assert!(whole(&shares), "{shares:?}");
            prop_assert_eq!(decode(&encode(&levels), levels.len()), Ok(levels));
        }

        #[test]
        fn arbitrary_tables_and_words_never_panic(
            lowest: i8,
            mut shares in prop::collection::vec(1_u16..4000, 0..300),
            whole: bool,
            words: Vec<u8>,
            count in 0_usize..500,
        ) {
            let rest = shares.iter().try_fold(1_u16 << 14, |rest, share| rest.checked_sub(*share));
            if let Some(rest) = rest.filter(|_| whole) {
                shares.push(rest);
            }
            let _ = decode(&Shared { lowest, shares: bytes(&shares), words }, count);
        }
    }

    #[test]
    fn levels_of_one_kind_take_no_room() {
        for level in [-127, -1, 0, 1, 127] {
            let levels = vec![level; 10_000];
            let coded = encode(&levels);
            assert!(coded.words.len() <= 300, "{} bytes for one kind of level", coded.words.len());
            assert_eq!(decode(&coded, levels.len()), Ok(levels));
        }
    }

    #[test]
    fn coding_is_at_the_entropy() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        // A sum of six even draws is near enough to normal; its deviation is 1.4 steps.
        let mut draw = || (0..6).map(|_| random.random_range(-1.0..1.0_f64)).sum::<f64>();
        let levels: Vec<i8> = (0..1 << 18).map(|_| draw().round() as i8).collect();
        let mut counts = [0_u32; 256];
        for level in &levels {
            counts[(i16::from(*level) + 128) as usize] += 1;
        }
        let share = |count: u32| f64::from(count) / levels.len() as f64;
        let entropy: f64 = counts
            .into_iter()
            .filter(|count| *count > 0)
            .map(|count| -f64::from(count) * share(count).log2() / 8.0)
            .sum();
        let coded = encode(&levels).words.len() as f64;
        println!("{:.4} of the entropy", coded / entropy);
        assert!(coded < entropy * 1.002, "{coded} bytes, entropy {entropy}");
    }

    #[test]
    fn tables_that_are_not_whole_are_refused() {
        let honest = encode(&[-2, 0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(decode(&honest, 8), Ok(vec![-2, 0, 0, 1, 0, 2, 0, 0]));
        let refused = |change: &dyn Fn(&mut Shared)| {
            let mut coded = honest.clone();
            change(&mut coded);
            assert_eq!(decode(&coded, 8), Err(Malformed), "{coded:?}");
        };
        refused(&|coded| coded.lowest = 0);
        refused(&|coded| coded.lowest = -128);
        refused(&|coded| coded.lowest = 126);
        refused(&|coded| coded.shares.clear());
        refused(&|coded| coded.shares.push(0));
        refused(&|coded| coded.shares = bytes(&[1 << 14]));
        refused(&|coded| coded.shares = bytes(&[0, 1 << 13, 1 << 13]));
        refused(&|coded| coded.shares = bytes(&[1, 1 << 13, 1 << 13]));
        refused(&|coded| coded.shares = bytes(&[1 << 14; 5]));
        // 2¹⁶ more than the whole: a sum that wraps around would pass.
        refused(&|coded| coded.shares = bytes(&[1 << 14, 1 << 14, 1 << 14, 1 << 14, 1 << 14]));
        refused(&|coded| coded.shares = bytes(&[64; 256]));
        refused(&|coded| coded.words.push(0));
        refused(&|coded| coded.words.extend([1, 0, 0, 0]));
    }
}
