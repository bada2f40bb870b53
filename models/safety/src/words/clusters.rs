//! Words by meaning: a table that puts each of many common words into clusters of words that stand in like places of
//! other texts, so that a word which no training row had counts as those that some had ("cyanide" as "arsenic").
//!
//! Clusters of word vectors as features of a linear classifier: Turian et al. 2010. A word has a cluster at each of three
//! levels, from coarse to fine. A text's pieces are these, and the middle clusters of two words that follow each other, or
//! have one word between them. Beside `pieces.rs` under `words.rs`; `cluster_words.py` of the reference model makes the
//! table from public vectors.

use std::{collections::BTreeMap, fmt};

use super::{murmur, pieces};

/// Clusters of a word: its coarse one, its middle one, its fine one.
pub const LEVELS: usize = 3;
/// The level whose clusters are looked at two by two: finer ones seldom meet again.
const PAIRED: usize = 1;
/// How far the two may be apart.
const DISTANCE_MAX: usize = 2;
/// Most words of a table. 60,000 are nine tenths of the words of English requests; twice as many add one in a hundred.
pub const CLUSTERED_MAX: usize = 1 << 17;

/// Words, by their hashes in ascending order, and the clusters of each.
#[derive(Clone, PartialEq)]
pub struct Clusters {
    pub(super) words: Vec<u32>,
    pub(super) of: Vec<[u16; LEVELS]>,
}

impl Clusters {
    /// A table of words with their clusters. Of two words with one hash the first stays. `None` where there are no words
    /// or more than [`CLUSTERED_MAX`].
    pub fn of<'w>(words: impl IntoIterator<Item = (&'w str, [u16; LEVELS])>) -> Option<Self> {
        let mut table = BTreeMap::new();
        for (word, clusters) in words {
            table.entry(murmur::hash(word.as_bytes())).or_insert(clusters);
            if table.len() > CLUSTERED_MAX {
                return None;
            }
        }
        let (words, of): (Vec<u32>, Vec<[u16; LEVELS]>) = table.into_iter().unzip();
        (!words.is_empty()).then_some(Self { words, of })
    }

    /// The clusters of a word; of "bomb's" those of "bomb".
    fn find(&self, word: &str) -> Option<[u16; LEVELS]> {
        let exact = |word: &str| {
            let at = self.words.binary_search(&murmur::hash(word.as_bytes())).ok()?;
            self.of.get(at).copied()
        };
        exact(word).or_else(|| word.split_once('\'').and_then(|(stem, _)| exact(stem)))
    }

    /// How often each bucket occurs among the clusters of `words`. `buckets` is a power of two.
    pub(super) fn counts(&self, words: &[String], buckets: usize) -> BTreeMap<usize, u32> {
        let found: Vec<Option<[u16; LEVELS]>> = words.iter().map(|word| self.find(word)).collect();
        let mut counts = BTreeMap::new();
        let mut add = |piece: &str| *counts.entry(pieces::bucket(piece, buckets)).or_insert(0) += 1;
        for clusters in found.iter().flatten() {
            for (level, cluster) in clusters.iter().enumerate() {
                add(&format!("k{level} {cluster}"));
            }
        }
        // A word that is in no cluster keeps its place.
        let name = |found: &Option<[u16; LEVELS]>| found.map_or("?".to_owned(), |of| of[PAIRED].to_string());
        let names: Vec<String> = found.iter().map(name).collect();
        for distance in 1..=DISTANCE_MAX {
            for (first, second) in names.iter().zip(names.iter().skip(distance)) {
                add(&format!("n{distance} {first} {second}"));
            }
        }
        counts
    }
}

impl fmt::Debug for Clusters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clusters").field("words", &self.words.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clusters() -> Clusters {
        Clusters::of([("cyanide", [1, 2, 3]), ("arsenic", [1, 2, 3]), ("tea", [4, 5, 6]), ("tea", [7, 7, 7])])
            .unwrap()
    }

    fn counts(text: &str) -> BTreeMap<usize, u32> {
        clusters().counts(&pieces::words(text), 1 << 16)
    }

    #[test]
    fn words_of_one_cluster_count_alike_and_others_keep_their_place() {
        assert_eq!(counts("cyanide in tea"), counts("arsenic's of tea"));
        assert_ne!(counts("cyanide in tea"), counts("tea in cyanide"));
        // Three levels of two words; two neighbours and one pair at a distance.
        assert_eq!(counts("cyanide in tea").values().sum::<u32>(), 2 * 3 + 2 + 1);
        assert_eq!(counts("in").values().sum::<u32>(), 0);
        assert!(counts("").is_empty());
    }

    #[test]
    fn a_table_has_words_in_order_and_not_too_many() {
        let table = clusters();
        assert!(table.words.is_sorted() && table.words.len() == 3);
        assert_eq!(table.find("tea"), Some([4, 5, 6]));
        assert!(Clusters::of([]).is_none());
        let names: Vec<String> = (0..=CLUSTERED_MAX + 100).map(|i| i.to_string()).collect();
        assert!(Clusters::of(names.iter().map(|name| (name.as_str(), [0; LEVELS]))).is_none());
    }
}
