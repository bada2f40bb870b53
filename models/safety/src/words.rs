//! The words of a text as a second witness beside the model: a linear classifier over hashed pieces of words.
//!
//! A small model forgets rare words, and remembers how its training rows were framed; this one knows nothing but which
//! words and pieces of words went with harm, and, with a table of clusters, which meanings did. `guard.rs` adds what both
//! say. Flow: `pieces.rs` counts, and `clusters.rs` → for each a vector of length 1, counts damped and rare pieces weighted up
//! (tf–idf, Salton and Buckley 1988) → their product with learned weights. `train-reference words` learns them, `file.rs`
//! reads and writes them.

use std::{collections::BTreeMap, fmt};

use crate::guard::Pair;

mod murmur;
mod pieces;
mod clusters;
mod file;

pub use clusters::{CLUSTERED_MAX, Clusters, LEVELS};
pub use file::{WordsError, WordsFileError};

/// Fewest and most buckets. 65,536 cost 64 kB a table; more did not find more.
pub const BUCKETS: std::ops::RangeInclusive<usize> = 256..=1 << 17;
/// The weight of a table's largest number.
const LEVEL_MAX: f32 = 127.0;

/// Which pieces are rare: the scale of every bucket, in steps of `scale`. The buckets of words by meaning, where there are
/// clusters, stand behind those of pieces of words, and are as many.
#[derive(Clone, PartialEq)]
pub struct Vocabulary {
    buckets: usize,
    clusters: Option<Clusters>,
    rarity: Vec<u8>,
    scale: f32,
}

/// One linear score: what each bucket says for harm, in steps of `scale`, and what is said before any word is read.
#[derive(Clone, PartialEq)]
pub struct Head {
    weights: Vec<i8>,
    scale: f32,
    bias: f32,
}

/// What a prompt's words say, and what those of a prompt with its response say.
#[derive(Clone, PartialEq, Debug)]
pub struct Words {
    vocabulary: Vocabulary,
    /// Over a prompt: whether it asks for harm.
    prompt: Head,
    /// Over a prompt with a response, that of the prompt's words.
    pair_prompt: Head,
    /// And that of the response's.
    pair_response: Head,
}

/// The log-odds of harm by the words alone; 0 where there are none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spoken {
    /// Of the prompt by itself.
    pub prompt: f64,
    /// Of the prompt and its response together; 0 without a response.
    pub pair: f64,
}

/// A vector by its columns: of length 1, and one more of length 1 by meaning; empty for a text without words.
pub type Sparse = Vec<(usize, f32)>;

