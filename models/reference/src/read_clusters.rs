//! Reads the clusters of common words that `cluster_words.py` writes, for `learn_words.rs`: a word a line with its three
//! clusters, from coarse to fine, tabs between.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use commonweal_safety::{CLUSTERED_MAX, Clusters, LEVELS};

/// 60,000 words have 1.2 MB.
const FILE_BYTES_MAX: u64 = 1 << 23;

/// Why a file of clusters cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClustersError {
    #[error("{} cannot be read", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} has more than {FILE_BYTES_MAX} bytes", path.display())]
    TooLarge { path: PathBuf },
    #[error("line {line} of {} must be a word and {LEVELS} numbers below 65536, tabs between", path.display())]
    Line { path: PathBuf, line: usize },
    #[error("{} must have 1 to {CLUSTERED_MAX} words, has {got}", path.display())]
    Count { path: PathBuf, got: usize },
}

pub(crate) fn read(path: &Path) -> Result<Clusters, ClustersError> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text));
    read.map_err(|source| ClustersError::Read { path: path.into(), source })?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(ClustersError::TooLarge { path: path.into() });
    }
    let lines = text.lines().enumerate();
    let line = |(index, line)| row(line).ok_or(ClustersError::Line { path: path.into(), line: index + 1 });
    let rows = lines.map(line).collect::<Result<Vec<_>, _>>()?;
    let got = rows.len();
    Clusters::of(rows).ok_or(ClustersError::Count { path: path.into(), got })
}

fn row(line: &str) -> Option<(&str, [u16; LEVELS])> {
    let (word, clusters) = line.split_once('\t')?;
    let clusters: Vec<u16> = clusters.split('\t').map(str::parse).collect::<Result<_, _>>().ok()?;
    Some((word, clusters.try_into().ok()?)).filter(|_| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_and_any_other_line_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("clusters.tsv");
        let of = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read(&path)
        };
        let expected = Clusters::of([("bread", [1, 2, 3]), ("cake", [1, 2, 65_535])]);
        assert_eq!(of("bread\t1\t2\t3\ncake\t1\t2\t65535\n").ok(), expected);
        for bad in [
            "bread\t1\t2",
            "bread\t1\t2\t3\t4",
            "bread\t1\t2\t65536",
            "bread 1 2 3",
            "\t1\t2\t3",
            "bread\t1\t2\t-3",
        ] {
            let error = of(&format!("cake\t1\t2\t3\n{bad}\n")).unwrap_err();
            assert!(matches!(error, ClustersError::Line { line: 2, .. }), "{bad:?}: {error}");
        }
        assert!(matches!(of(""), Err(ClustersError::Count { got: 0, .. })));
        assert!(matches!(read(directory.path()), Err(ClustersError::Read { .. })));
    }
}
