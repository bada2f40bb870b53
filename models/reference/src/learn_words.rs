//! Guard rows → a model of words (`commonweal_safety::Words`), fitted by `linear.rs`.
//!
//! One score from the prompts that stand alone, one from pairs over the words of prompt and response side by side.
//! [`by_source`] says what each source would get from a model that never saw it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use clap::Args;
use commonweal_safety::{BUCKETS, Clusters, Head, Rate, Sparse, Vocabulary, Words};
use serde_json::{Value, json};

use crate::{
    disguise,
    linear::{Example, fit},
    rows::GuardRow,
    show::Progress,
};

/// False alarms among a development split's safe rows at which sources are compared.
const FALSE_ALARMS: f64 = 0.02;

/// How the words are learned.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct WordsRecipe {
    /// Buckets that pieces of words are hashed to, a power of two
    #[arg(long, default_value_t = 1 << 16)]
    buckets: usize,
    /// How closely the rows are fitted: the C of logistic regression
    #[arg(long, default_value_t = 4.0)]
    strength: f64,
    /// Share of the prompts alone that are learned in each disguise besides: letters as digits, typing errors, role play
    #[arg(long, default_value_t = 0.3)]
    disguises: f64,
}

/// A row's vectors.
struct Read {
    prompt: Sparse,
    response: Option<Sparse>,
}

/// Learns from rows, and with clusters of words of like meaning; the same of both give the same bytes.
pub(crate) fn learn_words(
    rows: &[GuardRow],
    clusters: Option<&Clusters>,
    recipe: WordsRecipe,
) -> Result<Words> {
    ensure!(recipe.strength > 0.0 && recipe.strength.is_finite(), "--strength must be above 0");
    ensure!((0.0..=1.0).contains(&recipe.disguises), "--disguises must be from 0 to 1");
    let disguised = disguise::disguised(rows, recipe.disguises);
    let rows: Vec<&GuardRow> = rows.iter().chain(&disguised).collect();
    let texts = rows.iter().flat_map(|row| [Some(row.prompt.as_str()), row.response.as_deref()]).flatten();
    let vocabulary = Vocabulary::of(texts, recipe.buckets, clusters.cloned()).with_context(|| {
        format!("--buckets must be a power of two in {BUCKETS:?}, got {}", recipe.buckets)
    })?;
    let columns = vocabulary.columns();
    let read: Vec<Read> = rows.iter().map(|row| read_row(&vocabulary, row)).collect();
    let examples = |with_response: bool| -> Result<Vec<Example>> {
        let chosen = rows.iter().zip(&read).filter(|(row, _)| row.response.is_some() == with_response);
        let examples: Vec<Example> = chosen
            .map(|(row, read)| Example { vector: read.joined(columns), is_unsafe: row.is_unsafe() })
            .collect();
        let positives = examples.iter().filter(|example| example.is_unsafe).count();
        let what = if with_response { "pairs" } else { "prompts alone" };
        ensure!(positives > 0 && positives < examples.len(), "rows must have safe and unsafe {what}");
        Ok(examples)
    };
    let prompt = fit(&examples(false)?, columns, recipe.strength);
    let pair = fit(&examples(true)?, 2 * columns, recipe.strength);
    let (pair_prompt, pair_response) = pair.weights.split_at(columns);
    let heads = [(prompt.weights.as_slice(), prompt.bias), (pair_prompt, 0.0), (pair_response, pair.bias)];
    let [Some(prompt), Some(pair_prompt), Some(pair_response)] = heads.map(|(weights, bias)| {
        let weights: Vec<f32> = weights.iter().map(|weight| *weight as f32).collect();
        Head::of(&weights, bias as f32)
    }) else {
        anyhow::bail!("learned weights are not finite");
    };
    Words::of(vocabulary, prompt, pair_prompt, pair_response).context("tables differ in size")
}

/// Training rows are short: what does not fit the first window is left out.
fn read_row(vocabulary: &Vocabulary, row: &GuardRow) -> Read {
    let first = |text: &str| vocabulary.vectors(text).into_iter().next().unwrap_or_default();
    Read { prompt: first(&row.prompt), response: row.response.as_deref().map(first) }
}

impl Read {
    /// The response's columns stand behind the prompt's.
    fn joined(&self, columns: usize) -> Sparse {
        let response = self.response.iter().flatten().map(|(at, value)| (at + columns, *value));
        self.prompt.iter().copied().chain(response).collect()
    }
}

