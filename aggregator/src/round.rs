//! What a round is: `tick(now, event) -> actions`, pure.
//!
//! ```text
//! Waiting → Collecting → Merging → Aligning → Evaluating → Publishing → Waiting (next round)
//!               │            └─────────┴──────────┴── Rejected ──────────▲
//!               └──────────────── Abandoned (no quorum) ─────────────────┘
//! ```
//!
//! Buffered rounds (`buffer.rs`) open by themselves and are abandoned only when nothing came.
//!
//! `receive` turns a device's messages into events, `serve` carries the actions out in order and reports
//! back with events. Nothing here reads a clock or a disk. A device that fails or vanishes never stops a
//! round: the goal, the quorum and the deadline decide.

mod vocabulary;
mod policy;
mod sample;
mod buffer;
#[cfg(test)]
mod simulate;
#[cfg(test)]
mod simulate_buffer;

use std::collections::{BTreeMap, BTreeSet};

use commonweal_protocol::{DeviceId, Digest, ReportCard, RoundId, Start};
use serde::{Deserialize, Serialize};

pub use buffer::{ROUNDS_BACK_MAX, Task};
pub use policy::{GOAL_MAX, Policy, PolicyError, RoundMode, TASKS_MAX};
pub use sample::{Chosen, Sampling};
pub use vocabulary::{Action, Event, NotAdmitted, Outcome, Summary};

use sample::READY_MAX;

/// Longest reason kept for a rejected round.
const REASON_BYTES_MAX: usize = 2_000;

/// Where a round stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    /// Devices report that they are ready.
    Waiting {
        /// Who did.
        ready: BTreeSet<DeviceId>,
        /// When the first did.
        since_ms: Option<u64>,
    },
    /// Devices train and upload.
    Collecting {
        /// Updates at which the round closes early.
        target: u32,
        /// When the round closes whatever has come.
        deadline_ms: u64,
        /// Devices with a task, and whether their update has come.
        selected: BTreeMap<DeviceId, bool>,
    },
    /// The updates are merged into a candidate.
    Merging,
    /// The candidate is tuned on revised answers.
    Aligning {
        /// The merged adapter.
        candidate: Digest,
    },
    /// The candidate is measured.
    Evaluating {
        /// The aligned adapter.
        candidate: Digest,
    },
    /// The release is signed and made the head.
    Publishing {
        /// The adapter to publish.
        candidate: Digest,
        /// How it did.
        card: Box<ReportCard>,
    },
}

impl Phase {
    /// Its name in a status line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Waiting { .. } => "waiting",
            Self::Collecting { .. } => "collecting",
            Self::Merging => "merging",
            Self::Aligning { .. } => "aligning",
            Self::Evaluating { .. } => "evaluating",
            Self::Publishing { .. } => "publishing",
        }
    }
}

/// The state machine of all rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rounds {
    /// The current round, or the next one while waiting.
    pub round: RoundId,
    /// Where it stands.
    pub phase: Phase,
    /// The release it starts from; known once it is open.
    pub start: Option<Start>,
    opened_ms: u64,
    closed_ms: u64,
    selected: u32,
    received: u32,
    /// Of fair sampling: when each device was last asked.
    chosen: Chosen,
    /// Of buffered rounds: who is at work on what.
    tasks: BTreeMap<DeviceId, Task>,
}

impl Default for Rounds {
    fn default() -> Self {
        Self::waiting(RoundId(1))
    }
}

impl Rounds {
    fn waiting(round: RoundId) -> Self {
        Self {
            round,
            phase: Phase::Waiting { ready: BTreeSet::new(), since_ms: None },
            start: None,
            opened_ms: 0,
            closed_ms: 0,
            selected: 0,
            received: 0,
            chosen: Chosen::default(),
            tasks: BTreeMap::new(),
        }
    }

    /// Whether an update of `device` for `round` would be counted now. `Ok(true)`: it already was.
    pub fn admits(&self, policy: &Policy, round: RoundId, device: &DeviceId) -> Result<bool, NotAdmitted> {
        if policy.is_buffered() {
            return self.admits_buffered(policy, round, device);
        }
        let stale = NotAdmitted::StaleRound { named: round.0, current: self.round.0 };
        if round != self.round {
            return Err(stale);
        }
        let Phase::Collecting { selected, .. } = &self.phase else { return Err(stale) };
        selected.get(device).copied().ok_or(NotAdmitted::NotSelected)
    }

    /// Devices that have or had a task in the current round.
    pub fn selected(&self) -> u32 {
        self.selected
    }

    /// When the round began; 0 before that.
    pub fn opened_ms(&self) -> u64 {
        self.opened_ms
    }

    /// Whether the round's deadline has come.
    pub fn is_due(&self, now_ms: u64) -> bool {
        matches!(self.phase, Phase::Collecting { deadline_ms, .. } if deadline_ms <= now_ms)
    }

    /// Updates received in the current round, and the number at which it closes.
    pub fn progress(&self) -> (u32, u32) {
        match &self.phase {
            Phase::Collecting { target, .. } => (self.received, *target),
            _ => (self.received, 0),
        }
    }

