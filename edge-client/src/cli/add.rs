//! `add`: keeps the conversations of files for training.

use std::path::PathBuf;

use anyhow::Result;

use super::{Shared, exit::BadInput, open};
use crate::{events::Event, sample};

pub(super) fn add(shared: &Shared, files: &[PathBuf]) -> Result<()> {
    let store = open::Place::find(shared)?.store()?;
    let (mut added, mut seen, mut bad) = (0, 0, 0);
    for file in files {
        let parsed = open::read_samples(file)?;
        seen += parsed.samples.len();
        bad += parsed.bad.len();
        added += sample::keep(&store, &parsed)?;
    }
    shared.output().show(&Event::Added { added, known: seen - added, bad });
    if seen == 0 {
        return Err(BadInput(format!("no usable row: {bad} lines were left out")).into());
    }
    Ok(())
}