/// For every source of `rows`: how many of its unsafe rows a model that was learned without it finds, and how many of
/// its safe ones it calls unsafe, at the threshold of 2 % false alarms on `dev`'s rows of the other sources.
pub(crate) fn by_source(
    rows: &[GuardRow],
    dev: &[GuardRow],
    clusters: Option<&Clusters>,
    recipe: WordsRecipe,
    progress: Progress,
) -> Result<Vec<Value>> {
    let sources: BTreeSet<&str> = rows.iter().map(source).collect();
    let bar = progress.bar(sources.len() as u64, 0);
    let mut table = Vec::new();
    for left_out in sources {
        let kept: Vec<GuardRow> = rows.iter().filter(|row| source(row) != left_out).cloned().collect();
        let words = learn_words(&kept, clusters, recipe)?;
        for with_response in [false, true] {
            let of_form = |row: &&GuardRow| row.response.is_some() == with_response;
            let safe = dev.iter().filter(of_form).filter(|row| source(row) != left_out && !row.is_unsafe());
            let threshold = threshold(safe.map(|row| score(&words, row)).collect());
            let (mut found, mut alarms) = (Rate::default(), Rate::default());
            for row in rows.iter().filter(of_form).filter(|row| source(row) == left_out) {
                let rate = if row.is_unsafe() { &mut found } else { &mut alarms };
                rate.add(score(&words, row) > threshold);
            }
            if found.total + alarms.total > 0 {
                table.push(json!({
                    "event": "left_out", "source": left_out, "form": if with_response { "pair" } else { "prompt" },
                    "found": found.value(), "unsafe_rows": found.total,
                    "false_alarms": alarms.value(), "safe_rows": alarms.total,
                }));
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(table)
}

fn source(row: &GuardRow) -> &str {
    row.source.as_deref().and_then(|source| source.split('/').next()).unwrap_or("all")
}

/// Both witnesses' words together, as the guard adds them.
fn score(words: &Words, row: &GuardRow) -> f64 {
    let spoken = words.say(row.pair());
    spoken.prompt + spoken.pair
}

/// What 2 % of the scores are above.
fn threshold(mut scores: Vec<f64>) -> f64 {
    scores.sort_by(f64::total_cmp);
    let above = (FALSE_ALARMS * scores.len() as f64) as usize;
    scores.iter().rev().nth(above).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<GuardRow> {
        let row = |prompt: &str, response: Option<&str>, label: &str, source: &str| {
            let row = json!({"prompt": prompt, "response": response, "label": label, "category": null, "source": source});
            serde_json::from_value(row).unwrap()
        };
        let mut rows = Vec::new();
        for (i, source) in ["a", "b", "a", "b"].into_iter().enumerate() {
            rows.push(row(&format!("how to poison dog {i}"), None, "unsafe", source));
            rows.push(row(&format!("how to feed dog {i}"), None, "safe", source));
            rows.push(row(&format!("how to poison dog {i}"), Some("sure, here is how"), "unsafe", source));
            rows.push(row(&format!("how to poison dog {i}"), Some("i will not help"), "safe", source));
        }
        rows
    }

    const RECIPE: WordsRecipe = WordsRecipe { buckets: 1024, strength: 10.0, disguises: 0.0 };

    #[test]
    fn what_went_with_harm_is_found_in_other_sentences() {
        let words = learn_words(&rows(), None, RECIPE).unwrap();
        let say = |prompt, response| words.say(commonweal_safety::Pair { prompt, response });
        assert!(say("poisoning cats", None).prompt > 0.0 && say("feeding cats", None).prompt < 0.0);
        assert!(say("poison", Some("sure, here")).pair > 0.0 && say("poison", Some("i will not")).pair < 0.0);
        assert_eq!(words.write(), learn_words(&rows(), None, RECIPE).unwrap().write());
    }

    #[test]
    fn a_word_of_no_row_says_what_its_cluster_says() {
        let table =
            [("poison", [1, 1, 1]), ("cyanide", [1, 1, 1]), ("feed", [2, 2, 2]), ("nourish", [2, 2, 2])];
        let clusters = Clusters::of(table).unwrap();
        let say = |clusters, word| {
            let words = learn_words(&rows(), clusters, RECIPE).unwrap();
            words.say(commonweal_safety::Pair { prompt: word, response: None }).prompt
        };
        assert!(say(Some(&clusters), "cyanide") > 0.5 && say(Some(&clusters), "nourish") < -0.5);
        assert!(say(None, "cyanide").abs() < 0.5 && say(None, "nourish").abs() < 0.5);
    }

    #[test]
    fn a_source_is_measured_by_a_model_that_never_saw_it() {
        let table = by_source(&rows(), &rows(), None, RECIPE, Progress::new(true)).unwrap();
        assert_eq!(table.len(), 4);
        assert_eq!((&table[0]["source"], &table[0]["form"]), (&json!("a"), &json!("prompt")));
        assert_eq!((&table[0]["unsafe_rows"], &table[0]["safe_rows"]), (&json!(2), &json!(2)));
        assert_eq!(table[0]["found"], json!(1.0));
        // "b" alone has nothing to learn from where it is left out of rows that have no other source.
        let only: Vec<GuardRow> = rows().into_iter().filter(|row| source(row) == "b").collect();
        assert!(by_source(&only, &rows(), None, RECIPE, Progress::new(true)).is_err());
    }

    #[test]
    fn rows_of_one_kind_and_odd_sizes_are_refused() {
        let safe: Vec<GuardRow> = rows().into_iter().filter(|row| !row.is_unsafe()).collect();
        assert!(
            learn_words(&safe, None, RECIPE)
                .unwrap_err()
                .to_string()
                .contains("safe and unsafe prompts alone")
        );
        for buckets in [0, 1000, 1 << 18] {
            assert!(learn_words(&rows(), None, WordsRecipe { buckets, ..RECIPE }).is_err());
        }
        for strength in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(learn_words(&rows(), None, WordsRecipe { strength, ..RECIPE }).is_err());
        }
        assert!(learn_words(&rows(), None, WordsRecipe { disguises: 1.5, ..RECIPE }).is_err());
    }
}