    /// The next step. Events that do not belong to the phase change nothing.
    pub fn tick(&mut self, policy: &Policy, now_ms: u64, event: Event) -> Vec<Action> {
        match (&mut self.phase, event) {
            (_, Event::Resumed) => self.resume(policy, now_ms),
            (_, Event::Recorded) => self.leave(policy),
            (Phase::Waiting { .. }, Event::Head(start)) if policy.is_buffered() => {
                self.open_buffer(policy, now_ms, start)
            }
            (Phase::Waiting { .. }, Event::Polled(device, start)) if policy.is_buffered() => {
                let mut actions = self.open_buffer(policy, now_ms, start);
                actions.extend(self.give_task(policy, now_ms, device, start));
                actions
            }
            (Phase::Waiting { .. }, Event::Polled(device, start)) => {
                self.enlist(policy, now_ms, device, start)
            }
            (Phase::Waiting { since_ms, .. }, Event::TimePassed) => {
                since_ms.map_or_else(Vec::new, |since_ms| {
                    let open_ms = since_ms.saturating_add(policy.wait_ms);
                    // Opening needs a device's poll, which names the release; so only keep the timer.
                    if now_ms < open_ms { vec![Action::WakeAt(open_ms)] } else { Vec::new() }
                })
            }
            (Phase::Collecting { .. }, Event::Polled(device, start)) if policy.is_buffered() => {
                self.give_task(policy, now_ms, device, start)
            }
            (Phase::Collecting { .. }, Event::Received(device)) if policy.is_buffered() => {
                self.count_buffered(now_ms, device)
            }
            (Phase::Collecting { .. }, Event::TimePassed) if policy.is_buffered() => {
                self.check_buffer(policy, now_ms)
            }
            (Phase::Collecting { .. }, Event::Polled(device, _)) => self.assign(policy, device),
            (Phase::Collecting { .. }, Event::Received(device)) => self.count(now_ms, &device),
            (Phase::Collecting { .. }, Event::TimePassed) => self.check_deadline(policy, now_ms),
            (Phase::Merging, Event::Merged(candidate)) => {
                self.enter(Phase::Aligning { candidate }, Action::Align(candidate))
            }
            (Phase::Aligning { .. }, Event::Aligned(candidate)) => {
                self.enter(Phase::Evaluating { candidate }, Action::Evaluate(candidate))
            }
            (Phase::Evaluating { candidate }, Event::Accepted(card)) => {
                let candidate = *candidate;
                self.enter(
                    Phase::Publishing { candidate, card: card.clone() },
                    Action::Publish(candidate, card),
                )
            }
            (Phase::Publishing { .. }, Event::Published(version)) => {
                self.finish(policy, now_ms, Outcome::Published { version })
            }
            (
                Phase::Merging | Phase::Aligning { .. } | Phase::Evaluating { .. } | Phase::Publishing { .. },
                Event::Refused(mut reason),
            ) => {
                let mut end = reason.len().min(REASON_BYTES_MAX);
                while !reason.is_char_boundary(end) {
                    end -= 1;
                }
                reason.truncate(end);
                self.finish(policy, now_ms, Outcome::Rejected { reason })
            }
            _ => Vec::new(),
        }
    }

    /// A device is ready; perhaps enough are to begin.
    fn enlist(&mut self, policy: &Policy, now_ms: u64, device: DeviceId, start: Start) -> Vec<Action> {
        if policy.is_past_last(self.round) {
            return vec![Action::Stop];
        }
        let Phase::Waiting { ready, since_ms } = &mut self.phase else { return Vec::new() };
        // Bounded: whoever comes first needs no more to be remembered than the goal.
        let is_drawn = policy.sampling != Sampling::First;
        let ready_max = if is_drawn { READY_MAX } else { policy.goal as usize };
        if ready.len() < ready_max {
            ready.insert(device);
        }
        let since_ms = *since_ms.get_or_insert(now_ms);
        let open_ms = since_ms.saturating_add(policy.wait_ms);
        let count = ready.len() as u32;
        // A draw is of all that come in its time.
        if (is_drawn || count < policy.goal) && (now_ms < open_ms || count < policy.quorum) {
            return vec![Action::WakeAt(open_ms)];
        }
        let deadline_ms = now_ms.saturating_add(policy.deadline_ms);
        let target = count.min(policy.goal);
        let mut selected = BTreeMap::new();
        if is_drawn {
            let (draw, count) = ((policy.sampling_seed, self.round), policy.selected_max(target) as usize);
            let asked = sample::choose(ready, policy.sampling, &self.chosen, draw, count);
            if policy.sampling == Sampling::Fair {
                self.chosen.note(self.round, asked.iter().copied());
            }
            selected.extend(asked.into_iter().map(|device| (device, false)));
        }
        self.selected = selected.len() as u32;
        self.phase = Phase::Collecting { target, deadline_ms, selected };
        self.start = Some(start);
        self.opened_ms = now_ms;
        self.received = 0;
        let mut actions = vec![Action::Save, Action::Opened];
        actions.extend(self.assign(policy, device));
        actions.push(Action::WakeAt(deadline_ms));
        actions
    }

