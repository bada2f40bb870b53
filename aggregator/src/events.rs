//! What a run tells the outside: one [`Event`] for each thing that an operator or a report wants to know.
//!
//! With `--json` every event is one line of stdout, with when it was told (`time_ms`); otherwise a short sentence. Counts and
//! digests only: no event can hold a text.

mod figures;

use std::io::Write;
use std::sync::Arc;

use commonweal_protocol::{DeviceId, Digest, Fault, Refusal, ReportCard, RoundId, TraceContext, Version};
use commonweal_transport::Clock;
use serde::Serialize;

pub use figures::{AlignFigures, EvaluateFigures, Figures, MergeFigures, Origin};

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The server takes connections.
    Listening {
        /// Where; nowhere for who only drives.
        address: Option<String>,
        /// Where the operator's port is, if there is one.
        admin: Option<String>,
        /// The current release.
        version: Version,
        /// The round to come or to be resumed.
        round: RoundId,
    },
    /// This process drives the rounds from now on, of those that share its stores.
    Drives {
        /// The round under way, or the next.
        round: RoundId,
    },
    /// Another process may drive from now on.
    StandsBy,
    /// A device has its certificate.
    Enrolled {
        /// Its name from now on.
        device: DeviceId,
    },
    /// A round has begun.
    RoundOpened {
        /// The round.
        round: RoundId,
        /// The release that it starts from.
        start: Version,
        /// Updates at which it closes.
        target: u32,
    },
    /// A device has its task.
    Assigned {
        /// The round.
        round: RoundId,
        /// The device.
        device: DeviceId,
    },
    /// An update is on disk and its receipt was signed.
    Received {
        /// The round.
        round: RoundId,
        /// Who sent it.
        device: DeviceId,
        /// Its bytes.
        bytes: u64,
        /// BLAKE3 of them.
        digest: Digest,
        /// The round whose task it did: an earlier one, perhaps, in buffered mode.
        task_round: RoundId,
        /// When the device began to bring it, if since this start.
        opened_ms: Option<u64>,
        /// The place of its delivery in the device's own traces, if the device sent it.
        #[serde(skip)]
        trace: Option<TraceContext>,
        /// Its weight.
        samples: u32,
        /// Updates so far.
        received: u32,
        /// Updates at which the round closes.
        target: u32,
    },
    /// A peer was refused.
    Refused {
        /// The device, if it has a certificate.
        device: Option<DeviceId>,
        /// What it asked for.
        request: &'static str,
        /// The round under way, or the next.
        round: RoundId,
        /// The update that it was about, if it was about one.
        update: Option<Digest>,
        /// Why, as the peer is told.
        refusal: Refusal,
        /// Why, in the operator's words.
        reason: String,
        /// Refusals of strangers before it of which nothing was told.
        untold: u64,
    },
    /// The round takes no more updates.
    RoundClosed {
        /// The round.
        round: RoundId,
        /// Devices that had a task.
        selected: u32,
        /// Updates that came.
        received: u32,
        /// Their bytes.
        uploaded_bytes: u64,
    },
    /// An accepted update is not merged: its device was revoked since.
    LeftOut {
        /// The round.
        round: RoundId,
        /// Whose it is.
        device: DeviceId,
    },
    /// A stage is done.
    Stage {
        /// The round.
        round: RoundId,
        /// When the round began, ms since 1970.
        #[serde(skip)]
        opened_ms: u64,
        /// How long it took.
        seconds: f64,
        /// What it did.
        #[serde(flatten)]
        figures: Figures,
    },
    /// A release is the head.
    Published {
        /// The round that made it, if one did.
        round: Option<RoundId>,
        /// Its version.
        version: Version,
        /// The release that it replaces.
        parent: Option<Version>,
        /// Its adapter.
        digest: Digest,
        /// How it was measured.
        report_card: ReportCard,
    },
    /// A release is tried on a share of the devices.
    Trial {
        /// Which.
        version: Version,
        /// The release that the others keep.
        stable: Version,
        /// How many devices see it.
        share: f64,
    },
    /// What devices reported with a round's updates does not count in the trial: what is known of it is damaged.
    Uncounted {
        /// The round.
        round: RoundId,
        /// What is damaged.
        reason: String,
    },
    /// A device says that it cannot install a release.
    Troubled {
        /// Which device.
        device: DeviceId,
        /// Which release.
        version: Version,
        /// Why, in the protocol's words.
        fault: Fault,
    },
    /// A release was no worse on trial, and is for all devices.
    Promoted {
        /// Which.
        version: Version,
        /// What was reported of it.
        reason: String,
    },
    /// A release was worse on trial: the one before it is the head again.
    RolledBack {
        /// Which was worse.
        version: Version,
        /// Whose adapter all devices get.
        to: Version,
        /// Under which version.
        now: Version,
        /// What was reported of it.
        reason: String,
    },
    /// The previous release stays.
    Rejected {
        /// The round.
        round: RoundId,
        /// When it began, ms since 1970.
        #[serde(skip)]
        opened_ms: u64,
        /// Which stage or gate refused the candidate, and why; or that too few updates came in time.
        reason: String,
    },
    /// A stage could not reach its store or its library and will be tried again.
    Retrying {
        /// The round.
        round: RoundId,
        /// What failed.
        reason: String,
        /// When it is tried again.
        after_ms: u64,
    },
    /// A test asked to be halted here (`COMMONWEAL_PAUSE_AT`).
    Paused {
        /// The fault point.
        at: String,
        /// The process to kill.
        process: u32,
    },
    /// The server's certificate was issued anew and the admin token read again, as SIGHUP asks.
    Reloaded {
        /// Why the token is still the one before.
        problem: Option<String>,
    },
    /// The server ends.
    Stopped {
        /// The current release.
        version: Version,
    },
}

