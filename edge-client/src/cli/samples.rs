//! `samples` and `forget`: what is kept for training, and its end.

use std::{collections::BTreeSet, fmt::Write as _};

use anyhow::{Context, Result};
use clap::Args;
use commonweal_transport::Clock;
use serde_json::json;
use time::{OffsetDateTime, macros::format_description};

use super::{Shared, exit::BadInput, open};
use crate::{
    era::Era,
    events::{Event, Output},
    forget,
    kept::{self, Kept},
    sample::{Sample, SampleId},
    store::{Store, StoreError},
    units::Span,
};

/// Characters of a sample's name that are shown: enough to tell some millions apart.
const NAME_CHARS: usize = 12;

/// What `forget` was asked for.
#[derive(Debug, Args)]
pub struct Request {
    /// Beginnings of samples' names, as `samples` shows them
    #[arg(value_name = "SAMPLE")]
    names: Vec<String>,
    /// Those that came with this file's name, or `serve` for kept chats
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Those that are older: 90d, 12h, 5m
    #[arg(long, value_name = "TIME")]
    older_than: Option<Span>,
    /// All, with everything computed from them, the personal adapter, and the key if no edge-client works in the directory
    #[arg(long, conflicts_with_all = ["names", "source", "older_than"])]
    all: bool,
}

/// One line a sample.
pub(super) fn samples(shared: &Shared, with_text: bool) -> Result<()> {
    let store = open::Place::find(shared)?.look()?;
    let all = kept::all(&store)?;
    let used = kept::used(&store)?;
    let output = shared.output();
    for one in &all {
        let id = one.sample.id();
        let state = match &used {
            Some(used) if used.contains(&id) => "used",
            None if forget::has_rounds(&store)? => "used",
            _ => "new",
        };
        output.say(&match output {
            Output::Json => as_json(one, id, state, with_text).to_string(),
            Output::Text => as_text(one, id, state, with_text),
        });
    }
    if output == Output::Text {
        output.say(&format!("{} samples; new: no round has drawn it yet", all.len()));
    }
    Ok(())
}

fn as_json(kept: &Kept, id: SampleId, state: &str, with_text: bool) -> serde_json::Value {
    let mut line = json!({
        "sample": id.to_string(), "source": kept.source, "added_ms": kept.added_ms,
        "turns": kept.sample.turns().len(), "characters": characters(&kept.sample), "state": state,
    });
    if with_text {
        line["messages"] = json!(kept.sample.turns());
    }
    line
}

fn as_text(kept: &Kept, id: SampleId, state: &str, with_text: bool) -> String {
    let Kept { sample, source, added_ms } = kept;
    let source = source.as_deref().unwrap_or("unknown");
    let mut line = format!(
        "{}  {}  {state:4}  {:2} turns  {:6} characters  {source}",
        &id.to_string()[..NAME_CHARS],
        date(*added_ms),
        sample.turns().len(),
        characters(sample),
    );
    if with_text {
        for turn in sample.turns() {
            let role = json!(turn.role);
            let _ = write!(line, "\n    {}: {}", role.as_str().unwrap_or_default(), turn.content);
        }
    }
    line
}

fn characters(sample: &Sample) -> usize {
    sample.turns().iter().map(|turn| turn.content.chars().count()).sum()
}

/// In UTC.
fn date(ms: u64) -> String {
    let form = format_description!("[year]-[month]-[day] [hour]:[minute]");
    let date = OffsetDateTime::from_unix_timestamp((ms / 1000) as i64).ok();
    date.and_then(|date| date.format(form).ok()).unwrap_or_else(|| "unknown date".into())
}

