//! `run` and `once`: the device visits the aggregator, as often as it is asked to come back. `member.rs` is the device.

use std::{
    num::NonZeroU64,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use commonweal_protocol::ReconnectWindow;
use commonweal_transport::{Clock, PutOff};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    Shared,
    member::{Member, Turn},
};
use crate::{
    doing,
    events::{Event, Output},
    install::InstallError,
    notify,
    pipeline::{Outcome, Visit},
    pipeline_error::PipelineError,
};

/// Longest wait that the aggregator can ask for, if the settings say nothing: a device that was told more by mistake is
/// back within a day.
const POLL_SECONDS_MAX: u64 = 24 * 3600;
/// After a failure that may pass, if the aggregator did not say when to come back: devices that lost it at one moment
/// do not return at one.
const RETRY: ReconnectWindow = ReconnectWindow { after_ms: 2_500, spread_ms: 5_000 };
/// After something that the disk's budget has no room for: what makes some is a person's, or another release.
const DISK_RETRY: ReconnectWindow = ReconnectWindow { after_ms: 600_000, spread_ms: 600_000 };
/// Devices whose budgets begin anew at one midnight do not come at one moment.
const PUT_OFF_SPREAD_MS: u32 = 3_600_000;
/// After work that memory was too short for: what else takes it is a person's, and ends in minutes.
const MEMORY_RETRY: ReconnectWindow = ReconnectWindow { after_ms: 60_000, spread_ms: 60_000 };

/// One visit; exit code 4 when the update was refused.
pub(super) fn once(shared: &Shared, heeds: bool) -> Result<()> {
    let mut member = Member::open(shared, heeds)?;
    let (outcome, reconnect) = match member.turn()? {
        Turn::Visited(visited) => visited.map(|Visit { outcome, reconnect }| (outcome, reconnect))?,
        Turn::PutOff { why, .. } => {
            shared.output().show(&Event::Waiting { seconds: 0.0, why });
            return Ok(());
        }
    };
    let _visiting = member.device.store.hold_visit()?;
    // A release may have been published while this device worked.
    if let Outcome::Delivered(_) = outcome {
        match member.device.poll() {
            Err(error) if error.put_off().is_some() => {
                tracing::info!("{error}; the next visit asks for news");
            }
            polled => polled.map(|_| ())?,
        }
    }
    match outcome {
        Outcome::Refused(round, refusal) => {
            let refused = commonweal_transport::LinkError::Refused { reason: refusal, reconnect };
            Err(anyhow::Error::new(refused).context(format!("round {}", round.0)))
        }
        Outcome::Troubled(version) => {
            anyhow::bail!("release {version} cannot be installed here, which the aggregator is told")
        }
        outcome => {
            tracing::info!(?outcome, "visit ended");
            Ok(())
        }
    }
}

/// Visits until stopped, or until enough updates were accepted.
pub(super) fn run(shared: &Shared, rounds: Option<u64>, heeds: bool) -> Result<()> {
    let mut member = Member::open(shared, heeds)?;
    let _watchdog = notify::Watchdog::start().context("cannot start a thread")?;
    notify::ready();
    let longest = member.settings.poll_seconds_max.map_or(POLL_SECONDS_MAX, NonZeroU64::get);
    let longest = Duration::from_secs(longest);
    let stop = member.stop.clone();
    let mut random = ChaCha8Rng::from_os_rng();
    let mut delivered = 0;
    let mut is_put_off = false;
    while !stop.is_cancelled() {
        let (wait, why, is_owners) = match member.turn()? {
            Turn::PutOff { why, wait } => {
                if !std::mem::replace(&mut is_put_off, true) {
                    tracing::info!("waits: {why}");
                }
                (longest.min(wait), why, true)
            }
            Turn::Visited(Ok(Visit { outcome, reconnect })) => {
                is_put_off = false;
                delivered += u64::from(matches!(outcome, Outcome::Delivered(_)));
                if rounds.is_some_and(|rounds| delivered >= rounds) {
                    break;
                }
                (draw(reconnect, longest, random.next_u64()), describe(outcome).to_owned(), false)
            }
            Turn::Visited(Err(_)) if stop.is_cancelled() => break,
            Turn::Visited(Err(error)) => {
                let Some(window) = window_after(&error, Clock::system().unix_ms()) else {
                    return Err(error.into());
                };
                let why = why_again(&error);
                let is_owners = error.put_off().is_some() || error.over_disk().is_some();
                if let Some(PutOff { reason, .. }) = error.put_off() {
                    tracing::info!("waits {reason}");
                } else {
                    tracing::warn!("{:#}; trying again", anyhow::Error::new(error));
                }
                (draw(window, longest, random.next_u64()), why, is_owners)
            }
        };
        member.tell(sentence(&why));
        if shared.output() == Output::Text {
            tracing::debug!(seconds = wait.as_secs_f64(), why, "waiting");
        } else {
            shared.output().show(&Event::Waiting { seconds: wait.as_secs_f64(), why });
        }
        sleep(wait, &mut member, is_owners);
    }
    notify::stopping();
    member.tell("has stopped".to_owned());
    Ok(())
}

