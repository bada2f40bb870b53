//! The text side of a checkpoint: its tokenizer, its special tokens and its chat template. Third stage of
//! `checkpoint.rs`. The bytes go into the package as they are, but for one token of Gemma 3; here they are only proved
//! usable.

use std::io;
use std::path::{Path, PathBuf};

use commonweal_package::{ModelError, Tokens};
use commonweal_runtime::tokenize;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::{PostProcessor, Tokenizer};

use crate::config::{ConfigError, DeclaredTokens, read_bounded, read_json};

/// Longest tokenizer read; that of Llama 3 is 9 MB, the largest published ones are about 35 MB.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// Longest chat template read; the longest published ones are about 20 kB.
pub(crate) const TEMPLATE_BYTES_MAX: u64 = 1 << 20;

/// Gemma 3's text checkpoints have the tokenizer of those that see, and so this token for which they have no row.
const IMAGE_TOKEN: &str = "<image_soft_token>";

/// What a package needs to turn conversations into tokens.
#[derive(Clone, Debug)]
pub struct Text {
    /// The bytes of `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// The chat template, in Jinja.
    pub chat_template: String,
    /// Special tokens by number.
    pub tokens: Tokens,
}

/// Why the text side of a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tokenizer does not load.
    #[error("{} is not a tokenizer: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The tokenizer has tokens that the embedding has no row for.
    #[error(
        "wrong tokenizer: {} has the token {token:?} with number {got}, the model's vocab_size is {vocab_size}",
        path.display()
    )]
    WrongTokenizer {
        /// The file.
        path: PathBuf,
        /// The token with the largest number.
        token: String,
        /// That number.
        got: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// A classifier's tokenizer puts no special tokens around a text.
    #[error("{} must put special tokens around a text (a post_processor), it puts none", path.display())]
    NoFrame {
        /// The file.
        path: PathBuf,
    },
    /// A special token is not in the tokenizer.
    #[error("special token {token:?} is not in the tokenizer")]
    UnknownToken {
        /// The token's text.
        token: String,
    },
    /// The special tokens are impossible.
    #[error("the special tokens are impossible")]
    Tokens(#[from] ModelError),
    /// A configuration file is damaged.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The checkpoint has no chat template.
    #[error(
        "{} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); give one with \
         --chat-template FILE",
        directory.display()
    )]
    NoTemplate {
        /// The checkpoint directory.
        directory: PathBuf,
    },
    /// The chat template is not Jinja.
    #[error("{} is not a chat template", path.display())]
    Template {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<minijinja::Error>,
    },
}

