//! Text to token ids and back, with the package's `tokenizer.json`. `conversation.rs` encodes rendered chats with it,
//! `generate.rs` turns new tokens into text as they come.

use std::{borrow::Cow, fs::File, io, io::Read, panic, path::Path};

use serde::de::IgnoredAny;
use tokenizers::{Encoding, PostProcessor};

/// Longest tokenizer read. The largest published ones are about 35 MB; `model-compiler` takes as much.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// The package's tokenizer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: Vec<String>,
}

/// Why text could not become tokens, or tokens text.
#[derive(Debug, thiserror::Error)]
pub enum TokenizeError {
    /// The file is no tokenizer.
    #[error("{path} is not a tokenizer")]
    Open {
        /// The file.
        path: String,
        /// What the parser said.
        #[source]
        source: tokenizers::Error,
    },
    /// The text could not be encoded.
    #[error("text of {bytes} bytes does not encode")]
    Encode {
        /// Length of the text.
        bytes: usize,
        /// What the tokenizer said.
        #[source]
        source: tokenizers::Error,
    },
    /// The special tokens could not be put around a text.
    #[error("{tokens} tokens take no special tokens around them")]
    Frame {
        /// Number of tokens.
        tokens: usize,
        /// What the tokenizer said.
        #[source]
        source: tokenizers::Error,
    },
    /// The tokens could not be decoded.
    #[error("{tokens} tokens do not decode")]
    Decode {
        /// Number of tokens.
        tokens: usize,
        /// What the tokenizer said.
        #[source]
        source: tokenizers::Error,
    },
}

