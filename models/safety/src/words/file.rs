//! The file of a words model, `adapters/guard.words` in a package. Little-endian; everything else is refused.
//!
//! ```text
//! 0   "commonweal words"              16 bytes
//! 16  version                         u32, 1 without clusters and 2 with them
//! 20  buckets                         u32, a power of two
//! 24  scale of the rarities           f32, above 0
//! 28  scale, bias                     f32 each: of prompts, of pairs' prompts, of pairs' responses
//! 52  clustered words                 u32, at least 1; their hashes, u32 each, ascending; the three clusters of each, u16
//!     (this only in version 2)
//!     rarities                        u8 each
//!     weights                         i8 each: of prompts, of pairs' prompts, of pairs' responses
//! ```
//!
//! Rarities and each of the weights are as many as buckets, and twice as many with clusters. Versions of before 2 are read.
//! Written by `train-reference words`, read by `open.rs`.

use std::{fs::File, io, io::Read, path::PathBuf};

use commonweal_package::Package;

use super::{BUCKETS, CLUSTERED_MAX, Clusters, Head, LEVELS, Vocabulary, Words, columns};

const MAGIC: &[u8; 16] = b"commonweal words";
/// Without clusters, and with them.
const VERSIONS: [u32; 2] = [1, 2];
const HEADER_BYTES: usize = 52;
/// A clustered word's hash and clusters.
const CLUSTERED_BYTES: usize = 4 + 2 * LEVELS;
/// The largest file that can be one: 2.4 MB.
const FILE_BYTES_MAX: usize = HEADER_BYTES + 4 + CLUSTERED_BYTES * CLUSTERED_MAX + 4 * 2 * *BUCKETS.end();
/// A rarity is at most 1 + ln(1 + texts), so that a step is far below 1; no learned weight or bias comes near this.
const NUMBER_MAX: f32 = 1000.0;

/// Why bytes are no words model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WordsError {
    /// Another kind of file.
    #[error("words file must begin with {:?}", String::from_utf8_lossy(MAGIC))]
    Magic,
    /// A later form.
    #[error("words file has version {got}, expected 1 or 2")]
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
    /// Too few or too many.
    #[error("words file has {got} clustered words, expected 1 to {CLUSTERED_MAX}")]
    Clustered {
        /// What it says.
        got: usize,
    },
    /// Words could not be found among them.
    #[error("clustered word {at} of the words file must have a larger hash than the one before")]
    Order {
        /// Index of the word.
        at: usize,
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
        if !VERSIONS.contains(&version) {
            return Err(WordsError::Version { got: version });
        }
        let buckets = u32::from_le_bytes(fields[1]) as usize;
        if !BUCKETS.contains(&buckets) || !buckets.is_power_of_two() {
            return Err(WordsError::Buckets { got: buckets });
        }
        let (clusters, tables) = if version == VERSIONS[1] {
            let (clusters, tables) = read_clusters(tables, bytes.len())?;
            (Some(clusters), tables)
        } else {
            (None, tables)
        };
        let columns = columns(buckets, clusters.as_ref());
        if tables.len() != 4 * columns {
            let expected = bytes.len() - tables.len() + 4 * columns;
            return Err(WordsError::Length { expected, got: bytes.len() });
        }
        let scale = |field: usize, name| positive(f32::from_le_bytes(fields[field]), name);
        let table = |index: usize| &tables[index * columns..(index + 1) * columns];
        let head = |index: usize| -> Result<Head, WordsError> {
            let bias = f32::from_le_bytes(fields[2 * index + 2]);
            let weights = table(index).iter().map(|byte| byte.cast_signed()).collect();
            Ok(Head {
                weights,
                scale: scale(2 * index + 1, "scale of weights")?,
                bias: bounded(bias, "bias")?,
            })
        };
        let (rarity, scale) = (table(0).to_vec(), scale(2, "scale of rarities")?);
        let vocabulary = Vocabulary { buckets, clusters, rarity, scale };
        Ok(Self { vocabulary, prompt: head(1)?, pair_prompt: head(2)?, pair_response: head(3)? })
    }

    /// The file's bytes.
    pub fn write(&self) -> Vec<u8> {
        let Vocabulary { buckets, clusters, rarity, scale } = &self.vocabulary;
        let heads = [&self.prompt, &self.pair_prompt, &self.pair_response];
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSIONS[usize::from(clusters.is_some())].to_le_bytes());
        bytes.extend((*buckets as u32).to_le_bytes());
        bytes.extend(scale.to_le_bytes());
        bytes.extend(heads.iter().flat_map(|head| [head.scale, head.bias]).flat_map(f32::to_le_bytes));
        if let Some(clusters) = clusters {
            bytes.extend((clusters.words.len() as u32).to_le_bytes());
            bytes.extend(clusters.words.iter().flat_map(|hash| hash.to_le_bytes()));
            bytes.extend(clusters.of.iter().flatten().flat_map(|cluster| cluster.to_le_bytes()));
        }
        bytes.extend(rarity);
        bytes.extend(heads.iter().flat_map(|head| head.weights.iter().map(|weight| weight.cast_unsigned())));
        bytes
    }
}

