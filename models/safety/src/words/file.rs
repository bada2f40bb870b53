//! The file of a words model, `adapters/guard.words` in a package. Little-endian; everything else is refused.
//!
//! ```text
//! 0   "commonweal words"              16 bytes
//! 16  version                         u32, 1
//! 20  buckets                         u32, a power of two
//! 24  scale of the rarities           f32, above 0
//! 28  scale, bias                     f32 each: of prompts, of pairs' prompts, of pairs' responses
//! 52  rarities                        u8 each
//!     weights                         i8 each: of prompts, of pairs' prompts, of pairs' responses
//! ```
//!
//! Written by `train-reference words`, read by `open.rs`.

use std::{fs::File, io, io::Read, path::PathBuf};

use commonweal_package::Package;

use super::{BUCKETS, Head, Vocabulary, Words};

const MAGIC: &[u8; 16] = b"commonweal words";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 52;
/// The largest file that can be one.
const FILE_BYTES_MAX: usize = HEADER_BYTES + 4 * *BUCKETS.end();
/// A rarity is at most 1 + ln(1 + texts), so that a step is far below 1; no learned weight or bias comes near this.
const NUMBER_MAX: f32 = 1000.0;

/// Why bytes are no words model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WordsError {
    /// Another kind of file.
    #[error("words file must begin with {:?}", String::from_utf8_lossy(MAGIC))]
    Magic,
    /// A later form.
    #[error("words file has version {got}, expected {VERSION}")]
    Version {
        /// What it says.
        got: u32,
    },
    /// Too few or too many, or no power of two.
    #[error("words file has {got} buckets, expected a power of two from {} to {}", BUCKETS.start(), BUCKETS.end())]
    Buckets {
        /// What it says.
        got: usize,
    },
    /// Cut short, or with something behind it.
    #[error("words file has {got} bytes, expected {expected}")]
    Length {
        /// By its header.
        expected: usize,
        /// Its size.
        got: usize,
    },
    /// A scale or a bias with which no score would be one.
    #[error("{name} of the words file is {value}, expected a number within its bounds, at most {NUMBER_MAX}")]
    Number {
        /// Which.
        name: &'static str,
        /// What it is.
        value: f32,
    },
}

/// Why a package's words model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WordsFileError {
    /// The package does not have the file.
    #[error("package {} has no {name}", package.display())]
    Missing {
        /// The package's directory.
        package: PathBuf,
        /// The file that is absent from its manifest.
        name: String,
    },
    /// The file cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is something else.
    #[error("{name} is no model of words")]
    Invalid {
        /// The file.
        name: String,
        /// What is wrong with it.
        #[source]
        source: WordsError,
    },
}

impl Words {
    /// Reads the file of a package; what is not in its manifest is not read.
    pub fn of_package(package: &Package, name: &str) -> Result<Self, WordsFileError> {
        let missing =
            || WordsFileError::Missing { package: package.directory().into(), name: name.to_owned() };
        let path = package.file(name).ok_or_else(missing)?;
        let mut bytes = Vec::new();
        let read =
            File::open(&path).and_then(|file| file.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes));
        read.map_err(|source| WordsFileError::Read { path, source })?;
        Self::read(&bytes).map_err(|source| WordsFileError::Invalid { name: name.to_owned(), source })
    }

    /// Reads a file's bytes, whole.
    pub fn read(bytes: &[u8]) -> Result<Self, WordsError> {
        let expected = HEADER_BYTES;
        let Some((header, tables)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(WordsError::Length { expected, got: bytes.len() });
        };
        if !header.starts_with(MAGIC) {
            return Err(WordsError::Magic);
        }
        let (fields, _) = header[MAGIC.len()..].as_chunks::<4>();
        let version = u32::from_le_bytes(fields[0]);
        if version != VERSION {
            return Err(WordsError::Version { got: version });
        }
        let buckets = u32::from_le_bytes(fields[1]) as usize;
        if !BUCKETS.contains(&buckets) || !buckets.is_power_of_two() {
            return Err(WordsError::Buckets { got: buckets });
        }
        if tables.len() != 4 * buckets {
            let expected = HEADER_BYTES + 4 * buckets;
            return Err(WordsError::Length { expected, got: bytes.len() });
        }
        let scale = |field: usize, name| positive(f32::from_le_bytes(fields[field]), name);
        let table = |index: usize| &tables[index * buckets..(index + 1) * buckets];
        let head = |index: usize| -> Result<Head, WordsError> {
            let bias = f32::from_le_bytes(fields[2 * index + 2]);
            let weights = table(index).iter().map(|byte| byte.cast_signed()).collect();
            Ok(Head {
                weights,
                scale: scale(2 * index + 1, "scale of weights")?,
                bias: bounded(bias, "bias")?,
            })
        };
        let vocabulary = Vocabulary { rarity: table(0).to_vec(), scale: scale(2, "scale of rarities")? };
        Ok(Self { vocabulary, prompt: head(1)?, pair_prompt: head(2)?, pair_response: head(3)? })
    }

    /// The file's bytes.
    pub fn write(&self) -> Vec<u8> {
        let heads = [&self.prompt, &self.pair_prompt, &self.pair_response];
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((self.vocabulary.buckets() as u32).to_le_bytes());
        bytes.extend(self.vocabulary.scale.to_le_bytes());
        bytes.extend(heads.iter().flat_map(|head| [head.scale, head.bias]).flat_map(f32::to_le_bytes));
        bytes.extend(&self.vocabulary.rarity);
        bytes.extend(heads.iter().flat_map(|head| head.weights.iter().map(|weight| weight.cast_unsigned())));
        bytes
    }
}