/// A wish is written down, and carried out once no visit is under way; a running daemon's ends for it.
pub(super) fn forget(shared: &Shared, request: &Request) -> Result<()> {
    let place = open::Place::find(shared)?;
    let store = place.look()?;
    let samples = if request.all {
        // Without its key there is nothing to count.
        let count = kept::all(&store).ok().map(|all| all.len());
        forget::wish_all(&store)?;
        count
    } else {
        Some(wish(&place, request)?)
    };
    let visiting = store.hold_visit()?;
    // Anew: only who visits ends a key, so the one that is read from here on is the one that is there.
    let forgotten = forget::carry_out(&place.look()?)?;
    let key = request.all && end_key(&place)?;
    drop(visiting);
    let forget::Forgotten { rounds, personal } = forgotten;
    shared.output().show(&Event::Forgotten { samples, rounds, personal, key });
    Ok(())
}

/// How many samples shall go. If somebody says `--all` meanwhile, they are looked for again, among what was added since.
fn wish(place: &open::Place, request: &Request) -> Result<usize> {
    loop {
        // Anew, for the key of the samples that are there now.
        let store = place.look()?;
        let era = Era::now(&store)?;
        let ids = chosen(&store, request)?;
        if ids.is_empty() || forget::wish_of(&store, &ids, era)? {
            return Ok(ids.len());
        }
    }
}

fn chosen(store: &Store, request: &Request) -> Result<BTreeSet<SampleId>> {
    let Request { names, source, older_than, .. } = request;
    if names.is_empty() && source.is_none() && older_than.is_none() {
        let text = "expected what to forget: names of samples, --source, --older-than or --all";
        return Err(BadInput(text.into()).into());
    }
    let all = kept::all(store)?;
    let known: Vec<Sample> = all.iter().map(|kept| kept.sample.clone()).collect();
    let mut ids =
        forget::choose(&known, names).map_err(|error| BadInput(error.to_string())).context("forget")?;
    if source.is_some() || older_than.is_some() {
        let old = match older_than {
            Some(span) => Some(forget::expired(store, *span, Clock::system().unix_ms())?),
            None => None,
        };
        let fits = |kept: &&Kept| {
            source.as_ref().is_none_or(|name| kept.source.as_ref() == Some(name))
                && old.as_ref().is_none_or(|old| old.contains(&kept.sample.id()))
        };
        ids.extend(all.iter().filter(fits).map(|kept| kept.sample.id()));
    }
    Ok(ids)
}

/// Nobody needs the key any more: older copies of the files, in a backup or on the disk's free blocks, close with it. Whoever
/// holds the directory may have the key in use; `serve`, `chat` and `train` do not hold it, and read the key anew where they
/// write.
fn end_key(place: &open::Place) -> Result<bool> {
    let mut store = match Store::lock(&place.directory, place.key.clone()) {
        Ok(store) => store,
        Err(StoreError::Locked(_)) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    // Nothing is sealed with it between the look and its end.
    let _held = forget::hold_all(&store)?;
    if !store.secrets()?.is_empty() {
        return Ok(false);
    }
    // Who has read it already seals nothing more with it.
    Era::end(&store)?;
    Ok(store.unseal()?)
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;
    use crate::{
        keys::{self, KeyPlace},
        settings::SettingsFile,
    };

    #[test]
    fn the_key_stays_if_a_wish_is_being_written() {
        let directory = tempfile::tempdir().unwrap();
        let key = KeyPlace::File(directory.path().join(keys::FILE));
        let place =
            open::Place { directory: directory.path().to_owned(), settings: SettingsFile::default(), key };
        drop(place.store().unwrap());
        let store = place.look().unwrap();
        let held = store.hold(forget::WISH_LOCK).unwrap();
        let is_ended = thread::scope(|scope| {
            let ending = scope.spawn(|| end_key(&place).unwrap());
            // Long enough for whoever does not wait.
            for _ in 0..200 {
                if !ending.is_finished() {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            store.write(forget::WISH, b"").unwrap();
            drop(held);
            ending.join().unwrap()
        });
        assert!(!is_ended && directory.path().join(keys::FILE).exists());
        store.remove(forget::WISH).unwrap();
        let era = Era::now(&store).unwrap();
        assert!(end_key(&place).unwrap() && !directory.path().join(keys::FILE).exists());
        assert_ne!(Era::now(&store).unwrap(), era, "whoever has read the key knows that it has gone");
    }
}
