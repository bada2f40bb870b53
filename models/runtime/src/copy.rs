//! Guesses how an answer goes on from the text that it seems to copy, so that one run of the network checks several
//! tokens: prompt-lookup decoding (Saxena 2023), the speculative decoding of Leviathan et al. (arXiv 2211.17192) with
//! the prompt in place of a draft model. `generate.rs` keeps a guess only as far as the network chooses the same
//! tokens itself, so an answer does not depend on the guesses, only its time.

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
    length: usize,
}

impl Copying {
    pub(crate) fn new(prompt: &[u32]) -> Self {
        Self { text: prompt.to_vec(), length: GUESS_MAX / 2 }
    }

    /// The answer goes on with this token.
    pub(crate) fn push(&mut self, token: u32) {
        self.text.push(token);
    }

    /// At most `most` tokens: what followed the last time that the text had its present end.
    pub(crate) fn guess(&self, most: usize) -> &[u32] {
        let text = self.text.as_slice();
        let most = most.min(self.length);
        for matched in MATCHED.rev().filter(|&matched| matched < text.len()) {
            let end = &text[text.len() - matched..];
            let earlier = text[..text.len() - 1].windows(matched).rposition(|window| window == end);
            if let Some(at) = earlier {
                let follows = &text[at + matched..];
                return &follows[..most.min(follows.len())];
            }
        }
        &[]
    }

    /// Of a guess of so many tokens, so many were right: the next one is twice as long, or little longer than what was
    /// right.
    pub(crate) fn learn(&mut self, guessed: usize, right: usize) {
        if guessed > 0 {
            let length = if right == guessed { self.length * 2 } else { right + 2 };
            self.length = length.clamp(GUESS_MIN, GUESS_MAX);
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
        let copying = Copying::new(&[3, 1, 2, 9, 4, 1, 2, 8, 0, 1, 2, 7, 4, 1, 2]);
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
}
