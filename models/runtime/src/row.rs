//! One answer on its way: the next token (`sample_token.rs`), the text so far, and why it ends. `generate.rs` and
//! `together.rs` decode many of them side by side; a row knows nothing of the others.

use commonweal_package::Tokens;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::{
    generate::{GenerateOptions, Generated, OnText, StopReason},
    infer::InferError,
    model::Model,
    sample_token::{Choice, choose, logprobs},
    tokenize::TextStream,
};

/// One answer on its way.
pub(crate) struct Row<'m> {
    /// Index of the prompt among those of the call.
    pub(crate) prompt: usize,
    /// Tokens in the cache.
    pub(crate) length: usize,
    context: usize,
    tokens: &'m Tokens,
    random: ChaCha8Rng,
    text: Option<TextStream<'m>>,
    /// Bytes of the text that `on_text` has received.
    shown: usize,
    /// Where the stop text begins.
    cut: Option<usize>,
    /// The token that was chosen last, and its log-probability.
    pub(crate) last: u32,
    pub(crate) last_logprob: f32,
    logprob: f64,
    pub(crate) stop: Option<StopReason>,
}

impl<'m> Row<'m> {
    /// Row `prompt` of a call draws from a stream of random numbers of its own.
    pub(crate) fn new(model: &'m Model, options: &GenerateOptions, prompt: usize, length: usize) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(options.seed);
        random.set_stream(prompt as u64);
        let text = Some(model.tokenizer().text_stream());
        let (context, tokens) = (model.context(), &model.manifest().tokens);
        Self {
            prompt,
            length,
            context,
            tokens,
            random,
            text,
            shown: 0,
            cut: None,
            last: 0,
            last_logprob: 0.0,
            logprob: 0.0,
            stop: None,
        }
    }

    /// Chooses the next token from the network's output, and hands out the text that is certain now. Nothing once the
    /// row has stopped.
    pub(crate) fn choose(
        &mut self,
        options: &GenerateOptions,
        logits: &[f32],
        on_text: OnText<'_>,
    ) -> Result<(), InferError> {
        let (None, Some(stream)) = (self.stop, &mut self.text) else { return Ok(()) };
        let seen = stream.tokens().len();
        let choice = match options.begin.get(seen) {
            Some(&token) => logprobs(logits, &[token]).map(|logprobs| Choice { token, logprob: logprobs[0] }),
            None => choose(logits, options.temperature, options.top_p, &mut self.random),
        };
        let choice = choice.ok_or(InferError::NotFinite { row: self.prompt })?;
        self.last = choice.token;
        self.last_logprob = choice.logprob;
        self.logprob += f64::from(choice.logprob);
        let text = stream.push(choice.token)?;
        // A stop text that begins before `shown` would have been found, or held back, earlier.
        self.cut = options.stop.iter().filter_map(|stop| text[self.shown..].find(stop)).min();
        self.cut = self.cut.map(|cut| cut + self.shown);
        self.stop = if self.tokens.eos.contains(&choice.token) {
            Some(StopReason::EndToken)
        } else if self.cut.is_some() {
            Some(StopReason::StopText)
        } else if seen + 1 >= options.max_new_tokens {
            Some(StopReason::Length)
        } else if self.length + 1 >= self.context {
            Some(StopReason::Context)
        } else {
            None
        };
        if self.stop.is_none() {
            let safe = text.len() - held_back(&text[self.shown..], &options.stop);
            show(self.prompt, text, &mut self.shown, safe, on_text);
        }
        Ok(())
    }

    /// The text that a token would add, half a character being none yet.
    pub(crate) fn piece(&self, token: u32) -> Result<String, InferError> {
        Ok(self.text.as_ref().map(|stream| stream.piece(token)).transpose()?.unwrap_or_default())
    }

    /// Bytes of the text so far, whether handed out or not.
    pub(crate) fn text_bytes(&self) -> usize {
        self.text.as_ref().map_or(0, |stream| stream.text().len())
    }

    /// The text so far from some byte on.
    pub(crate) fn text_after(&self, byte: usize) -> &str {
        self.text.as_ref().and_then(|stream| stream.text().get(byte..)).unwrap_or_default()
    }

    /// Whether the last token is one that ends an answer.
    pub(crate) fn is_at_end_token(&self) -> bool {
        self.stop == Some(StopReason::EndToken)
    }

    /// The whole answer, what of it was not handed out first.
    pub(crate) fn answer(&mut self, on_text: OnText<'_>) -> Result<Generated, InferError> {
        let (mut text, tokens) = self.text.take().map(TextStream::finish).transpose()?.unwrap_or_default();
        text.truncate(self.cut.unwrap_or(text.len()));
        let end = text.len();
        show(self.prompt, &text, &mut self.shown, end, on_text);
        let stop = self.stop.unwrap_or(StopReason::Length);
        Ok(Generated { text, tokens, stop, logprob: self.logprob })
    }
}

fn show(prompt: usize, text: &str, shown: &mut usize, end: usize, on_text: OnText<'_>) {
    if let Some(piece) = text.get(*shown..end).filter(|piece| !piece.is_empty()) {
        on_text(prompt, piece);
        *shown = end;
    }
}

/// Bytes at the end of a text that may be the beginning of a stop text.
fn held_back(text: &str, stops: &[String]) -> usize {
    let begins = |stop: &String| {
        let longest = text.len().min(stop.len() - 1);
        (1..=longest).rev().find(|&length| stop.is_char_boundary(length) && text.ends_with(&stop[..length]))
    };
    stops.iter().filter_map(begins).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_may_become_a_stop_text_is_held_back() {
        let stops = ["\n\nUser:".to_owned(), "</s>".to_owned()];
        assert_eq!(held_back("hello", &stops), 0);
        assert_eq!(held_back("hello\n", &stops), 1);
        assert_eq!(held_back("hello\n\nUs", &stops), 4);
        assert_eq!(held_back("a<", &stops), 1);
    }
}