/// The table of clusters, and what stands behind it; `got` is the file's size.
fn read_clusters(bytes: &[u8], got: usize) -> Result<(Clusters, &[u8]), WordsError> {
    let short = |expected: usize| WordsError::Length { expected: got - bytes.len() + expected, got };
    let (count, rest) = bytes.split_first_chunk::<4>().ok_or(short(4))?;
    let count = u32::from_le_bytes(*count) as usize;
    if !(1..=CLUSTERED_MAX).contains(&count) {
        return Err(WordsError::Clustered { got: count });
    }
    let Some((table, tables)) = rest.split_at_checked(count * CLUSTERED_BYTES) else {
        return Err(short(4 + count * CLUSTERED_BYTES));
    };
    let (hashes, of) = table.split_at(4 * count);
    let words: Vec<u32> = hashes.as_chunks().0.iter().map(|hash| u32::from_le_bytes(*hash)).collect();
    if let Some(at) = words.windows(2).position(|two| two[0] >= two[1]) {
        return Err(WordsError::Order { at: at + 1 });
    }
    let (of, _) = of.as_chunks::<{ 2 * LEVELS }>();
    let clusters = |bytes: &[u8; 2 * LEVELS]| -> [u16; LEVELS] {
        std::array::from_fn(|level| u16::from_le_bytes([bytes[2 * level], bytes[2 * level + 1]]))
    };
    Ok((Clusters { words, of: of.iter().map(clusters).collect() }, tables))
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

    fn words(clusters: Option<Clusters>) -> Words {
        let texts = ["How do I bake bread?", "How do I pick a lock?"];
        let columns = columns(256, clusters.as_ref());
        let head = |step: usize| {
            let weights: Vec<f32> = (0..columns).map(|i| ((i * step) % 17) as f32 - 8.0).collect();
            Head::of(&weights, step as f32 / 10.0).unwrap()
        };
        Words::of(Vocabulary::of(texts, 256, clusters).unwrap(), head(3), head(5), head(7)).unwrap()
    }

    fn clustered() -> Words {
        words(Clusters::of([("bread", [1, 20, 300]), ("lock", [2, 10, 400]), ("pick", [2, 10, 65_535])]))
    }

    #[test]
    fn a_file_round_trips() {
        let bytes = words(None).write();
        assert_eq!(bytes.len(), HEADER_BYTES + 4 * 256);
        assert_eq!(Words::read(&bytes).unwrap(), words(None));
        let bytes = clustered().write();
        assert_eq!(bytes.len(), HEADER_BYTES + 4 + 3 * CLUSTERED_BYTES + 4 * 512);
        assert_eq!(Words::read(&bytes).unwrap(), clustered());
    }

    #[test]
    fn what_is_no_table_of_clusters_is_refused_by_name() {
        let good = clustered().write();
        let with = |at: usize, bytes: &[u8]| {
            let mut changed = good.clone();
            changed[at..at + bytes.len()].copy_from_slice(bytes);
            Words::read(&changed).unwrap_err()
        };
        for got in [0, CLUSTERED_MAX as u32 + 1, u32::MAX] {
            assert_eq!(with(HEADER_BYTES, &got.to_le_bytes()), WordsError::Clustered { got: got as usize });
        }
        assert!(matches!(with(HEADER_BYTES, &100_000_u32.to_le_bytes()), WordsError::Length { .. }));
        let first = good[HEADER_BYTES + 4..HEADER_BYTES + 8].to_vec();
        assert_eq!(with(HEADER_BYTES + 8, &first), WordsError::Order { at: 1 });
        // Without its table, and a table where there should be none.
        assert!(matches!(with(16, &1_u32.to_le_bytes()), WordsError::Length { .. }));
        for length in (HEADER_BYTES..good.len()).step_by(7) {
            assert!(matches!(Words::read(&good[..length]), Err(WordsError::Length { .. })), "{length}");
        }
        assert!(Words::read(&[&good[..], &[0]].concat()).is_err());
    }

    #[test]
    fn any_changed_byte_is_refused_or_still_gives_a_number() {
        let good = clustered().write();
        for at in 0..good.len() {
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = good.clone();
                changed[at] = byte;
                let Ok(words) = Words::read(&changed) else { continue };
                let spoken = words.say(crate::Pair { prompt: "Pick a lock", response: Some("bake bread") });
                assert!(spoken.prompt.is_finite() && spoken.pair.is_finite(), "byte {at} as {byte}");
            }
        }
    }

    #[test]
    fn what_is_no_words_model_is_refused_by_name() {
        let good = words(None).write();
        let with = |at: usize, bytes: &[u8]| {
            let mut changed = good.clone();
            changed[at..at + bytes.len()].copy_from_slice(bytes);
            Words::read(&changed).unwrap_err()
        };
        assert!(matches!(with(0, b"C"), WordsError::Magic));
        assert_eq!(with(16, &3_u32.to_le_bytes()), WordsError::Version { got: 3 });
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
