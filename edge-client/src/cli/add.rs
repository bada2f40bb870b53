//! `add`: keeps the conversations of files for training, once those are gone that are past their time.

use std::path::PathBuf;

use anyhow::Result;
use commonweal_transport::Clock;

use super::{Shared, open};
use crate::{events::Event, forget, kept};

pub(super) fn add(shared: &Shared, files: &[PathBuf]) -> Result<()> {
    let place = open::Place::find(shared)?;
    let policy = place.policy(shared)?;
    // All are read before any is kept: a wrong name among them changes nothing.
    let parsed = files.iter().map(|file| open::read_samples(file)).collect::<Result<Vec<_>>>()?;
    let (mut added, mut seen, mut bad) = (0, 0, 0);
    let now_ms = Clock::system().unix_ms();
    forget::expire_alone(&place.look()?, policy.store.keep, now_ms)?;
    let store = place.store_or_look()?.within(policy.budget.disk);
    for (file, parsed) in files.iter().zip(&parsed) {
        seen += parsed.good.len();
        bad += parsed.bad.len();
        let source = file.file_name().unwrap_or_default().to_string_lossy();
        added += kept::keep(&store, parsed, &source, now_ms)?;
    }
    shared.output().show(&Event::Added { added, known: seen - added, bad });
    Ok(())
}
