//! No evaluation prompt and nothing close to one may be in a training set: MinHash signatures of three-word runs (Broder
//! 1997) estimate the Jaccard similarity of every pair, and one pair that is too close ends the run with its name.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

/// From this estimate on two texts count as one.
const NEAR: f64 = 0.8;
/// Values of a signature: the estimate's standard error is at most 1 / (2 · √256) = 0.03.
const HASHES: usize = 256;
/// Words of a run.
const RUN: usize = 3;

/// A text with its signature.
struct Signed<'t> {
    place: &'t str,
    text: &'t str,
    signature: [u32; HASHES],
}

/// Texts of one set, under its name.
pub(crate) type Named = (String, String);

/// Fails with the closest pair if an evaluation text is near a training text. Gives how many pairs were compared.
pub(crate) fn check(training: &[Named], evaluation: &[Named]) -> Result<u64> {
    let training = sign(training);
    let evaluation = sign(evaluation);
    let mut pairs = 0;
    for asked in &evaluation {
        for trained in &training {
            pairs += 1;
            let similarity = similarity(&asked.signature, &trained.signature);
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
    texts.iter().map(|(place, text)| Signed { place, text, signature: signature(text) }).collect()
}

/// The least value of each hash over the text's runs of words.
fn signature(text: &str) -> [u32; HASHES] {
    let lower = text.to_lowercase();
    let words: Vec<&str> =
        lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
    let runs: BTreeSet<String> = match words.len() {
        0..=RUN => BTreeSet::from([words.join(" ")]),
        _ => words.windows(RUN).map(|run| run.join(" ")).collect(),
    };
    let mut signature = [u32::MAX; HASHES];
    for run in runs {
        let mut bytes = [0; HASHES * 4];
        blake3::Hasher::new().update(run.as_bytes()).finalize_xof().fill(&mut bytes);
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
    fn the_estimate_is_near_the_true_similarity() {
        let words: Vec<String> = (0..40).map(|word| format!("w{word}")).collect();
        // 38 and 28 runs, 28 shared: 28 / 38.
        let (left, right) = (signature(&words.join(" ")), signature(&words[..30].join(" ")));
        assert!((similarity(&left, &right) - 28.0 / 38.0).abs() < 0.1);
    }
}
