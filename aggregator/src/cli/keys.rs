//! `aggregator keys list` and `rotate`: which keys have signed for the aggregator, and a new one that follows.

use commonweal_protocol::{AggregatorKey, KeyNumber, Lineage};
use commonweal_transport::Clock;
use serde_json::{Value, json};

use super::{CliError, moment, now_ms, say, say_json};
use crate::directory::Directory;
use crate::events::Events;
use crate::pause::PausePoint;

#[derive(Debug, clap::Subcommand)]
pub(super) enum KeysVerb {
    /// Every key since `init`, the one in force last.
    #[command(
        after_help = "Examples:\n  aggregator keys list --dir state\n  aggregator keys list --dir state --json"
    )]
    List,
    /// A new key signs from now on, also in a running server; the one before it is retired for good.
    #[command(after_help = "Example:\n  aggregator keys rotate --dir state\n\n\
        Devices follow at their next visit and refuse what the retired key signs from then on. Back the state directory\n\
        up afterwards: an older backup has a key that no device follows any more.\n\
        COMMONWEAL_PAUSE_AT=drawn|written|renamed halts there (kill tests).")]
    Rotate,
}

pub(super) fn keys(directory: &Directory, verb: &KeysVerb, json: bool) -> Result<(), CliError> {
    match verb {
        KeysVerb::List => list(directory.signer()?.keys().lineage(), json),
        KeysVerb::Rotate => rotate(directory, json),
    }
}

/// Number, key and when it came into force; of the first one that is not known.
fn rows(lineage: &Lineage) -> Vec<(KeyNumber, AggregatorKey, Option<u64>)> {
    let first = (lineage.first_number(), lineage.first(), None);
    let followed = lineage.steps().iter().map(|step| {
        let step = step.succession;
        (step.number, step.key, Some(step.created_ms))
    });
    std::iter::once(first).chain(followed).collect()
}

fn list(lineage: &Lineage, json: bool) -> Result<(), CliError> {
    for (number, key, since_ms) in rows(lineage) {
        let is_in_force = number == lineage.number();
        if json {
            say_json(&json!({"number": number, "key": key, "since_ms": since_ms, "in_force": is_in_force}))?;
            continue;
        }
        let since =
            since_ms.map_or_else(|| "since the beginning".to_owned(), |ms| format!("since {}", moment(ms)));
        say(&format!(
            "{number:>3}  {}  {since}{}",
            key.0,
            if is_in_force { ", in force" } else { ", retired" }
        ));
    }
    Ok(())
}

fn rotate(directory: &Directory, json: bool) -> Result<(), CliError> {
    let (pause, events) = (PausePoint::from_environment(), Events::to_stdout(json, Clock::system()));
    let keys = directory.rotate(now_ms(), |step| pause.here(step, &events))?;
    let lineage = keys.lineage();
    let rows = rows(lineage);
    let retired: Option<&AggregatorKey> = rows.iter().rev().nth(1).map(|(_, key, _)| key);
    if json {
        let told: Value = json!({"number": lineage.number(), "key": lineage.key(), "retired": retired});
        return say_json(&told);
    }
    say(&format!("key {} signs from now on: {}", lineage.number(), lineage.key().0));
    say("devices follow at their next visit; back the state directory up, an older backup has no such key");
    Ok(())
}
