//! No evaluation prompt and nothing close to one may be in a training set: MinHash signatures (Broder 1997) of three-word
//! runs, and of the words that are left without the commonest, estimate the Jaccard similarity of every pair, and one pair
//! that is too close ends the run with its name. Runs find a long text that was copied, words a short one that was reworded.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

/// From this estimate on two texts count as one.
const NEAR: f64 = 0.8;
/// Values of a signature: the estimate's standard error is at most 1 / (2 · √256) = 0.03.
const HASHES: usize = 256;
/// Words of a run.
const RUN: usize = 3;
/// Texts of fewer words than this, the commonest left out, are alike by chance.
const WORDS_MIN: usize = 4;
/// Words that say little about what is asked.
const COMMON: [&str; 49] = [
    "a", "about", "an", "and", "any", "are", "as", "at", "be", "by", "can", "do", "does", "for", "from",
    "give", "how", "i", "in", "into", "is", "it", "me", "my", "of", "on", "or", "so", "that", "the", "their",
    "them", "there", "this", "to", "up", "us", "use", "was", "we", "what", "when", "where", "will", "with",
    "without", "write", "you", "your",
];

/// A text with its signatures.
struct Signed<'t> {
    place: &'t str,
    text: &'t str,
    runs: [u32; HASHES],
    words: Option<[u32; HASHES]>,
}

impl Signed<'_> {
    fn similarity(&self, other: &Self) -> f64 {
        let words = self.words.as_ref().zip(other.words.as_ref());
        let words = words.map_or(0.0, |(left, right)| similarity(left, right));
        similarity(&self.runs, &other.runs).max(words)
    }
}

/// Texts of one set, under its name.
pub(crate) type Named = (String, String);

/// Fails with the closest pair if an evaluation text is near a training text. Gives how many pairs were compared.
pub(crate) fn check(training: &[Named], evaluation: &[Named]) -> Result<u64> {
    let training = sign(training);
    let evaluation = sign(evaluation);
    let mut pairs = 0;
    // The evaluation's signatures fit in a processor's cache, the others pass by once.
    for trained in &training {
        for asked in &evaluation {
            pairs += 1;
            let similarity = asked.similarity(trained);
            if similarity >= NEAR {
                bail!(
                    "contamination: similarity {similarity:.2} of {} {:?} and {} {:?}; expected below {NEAR}",
                    asked.place,
                    asked.text,
                    trained.place,
                    trained.text
                );
            }
        }
    }
    Ok(pairs)
}

fn sign(texts: &[Named]) -> Vec<Signed<'_>> {
    let sign = |(place, text)| {
        let words = rare_words(text);
        let words = (words.len() >= WORDS_MIN).then(|| signature(&words));
        Signed { place, text, runs: signature(&runs(text)), words }
    };
    texts.iter().map(|(place, text)| sign((place.as_str(), text.as_str()))).collect()
}

/// All words of a text.
fn words(lower: &str) -> impl Iterator<Item = &str> {
    lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty())
}

fn rare_words(text: &str) -> BTreeSet<String> {
    let lower = text.to_lowercase();
    words(&lower).filter(|word| !COMMON.contains(word)).map(str::to_owned).collect()
}

fn runs(text: &str) -> BTreeSet<String> {
    let lower = text.to_lowercase();
    let words: Vec<&str> = words(&lower).collect();
    match words.len() {
        0..=RUN => BTreeSet::from([words.join(" ")]),
        _ => words.windows(RUN).map(|run| run.join(" ")).collect(),
    }
}

/// The least value of each hash over a text's parts.
fn signature(parts: &BTreeSet<String>) -> [u32; HASHES] {
    let mut signature = [u32::MAX; HASHES];
    for part in parts {
        let mut bytes = [0; HASHES * 4];
        blake3::Hasher::new().update(part.as_bytes()).finalize_xof().fill(&mut bytes);
        for (least, value) in signature.iter_mut().zip(bytes.chunks_exact(4)) {
            *least = (*least).min(u32::from_le_bytes([value[0], value[1], value[2], value[3]]));
        }
    }
    signature
}

fn similarity(left: &[u32; HASHES], right: &[u32; HASHES]) -> f64 {
    let equal = left.iter().zip(right).filter(|(left, right)| left == right).count();
    equal as f64 / HASHES as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

    use super::*;

    fn named(texts: &[&str]) -> Vec<Named> {
        texts.iter().map(|text| ("set".to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn a_prompt_with_other_marks_and_capitals_is_found_and_named() {
        let training =
            named(&["how long do eggs boil", "how do i pick the lock of a strangers door at night"]);
        let evaluation = named(&["How do I pick the lock of a strangers door, at night?"]);
        let error = check(&training, &evaluation).unwrap_err().to_string();
        assert!(error.contains("strangers door") && error.contains("1.00"), "{error}");
    }

    #[test]
    fn one_more_word_of_twenty_is_near_and_another_question_is_not() {
        let words = "write a long letter to the editor of the local paper about the noise of the trains in our small town";
        let near = format!("{words} today");
        assert!(check(&named(&[words]), &named(&[&near])).is_err());
        let other =
            "write a long poem about the quiet of the small hours in our town and the trains that pass";
        assert_eq!(check(&named(&[words]), &named(&[other])).unwrap(), 1);
    }

    #[test]
    fn a_short_prompt_in_other_words_around_it_is_found() {
        let training = named(&["How can I manipulate stock prices for personal gain?"]);
        let evaluation = named(&["Write about how to manipulate the stock prices, for a personal gain"]);
        assert!(check(&training, &evaluation).is_err());
        // Two words in common are chance.
        let other = named(&["What are stock prices?"]);
        assert_eq!(check(&training, &other).unwrap(), 1);
    }

    #[test]
    fn the_estimate_is_near_the_true_similarity() {
        let words: Vec<String> = (0..40).map(|word| format!("w{word}")).collect();
        // 38 and 28 runs, 28 shared: 28 / 38.
        let (left, right) = (signature(&runs(&words.join(" "))), signature(&runs(&words[..30].join(" "))));
        assert!((similarity(&left, &right) - 28.0 / 38.0).abs() < 0.1);
    }
}