/// Where events go.
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(&Event) + Send + Sync>);

impl std::fmt::Debug for Events {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Events")
    }
}

impl Events {
    /// Events go to this function.
    pub fn to(sink: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// Events become lines of stdout: objects with the time by this clock, or sentences.
    pub fn to_stdout(json: bool, clock: Clock) -> Self {
        Self::to(move |event| {
            let line = if json { event.object(clock.unix_ms()) } else { event.sentence() };
            // A reader that went away is no reason to stop a round.
            let mut stdout = std::io::stdout().lock();
            drop(writeln!(stdout, "{line}").and_then(|()| stdout.flush()));
        })
    }

    /// The same, and `hear` is told first.
    #[must_use]
    pub fn heard_by(&self, hear: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        let events = self.clone();
        Self::to(move |event| {
            hear(event);
            events.tell(event);
        })
    }

    /// Tells of an event.
    pub fn tell(&self, event: &Event) {
        (self.0)(event);
    }
}

fn percent(rate: Option<f64>) -> String {
    rate.map_or_else(|| "not measured".to_owned(), |rate| format!("{:.1} %", rate * 100.0))
}

/// A report card in one line.
pub fn card_sentence(card: &ReportCard) -> String {
    let loss = card.held_out_loss.map_or_else(|| "not measured".to_owned(), |loss| format!("{loss:.4}"));
    format!(
        "safe answers {}, attack success {}, over-refusal {}, held-out loss {loss}",
        percent(card.safe_rate),
        percent(card.attack_success_rate),
        percent(card.over_refusal_rate),
    )
}

impl Event {
    /// The event for a program: one line of JSON, with when it was told.
    fn object(&self, time_ms: u64) -> String {
        #[derive(Serialize)]
        struct Timed<'event> {
            time_ms: u64,
            #[serde(flatten)]
            event: &'event Event,
        }
        serde_json::to_string(&Timed { time_ms, event: self }).unwrap_or_default()
    }

    /// The event for a person.
    pub fn sentence(&self) -> String {
        match self {
            Self::Listening { address, admin, version, round } => {
                let admin = admin
                    .as_ref()
                    .map_or_else(String::new, |admin| format!(", for operators on http://{admin}"));
                let address = address.as_deref().unwrap_or("no address for devices");
                format!("listening on {address}{admin}; release {version}, round {round} is next")
            }
            Self::Drives { round } => format!("drives the rounds from here on, round {round} is next"),
            Self::StandsBy => "stands by: another process may drive".to_owned(),
            Self::Enrolled { device } => format!("device {device} enrolled"),
            Self::RoundOpened { round, start, target } => {
                format!("round {round} opened from release {start}, {target} updates wanted")
            }
            Self::Assigned { round, device } => format!("round {round}: device {device} has its task"),
            Self::Received { round, device, bytes, received, target, .. } => {
                format!("round {round}: {received}/{target} updates, {bytes} bytes from {device}")
            }
            Self::Refused { device, request, reason, .. } => match device {
                Some(device) => format!("refused {request} of {device}: {reason}"),
                None => format!("refused {request}: {reason}"),
            },
            Self::RoundClosed { round, selected, received, uploaded_bytes } => format!(
                "round {round} closed: {received} updates of {selected} devices, {uploaded_bytes} bytes"
            ),
            Self::LeftOut { round, device } => {
                format!("round {round}: the update of device {device} is left out, for it was revoked")
            }
            Self::Stage { round, seconds, figures, .. } => {
                format!("round {round}: {} ({seconds:.1} s)", figures.sentence())
            }
            Self::Published { version, parent, report_card, .. } => format!(
                "release {version}{}: {}",
                parent.map_or_else(String::new, |parent| format!(" (after {parent})")),
                card_sentence(report_card)
            ),
            Self::Trial { version, stable, share } => format!(
                "release {version} is on trial with {:.1} % of the devices; the others keep {stable}",
                share * 100.0
            ),
            Self::Uncounted { round, reason } => {
                format!("round {round}: what devices reported of releases is not counted: {reason}")
            }
            Self::Troubled { device, version, fault } => {
                format!("device {device} cannot install release {version}: {fault}")
            }
            Self::Promoted { version, reason } => format!("release {version} is for all devices: {reason}"),
            Self::RolledBack { version, to, now, reason } => {
                format!("release {version} rolled back to {to}, which is release {now} now: {reason}")
            }
            Self::Rejected { round, reason, .. } => {
                format!("round {round} rejected, the release stays: {reason}")
            }
            Self::Retrying { round, reason, after_ms } => {
                format!("round {round}: {reason}; trying again in {after_ms} ms")
            }
            Self::Paused { at, process } => format!("paused at {at}, process {process}"),
            Self::Reloaded { problem: None } => "reloaded".to_owned(),
            Self::Reloaded { problem: Some(problem) } => {
                format!("reloaded; the admin token is still the one before: {problem}")
            }
            Self::Stopped { version } => format!("stopped; release {version}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_one_flat_object() {
        let event = Event::Stage {
            round: RoundId(2),
            opened_ms: 7,
            seconds: 0.5,
            figures: Figures::Align(AlignFigures { prompts: 3, ..AlignFigures::default() }),
        };
        let value: serde_json::Value = serde_json::from_str(&event.object(1_700_000_000_000)).unwrap();
        assert_eq!(value["time_ms"], 1_700_000_000_000_u64);
        assert_eq!(value["event"], "stage");
        assert_eq!(value["stage"], "align");
        assert_eq!(value["round"], 2);
        assert_eq!(value["prompts"], 3);
    }
}
