//! Files of texts as tokens: what a quantization is calibrated by and what held-out loss is measured on. A file is
//! either JSON lines, each `{"messages":[{"role":…,"content":…},…]}` or `{"text":…}` (other keys are not read), or plain
//! text. It is read line by line and no further than the tokens that are wanted.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{
    conversation::{Chat, ConversationError, TrainingRow},
    template::Message,
};

/// Longest line read: a book is about one megabyte.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// The tokens of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Texts {
    /// One row for each line that is not empty. Weights are 1 on the assistant's tokens of a conversation and on every
    /// token of any other text.
    pub rows: Vec<TrainingRow>,
    /// Whether every row is a conversation, which stands for itself; other texts may be joined.
    pub are_chats: bool,
}

/// Why a file gives no tokens.
#[derive(Debug, thiserror::Error)]
pub enum TextsError {
    /// The file cannot be read, or is no UTF-8.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line is too long.
    #[error("line {line} of {} must have at most {LINE_BYTES_MAX} bytes, got more", path.display())]
    Long {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// A line of a JSONL file is of neither form.
    #[error("line {line} of {} must have \"messages\" or \"text\"", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// A line has no tokens.
    #[error("line {line} of {} has no tokens", path.display())]
    Tokens {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// Why.
        #[source]
        source: ConversationError,
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Row {
    Chat { messages: Vec<Message> },
    Text { text: String },
}

impl Texts {
    /// Reads a file until its rows have `tokens_max` tokens together, or to its end.
    pub fn read(path: &Path, chat: &Chat, tokens_max: usize) -> Result<Self, TextsError> {
        let failed = |source| TextsError::Read { path: path.into(), source };
        let mut file = BufReader::new(File::open(path).map_err(failed)?);
        let (mut texts, mut tokens, mut is_json) = (Self { rows: Vec::new(), are_chats: true }, 0, None);
        for line in 1.. {
            let mut text = String::new();
            let mut bounded = file.by_ref().take(LINE_BYTES_MAX + 1);
            if tokens >= tokens_max || bounded.read_line(&mut text).map_err(failed)? == 0 {
                break;
            }
            if text.len() as u64 > LINE_BYTES_MAX {
                return Err(TextsError::Long { path: path.into(), line });
            }
            if text.trim().is_empty() {
                continue;
            }
            // The first line tells what the file is.
            let row = if *is_json.get_or_insert_with(|| text.trim_start().starts_with('{')) {
                serde_json::from_str(&text).map_err(|source| TextsError::Row {
                    path: path.into(),
                    line,
                    source,
                })?
            } else {
                Row::Text { text }
            };
            texts.are_chats &= matches!(row, Row::Chat { .. });
            let row =
                row.tokens(chat).map_err(|source| TextsError::Tokens { path: path.into(), line, source })?;
            tokens += row.ids.len();
            texts.rows.push(row);
        }
        Ok(texts)
    }

    /// All tokens, one row behind the other.
    pub fn tokens(&self) -> Vec<u32> {
        self.rows.iter().flat_map(|row| row.ids.iter().copied()).collect()
    }

    /// Rows of at most `length` tokens to measure a loss on: conversations cut at their end, other texts joined and cut
    /// in pieces, each piece behind `bos` where the model has such a token.
    #[must_use]
    pub fn measured(self, length: usize, bos: Option<u32>) -> Vec<TrainingRow> {
        if self.are_chats {
            return self.rows.into_iter().map(|row| row.truncated(length)).collect();
        }
        let (first, tokens) = (Vec::from_iter(bos), self.tokens());
        let piece = |tokens: &[u32]| {
            let ids = [&first, tokens].concat();
            let weights = ids.iter().enumerate().map(|(at, _)| if at < first.len() { 0.0 } else { 1.0 });
            TrainingRow { weights: weights.collect(), ids }
        };
        tokens.chunks(length.saturating_sub(first.len()).max(1)).map(piece).collect()
    }
}

impl Row {
    fn tokens(&self, chat: &Chat) -> Result<TrainingRow, ConversationError> {
        match self {
            Self::Chat { messages } => chat.training_row(messages),
            Self::Text { text } => {
                // What is written out as a special token is text here.
                let ids = chat.tokenizer().encode(&chat.tokenizer().defuse(text))?;
                Ok(TrainingRow { weights: vec![1.0; ids.len()], ids })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::{ChatTemplate, SpecialTokens};
    use crate::tokenize::Tokenizer;

    fn read(content: &str, tokens_max: usize) -> Result<Texts, TextsError> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/bytes.tokenizer.json");
        let template = "{% for m in messages %}{{ m.content }}|{% endfor %}";
        let template = ChatTemplate::parse(template, SpecialTokens::default()).unwrap();
        let chat = Chat::new(Tokenizer::open(path.as_ref()).unwrap(), template);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("texts");
        std::fs::write(&file, content).unwrap();
        Texts::read(&file, &chat, tokens_max)
    }

    #[test]
    fn conversations_and_texts_are_told_apart() {
        let row =
            r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"ab"}],"id":7}"#;
        let chats = read(&format!("{row}\n\n{row}\n"), usize::MAX).unwrap();
        assert!(chats.are_chats && chats.rows.len() == 2);
        assert_eq!(chats.rows[0].weights.iter().sum::<f32>(), 3.0, "ab|");
        let texts = read("{\"text\":\"abc\",\"title\":\"t\"}\n{\"text\":\"de\"}", usize::MAX).unwrap();
        assert!(!texts.are_chats && texts.tokens().len() == 5);
        let plain = read("first line\n\nsecond\n", usize::MAX).unwrap();
        assert_eq!(plain.rows.iter().map(|row| row.ids.len()).collect::<Vec<_>>(), [11, 7]);
        assert_eq!(read("one\ntwo\nthree\n", 5).unwrap().rows.len(), 2, "no further than wanted");
    }

    #[test]
    fn a_line_that_is_no_row_is_named() {
        let error = read("{\"text\":\"abc\"}\n{\"prompt\":1}\n", usize::MAX).unwrap_err();
        assert!(matches!(error, TextsError::Row { line: 2, .. }), "{error}");
    }

    #[test]
    fn texts_are_measured_in_joined_pieces_and_conversations_apart() {
        let pieces = read("abcd\nefgh\n", usize::MAX).unwrap().measured(4, Some(9));
        assert_eq!(pieces.iter().map(|row| row.ids.len()).collect::<Vec<_>>(), [4, 4, 4, 2]);
        assert!(pieces.iter().all(|row| row.ids[0] == 9 && row.weights[0] == 0.0 && row.weights[1] == 1.0));
        let row = r#"{"messages":[{"role":"assistant","content":"abcdef"}]}"#;
        assert_eq!(read(row, usize::MAX).unwrap().measured(4, Some(9))[0].ids.len(), 4);
    }
}
