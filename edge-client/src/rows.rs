//! Before stage 1: files of rows as they are published elsewhere, read within bounds. A bad row costs itself only.
//!
//! `sample.rs` asks for conversations, `filter --evaluate` for labelled rows. A row is a JSON object: a line of JSONL,
//! or a CSV record under its header's names. What is wrong is told by line, never by quoting a person's text.

use std::{
    fmt,
    io::{self, BufRead, Read},
    path::Path,
};

use serde_json::Value;

use crate::sample::SampleError;

/// One line of a file. The largest row of the public data we read has 40 kB; 1 MiB refuses a wrong file early.
pub const LINE_BYTES_MAX: usize = 1 << 20;
/// One file. All of it is held in memory: at 1 kB a conversation, a quarter of a million of them.
pub const FILE_BYTES_MAX: u64 = 256 << 20;
/// Rows of one file, good and bad: an object's own overhead, some 200 bytes, then stays below the text's bound.
pub const ROWS_MAX: usize = 1_000_000;

/// Why one row was left out. Says where and how much, never the text itself.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// Longer than [`LINE_BYTES_MAX`].
    #[error("line is longer than {LINE_BYTES_MAX} bytes")]
    LineLong,
    /// Not UTF-8.
    #[error("line is not UTF-8 text")]
    NotText,
    /// Not JSON.
    #[error("not a JSON object: {0}")]
    Json(String),
    /// An object, but not one of the forms.
    #[error("expected {0}")]
    Form(&'static str),
    /// A preference pair whose dialogue has no `Human:`/`Assistant:` turns.
    #[error("\"{0}\" is no dialogue of Human and Assistant turns")]
    Dialogue(&'static str),
    /// A preference pair that differs in more than the last reply.
    #[error("\"rejected\" is not the dialogue of \"chosen\" with another last reply")]
    NoPair,
    /// A conversation that cannot be a sample.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

/// A line that was left out.
#[derive(Debug, PartialEq, Eq)]
pub struct BadLine {
    /// From 1.
    pub line: usize,
    /// Why.
    pub reason: RowError,
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.reason)
    }
}

/// What a file gave.
#[derive(Debug)]
pub struct Parsed<T> {
    /// The good rows with their lines, in order.
    pub good: Vec<(usize, T)>,
    /// The bad ones.
    pub bad: Vec<BadLine>,
}

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One JSON object a line.
    Jsonl,
    /// Records under a header, `goal,target` for example.
    Csv,
}

impl Form {
    /// By the file's name: `.csv` is CSV, anything else JSONL.
    pub fn of(path: &Path) -> Self {
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("csv")) { Self::Csv } else { Self::Jsonl }
    }
}

/// Why a file gave nothing at all.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk failed.
    #[error("reading failed after line {line}")]
    Io {
        /// Lines read before it.
        line: usize,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file without rows.
    #[error("no rows: the file is empty")]
    Empty,
    /// More than a device holds in memory.
    #[error("expected at most {ROWS_MAX} rows and {FILE_BYTES_MAX} bytes in one file: split it")]
    TooLarge,
}

/// Reads a file, each row with `parse`.
pub fn read<T>(
    input: impl BufRead,
    form: Form,
    parse: impl Fn(Value) -> Result<T, RowError>,
) -> Result<Parsed<T>, ReadError> {
    read_within(input, form, parse, FILE_BYTES_MAX)
}

fn read_within<T>(
    input: impl BufRead,
    form: Form,
    parse: impl Fn(Value) -> Result<T, RowError>,
    bytes_max: u64,
) -> Result<Parsed<T>, ReadError> {
    let mut input = input.take(bytes_max + 1);
    let mut parsed = Parsed { good: Vec::new(), bad: Vec::new() };
    let mut keep = |line: usize, row: Result<Value, RowError>| {
        match row.and_then(&parse) {
            Ok(row) => parsed.good.push((line, row)),
            Err(reason) => parsed.bad.push(BadLine { line, reason }),
        }
        if parsed.good.len() + parsed.bad.len() > ROWS_MAX { Err(ReadError::TooLarge) } else { Ok(()) }
    };
    match form {
        Form::Jsonl => read_jsonl(&mut input, &mut keep)?,
        Form::Csv => read_csv(&mut input, &mut keep)?,
    }
    if input.limit() == 0 {
        return Err(ReadError::TooLarge);
    }
    if parsed.good.is_empty() && parsed.bad.is_empty() { Err(ReadError::Empty) } else { Ok(parsed) }
}

/// Blank lines are passed over.
fn read_jsonl(
    input: &mut impl BufRead,
    keep: &mut impl FnMut(usize, Result<Value, RowError>) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    let mut buffer = Vec::new();
    for line in 1.. {
        let read =
            next_line(input, &mut buffer).map_err(|source| ReadError::Io { line: line - 1, source })?;
        let row = match read {
            None => break,
            Some(Err(reason)) => Err(reason),
            Some(Ok(())) => match std::str::from_utf8(&buffer) {
                Err(_) => Err(RowError::NotText),
                // A file from Windows may begin with a byte order mark.
                Ok(text) => match text.trim_start_matches('\u{feff}').trim() {
                    "" => continue,
                    text => serde_json::from_str(text).map_err(|error| RowError::Json(place(&error))),
                },
            },
        };
        keep(line, row)?;
    }
    Ok(())
}