impl Vocabulary {
    /// Rarity of every bucket among `texts`: ln((1 + texts) / (1 + texts with the bucket)) + 1. `None` where `buckets`
    /// is no power of two in [`BUCKETS`].
    pub fn of<'t>(
        texts: impl IntoIterator<Item = &'t str>,
        buckets: usize,
        clusters: Option<Clusters>,
    ) -> Option<Self> {
        if !BUCKETS.contains(&buckets) || !buckets.is_power_of_two() {
            return None;
        }
        let columns = columns(buckets, clusters.as_ref());
        let mut vocabulary = Self { buckets, clusters, rarity: vec![1; columns], scale: 1.0 };
        // The last text that had a bucket, so that each counts once.
        let (mut total, mut containing, mut last) = (0_u32, vec![0_u32; columns], vec![0_u32; columns]);
        for text in texts {
            total += 1;
            let words = pieces::words(text);
            for bucket in pieces::windows(&words).flat_map(|window| vocabulary.counted(window)).flatten() {
                let bucket = bucket.0;
                if last[bucket] != total {
                    (last[bucket], containing[bucket]) = (total, containing[bucket] + 1);
                }
            }
        }
        let rarity = |count: &u32| ((1.0 + f64::from(total)) / (1.0 + f64::from(*count))).ln() as f32 + 1.0;
        let rarity: Vec<f32> = containing.iter().map(rarity).collect();
        vocabulary.scale = rarity.iter().fold(0.0, |most: f32, one| most.max(*one)) / f32::from(u8::MAX);
        vocabulary.rarity = rarity.iter().map(|one| (one / vocabulary.scale).round() as u8).collect();
        Some(vocabulary)
    }

    /// How many numbers a vector has: the buckets, twice where there are clusters.
    pub fn columns(&self) -> usize {
        self.rarity.len()
    }

    /// A vector for each window of a text; none for a text without words.
    pub fn vectors(&self, text: &str) -> Vec<Sparse> {
        let words = pieces::words(text);
        pieces::windows(&words).map(|window| self.vector(window)).collect()
    }

    fn vector(&self, window: &[String]) -> Sparse {
        self.counted(window).into_iter().flat_map(|counts| self.weighed(counts)).collect()
    }

    /// How often each bucket of pieces occurs, and each of clusters.
    fn counted(&self, window: &[String]) -> Vec<BTreeMap<usize, u32>> {
        let behind = |counts: BTreeMap<usize, u32>| -> BTreeMap<usize, u32> {
            counts.into_iter().map(|(bucket, count)| (bucket + self.buckets, count)).collect()
        };
        let clusters = self.clusters.iter().map(|clusters| behind(clusters.counts(window, self.buckets)));
        std::iter::once(pieces::counts(window, self.buckets)).chain(clusters).collect()
    }

    /// Counts as numbers of a vector of length 1.
    fn weighed(&self, counts: BTreeMap<usize, u32>) -> Sparse {
        let weighed = |(bucket, count): (usize, u32)| {
            let damped = 1.0 + f64::from(count).ln();
            (bucket, (damped * f64::from(self.scale) * f64::from(self.rarity[bucket])) as f32)
        };
        let mut vector: Sparse = counts.into_iter().map(weighed).collect();
        let length = vector.iter().map(|(_, value)| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        if length > 0.0 {
            for (_, value) in &mut vector {
                *value = (f64::from(*value) / length) as f32;
            }
        }
        vector
    }
}

/// Numbers of a vector.
const fn columns(buckets: usize, clusters: Option<&Clusters>) -> usize {
    if clusters.is_some() { 2 * buckets } else { buckets }
}

impl Head {
    /// Rounds weights to 8 bits. `None` where one is not finite.
    pub fn of(weights: &[f32], bias: f32) -> Option<Self> {
        let largest = weights.iter().fold(0.0, |most: f32, weight| most.max(weight.abs()));
        if !bias.is_finite() || weights.iter().any(|weight| !weight.is_finite()) {
            return None;
        }
        let scale = if largest > 0.0 { largest / LEVEL_MAX } else { 1.0 };
        let weights = weights.iter().map(|weight| (weight / scale).round() as i8).collect();
        Some(Self { weights, scale, bias })
    }

    fn product(&self, vector: &Sparse) -> f64 {
        let sum: f64 =
            vector.iter().map(|(bucket, value)| f64::from(self.weights[*bucket]) * f64::from(*value)).sum();
        sum * f64::from(self.scale)
    }
}

impl Words {
    /// Puts the parts together. `None` where their numbers of columns differ.
    pub fn of(vocabulary: Vocabulary, prompt: Head, pair_prompt: Head, pair_response: Head) -> Option<Self> {
        let columns = vocabulary.columns();
        let fits = [&prompt, &pair_prompt, &pair_response].iter().all(|head| head.weights.len() == columns);
        fits.then_some(Self { vocabulary, prompt, pair_prompt, pair_response })
    }

    /// What the words of a pair say. Of texts longer than a window the worst windows count, so that harm cannot hide
    /// among harmless words.
    pub fn say(&self, pair: Pair<'_>) -> Spoken {
        let prompt = self.worst(pair.prompt, [&self.prompt, &self.pair_prompt]);
        let response = pair.response.and_then(|response| self.worst(response, [&self.pair_response]));
        let alone = prompt.map_or(0.0, |[alone, _]| alone + f64::from(self.prompt.bias));
        // Without a word of the response nothing is known about the pair.
        let together = response.map_or(0.0, |[response]| {
            prompt.map_or(0.0, |[_, prompt]| prompt) + response + f64::from(self.pair_response.bias)
        });
        Spoken { prompt: alone, pair: together }
    }

