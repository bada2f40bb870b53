//! `add`: keeps the conversations of files for training.

use std::path::PathBuf;

use anyhow::Result;

use super::{Shared, open};
use crate::{events::Event, sample};

pub(super) fn add(shared: &Shared, files: &[PathBuf]) -> Result<()> {
    let store = open::Place::find(shared)?.store()?;
    // All are read before any is kept: a wrong name among them changes nothing.
    let parsed = files.iter().map(|file| open::read_samples(file)).collect::<Result<Vec<_>>>()?;
    let (mut added, mut seen, mut bad) = (0, 0, 0);
    for parsed in &parsed {
        seen += parsed.good.len();
        bad += parsed.bad.len();
        added += sample::keep(&store, parsed)?;
    }
    shared.output().show(&Event::Added { added, known: seen - added, bad });
    Ok(())
}
