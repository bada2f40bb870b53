//! `aggregator show VERSION`: a release's report card, where it came from, and how its trial went.

use commonweal_protocol::{Direction, Metric, ReportCard, RoundId, Version};

use super::{CliError, Opened, moment, say, say_json};
use crate::canary::{self, Canary};
use crate::desk::{Record, records};
use crate::events::card_sentence;

pub(super) fn show(opened: &Opened, version: u64, json: bool) -> Result<(), CliError> {
    let (publisher, _) = opened.publisher()?;
    let signed = publisher.release(Version(version))?;
    let (signed_with, release) = (publisher.signed_with(&signed), signed.release);
    let coord = opened.storage.coord.as_ref();
    let record = match release.round {
        Some(round) => records(coord, round, 1)?.into_iter().find(|record| record.round == round),
        None => None,
    };
    let canary = canary::read(coord)?.map(|(canary, _)| canary);
    let head = publisher.head()?.map_or(release.version, |head| head.release.version);
    let stage = stage(canary.as_ref(), head, release.version);
    if json {
        let lineage = record.as_ref().map(|record| &record.lineage);
        return say_json(&serde_json::json!({
            "release": release, "lineage": lineage, "record": record, "stage": stage.0, "stage_reason": stage.1,
            "signed_with": signed_with,
        }));
    }
    say(&format!("release {} of {}", release.version, moment(release.created_ms)));
    let parent = release.parent.map_or_else(|| "none".to_owned(), |parent| parent.to_string());
    let round =
        release.round.map_or_else(|| "none, made by an operator".to_owned(), |round| round.to_string());
    say(&format!("  previous   {parent}"));
    say(&format!("  round      {round}"));
    say(&format!("  base       {}", release.base));
    say(&format!("  adapter    {} ({} bytes)", release.digest, release.length));
    let signed_with = signed_with.map_or_else(|| "none".to_owned(), |number| number.to_string());
    say(&format!("  signed     with key {signed_with}"));
    say(&format!("  in force   {}{}", stage.0, stage.1.map_or_else(String::new, |why| format!(": {why}"))));
    say_card(&release.report_card);
    if let Some(record) = record {
        say_lineage(&record);
    }
    Ok(())
}

fn say_card(card: &ReportCard) {
    say(&format!("  measured   {}", card_sentence(card)));
    if !card.merge.is_empty() {
        say(&format!("  merged     {}", card.merge));
    }
    for gate in &card.gates {
        let metric = match gate.metric {
            Metric::SafeRate => "safe answers",
            Metric::AttackSuccessRate => "attack success",
            Metric::OverRefusalRate => "over-refusal",
            Metric::HeldOutLoss => "held-out loss",
            Metric::HeldOutLossRise => "rise of the held-out loss",
        };
        let bound = match gate.direction {
            Direction::AtLeast => "at least",
            Direction::AtMost => "at most",
        };
        let word = if gate.passed { "passed" } else { "FAILED" };
        say(&format!("  gate       {metric} {bound} {:.4}: {:.4}, {word}", gate.threshold, gate.value));
    }
}

fn say_lineage(record: &Record) {
    let RoundId(round) = record.round;
    say(&format!("  updates    {} merged in round {round}:", record.lineage.len()));
    for origin in &record.lineage {
        say(&format!(
            "             {} of {}, trained from release {}",
            origin.digest, origin.device, origin.start
        ));
    }
}

/// Who may have the release, and why.
fn stage(canary: Option<&Canary>, head: Version, version: Version) -> (&'static str, Option<String>) {
    let ended = canary.and_then(|canary| canary.ended.iter().rev().find(|ended| ended.version == version));
    let reason = ended.map(|ended| ended.reason.clone());
    let trial = canary.and_then(|canary| Some((canary, canary.trial.as_ref()?)));
    let stable = trial.map_or(head, |(canary, _)| canary.stable);
    match trial {
        _ if ended.is_some_and(|ended| ended.rolled_back) => ("rolled back", reason),
        Some((canary, trial)) if version > stable => {
            let (after, before) = (trial.losses.len(), canary.before.len());
            let reports = format!("{after} reports, {before} of the release before");
            ("on trial", Some(format!("{reports}; {}", trial.words.count())))
        }
        _ if version < stable => ("no longer", Some(format!("release {stable} took its place"))),
        _ => ("for all devices", reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_force_is_told_from_what_was() {
        let said = |canary: Option<&Canary>, version| stage(canary, Version(4), Version(version)).0;
        assert_eq!([3, 4].map(|version| said(None, version)), ["no longer", "for all devices"]);
        let mut canary = Canary::stable(Version(2));
        canary.see_head(Version(3), true, 0);
        canary.see_head(Version(4), true, 0);
        let all = [1, 2, 3, 4].map(|version| said(Some(&canary), version));
        assert_eq!(all, ["no longer", "for all devices", "on trial", "on trial"]);
        canary.roll_back(Version(5), "worse".to_owned(), 0);
        assert_eq!(stage(Some(&canary), Version(5), Version(4)), ("rolled back", Some("worse".to_owned())));
    }
}