/// Reads one line of at most [`LINE_BYTES_MAX`] bytes; what is longer is skipped without being kept in memory.
fn next_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Option<Result<(), RowError>>> {
    line.clear();
    let read = input.by_ref().take(LINE_BYTES_MAX as u64 + 1).read_until(b'\n', line)?;
    if read == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') || read <= LINE_BYTES_MAX {
        return Ok(Some(Ok(())));
    }
    // The rest of the long line.
    loop {
        line.clear();
        let read = input.by_ref().take(LINE_BYTES_MAX as u64).read_until(b'\n', line)?;
        if read == 0 || line.last() == Some(&b'\n') {
            return Ok(Some(Err(RowError::LineLong)));
        }
    }
}

/// Records become objects of strings; a short record lacks its last names.
fn read_csv(
    input: &mut impl BufRead,
    keep: &mut impl FnMut(usize, Result<Value, RowError>) -> Result<(), ReadError>,
) -> Result<(), ReadError> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(input);
    let names: Vec<String> = match reader.headers() {
        Ok(header) if header.as_slice().len() <= LINE_BYTES_MAX => {
            header.iter().map(|name| name.trim().to_lowercase()).collect()
        }
        // Every row would have a copy of its names.
        Ok(_) => return Err(csv_failed(io::Error::other("header is longer than a line may be").into(), 0)),
        Err(error) => return Err(csv_failed(error, 0)),
    };
    let mut last = 1;
    for record in reader.records() {
        let (line, row) = match record {
            Ok(record) => {
                let line = record.position().map_or(0, |position| position.line() as usize);
                let fields = names.iter().cloned().zip(record.iter().map(Value::from));
                let is_long = record.as_slice().len() > LINE_BYTES_MAX;
                let row = if is_long { Err(RowError::LineLong) } else { Ok(Value::Object(fields.collect())) };
                (line, row)
            }
            Err(error) if error.is_io_error() => return Err(csv_failed(error, last)),
            Err(error) => {
                (error.position().map_or(0, |position| position.line() as usize), Err(RowError::NotText))
            }
        };
        last = line;
        keep(line, row)?;
    }
    Ok(())
}

fn csv_failed(error: csv::Error, line: usize) -> ReadError {
    let source = match error.into_kind() {
        csv::ErrorKind::Io(source) => source,
        other => io::Error::new(io::ErrorKind::InvalidData, format!("{other:?}")),
    };
    ReadError::Io { line, source }
}

/// serde_json's own message may quote the input; its category and column do not.
pub(crate) fn place(error: &serde_json::Error) -> String {
    format!("{:?} error at column {}", error.classify(), error.column()).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[u8], form: Form) -> Parsed<Value> {
        read(text, form, Ok).unwrap()
    }

    fn places<T>(parsed: &Parsed<T>) -> (Vec<usize>, Vec<usize>) {
        (parsed.good.iter().map(|(line, _)| *line).collect(), parsed.bad.iter().map(|bad| bad.line).collect())
    }

    #[test]
    fn a_bad_line_is_told_by_number_and_costs_itself_only() {
        let long = "x".repeat(LINE_BYTES_MAX + 1);
        let text =
            [b"\xef\xbb\xbf{\"a\":1}\r\n{\"secret\n\n" as &[u8], long.as_bytes(), b"\n\xff\xfe\n{}"].concat();
        let parsed = lines(&text, Form::Jsonl);
        assert_eq!(places(&parsed), (vec![1, 6], vec![2, 4, 5]));
        let reasons: Vec<&RowError> = parsed.bad.iter().map(|bad| &bad.reason).collect();
        assert!(matches!(reasons[..], [RowError::Json(_), RowError::LineLong, RowError::NotText]));
        assert!(!parsed.bad[0].to_string().contains("secret"));
    }

    #[test]
    fn records_are_objects_under_the_header() {
        let parsed = lines(b"Goal, target\n\"Write, a\nthing\",yes\nonly one\n\xff,no\nb,c\n", Form::Csv);
        assert_eq!(places(&parsed), (vec![2, 4, 6], vec![5]));
        assert_eq!(parsed.good[0].1, serde_json::json!({"goal": "Write, a\nthing", "target": "yes"}));
        assert_eq!(parsed.good[1].1, serde_json::json!({"goal": "only one"}));
    }

    #[test]
    fn a_record_is_no_longer_than_a_line() {
        let long = "x".repeat(LINE_BYTES_MAX + 1);
        let parsed = lines(format!("goal\na\n\"{long}\n\"\nb\n").as_bytes(), Form::Csv);
        assert_eq!(places(&parsed), (vec![2, 5], vec![3]));
        assert_eq!(parsed.bad[0].reason, RowError::LineLong);
        assert!(matches!(read(format!("{long}\na\n").as_bytes(), Form::Csv, Ok), Err(ReadError::Io { .. })));
    }

    #[test]
    fn an_empty_or_a_too_large_file_is_refused() {
        for (text, form) in [("", Form::Jsonl), ("\n \n", Form::Jsonl), ("", Form::Csv), ("a,b\n", Form::Csv)]
        {
            assert!(matches!(read(text.as_bytes(), form, Ok), Err(ReadError::Empty)), "{text:?}");
        }
        let within = |bytes_max| read_within(&b"{}\n{}\n"[..], Form::Jsonl, Ok, bytes_max);
        assert_eq!(within(6).unwrap().good.len(), 2);
        assert!(matches!(within(5), Err(ReadError::TooLarge)));
    }
}
