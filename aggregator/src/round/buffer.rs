//! Buffered rounds (`FedBuff`, Nguyen et al. 2022, arXiv 2106.06639): nobody waits for the slowest device.
//!
//! A part of `round.tick`. A device trains from whatever release is current and delivers when it is done; a round is
//! the filling of one buffer and ends with the goal's number of updates, whichever release each began from. An update
//! names the round in which its task was given, and the task here says which release that was; one that lies too far
//! back is refused, and its device begins anew. A device counts once in a buffer.

use commonweal_protocol::{DeviceId, RoundId, Start, Version};
use serde::{Deserialize, Serialize};

use super::{Action, NotAdmitted, Outcome, Phase, Policy, Rounds};

/// Rounds that an update may lie behind, whatever the releases: as long as its receipt could be repeated.
pub const ROUNDS_BACK_MAX: u64 = 15;

/// What a device was asked to do, kept until its update has come.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// The round in which it was given, which the update names.
    pub round: RoundId,
    /// The release that the device trains from.
    pub start: Start,
    /// From when another device may have its place.
    pub due_ms: u64,
}

impl Rounds {
    /// Begins a buffer from this release. Tasks that are too old by now are forgotten.
    pub(super) fn open_buffer(&mut self, policy: &Policy, now_ms: u64, start: Start) -> Vec<Action> {
        if policy.is_past_last(self.round) {
            return vec![Action::Stop];
        }
        let deadline_ms = now_ms.saturating_add(policy.deadline_ms);
        let selected = std::collections::BTreeMap::new();
        self.phase = Phase::Collecting { target: policy.goal, deadline_ms, selected };
        self.start = Some(start);
        self.opened_ms = now_ms;
        self.received = 0;
        let round = self.round;
        self.tasks.retain(|_, task| {
            lag(round, task.round) <= ROUNDS_BACK_MAX
                && staleness(start.version, task.start.version) <= policy.staleness_max
        });
        self.selected = self.tasks.len() as u32;
        vec![Action::Save, Action::Opened, Action::WakeAt(deadline_ms)]
    }

    /// Gives a device a task from the current release, or again the one that it has of this round.
    pub(super) fn give_task(
        &mut self,
        policy: &Policy,
        now_ms: u64,
        device: DeviceId,
        start: Start,
    ) -> Vec<Action> {
        let Phase::Collecting { selected, .. } = &self.phase else { return Vec::new() };
        if selected.contains_key(&device) {
            return Vec::new();
        }
        // The head moves under an open buffer when an operator rolls back.
        if self.start.is_none_or(|before| before.version < start.version) {
            self.start = Some(start);
        }
        let due_ms = now_ms.saturating_add(policy.deadline_ms);
        match self.given(&device) {
            Some(round) if round == self.round => {
                if let Some(task) = self.tasks.get_mut(&device) {
                    task.due_ms = due_ms;
                }
                return vec![Action::Assign(device)];
            }
            // It begins anew in the place that it has.
            Some(_) => {}
            None if !self.make_place(policy, now_ms) => return Vec::new(),
            None => self.selected = self.selected.saturating_add(1),
        }
        self.tasks.insert(device, Task { round: self.round, start, due_ms });
        vec![Action::Save, Action::Assign(device)]
    }

    /// Whether there is room for one more task; a device whose time is over loses its place.
    fn make_place(&mut self, policy: &Policy, now_ms: u64) -> bool {
        if self.tasks.len() < policy.selected_max(policy.goal) as usize {
            return true;
        }
        let late = self.tasks.iter().filter(|(_, task)| task.due_ms <= now_ms);
        let latest = late.min_by_key(|(_, task)| task.due_ms).map(|(device, _)| *device);
        latest.is_some_and(|device| self.tasks.remove(&device).is_some())
    }

