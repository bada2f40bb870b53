//! Reads labelled rows: `guard.*.jsonl` for the guard, `reviser.*.jsonl` for the reviser.
//!
//! `make_adapter_data.py` writes them. `learn_guard.rs` and `learn_reviser.rs` turn them into tokens.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use commonweal_safety::{CategoryId, Pair};
use serde::{Deserialize, de::DeserializeOwned};

/// A file of rows beyond this is not one of ours: 20,000 rows have 5 MB.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Safe or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Label {
    Safe,
    Unsafe,
}

/// A labelled prompt, or prompt with response.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GuardRow {
    pub(crate) prompt: String,
    pub(crate) response: Option<String>,
    pub(crate) label: Label,
    pub(crate) category: Option<CategoryId>,
    #[serde(default)]
    pub(crate) source: Option<String>,
}

impl GuardRow {
    pub(crate) fn pair(&self) -> Pair<'_> {
        Pair { prompt: &self.prompt, response: self.response.as_deref() }
    }

    pub(crate) fn is_unsafe(&self) -> bool {
        self.label == Label::Unsafe
    }
}

/// A response with its critique and its rewriting.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReviserRow {
    pub(crate) prompt: String,
    pub(crate) response: String,
    pub(crate) category: Option<CategoryId>,
    pub(crate) principle: String,
    pub(crate) critique: String,
    pub(crate) revision: String,
}

/// Why a file of rows cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RowsError {
    #[error("{} cannot be read", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} has {bytes} bytes, expected at most {FILE_BYTES_MAX}", path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("line {line} of {} is not a row", path.display())]
    Row { path: PathBuf, line: usize, source: serde_json::Error },
    #[error("{} has no rows", path.display())]
    Empty { path: PathBuf },
}

/// Rows of a JSONL file; empty lines are skipped, anything else that is no row is refused with its line.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, RowsError> {
    let failed = |source| RowsError::Read { path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(RowsError::TooLarge { path: path.into(), bytes });
    }
    let mut rows = Vec::new();
    for (index, line) in BufReader::new(file.take(FILE_BYTES_MAX)).lines().enumerate() {
        let line = line.map_err(failed)?;
        if line.trim().is_empty() {
            continue;
        }
        let row = serde_json::from_str(&line);
        rows.push(row.map_err(|source| RowsError::Row { path: path.into(), line: index + 1, source })?);
    }
    if rows.is_empty() { Err(RowsError::Empty { path: path.into() }) } else { Ok(rows) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn rows_are_read_and_a_bad_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let good = r#"{"prompt":"p","response":null,"label":"unsafe","category":"crime","source":"own"}"#;
        fs::write(&path, format!("{good}\n\n{good}\n")).unwrap();
        let rows: Vec<GuardRow> = read(&path).unwrap();
        assert!(rows.len() == 2 && rows[0].is_unsafe() && rows[0].response.is_none());
        fs::write(&path, format!("{good}\n{{\"prompt\":1}}\n")).unwrap();
        assert!(matches!(read::<GuardRow>(&path), Err(RowsError::Row { line: 2, .. })));
        fs::write(&path, "\n").unwrap();
        assert!(matches!(read::<GuardRow>(&path), Err(RowsError::Empty { .. })));
    }
}
