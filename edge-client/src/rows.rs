//! Bounded reading of lines and CSV rows, for `sample.rs` and the command line. A bad row costs itself only.

use std::io::{BufRead, Read};

use crate::sample::{BadLine, LINE_BYTES_MAX, Parsed, ROWS_MAX, ReadError, RowError, Sample};

/// Reads one line of at most [`LINE_BYTES_MAX`] bytes; what is longer is skipped without being kept in memory.
fn next_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<Option<Result<(), RowError>>> {
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

/// Reads JSON lines with `parse`; blank lines are passed over.
pub(crate) fn read_jsonl(
    mut input: impl BufRead,
    parse: impl Fn(&str) -> Result<Sample, RowError>,
) -> Result<Parsed, ReadError> {
    let mut parsed = Parsed::default();
    let mut buffer = Vec::new();
    for line in 1.. {
        let read =
            next_line(&mut input, &mut buffer).map_err(|source| ReadError::Io { line: line - 1, source })?;
        let row = match read {
            None => break,
            Some(Err(reason)) => Err(reason),
            Some(Ok(())) => match std::str::from_utf8(&buffer).map(str::trim) {
                Err(_) => Err(RowError::NotText),
                Ok("") => continue,
                Ok(text) => parse(text),
            },
        };
        match row {
            Ok(sample) => parsed.samples.push(sample),
            Err(reason) => parsed.bad.push(BadLine { line, reason }),
        }
        if parsed.samples.len() + parsed.bad.len() > ROWS_MAX {
            return Err(ReadError::TooMany);
        }
    }
    Ok(parsed)
}

/// Reads `goal,target` rows with a header, as AdvBench publishes them.
pub(crate) fn read_csv(input: impl BufRead) -> Result<Parsed, ReadError> {
    // A CSV field may span lines, so a bound on the whole stands in for the bound on a line.
    let whole = input.take((ROWS_MAX as u64) * 1024);
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(whole);
    let header = match reader.headers() {
        Ok(header) if header.is_empty() => return Err(ReadError::Empty),
        Ok(header) => header.clone(),
        Err(error) => return Err(csv_failed(error, 0)),
    };
    let column =
        |names: &[&str]| header.iter().position(|name| names.contains(&name.trim().to_lowercase().as_str()));
    let mut parsed = Parsed::default();
    let (Some(goal), Some(target)) = (column(&["goal", "prompt"]), column(&["target", "response"])) else {
        parsed
            .bad
            .push(BadLine { line: 1, reason: RowError::Csv(format!("header has {} others", header.len())) });
        return Ok(parsed);
    };
    for record in reader.records() {
        let record = match record {
            Ok(record) => record,
            Err(error) if error.is_io_error() => return Err(csv_failed(error, parsed.samples.len())),
            Err(error) => {
                let line = error.position().map_or(0, |position| position.line() as usize);
                parsed.bad.push(BadLine { line, reason: RowError::NotText });
                continue;
            }
        };
        let line = record.position().map_or(0, |position| position.line() as usize);
        let row = match (record.get(goal), record.get(target)) {
            (Some(goal), Some(target)) => Sample::from_pair(goal.to_owned(), target.to_owned()),
            _ => Err(RowError::Csv(format!("row has {} columns", record.len()))),
        };
        match row {
            Ok(sample) => parsed.samples.push(sample),
            Err(reason) => parsed.bad.push(BadLine { line, reason }),
        }
        if parsed.samples.len() + parsed.bad.len() > ROWS_MAX {
            return Err(ReadError::TooMany);
        }
    }
    Ok(parsed)
}

fn csv_failed(error: csv::Error, line: usize) -> ReadError {
    let source = match error.into_kind() {
        csv::ErrorKind::Io(source) => source,
        other => std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{other:?}")),
    };
    ReadError::Io { line, source }
}