#[derive(Default, Deserialize)]
struct RawSpecial {
    bos_token: Option<RawToken>,
    eos_token: Option<RawToken>,
    pad_token: Option<RawToken>,
    chat_template: Option<RawTemplate>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawToken {
    Text(String),
    Added { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawTemplate {
    One(String),
    Many(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// Reads and checks the text side of a checkpoint directory; `template` replaces its chat template.
pub fn read(
    directory: &Path,
    template: Option<&Path>,
    declared: &DeclaredTokens,
    vocab_size: usize,
) -> Result<Text, TextError> {
    let path = directory.join("tokenizer.json");
    let (bytes, tokenizer) = load(&path, vocab_size)?;
    let special = read_special(directory)?;
    let tokens = find_tokens(&tokenizer, declared, &special)?;
    tokens.check(vocab_size)?;
    let chat_template = find_template(directory, template, special.chat_template)?;
    Ok(Text { tokenizer: bytes, chat_template, tokens })
}

/// Loads a tokenizer and checks that the model has a row for each of its tokens. One that stands for an image is dropped
/// where there is none.
pub fn load(path: &Path, vocab_size: usize) -> Result<(Vec<u8>, Tokenizer), TextError> {
    let bytes = read_bounded(path, TOKENIZER_BYTES_MAX)
        .map_err(|source| TextError::Read { path: path.into(), source })?;
    let tokenizer = parse(path, &bytes)?;
    match check(path, &tokenizer, vocab_size) {
        Ok(()) => Ok((bytes, tokenizer)),
        Err(TextError::WrongTokenizer { token, .. }) if token == IMAGE_TOKEN => {
            let bytes = without_image_token(path, &bytes)?;
            let tokenizer = parse(path, &bytes)?;
            check(path, &tokenizer, vocab_size)?;
            Ok((bytes, tokenizer))
        }
        Err(error) => Err(error),
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Tokenizer, TextError> {
    tokenize::parse(bytes)
        .map_err(|error| TextError::Tokenizer { path: path.into(), reason: error.to_string() })
}

fn check(path: &Path, tokenizer: &Tokenizer, vocab_size: usize) -> Result<(), TextError> {
    let last = tokenizer.get_vocab(true).into_iter().max_by_key(|(_, number)| *number);
    match last {
        None => Err(TextError::Tokenizer { path: path.into(), reason: "no tokens".into() }),
        Some((token, got)) if got as usize >= vocab_size => {
            Err(TextError::WrongTokenizer { path: path.into(), token, got, vocab_size })
        }
        Some(_) => Ok(()),
    }
}

/// The tokenizer without [`IMAGE_TOKEN`]: written out in a text it is text.
fn without_image_token(path: &Path, bytes: &[u8]) -> Result<Vec<u8>, TextError> {
    let damaged =
        |error: serde_json::Error| TextError::Tokenizer { path: path.into(), reason: error.to_string() };
    let mut tokenizer: Value = serde_json::from_slice(bytes).map_err(damaged)?;
    if let Some(added) = tokenizer.get_mut("added_tokens").and_then(Value::as_array_mut) {
        added.retain(|token| token.get("content").and_then(Value::as_str) != Some(IMAGE_TOKEN));
    }
    serde_json::to_vec(&tokenizer).map_err(damaged)
}

/// Checks that a classifier's tokenizer frames texts with special tokens: without them its first token is no summary.
pub(crate) fn check_frame(path: &Path, tokenizer: &Tokenizer) -> Result<(), TextError> {
    match tokenizer.get_post_processor().map_or(0, |frame| frame.added_tokens(false)) {
        0 => Err(TextError::NoFrame { path: path.into() }),
        _ => Ok(()),
    }
}

/// `special_tokens_map.json` before `tokenizer_config.json`; both are optional.
fn read_special(directory: &Path) -> Result<RawSpecial, TextError> {
    let read = |name: &str| {
        let path = directory.join(name);
        if path.exists() { read_json(&path) } else { Ok(RawSpecial::default()) }
    };
    let (map, config) = (read("special_tokens_map.json")?, read("tokenizer_config.json")?);
    Ok(RawSpecial {
        bos_token: map.bos_token.or(config.bos_token),
        eos_token: map.eos_token.or(config.eos_token),
        pad_token: map.pad_token.or(config.pad_token),
        chat_template: config.chat_template,
    })
}

/// Numbers in the configuration win; the tokenizer's own names fill the gaps. The tokenizer's end of sequence is
/// added to the configuration's, since chat models often declare only one of them. Padding is masked everywhere, so
/// any token will do where none is declared.
fn find_tokens(
    tokenizer: &Tokenizer,
    declared: &DeclaredTokens,
    special: &RawSpecial,
) -> Result<Tokens, TextError> {
    let number = |token: &Option<RawToken>| match token {
        None => Ok(None),
        Some(RawToken::Text(text) | RawToken::Added { content: text }) => match tokenizer.token_to_id(text) {
            Some(number) => Ok(Some(number)),
            None => Err(TextError::UnknownToken { token: text.clone() }),
        },
    };
    let mut eos = declared.eos.clone();
    if let Some(end) = number(&special.eos_token)?.filter(|end| !eos.contains(end)) {
        eos.push(end);
    }
    let bos = declared.bos.or(number(&special.bos_token)?);
    let pad = declared.pad.or(number(&special.pad_token)?).or(eos.first().copied()).unwrap_or(0);
    Ok(Tokens { bos, eos, pad })
}

fn find_template(
    directory: &Path,
    chosen: Option<&Path>,
    configured: Option<RawTemplate>,
) -> Result<String, TextError> {
    let own = directory.join("chat_template.jinja");
    let (path, text) = match (chosen, configured) {
        (Some(path), _) => (path.to_path_buf(), read_template(path)?),
        (None, _) if own.exists() => {
            let text = read_template(&own)?;
            (own, text)
        }
        (None, Some(configured)) => {
            let text = match configured {
                RawTemplate::One(text) => Some(text),
                RawTemplate::Many(all) => {
                    all.into_iter().find(|named| named.name == "default").map(|named| named.template)
                }
            };
            let text = text.ok_or(TextError::NoTemplate { directory: directory.into() })?;
            (directory.join("tokenizer_config.json"), text)
        }
        (None, None) => return Err(TextError::NoTemplate { directory: directory.into() }),
    };
    minijinja::Environment::new()
        .add_template("chat", &text)
        .map_err(|error| TextError::Template { path, source: Box::new(error) })?;
    Ok(text)
}

fn read_template(path: &Path) -> Result<String, TextError> {
    let read = |source| TextError::Read { path: path.into(), source };
    let bytes = read_bounded(path, TEMPLATE_BYTES_MAX).map_err(read)?;
    String::from_utf8(bytes).map_err(|error| read(io::Error::new(io::ErrorKind::InvalidData, error)))
}
