//! A text → its words and their pieces, each hashed to a bucket and counted.
//!
//! The pieces of Joachims 1998 and of fastText (Bojanowski et al. 2017): every word, every two words that follow
//! each other, and the 3 to 5 letters in a row of a word with its bounds; the latter so that a word in another
//! spelling is not wholly another word. From `guard.rs` by `words.rs`; `murmur.rs` hashes.

use std::collections::BTreeMap;

use super::murmur;

/// Words that are looked at together: training rows have at most some 80. What is longer is read in windows.
pub(crate) const WINDOW_WORDS: usize = 96;
/// Every text of this many words lies whole in one of the windows.
const OVERLAP_WORDS: usize = WINDOW_WORDS / 2;
/// Letters of a word; what goes on is the next word. The longest of an English dictionary has 45.
const WORD_LETTERS_MAX: usize = 32;
/// Letters that stand alone side by side and are read as a word: "a b c" is one, "vitamin a b" has none.
const SPELLED_LETTERS_MIN: usize = 3;
/// Letters in a row, with the marks of a word's bounds.
const LETTERS: std::ops::RangeInclusive<usize> = 3..=5;

/// The words of a text in lower case: letters and digits in a row, and an apostrophe between them. Disguises are taken
/// off: digits among letters that stand for letters ("h4ck"), and words written letter by letter ("h a c k", "h.a.c.k").
pub(crate) fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    // Letters that stand alone, and the one character that stands between each and the next.
    let (mut alone, mut between) = (Vec::new(), None);
    for (word, gap) in runs(text) {
        let is_letter = word.chars().nth(1).is_none();
        let continues =
            alone.len() == 1 && gap.is_some() || alone.len() > 1 && gap.is_some() && gap == between;
        if !(alone.is_empty() || is_letter && continues) {
            flush(&mut alone, &mut words);
        }
        if is_letter {
            alone.push(word);
            between = gap;
        } else {
            words.push(undisguised(word));
        }
    }
    flush(&mut alone, &mut words);
    words
}

/// Letters in a row, with the one character before them where there is just one between them and the ones before.
fn runs(text: &str) -> Vec<(String, Option<char>)> {
    let (mut runs, mut run, mut letters) = (Vec::new(), String::new(), 0);
    // Characters since the last run, and the first of them.
    let (mut skipped, mut gap) = (0_usize, None);
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let joins = matches!(character, '\'' | '’')
            && letters > 0
            && characters.peek().is_some_and(|next| next.is_alphanumeric());
        let is_inside = character.is_alphanumeric() || joins;
        if character.is_alphanumeric() {
            run.extend(character.to_lowercase());
            letters += 1;
        } else if joins {
            run.push('\'');
            letters += 1;
        }
        if letters > 0 && (!is_inside || letters >= WORD_LETTERS_MAX) {
            runs.push((std::mem::take(&mut run), gap.filter(|_| skipped == 1)));
            (letters, skipped, gap) = (0, 0, None);
        }
        if !is_inside {
            gap.get_or_insert(character);
            skipped += 1;
        }
    }
    if letters > 0 {
        runs.push((run, gap.filter(|_| skipped == 1)));
    }
    runs
}

/// Letters that stood alone become one word where they are many, and so are no words of their own.
fn flush(alone: &mut Vec<String>, words: &mut Vec<String>) {
    if alone.len() < SPELLED_LETTERS_MIN {
        words.append(alone);
        return;
    }
    let letters: Vec<char> = alone.drain(..).flat_map(|letter| letter.chars().collect::<Vec<_>>()).collect();
    let joined = letters.chunks(WORD_LETTERS_MAX).map(|part| undisguised(part.iter().collect()));
    words.extend(joined);
}

/// Digits that look like letters are letters in a word that has some.
fn undisguised(word: String) -> String {
    if !(word.contains(char::is_alphabetic) && word.contains(|c: char| c.is_ascii_digit())) {
        return word;
    }
    let letter = |digit| match digit {
        '0' => 'o',
        '1' => 'i',
        '3' => 'e',
        '4' => 'a',
        '5' => 's',
        '7' => 't',
        other => other,
    };
    word.chars().map(letter).collect()
}