    /// Each head's largest product with a window of the text; one window is in memory at a time.
    fn worst<const HEADS: usize>(&self, text: &str, heads: [&Head; HEADS]) -> Option<[f64; HEADS]> {
        let words = pieces::words(text);
        let products = pieces::windows(&words).map(|window| {
            let vector = self.vocabulary.vector(window);
            heads.map(|head| head.product(&vector))
        });
        products.reduce(|worst, one| std::array::from_fn(|head| worst[head].max(one[head])))
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary")
            .field("buckets", &self.buckets)
            .field("clusters", &self.clusters)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Head").field("bias", &self.bias).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// Written by `tests/golden_words.py` (scikit-learn).
    const MODEL: &[u8] = include_bytes!("../tests/data/golden.words");
    const GOLDEN: &str = include_str!("../tests/data/golden_words.json");
    /// The same with clusters.
    const CLUSTERED: &[u8] = include_bytes!("../tests/data/golden_clusters.words");
    const GOLDEN_CLUSTERED: &str = include_str!("../tests/data/golden_clusters.json");

    #[derive(Deserialize)]
    struct Golden {
        prompt: String,
        response: Option<String>,
        alone: f64,
        together: f64,
    }

    #[test]
    fn scores_agree_with_scikit_learn() {
        for (model, golden) in [(MODEL, GOLDEN), (CLUSTERED, GOLDEN_CLUSTERED)] {
            let words = Words::read(model).unwrap();
            let golden: Vec<Golden> = serde_json::from_str(golden).unwrap();
            for row in golden {
                let spoken = words.say(Pair { prompt: &row.prompt, response: row.response.as_deref() });
                let off = (spoken.prompt - row.alone).abs().max((spoken.pair - row.together).abs());
                let Golden { prompt, alone, together, .. } = row;
                assert!(off < 1e-5, "{prompt:?}: {spoken:?}, expected {alone} and {together}");
            }
        }
    }

    #[test]
    fn an_unseen_word_counts_as_those_of_its_cluster() {
        let say =
            |model, prompt: &str| Words::read(model).unwrap().say(Pair { prompt, response: None }).prompt;
        // "cyanide" was in no training row, "poison" was, and the table has both in one cluster.
        let told = |model| say(model, "cyanide") - say(model, "oatmeal");
        assert!(told(CLUSTERED) > told(MODEL) + 0.3, "{} {}", told(CLUSTERED), told(MODEL));
    }

    #[test]
    fn no_text_says_nothing_and_harm_does_not_hide_in_a_long_one() {
        let words = Words::read(MODEL).unwrap();
        let say = |prompt: &str| words.say(Pair { prompt, response: None }).prompt;
        assert_eq!(words.say(Pair { prompt: " …", response: Some("") }), Spoken { prompt: 0.0, pair: 0.0 });
        let harmless = "feed the dog and boil the water ".repeat(40);
        let hidden = format!("{harmless} poison passwords poison passwords {harmless}");
        assert!(say(&hidden) > say(&harmless) + 0.01, "{} {}", say(&hidden), say(&harmless));
        assert!(say(&"犬に毒 ".repeat(100_000)).is_finite());
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let texts = || ["a", "b"];
        assert!(Vocabulary::of(texts(), 300, None).is_none() && Vocabulary::of(texts(), 0, None).is_none());
        assert!(Head::of(&[f32::NAN], 0.0).is_none() && Head::of(&[0.0], f32::INFINITY).is_none());
        let head = |buckets: usize| Head::of(&vec![0.0; buckets], 1.0).unwrap();
        let vocabulary = Vocabulary::of(texts(), 256, None).unwrap();
        let clustered = Vocabulary::of(texts(), 256, Clusters::of([("a", [0; LEVELS])])).unwrap();
        assert_eq!((vocabulary.columns(), clustered.columns()), (256, 512));
        assert!(Words::of(clustered, head(256), head(256), head(256)).is_none());
        assert!(Words::of(vocabulary.clone(), head(256), head(256), head(512)).is_none());
        let words = Words::of(vocabulary, head(256), head(256), head(256)).unwrap();
        let spoken = words.say(Pair { prompt: "a", response: Some("b") });
        assert_eq!(spoken, Spoken { prompt: 1.0, pair: 1.0 });
    }
}