    /// See [`Rounds::admits`].
    pub(super) fn admits_buffered(
        &self,
        policy: &Policy,
        round: RoundId,
        device: &DeviceId,
    ) -> Result<bool, NotAdmitted> {
        let task = self.tasks.get(device).filter(|task| task.round == round);
        match (&self.phase, task) {
            (Phase::Collecting { selected, .. }, _) if selected.contains_key(device) => Ok(true),
            (_, None) if round < self.round => {
                Err(NotAdmitted::StaleRound { named: round.0, current: self.round.0 })
            }
            (_, None) => Err(NotAdmitted::NotSelected),
            (Phase::Collecting { .. }, Some(task)) => {
                let (got, most) = (self.staleness(task.start.version), policy.staleness_max);
                if got > most || lag(self.round, round) > ROUNDS_BACK_MAX {
                    return Err(NotAdmitted::TooStale { round: round.0, got, most });
                }
                Ok(false)
            }
            (_, Some(_)) => Err(NotAdmitted::Merging { current: self.round.0 }),
        }
    }

    /// An update is in the inbox, which is the truth even where the state knows of no task.
    pub(super) fn count_buffered(&mut self, now_ms: u64, device: DeviceId) -> Vec<Action> {
        let Phase::Collecting { target, selected, .. } = &mut self.phase else { return Vec::new() };
        if selected.insert(device, true).is_none() {
            self.received += 1;
            self.tasks.remove(&device);
        }
        if self.received >= *target { self.close(now_ms) } else { Vec::new() }
    }

    /// A buffer with a quorum is merged; one in which devices are at work and nothing came is given up, which costs
    /// nothing; any other goes on, so that no update is lost.
    pub(super) fn check_buffer(&mut self, policy: &Policy, now_ms: u64) -> Vec<Action> {
        let Phase::Collecting { deadline_ms, .. } = &mut self.phase else { return Vec::new() };
        if now_ms < *deadline_ms {
            return vec![Action::WakeAt(*deadline_ms)];
        }
        if self.received >= policy.quorum {
            return self.close(now_ms);
        }
        if self.received > 0 || self.tasks.is_empty() {
            *deadline_ms = now_ms.saturating_add(policy.deadline_ms);
            let wake = Action::WakeAt(*deadline_ms);
            return vec![Action::Save, wake];
        }
        self.closed_ms = now_ms;
        let mut actions = vec![Action::Closed];
        actions.extend(self.finish(policy, now_ms, Outcome::Abandoned { quorum: policy.quorum }));
        actions
    }

    /// Releases between the one that a device trained from and the one that its update is merged into.
    pub fn staleness(&self, trained_from: Version) -> u32 {
        self.start.map_or(0, |start| staleness(start.version, trained_from))
    }

    /// The round of the task that a device works on, in buffered mode.
    pub fn given(&self, device: &DeviceId) -> Option<RoundId> {
        self.tasks.get(device).map(|task| task.round)
    }

    /// The release that a device's update of the current buffer was trained from.
    pub fn trained_from(&self, device: &DeviceId) -> Option<Version> {
        let task = self.tasks.get(device).map(|task| task.start);
        task.or(self.start).map(|start| start.version)
    }

    /// The task that a device was just assigned: its round, its start, and the time left.
    pub fn task(&self, device: &DeviceId, now_ms: u64) -> Option<(RoundId, Start, u64)> {
        let (start, until_ms) = match (&self.phase, self.tasks.get(device)) {
            (_, Some(task)) if task.round == self.round => (task.start, task.due_ms),
            (Phase::Collecting { deadline_ms, .. }, _) => (self.start?, *deadline_ms),
            _ => return None,
        };
        Some((self.round, start, until_ms.saturating_sub(now_ms).max(1)))
    }
}

fn staleness(current: Version, trained_from: Version) -> u32 {
    u32::try_from(current.0.saturating_sub(trained_from.0)).unwrap_or(u32::MAX)
}

fn lag(current: RoundId, named: RoundId) -> u64 {
    current.0.saturating_sub(named.0)
}
