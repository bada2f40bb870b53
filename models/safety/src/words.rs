//! The words of a text as a second witness beside the model: a linear classifier over hashed pieces of words.
//!
//! A small model forgets rare words, and remembers how its training rows were framed; this one knows nothing but which
//! words and pieces of words went with harm. `guard.rs` adds what both say. Flow: `pieces.rs` counts → a vector of length 1,
//! counts damped and rare pieces weighted up (tf–idf, Salton and Buckley 1988) → its product with learned weights.
//! `train-reference words` learns them, `file.rs` reads and writes them.

use std::{collections::BTreeSet, fmt};

use crate::guard::Pair;

mod murmur;
mod pieces;
mod file;

pub use file::{WordsError, WordsFileError};

/// Fewest and most buckets. 65,536 cost 64 kB a table; more did not find more.
pub const BUCKETS: std::ops::RangeInclusive<usize> = 256..=1 << 17;
/// The weight of a table's largest number.
const LEVEL_MAX: f32 = 127.0;

/// Which pieces are rare: the scale of every bucket, in steps of `scale`.
#[derive(Clone, PartialEq)]
pub struct Vocabulary {
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

/// A vector by its buckets, of length 1; empty for a text without words.
pub type Sparse = Vec<(usize, f32)>;

impl Vocabulary {
    /// Rarity of every bucket among `texts`: ln((1 + texts) / (1 + texts with the bucket)) + 1. `None` where `buckets`
    /// is no power of two in [`BUCKETS`].
    pub fn of<'t>(texts: impl IntoIterator<Item = &'t str>, buckets: usize) -> Option<Self> {
        if !BUCKETS.contains(&buckets) || !buckets.is_power_of_two() {
            return None;
        }
        let (mut total, mut containing) = (0_u32, vec![0_u32; buckets]);
        for text in texts {
            total += 1;
            let words = pieces::words(text);
            let found: BTreeSet<usize> = pieces::windows(&words)
                .flat_map(|window| pieces::counts(window, buckets).into_keys())
                .collect();
            for bucket in found {
                containing[bucket] += 1;
            }
        }
        let rarity = |count: &u32| ((1.0 + f64::from(total)) / (1.0 + f64::from(*count))).ln() as f32 + 1.0;
        let rarity: Vec<f32> = containing.iter().map(rarity).collect();
        let scale = rarity.iter().fold(0.0, |most: f32, one| most.max(*one)) / f32::from(u8::MAX);
        let rarity = rarity.iter().map(|one| (one / scale).round() as u8).collect();
        Some(Self { rarity, scale })
    }

    /// How many buckets there are.
    pub fn buckets(&self) -> usize {
        self.rarity.len()
    }

    /// A vector for each window of a text; none for a text without words.
    pub fn vectors(&self, text: &str) -> Vec<Sparse> {
        let words = pieces::words(text);
        pieces::windows(&words).map(|window| self.vector(window)).collect()
    }

    fn vector(&self, window: &[String]) -> Sparse {
        let counts = pieces::counts(window, self.buckets());
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
    /// Puts the parts together. `None` where their numbers of buckets differ.
    pub fn of(vocabulary: Vocabulary, prompt: Head, pair_prompt: Head, pair_response: Head) -> Option<Self> {
        let buckets = vocabulary.buckets();
        let fits = [&prompt, &pair_prompt, &pair_response].iter().all(|head| head.weights.len() == buckets);
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
        f.debug_struct("Vocabulary").field("buckets", &self.buckets()).finish_non_exhaustive()
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

    #[derive(Deserialize)]
    struct Golden {
        prompt: String,
        response: Option<String>,
        alone: f64,
        together: f64,
    }

    #[test]
    fn scores_agree_with_scikit_learn() {
        let words = Words::read(MODEL).unwrap();
        let golden: Vec<Golden> = serde_json::from_str(GOLDEN).unwrap();
        for row in golden {
            let spoken = words.say(Pair { prompt: &row.prompt, response: row.response.as_deref() });
            let close = |got: f64, expected: f64| (got - expected).abs() < 1e-5;
            assert!(close(spoken.prompt, row.alone), "{:?}: {spoken:?}, expected {}", row.prompt, row.alone);
            assert!(
                close(spoken.pair, row.together),
                "{:?}: {spoken:?}, expected {}",
                row.prompt,
                row.together
            );
        }
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
        assert!(Vocabulary::of(texts(), 300).is_none() && Vocabulary::of(texts(), 0).is_none());
        assert!(Head::of(&[f32::NAN], 0.0).is_none() && Head::of(&[0.0], f32::INFINITY).is_none());
        let head = |buckets: usize| Head::of(&vec![0.0; buckets], 1.0).unwrap();
        let vocabulary = Vocabulary::of(texts(), 256).unwrap();
        assert!(Words::of(vocabulary.clone(), head(256), head(256), head(512)).is_none());
        let words = Words::of(vocabulary, head(256), head(256), head(256)).unwrap();
        let spoken = words.say(Pair { prompt: "a", response: Some("b") });
        assert_eq!(spoken, Spoken { prompt: 1.0, pair: 1.0 });
    }
}
