//! Guesses how an answer goes on from the text that it seems to copy, so that one run of the network checks several
//! tokens: prompt-lookup decoding (Saxena 2023), the speculative decoding of Leviathan et al. (arXiv 2211.17192) with
//! the prompt in place of a draft model. `generate.rs` keeps a guess only as far as the network chooses the same
//! tokens itself: the rule by which a token is accepted is that of an answer without guesses. With exact
//! kernels a reading of several tokens and one of a single token differ in the last bits of their sums. Fast ones, the
//! default, round them visibly another way, so where two tokens are about as probable the other one may be chosen, and
//! the rest follows from it.

/// Longest guess: the kernels' cost of a token falls little beyond it, and a wrong guess costs more.
pub(crate) const GUESS_MAX: usize = 16;
/// Shortest guess: below it, checking costs as much as it saves.
const GUESS_MIN: usize = 4;
/// Tokens at the end of the text that are looked up, the longest match first.
const MATCHED: std::ops::RangeInclusive<usize> = 2..=4;

/// A prompt and what has been answered so far.
#[derive(Debug)]
pub(crate) struct Copying {
    text: Vec<u32>,
    /// Tokens of the next guess, at most.
    length: usize,
    /// Where the last guess was taken from.
    taken: Option<usize>,
    /// Where the text goes on if the token that was guessed wrong only replaces another.
    resume: Option<usize>,
}

impl Copying {
    pub(crate) fn new(prompt: &[u32]) -> Self {
        Self { text: prompt.to_vec(), length: GUESS_MAX / 2, taken: None, resume: None }
    }

    /// The answer goes on with this token.
    pub(crate) fn push(&mut self, token: u32) {
        self.text.push(token);
    }

    /// At most `most` tokens: what followed the last time that the text had its present end, or else what follows the
    /// token that was replaced.
    pub(crate) fn guess(&mut self, most: usize) -> &[u32] {
        let text = self.text.as_slice();
        let earlier = |matched: usize| {
            let end = &text[text.len().checked_sub(matched)?..];
            let at = text[..text.len() - 1].windows(matched).rposition(|window| window == end)?;
            Some(at + matched)
        };
        self.taken = MATCHED.rev().find_map(earlier).or(self.resume);
        let follows = self.taken.and_then(|from| text.get(from..)).unwrap_or_default();
        &follows[..most.min(self.length).min(follows.len())]
    }

    /// Of a guess of so many tokens, so many were right: the next one is twice as long, or little longer than what was
    /// right. A guess that was wrong from the first token on is not resumed.
    pub(crate) fn learn(&mut self, guessed: usize, right: usize) {
        if guessed > 0 {
            let length = if right == guessed { self.length * 2 } else { right + 2 };
            self.length = length.clamp(GUESS_MIN, GUESS_MAX);
            self.resume = self.taken.filter(|_| right > 0).map(|from| from + right + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guess_is_what_followed_the_last_time() {
        let mut copying = Copying::new(&[1, 2, 3, 4, 1, 2, 5, 6, 7]);
        assert_eq!(copying.guess(8), [0_u32; 0]);
        copying.push(1);
        copying.push(2);
        // The later of two matches, and no further than the text goes.
        assert_eq!(copying.guess(3), [5, 6, 7]);
        assert_eq!(copying.guess(8), [5, 6, 7, 1, 2]);
        // The longer match wins: 4 1 2 stands only at the beginning of the second.
        let mut copying = Copying::new(&[3, 1, 2, 9, 4, 1, 2, 8, 0, 1, 2, 7, 4, 1, 2]);
        assert_eq!(copying.guess(2), [8, 0]);
        assert_eq!(copying.guess(0), [0_u32; 0]);
    }

    #[test]
    fn guesses_grow_while_they_are_right() {
        let mut copying = Copying::new(&[7; 64]);
        assert_eq!(copying.guess(64).len(), 1);
        for (guessed, right, next) in [(8, 8, 16), (16, 16, 16), (16, 0, 4), (4, 4, 8), (8, 7, 9), (0, 0, 9)]
        {
            copying.learn(guessed, right);
            assert_eq!(copying.length, next);
        }
    }

    #[test]
    fn a_guess_goes_on_behind_a_token_that_was_replaced() {
        let mut copying = Copying::new(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]);
        assert_eq!(copying.guess(4), [3, 4, 5, 6]);
        // The answer takes 3 and 4, then 50 in the place of 5.
        for token in [3, 4, 50] {
            copying.push(token);
        }
        copying.learn(4, 2);
        assert_eq!(copying.guess(3), [6, 7, 8]);
        // Wrong at once: the answer no longer follows.
        copying.push(60);
        copying.learn(3, 0);
        assert_eq!(copying.guess(3), [0_u32; 0]);
    }
}
