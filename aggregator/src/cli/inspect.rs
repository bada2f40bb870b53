//! `aggregator status`, `rounds` and `devices`: read-only, beside a running server or without one.

use commonweal_protocol::RoundId;
use serde_json::json;

use super::{CliError, Opened, moment, now_ms, say, say_json};
use crate::desk::{self, Record};
use crate::events::card_sentence;
use crate::receive::enroll::Registry;
use crate::store::PAGE_MAX;

#[derive(Debug, clap::Args)]
pub(super) struct RoundsVerb {
    /// From this round on.
    #[arg(long, default_value_t = 0)]
    from: u64,
}

pub(super) fn status(opened: &Opened, json: bool) -> Result<(), CliError> {
    let (publisher, base) = opened.publisher()?;
    let head = publisher.head()?;
    let (rounds, progress) = desk::peek(opened.storage.coord.as_ref())?;
    let received = opened.storage.inbox.list(&desk::queue(rounds.round), PAGE_MAX)?.len();
    let registry = Registry::new(opened.storage.coord.clone());
    let devices = registry.devices()?;
    let active = devices.iter().filter(|(_, record)| record.revoked_ms.is_none()).count();
    let tokens = registry.tokens_open(now_ms())?;
    let release = head.as_ref().map(|signed| &signed.release);
    let target = rounds.progress().1;
    if json {
        return say_json(&json!({
            "base": base.hash,
            "release": release,
            "version": release.map(|release| release.version),
            "round": rounds.round,
            "phase": rounds.phase.name(),
            "selected": rounds.selected(),
            "received": received,
            "target": target,
            "stage_seconds": progress.seconds,
            "devices": active,
            "devices_revoked": devices.len() - active,
            "tokens_open": tokens,
            "plain": opened.config.plain,
        }));
    }
    say(&format!("base     {}", base.hash));
    match release {
        Some(release) => {
            say(&format!("release  {}, published {}", release.version, moment(release.created_ms)));
            say(&format!("         {}", card_sentence(&release.report_card)));
        }
        None => say("release  none"),
    }
    say(&format!("round    {}, {}: {received} updates of {target}", rounds.round, rounds.phase.name()));
    say(&format!("devices  {active} active, {} revoked; {tokens} open invitations", devices.len() - active));
    Ok(())
}

fn percent(rate: Option<f64>) -> String {
    rate.map_or_else(|| "–".to_owned(), |rate| format!("{:.1} %", 100.0 * rate))
}

pub(super) fn rounds(opened: &Opened, verb: &RoundsVerb, json: bool) -> Result<(), CliError> {
    let mut from = RoundId(verb.from);
    if !json {
        say(&format!(
            "{:>5}  {:9}  {:>7}  {:>7}  {:>7}  {:>8}  {:>9}  {:>7}  {:>5}  {}",
            "round", "outcome", "release", "safe", "refusal", "loss", "updates", "clipped", "align", "reason"
        ));
    }
    loop {
        let page = desk::records(opened.storage.coord.as_ref(), from, 1_000)?;
        let Some(last) = page.last() else { return Ok(()) };
        from = RoundId(last.round.0.saturating_add(1));
        for record in &page {
            if json { say_json(record)? } else { say(&line(record)) }
        }
    }
}

fn line(record: &Record) -> String {
    format!(
        "{:>5}  {:9}  {:>7}  {:>7}  {:>7}  {:>8}  {:>9}  {:>7}  {:>5}  {}",
        record.round,
        record.outcome,
        record.version,
        percent(record.safe_rate),
        percent(record.over_refusal),
        record.held_out_loss.map_or_else(|| "–".to_owned(), |loss| format!("{loss:.4}")),
        format!("{}/{}", record.updates, record.selected),
        record.clipped,
        record.align_steps,
        record.reason.as_deref().unwrap_or_default()
    )
}

pub(super) fn devices(opened: &Opened, json: bool) -> Result<(), CliError> {
    for (device, record) in Registry::new(opened.storage.coord.clone()).devices()? {
        if json {
            say_json(&json!({
                "device": device,
                "enrolled_ms": record.enrolled_ms,
                "expires_ms": record.expires_ms,
                "revoked_ms": record.revoked_ms,
            }))?;
            continue;
        }
        let state = record.revoked_ms.map_or_else(
            || format!("certificate until {}", moment(record.expires_ms)),
            |revoked_ms| format!("revoked {}", moment(revoked_ms)),
        );
        say(&format!("{device}  enrolled {}  {state}", moment(record.enrolled_ms)));
    }
    Ok(())
}
