//! `add`: keeps the conversations of files for training, once those are gone that are past their time.

use std::path::PathBuf;

use anyhow::Result;
use commonweal_transport::Clock;

use super::{Shared, open};
use crate::{
    era::{self, Era},
    events::Event,
    forget,
    rows::Parsed,
    sample::Sample,
    units::Limit,
};

pub(super) fn add(shared: &Shared, files: &[PathBuf]) -> Result<()> {
    let place = open::Place::find(shared)?;
    let policy = place.policy(shared)?;
    // All are read before any is kept: a wrong name among them changes nothing.
    let parsed = files.iter().map(|file| open::read_samples(file)).collect::<Result<Vec<_>>>()?;
    let (mut added, mut seen, mut bad) = (0, 0, 0);
    let now_ms = Clock::system().unix_ms();
    forget::expire_alone(&place.look()?, policy.store.keep, now_ms)?;
    for (file, parsed) in files.iter().zip(&parsed) {
        seen += parsed.good.len();
        bad += parsed.bad.len();
        let source = file.file_name().unwrap_or_default().to_string_lossy();
        added += keep(&place, policy.budget.disk, parsed, &source, now_ms)?;
    }
    shared.output().show(&Event::Added { added, known: seen - added, bad });
    Ok(())
}

/// How many were new. If everything is forgotten meanwhile, they are added after it.
fn keep(
    place: &open::Place,
    disk_max: Limit,
    parsed: &Parsed<Sample>,
    source: &str,
    now_ms: u64,
) -> Result<usize> {
    loop {
        // Anew: with all that was forgotten, its key may have gone.
        let store = place.store_or_look()?.within(disk_max);
        let era = Era::now(&store)?;
        if let Some(added) = era::keep(&store, era, parsed, source, now_ms)? {
            return Ok(added);
        }
    }
}