/// Windows that cover all words, neighbours sharing half; one where the words are few, none where there are none.
pub(crate) fn windows(words: &[String]) -> impl Iterator<Item = &[String]> {
    let last = words.len().saturating_sub(WINDOW_WORDS).div_ceil(OVERLAP_WORDS);
    let count = if words.is_empty() { 0 } else { last + 1 };
    (0..count).map(|window| {
        let from = window * OVERLAP_WORDS;
        &words[from..words.len().min(from + WINDOW_WORDS)]
    })
}

/// The bucket of a piece. `buckets` is a power of two.
pub(crate) fn bucket(piece: &str, buckets: usize) -> usize {
    murmur::hash(piece.as_bytes()) as usize & (buckets - 1)
}

/// How often each bucket occurs among the pieces of `words`. `buckets` is a power of two.
pub(crate) fn counts(words: &[String], buckets: usize) -> BTreeMap<usize, u32> {
    let mut counts = BTreeMap::new();
    let mut add = |piece: &str| *counts.entry(bucket(piece, buckets)).or_insert(0) += 1;
    for (index, word) in words.iter().enumerate() {
        add(&format!("w{word}"));
        if index > 0 {
            add(&format!("w{} {word}", words[index - 1]));
        }
        let marked: Vec<char> = std::iter::once('^').chain(word.chars()).chain(['$']).collect();
        for length in LETTERS {
            for letters in marked.windows(length) {
                add(&std::iter::once('c').chain(letters.iter().copied()).collect::<String>());
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_letters_and_digits_in_a_row() {
        assert_eq!(
            words("Don't  STOP—24/7, Ärger’s 'quoted'"),
            ["don't", "stop", "24", "7", "ärger's", "quoted"]
        );
        assert!(words(" \n…").is_empty());
        assert_eq!(words("plan B, a 1 percent"), ["plan", "b", "a", "1", "percent"]);
        let long = words(&"x".repeat(2 * WORD_LETTERS_MAX + 3));
        assert_eq!(long.iter().map(String::len).collect::<Vec<_>>(), [WORD_LETTERS_MAX, WORD_LETTERS_MAX, 3]);
    }

    #[test]
    fn disguises_are_taken_off() {
        assert_eq!(
            words("H4ck th3 5erver in 2024, 40 times"),
            ["hack", "the", "server", "in", "2024", "40", "times"]
        );
        assert_eq!(words("k i l l  t h e  dog"), ["kill", "the", "dog"]);
        assert_eq!(words("k.i.l.l t.h.e b-o-m-b"), ["kill", "the", "bomb"]);
        assert_eq!(words("a b"), ["a", "b"]);
        assert_eq!(words("vitamin a. b c d"), ["vitamin", "a", "bcd"]);
        let spelled = words(&"x ".repeat(40));
        assert_eq!(spelled.iter().map(String::len).collect::<Vec<_>>(), [WORD_LETTERS_MAX, 8]);
    }

    #[test]
    fn windows_cover_every_word_and_share_half() {
        let lengths = |count: usize| -> Vec<usize> {
            let words = vec!["a".to_owned(); count];
            windows(&words).map(<[String]>::len).collect()
        };
        assert_eq!(lengths(0), [0; 0]);
        assert_eq!(lengths(1), [1]);
        assert_eq!(lengths(96), [96]);
        assert_eq!(lengths(97), [96, 49]);
        assert_eq!(lengths(144), [96, 96]);
        assert_eq!(lengths(145), [96, 96, 49]);
    }

    #[test]
    fn pieces_are_words_pairs_of_words_and_letters() {
        let one_bucket = counts(&words("ab cde"), 1);
        // wab, wcde, wab cde; ^ab ab$ ^ab$; ^cd cde de$, ^cde cde$, ^cde$.
        assert_eq!(one_bucket[&0], 3 + 3 + 6);
    }
}