    /// Gives a device its task: a new one while there is room, or the one it already has.
    fn assign(&mut self, policy: &Policy, device: DeviceId) -> Vec<Action> {
        let Phase::Collecting { target, selected, .. } = &mut self.phase else { return Vec::new() };
        match selected.get(&device) {
            Some(false) => vec![Action::Assign(device)],
            None if policy.sampling == Sampling::First
                && selected.len() < policy.selected_max(*target) as usize =>
            {
                selected.insert(device, false);
                self.selected = selected.len() as u32;
                vec![Action::Save, Action::Assign(device)]
            }
            Some(true) | None => Vec::new(),
        }
    }

    fn count(&mut self, now_ms: u64, device: &DeviceId) -> Vec<Action> {
        let Phase::Collecting { target, selected, .. } = &mut self.phase else { return Vec::new() };
        let Some(received) = selected.get_mut(device) else { return Vec::new() };
        if !*received {
            *received = true;
            self.received += 1;
        }
        if self.received >= *target { self.close(now_ms) } else { Vec::new() }
    }

    fn check_deadline(&mut self, policy: &Policy, now_ms: u64) -> Vec<Action> {
        let Phase::Collecting { deadline_ms, .. } = &self.phase else { return Vec::new() };
        if now_ms < *deadline_ms {
            return vec![Action::WakeAt(*deadline_ms)];
        }
        if self.received >= policy.quorum {
            return self.close(now_ms);
        }
        self.closed_ms = now_ms;
        let mut actions = vec![Action::Closed];
        actions.extend(self.finish(policy, now_ms, Outcome::Abandoned { quorum: policy.quorum }));
        actions
    }

    fn close(&mut self, now_ms: u64) -> Vec<Action> {
        self.closed_ms = now_ms;
        self.phase = Phase::Merging;
        vec![Action::Save, Action::Closed, Action::Merge]
    }

    fn enter(&mut self, phase: Phase, work: Action) -> Vec<Action> {
        self.phase = phase;
        vec![Action::Save, work]
    }

    fn finish(&mut self, policy: &Policy, now_ms: u64, outcome: Outcome) -> Vec<Action> {
        let summary = Summary {
            round: self.round,
            opened_ms: self.opened_ms,
            closed_ms: self.closed_ms,
            finished_ms: now_ms,
            selected: self.selected,
            received: self.received,
            outcome,
        };
        // The record comes first. Once it is there the round is over, whatever becomes of the state behind it.
        let mut actions = vec![Action::Finish(summary)];
        actions.extend(self.leave(policy));
        actions
    }

    /// On to the next round.
    fn leave(&mut self, policy: &Policy) -> Vec<Action> {
        let (tasks, chosen) = (std::mem::take(&mut self.tasks), std::mem::take(&mut self.chosen));
        *self = Self { chosen, tasks, ..Self::waiting(RoundId(self.round.0.saturating_add(1))) };
        let mut actions = vec![Action::Save];
        if policy.is_past_last(self.round) {
            actions.push(Action::Stop);
        }
        actions
    }

    /// What is to be done where the rounds stand, and when to look again at the latest: for who did not take the last step
    /// itself.
    pub fn outlook(&self, policy: &Policy) -> (Option<Action>, Option<u64>) {
        let wake_ms = match &self.phase {
            Phase::Waiting { since_ms, .. } => {
                since_ms.map(|since_ms| since_ms.saturating_add(policy.wait_ms))
            }
            Phase::Collecting { deadline_ms, .. } => Some(*deadline_ms),
            _ => None,
        };
        (self.work(), wake_ms)
    }

    /// The stage's work, in a stage.
    fn work(&self) -> Option<Action> {
        match &self.phase {
            Phase::Waiting { .. } | Phase::Collecting { .. } => None,
            Phase::Merging => Some(Action::Merge),
            Phase::Aligning { candidate } => Some(Action::Align(*candidate)),
            Phase::Evaluating { candidate } => Some(Action::Evaluate(*candidate)),
            Phase::Publishing { candidate, card } => Some(Action::Publish(*candidate, card.clone())),
        }
    }

    /// Whether the round after the last wanted one is next.
    pub fn is_over(&self, policy: &Policy) -> bool {
        matches!(self.phase, Phase::Waiting { .. }) && policy.is_past_last(self.round)
    }

    /// Takes up the phase's work where a stopped process left it.
    fn resume(&mut self, policy: &Policy, now_ms: u64) -> Vec<Action> {
        match &mut self.phase {
            Phase::Waiting { ready, since_ms } => {
                ready.clear();
                *since_ms = None;
                if policy.is_past_last(self.round) { vec![Action::Stop] } else { Vec::new() }
            }
            Phase::Collecting { deadline_ms, .. } => {
                // Nobody could upload while the process was down.
                let grace_ms = now_ms.saturating_add(policy.deadline_ms / 2);
                *deadline_ms = (*deadline_ms).max(grace_ms);
                let wake = Action::WakeAt(*deadline_ms);
                vec![Action::Save, wake]
            }
            _ => self.work().into_iter().collect(),
        }
    }
}