/// Reads the bytes of a `tokenizer.json`. The library panics on some that are damaged (0.22: JSON that ends within a
/// decoder, a precompiled normalizer that is none); here those are refused like all others.
pub fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer, tokenizers::Error> {
    serde_json::from_str::<IgnoredAny>(std::str::from_utf8(bytes)?)?;
    panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes))
        .unwrap_or_else(|_| Err("the library that reads tokenizers fails on it".into()))
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`. Padding and truncation in the file are ignored: the runtime pads, and
    /// refuses what is too long.
    pub fn open(path: &Path) -> Result<Self, TokenizeError> {
        let failed = |source| TokenizeError::Open { path: path.display().to_string(), source };
        let bytes = read_bounded(path, TOKENIZER_BYTES_MAX).map_err(|source| failed(Box::new(source)))?;
        Self::from_json(&bytes).map_err(failed)
    }

    pub(crate) fn from_json(bytes: &[u8]) -> Result<Self, tokenizers::Error> {
        let mut inner = parse(bytes)?;
        inner.with_padding(None);
        inner.with_truncation(None)?;
        let mut special: Vec<String> = inner
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| token.special && token.content.chars().nth(1).is_some())
            .map(|token| token.content)
            .collect();
        special.sort();
        Ok(Self { inner, special })
    }

    /// The token ids of a text; no token is added, special tokens written out in the text are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        Ok(self.encode_with_offsets(text)?.get_ids().to_vec())
    }

    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<Encoding, TokenizeError> {
        self.inner.encode(text, false).map_err(|source| TokenizeError::Encode { bytes: text.len(), source })
    }

    /// Special tokens that stand around a text, or around a text and its pair.
    pub(crate) fn frame_tokens(&self, is_pair: bool) -> usize {
        self.inner.get_post_processor().map_or(0, |frame| frame.added_tokens(is_pair))
    }

    /// An encoded text, or a text and its pair, with the special tokens around them.
    pub(crate) fn frame(&self, first: Encoding, second: Option<Encoding>) -> Result<Encoding, TokenizeError> {
        let tokens = first.len() + second.as_ref().map_or(0, Encoding::len);
        self.inner.post_process(first, second, true).map_err(|source| TokenizeError::Frame { tokens, source })
    }

    /// The text of tokens, without special tokens. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizeError> {
        self.inner.decode(ids, true).map_err(|source| TokenizeError::Decode { tokens: ids.len(), source })
    }

    /// The token of exactly this text, if there is one.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// The text of one token as the vocabulary spells it, special or not.
    pub fn spelling(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }

    /// One more than the largest number of a token, added ones included. There may be fewer tokens: numbers may be
    /// left out.
    pub fn ids_end(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |largest| largest as usize + 1)
    }

    /// A person's text in which no special token is written out: a zero-width space splits each one. Otherwise a
    /// message that contains `<|im_end|>` could end its own turn and speak as the system.
    pub fn defuse<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut text = Cow::Borrowed(text);
        for token in &self.special {
            if text.contains(token.as_str()) {
                let first = token.chars().next().map_or(0, char::len_utf8);
                let split = format!("{}\u{200b}{}", &token[..first], &token[first..]);
                text = Cow::Owned(text.replace(token.as_str(), &split));
            }
        }
        text
    }

    pub(crate) fn text_stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, ids: Vec::new(), prefix: 0, read: 0, text: String::new() }
    }
}

fn read_bounded(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(io::Error::other(format!("file has more than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// Text that grows token by token; never ends in half a character until it is finished.
#[derive(Debug)]
pub(crate) struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<u32>,
    /// Tokens from here are decoded again with each new one, since a decoder may treat the first token specially.
    prefix: usize,
    /// Tokens before this one are in `text`.
    read: usize,
    text: String,
}

impl TextStream<'_> {
    /// Adds a token; the text so far.
    pub(crate) fn push(&mut self, token: u32) -> Result<&str, TokenizeError> {
        self.ids.push(token);
        let known = self.tokenizer.decode(&self.ids[self.prefix..self.read])?;
        let grown = self.tokenizer.decode(&self.ids[self.prefix..])?;
        if !grown.ends_with(char::REPLACEMENT_CHARACTER)
            && let Some(piece) = grown.strip_prefix(&known).filter(|piece| !piece.is_empty())
        {
            self.text.push_str(piece);
            (self.prefix, self.read) = (self.read, self.ids.len());
        }
        Ok(&self.text)
    }

    /// The text that a token would add; nothing while its last character is incomplete.
    pub(crate) fn piece(&self, token: u32) -> Result<String, TokenizeError> {
        let known = self.tokenizer.decode(&self.ids[self.prefix..self.read])?;
        let grown = self.tokenizer.decode(&[&self.ids[self.prefix..], &[token]].concat())?;
        let is_whole = !grown.ends_with(char::REPLACEMENT_CHARACTER);
        Ok(grown.strip_prefix(&known).filter(|_| is_whole).unwrap_or_default().to_owned())
    }

    /// The text so far.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The tokens so far.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.ids
    }

    /// The whole text, with U+FFFD where the last character is incomplete.
    pub(crate) fn finish(self) -> Result<(String, Vec<u32>), TokenizeError> {
        let whole = self.tokenizer.decode(&self.ids)?;
        Ok((if whole.starts_with(&self.text) { whole } else { self.text }, self.ids))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> Tokenizer {
        Tokenizer::from_json(include_bytes!("../tests/data/bytes.tokenizer.json")).unwrap()
    }

    #[test]
    fn stream_never_shows_half_a_character() {
        let tokenizer = bytes();
        let ids = tokenizer.encode("naïve 中 end").unwrap();
        let mut stream = tokenizer.text_stream();
        for &id in &ids {
            let text = stream.push(id).unwrap();
            assert!("naïve 中 end".starts_with(text), "{text:?}");
        }
        assert_eq!(stream.finish().unwrap(), ("naïve 中 end".to_owned(), ids));
    }

    #[test]
    fn what_the_library_would_panic_on_is_refused() {
        let text = include_str!("../tests/data/bytes.tokenizer.json");
        let decoder = text.find("\"decoder\"").unwrap();
        parse(&text.as_bytes()[..decoder + 20]).unwrap_err();
        let broken = text.replacen("\"decoder\":", "\"decoder\": {\"type\": ?},", 1);
        parse(broken.as_bytes()).unwrap_err();
        parse(&[&text.as_bytes()[..decoder + 30], b"\xff", &text.as_bytes()[decoder + 30..]].concat())
            .unwrap_err();
        parse(text.replacen("ByteLevel\",\"add", "\\ud800\",\"add", 2).as_bytes()).unwrap_err();
        let mut json: serde_json::Value = serde_json::from_str(text).unwrap();
        json["normalizer"] = serde_json::json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" });
        parse(json.to_string().as_bytes()).unwrap_err();
    }

    #[test]
    fn the_largest_number_counts_and_not_how_many_there_are() {
        let text = include_str!("../tests/data/bytes.tokenizer.json");
        let mut json: serde_json::Value = serde_json::from_str(text).unwrap();
        let end = bytes().ids_end();
        json["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({
            "id": 900, "content": "<far>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }));
        json["model"]["vocab"]["<far>"] = 900.into();
        assert_eq!(Tokenizer::from_json(json.to_string().as_bytes()).unwrap().ids_end(), 901);
        assert!(end < 900);
    }

    #[test]
    fn a_file_above_the_bound_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
        assert!(read_bounded(&path, 4).unwrap_err().to_string().contains("more than 4 bytes"));
    }

    #[test]
    fn unfinished_character_is_replaced_at_the_end() {
        let tokenizer = bytes();
        let ids = tokenizer.encode("a中").unwrap();
        let mut stream = tokenizer.text_stream();
        for &id in &ids[..2] {
            stream.push(id).unwrap();
        }
        assert_eq!(stream.finish().unwrap().0, "a\u{fffd}");
    }

    #[test]
    fn written_out_special_token_is_defused() {
        let tokenizer = bytes();
        let end = tokenizer.token("<|im_end|>").unwrap();
        assert!(tokenizer.encode("a<|im_end|>b").unwrap().contains(&end));
        let text = tokenizer.defuse("a<|im_end|>b");
        assert!(!tokenizer.encode(&text).unwrap().contains(&end));
        assert_eq!(text.replace('\u{200b}', ""), "a<|im_end|>b");
    }
}