/// When to come back after a failure; never, if it will not pass.
fn window_after(error: &PipelineError, now_ms: u64) -> Option<ReconnectWindow> {
    if error.is_want_of_memory() {
        return Some(MEMORY_RETRY);
    }
    if error.over_disk().is_some() {
        return Some(DISK_RETRY);
    }
    if let Some(PutOff { until_ms, .. }) = error.put_off() {
        let after_ms = u32::try_from(until_ms.saturating_sub(now_ms)).unwrap_or(u32::MAX);
        return Some(ReconnectWindow { after_ms, spread_ms: after_ms.min(PUT_OFF_SPREAD_MS) });
    }
    // What the aggregator did not sign with its key in force is for the owner to see.
    let may_pass = error.is_transient()
        || matches!(error, PipelineError::Release { source, .. } if !matches!(**source, InstallError::Signature { .. }));
    may_pass.then(|| error.reconnect().unwrap_or(RETRY))
}

fn why_again(error: &PipelineError) -> String {
    if let (PipelineError::Release { version, .. }, None) = (error, error.over_disk()) {
        format!("release {version} cannot be installed here, which the aggregator is told")
    } else if let Some(refusal) = error.refusal() {
        refusal.to_string()
    } else if let Some(PutOff { reason, .. }) = error.put_off() {
        reason.clone()
    } else if let Some(full) = error.over_disk() {
        full.to_string()
    } else if error.is_want_of_memory() {
        "too little memory for the work".to_owned()
    } else {
        "the aggregator is away".to_owned()
    }
}

/// "waits: no work", "waits until tomorrow: …".
fn sentence(why: &str) -> String {
    let colon = if why.starts_with("until ") || why.starts_with("for ") { "" } else { ":" };
    format!("waits{colon} {why}")
}

/// This device's own moment in a window. One that ends after the longest wait is scaled down to end with it: were it cut
/// off there, most devices would come back at that one moment.
fn draw(window: ReconnectWindow, longest: Duration, random: u64) -> Duration {
    let drawn = Duration::from_millis(window.delay_ms(random));
    let end = Duration::from_millis(u64::from(window.after_ms) + u64::from(window.spread_ms));
    if end > longest { longest.mul_f64(drawn.as_secs_f64() / end.as_secs_f64()) } else { drawn }
}

fn describe(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Idle => "no work",
        Outcome::NoSamples => "nothing to train on: `edge-client add FILE`",
        Outcome::AlreadyDelivered(_) => "this round's update is delivered",
        Outcome::Delivered(_) => "delivered",
        Outcome::Diverged(_) => "training with this round's settings diverged",
        Outcome::Refused(..) => "the update was refused",
        Outcome::Troubled(_) => "the round's release cannot be installed here, which the aggregator is told",
    }
}