fn bounded(value: f32, name: &'static str) -> Result<f32, WordsError> {
    // A NaN is not within the bound either.
    if value.abs() <= NUMBER_MAX { Ok(value) } else { Err(WordsError::Number { name, value }) }
}

fn positive(value: f32, name: &'static str) -> Result<f32, WordsError> {
    if value > 0.0 { bounded(value, name) } else { Err(WordsError::Number { name, value }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> Words {
        let texts = ["How do I bake bread?", "How do I pick a lock?"];
        let head = |step: usize| {
            let weights: Vec<f32> = (0..256).map(|i| ((i * step) % 17) as f32 - 8.0).collect();
            Head::of(&weights, step as f32 / 10.0).unwrap()
        };
        Words::of(Vocabulary::of(texts, 256).unwrap(), head(3), head(5), head(7)).unwrap()
    }

    #[test]
    fn a_file_round_trips() {
        let bytes = words().write();
        assert_eq!(bytes.len(), HEADER_BYTES + 4 * 256);
        assert_eq!(Words::read(&bytes).unwrap(), words());
    }

    #[test]
    fn what_is_no_words_model_is_refused_by_name() {
        let good = words().write();
        let with = |at: usize, bytes: &[u8]| {
            let mut changed = good.clone();
            changed[at..at + bytes.len()].copy_from_slice(bytes);
            Words::read(&changed).unwrap_err()
        };
        assert!(matches!(with(0, b"C"), WordsError::Magic));
        assert_eq!(with(16, &2_u32.to_le_bytes()), WordsError::Version { got: 2 });
        for got in [0_u32, 255, 300, 1 << 18, u32::MAX] {
            assert_eq!(with(20, &got.to_le_bytes()), WordsError::Buckets { got: got as usize });
        }
        assert!(matches!(with(20, &512_u32.to_le_bytes()), WordsError::Length { expected: 2100, got: 1076 }));
        for number in [0.0_f32, -1.0, f32::NAN, f32::INFINITY, 1e6] {
            for at in [24, 28, 36, 44] {
                assert!(
                    matches!(with(at, &number.to_le_bytes()), WordsError::Number { .. }),
                    "{number} at {at}"
                );
            }
        }
        for number in [f32::NAN, f32::NEG_INFINITY, 1e6] {
            assert!(matches!(with(32, &number.to_le_bytes()), WordsError::Number { name: "bias", .. }));
        }
        for length in [0, 15, HEADER_BYTES - 1, HEADER_BYTES, good.len() - 1] {
            assert!(Words::read(&good[..length]).is_err(), "{length}");
        }
        assert!(Words::read(&[&good[..], &[0]].concat()).is_err());
    }
}
