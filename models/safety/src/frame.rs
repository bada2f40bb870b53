//! One template in tokens: the text around the places of a prompt and a response. `question.rs` fills in categories
//! before, and asks with what comes out.
//!
//! A person's text has its special tokens defused, so that it cannot end its own turn. A text longer than the guard
//! reads at once becomes several windows, which overlap: nothing is left unread.

use commonweal_runtime::{
    TokenizeError, Tokenizer,
    windows::{CROSSED_MAX, READINGS_MAX, reading_count, readings, windows},
};

use crate::question::QuestionError;

/// A template's own text and tokens around the texts.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    parts: Vec<String>,
    /// The parts encoded, without the space before a text.
    pieces: Vec<Vec<u32>>,
    /// Whether a space stands before each text; it belongs to the text's first word.
    spaced: Vec<bool>,
}

impl Frame {
    pub(crate) fn new(tokenizer: &Tokenizer, template: &str) -> Result<Self, TokenizeError> {
        let mut frame = Self { parts: Vec::new(), pieces: Vec::new(), spaced: Vec::new() };
        let parts: Vec<&str> = template.split("{prompt}").flat_map(|part| part.split("{response}")).collect();
        for (i, part) in parts.iter().enumerate() {
            let is_last = i + 1 == parts.len();
            let plain = if is_last { None } else { part.strip_suffix(' ') };
            frame.pieces.push(tokenizer.encode(plain.unwrap_or(part))?);
            frame.parts.push((*part).to_owned());
            if !is_last {
                frame.spaced.push(plain.is_some());
            }
        }
        Ok(frame)
    }

    /// The template's own tokens.
    pub(crate) fn tokens(&self) -> usize {
        self.pieces.iter().map(Vec::len).sum()
    }

    /// The tokens before the prompt.
    pub(crate) fn lead(&self) -> &[u32] {
        self.pieces.first().map_or(&[], Vec::as_slice)
    }

    /// The text behind the last of the person's, where the answer begins.
    pub(crate) fn tail(&self) -> &str {
        self.parts.last().map_or("", String::as_str)
    }

    /// The template around a text, or a text and its pair, each with the most tokens of it that are read at once. One
    /// window when all fit, encoded as a whole: a published guard learned the tokens that its template's text makes
    /// together with a person's, such as `?` and a blank line in one. Which windows of the two are read together is said
    /// by [`readings`]; texts that need more than [`READINGS_MAX`] are an error.
    pub(crate) fn windows(
        &self,
        tokenizer: &Tokenizer,
        texts: &[(&str, usize)],
    ) -> Result<Vec<Vec<u32>>, QuestionError> {
        let mut encoded = Vec::with_capacity(texts.len());
        let mut whole = self.parts.first().cloned().unwrap_or_default();
        for (((text, tokens_max), &spaced), part) in texts.iter().zip(&self.spaced).zip(&self.parts[1..]) {
            let text = tokenizer.defuse(text.trim());
            let ids =
                if spaced { tokenizer.encode(&format!(" {text}"))? } else { tokenizer.encode(&text)? };
            encoded.push((ids, *tokens_max));
            whole.push_str(&text);
            whole.push_str(part);
        }
        let spans: Vec<Vec<_>> =
            encoded.iter().map(|(ids, tokens_max)| windows(ids.len(), *tokens_max).collect()).collect();
        let counts = [0, 1].map(|text| spans.get(text).map_or(1, Vec::len));
        if counts == [1, 1] {
            let whole = tokenizer.encode(&whole)?;
            let most = self.tokens() + texts.iter().map(|(_, tokens_max)| tokens_max).sum::<usize>();
            // Encoded together a text may need more tokens than apart; the bound on a question holds all the same.
            if whole.len() <= most {
                return Ok(vec![whole]);
            }
        }
        let (limit, got) = (READINGS_MAX, reading_count(counts, CROSSED_MAX));
        if got > limit {
            return Err(QuestionError::Windows { limit, got });
        }
        let question = |places: [usize; 2]| {
            let mut question = self.lead().to_vec();
            for (text, ((ids, _), piece)) in encoded.iter().zip(&self.pieces[1..]).enumerate() {
                question.extend(&ids[spans[text][places[text]].clone()]);
                question.extend(piece);
            }
            question
        };
        Ok(readings(counts, CROSSED_MAX).into_iter().map(question).collect())
    }
}

/// The tokens that `label` adds behind `before`; `None` where it melts into what stands before.
pub(crate) fn tokens_behind(
    tokenizer: &Tokenizer,
    before: &str,
    label: &str,
) -> Result<Option<Vec<u32>>, TokenizeError> {
    let before_ids = tokenizer.encode(before)?;
    let whole = tokenizer.encode(&format!("{before}{label}"))?;
    let added = whole.strip_prefix(before_ids.as_slice()).filter(|added| !added.is_empty());
    Ok(added.map(<[u32]>::to_vec))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn tokenizer(path: &str) -> Tokenizer {
        Tokenizer::open(format!("{}/../{path}", env!("CARGO_MANIFEST_DIR")).as_ref()).unwrap()
    }

    #[test]
    fn the_bundled_guards_windows_are_the_same_encoded_whole_and_in_pieces() {
        let tokenizer = tokenizer("reference/checkpoint/tokenizer.json");
        let frame = Frame::new(&tokenizer, "<|user|>{prompt}<|end|><|assistant|>{response}<|end|><|system|>")
            .unwrap();
        let rows =
            fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../reference/demo/guard_test.jsonl"));
        let mut compared = 0;
        for row in rows.unwrap().lines() {
            let row: serde_json::Value = serde_json::from_str(row).unwrap();
            let text = |key: &str| row[key].as_str().unwrap_or("").to_owned();
            let (prompt, response) = (text("prompt"), text("response"));
            let windows = frame.windows(&tokenizer, &[(&prompt, 160), (&response, 192)]).unwrap();
            let mut pieces = frame.pieces[0].clone();
            for (text, piece) in [&prompt, &response].into_iter().zip(&frame.pieces[1..]) {
                pieces.extend(tokenizer.encode(&tokenizer.defuse(text.trim())).unwrap());
                pieces.extend(piece);
            }
            if windows.len() == 1 {
                assert_eq!(windows[0], pieces, "{row}");
                compared += 1;
            }
        }
        assert!(compared > 400, "{compared}");
    }

    #[test]
    fn a_label_that_melts_into_what_stands_before_is_told() {
        let tokenizer = tokenizer("runtime/tests/data/bytes.tokenizer.json");
        assert_eq!(tokens_behind(&tokenizer, "a<|im_end|>", "yes").unwrap().unwrap().len(), 3);
        assert!(tokens_behind(&tokenizer, "a", "").unwrap().is_none());
    }
}