/// Sleeps in short pieces, so that a signal ends it, and another policy too if it is the owner's rules or budget that the
/// device waits for. When it is long, the device gives its memory back meanwhile.
fn sleep(total: Duration, member: &mut Member, is_owners: bool) {
    let piece = Duration::from_millis(50);
    let mut left = total;
    while !left.is_zero() && !member.stop.is_cancelled() {
        doing::goes_on();
        if member.waits(Instant::now()) && is_owners {
            return;
        }
        thread::sleep(left.min(piece));
        left = left.saturating_sub(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::TrainingError;
    use commonweal_protocol::{Refusal, Version};
    use commonweal_runtime::memory::{self, Available, Bound};
    use commonweal_transport::LinkError;

    fn too_little() -> commonweal_runtime::MemoryError {
        let available = Some(Available { bytes: 1, bound: Bound::Machine });
        memory::check("a training step", 2, available, "x").unwrap_err()
    }

    #[test]
    fn the_aggregators_window_is_obeyed_also_when_it_refuses() {
        let reconnect = ReconnectWindow { after_ms: 60_000, spread_ms: 30_000 };
        for reason in [Refusal::Busy, Refusal::Internal] {
            let refused = LinkError::Refused { reason, reconnect };
            assert_eq!(window_after(&refused.into(), 0), Some(reconnect), "{reason:?}");
        }
        let away = LinkError::Stalled { during: "polling", stall_ms: 1 };
        assert_eq!(window_after(&away.into(), 0), Some(RETRY));
        let memory = PipelineError::Train(TrainingError::Memory(too_little()));
        assert_eq!(
            (window_after(&memory, 0), why_again(&memory).contains("memory")),
            (Some(MEMORY_RETRY), true)
        );
        let source = Box::new(InstallError::NotNewer { version: Version(1), installed: Version(2) });
        let release = PipelineError::Release { version: Version(1), reconnect, source };
        assert_eq!(window_after(&release, 0), Some(reconnect), "with all the others");
        assert!(why_again(&release).contains("release 1 cannot be installed"), "{}", why_again(&release));
        let revoked = LinkError::Refused { reason: Refusal::Revoked, reconnect };
        assert_eq!(window_after(&revoked.into(), 0), None);
    }

    #[test]
    fn a_budget_is_waited_for_until_its_day_and_said_in_a_sentence() {
        let error = |until_ms| {
            let reason = "until tomorrow: 198MB of today's 200MB are used".to_owned();
            PipelineError::from(LinkError::PutOff(PutOff { reason, until_ms }))
        };
        let hours = window_after(&error(8 * 3_600_000), 0).unwrap();
        assert_eq!((hours.after_ms, hours.spread_ms), (8 * 3_600_000, PUT_OFF_SPREAD_MS));
        let error = error(90_000);
        let window = |after_ms, spread_ms| Some(ReconnectWindow { after_ms, spread_ms });
        assert_eq!(window_after(&error, 30_000), window(60_000, 60_000));
        assert_eq!(window_after(&error, 100_000), window(0, 0));
        assert_eq!(sentence(&why_again(&error)), "waits until tomorrow: 198MB of today's 200MB are used");
        assert_eq!(sentence("no work"), "waits: no work");
        assert_eq!(crate::cli::exit::code(&error.into()), 5);
    }

    #[test]
    fn a_window_beyond_the_longest_wait_keeps_its_spread() {
        let longest = Duration::from_secs(100);
        let moments = |after_ms, spread_ms| {
            let window = ReconnectWindow { after_ms, spread_ms };
            [0, u64::from(spread_ms) / 2, u64::from(spread_ms)]
                .map(|random| draw(window, longest, random).as_secs())
        };
        assert_eq!(moments(20_000, 80_000), [20, 60, 100]);
        assert_eq!(moments(200_000, 800_000), [20, 60, 100]);
        assert_eq!(moments(0, 604_800_000), [0, 50, 100]);
        assert_eq!(moments(604_800_000, 0), [100, 100, 100]);
    }
}
