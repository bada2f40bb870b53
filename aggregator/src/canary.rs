//! A new release goes to a share of the devices first, and to the rest only if their reports are not worse than before.
//!
//! After `publish`; `receive` asks which release a device is to see, `drive` counts reports and carries a verdict out.
//! Pure: the state, the reports and the time come in, a verdict comes out.
//!
//! A device reports the loss with which training began (`loss_first`): the release's loss on the device's own pairs,
//! before it learned from them. The losses of what is on trial are compared with those of the release that all have, by
//! the Mann–Whitney U test (1947), one-sided at 1 %, after `canary_loss_rise` was taken off each: worse by less than
//! that is not worse. Ranks and not means, so that no device's number, however wild, weighs more than another's.
//! Rounds go on meanwhile, from the newest release; what they publish joins the trial.
//!
//! A device of the share says with its polls that it has it, or that it cannot install it (`words`). If more than
//! `canary_failures` cannot, it is worse, whatever the losses.

mod stored;
mod words;

use commonweal_protocol::{DeviceId, Version};
use serde::{Deserialize, Serialize};

use crate::config;

pub use stored::{LOG, read};
pub use words::{Count, Said, WORDS, Word, Words, tell};

/// Losses kept of the release that all devices have: the newest.
const BEFORE_MAX: usize = 256;
/// Losses kept of a trial: the newest.
const TRIAL_MAX: usize = 1_024;
/// Ended trials that are remembered.
const ENDED_MAX: usize = 32;
/// One-sided 1 % of the normal distribution.
const SIGNIFICANT: f64 = 2.326_347_874_040_841;

/// What is known of the releases in force.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Canary {
    /// The release that every device may have.
    pub stable: Version,
    /// Losses reported of it.
    pub before: Vec<f32>,
    /// What came after it, if anything did.
    pub trial: Option<Trial>,
    /// The last round whose reports are counted.
    pub counted_round: u64,
    /// Why the release on trial is being rolled back; written before that is done.
    pub verdict: Option<String>,
    /// How trials ended: the newest, in their order.
    pub ended: Vec<Ended>,
    /// The last word of a device that is counted.
    pub counted_word: u64,
}

/// Releases that a share of the devices sees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// The newest of them.
    pub version: Version,
    /// The newest that was reported of.
    pub reported: Option<Version>,
    /// Since when.
    pub since_ms: u64,
    /// Losses reported of them.
    pub losses: Vec<f32>,
    /// What devices said of them.
    pub words: Words,
}

impl Trial {
    fn new(version: Version, since_ms: u64) -> Self {
        Self { version, reported: None, since_ms, losses: Vec::new(), words: Words::default() }
    }
}

/// How a trial ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// Of which release.
    pub version: Version,
    /// Whether it was rolled back.
    pub rolled_back: bool,
    /// Why, in the operator's words.
    pub reason: String,
    /// When it began.
    pub since_ms: u64,
    /// When it ended.
    pub ended_ms: u64,
    /// Losses reported of it.
    pub reports: usize,
    /// Of the release that all had.
    pub reports_before: usize,
    /// What devices said of it.
    pub devices: Count,
}

/// What follows from the reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Too little is known.
    Wait,
    /// All devices may have it.
    Fine(String),
    /// The release before it comes back.
    Worse(String),
}

impl Canary {
    /// All devices have this release.
    pub fn stable(version: Version) -> Self {
        Self { stable: version, ..Self::default() }
    }

    /// The head is this release. One that a round made is on trial, any other (an operator's roll-back) is for all at
    /// once. True if that is news.
    pub fn see_head(&mut self, head: Version, is_of_round: bool, now_ms: u64) -> bool {
        let known = self.trial.as_ref().map_or(self.stable, |trial| trial.version);
        if head <= known {
            return false;
        }
        match &mut self.trial {
            Some(trial) if is_of_round => trial.version = head,
            None if is_of_round => {
                self.trial = Some(Trial::new(head, now_ms));
            }
            _ => {
                self.end(head, true, "another release took its place".to_owned(), now_ms);
                // They were of another adapter.
                self.before.clear();
            }
        }
        true
    }

    /// Counts a round's reports, once: the release that each device trained from and the loss that it began with.
    pub fn count(&mut self, round: u64, reports: impl Iterator<Item = (Version, f32)>) {
        if round <= self.counted_round {
            return;
        }
        self.counted_round = round;
        for (version, loss) in reports.filter(|(_, loss)| loss.is_finite()) {
            match &mut self.trial {
                Some(trial) if version > self.stable && version <= trial.version => {
                    keep(&mut trial.losses, loss, TRIAL_MAX);
                    trial.reported = trial.reported.max(Some(version));
                }
                _ if version == self.stable => keep(&mut self.before, loss, BEFORE_MAX),
                _ => {}
            }
        }
    }

    /// Whether this release is on trial.
    pub fn is_on_trial(&self, version: Version) -> bool {
        self.trial.as_ref().is_some_and(|trial| version > self.stable && version <= trial.version)
    }

    /// Counts a device's word on what is on trial, once by its place in the log. Without one the place is passed over.
    pub fn hear(&mut self, place: u64, word: Option<Word>) {
        if place <= self.counted_word {
            return;
        }
        self.counted_word = place;
        let word = word.filter(|word| self.is_on_trial(word.version));
        if let (Some(word), Some(trial)) = (word, &mut self.trial) {
            trial.words.hear(word.device, word.said);
        }
    }

    /// Leaves devices without a voice; true if there were any.
    pub fn silence(&mut self, is_out: impl Fn(&DeviceId) -> bool) -> bool {
        self.trial.as_mut().is_some_and(|trial| trial.words.silence(is_out))
    }

    /// What to do with what is on trial.
    pub fn judge(&self, settings: &config::Release, now_ms: u64) -> Verdict {
        let Some(trial) = &self.trial else { return Verdict::Wait };
        let wanted = settings.canary_reports as usize;
        let (after, before) = (trial.losses.len(), self.before.len());
        let is_over = now_ms.saturating_sub(trial.since_ms) >= (settings.canary_hours * 3_600_000.0) as u64;
        let devices = trial.words.count();
        let is_above = |of: usize| is_above(&devices, settings, of);
        // Who fails says so at once, who trains first says so late: until the time is over, those count too that were
        // told of it and have said nothing.
        let is_sure = is_over || devices.told >= wanted && is_above(devices.told);
        let is_doubtful = is_above(devices.answered());
        if is_doubtful && is_sure {
            return Verdict::Worse(devices.to_string());
        }
        if after >= wanted && before >= wanted {
            let z = rank_test(&trial.losses, &self.before, settings.canary_loss_rise);
            let told = format!(
                "loss on devices' own pairs: median {:.2} of {after} reports, before {:.2} of {before}; z = {z:.2}",
                median(&trial.losses).unwrap_or_default(),
                median(&self.before).unwrap_or_default(),
            );
            if z > SIGNIFICANT {
                return Verdict::Worse(told);
            }
            if !is_doubtful {
                return Verdict::Fine(told);
            }
        }
        if !is_over {
            return Verdict::Wait;
        }
        let hours = settings.canary_hours;
        Verdict::Fine(format!(
            "no verdict in {hours} hours: {after} reports, {before} before, {wanted} wanted"
        ))
    }

    /// Whether only those keep it from being promoted that say they cannot install it.
    pub fn is_held_up(&self, settings: &config::Release) -> bool {
        let wanted = settings.canary_reports as usize;
        self.trial.as_ref().is_some_and(|trial| {
            let devices = trial.words.count();
            let is_reported = trial.losses.len() >= wanted && self.before.len() >= wanted;
            is_reported && is_above(&devices, settings, devices.answered())
        })
    }

    /// All devices may have what was reported of; a newer release begins a trial of its own.
    pub fn promote(&mut self, reason: String, now_ms: u64) {
        let Some(trial) = self.trial.take() else { return };
        let version = trial.reported.unwrap_or(trial.version);
        self.note_end(&trial, version, false, reason, now_ms);
        let newest = trial.losses.len().saturating_sub(BEFORE_MAX);
        self.before = trial.losses.get(newest..).unwrap_or_default().to_vec();
        self.stable = version;
        self.see_head(trial.version, true, now_ms);
    }

    /// What was on trial was replaced by `version`, which holds the adapter that all devices had.
    pub fn roll_back(&mut self, version: Version, reason: String, now_ms: u64) {
        self.end(version, true, reason, now_ms);
    }

    fn end(&mut self, stable: Version, rolled_back: bool, reason: String, now_ms: u64) {
        self.verdict = None;
        if let Some(trial) = self.trial.take() {
            self.note_end(&trial, trial.version, rolled_back, reason, now_ms);
        }
        self.stable = stable;
    }

    fn note_end(&mut self, trial: &Trial, version: Version, rolled_back: bool, reason: String, now_ms: u64) {
        if self.ended.len() >= ENDED_MAX {
            self.ended.remove(0);
        }
        self.ended.push(Ended {
            version,
            rolled_back,
            reason,
            since_ms: trial.since_ms,
            ended_ms: now_ms,
            reports: trial.losses.len(),
            reports_before: self.before.len(),
            devices: trial.words.count(),
        });
    }

    /// The release that a device is to install: a share of the devices, another one in each trial, sees the head.
    pub fn release_for(&self, device: &DeviceId, head: Version, share: f64) -> Version {
        if self.trial.is_none() {
            return head;
        }
        let mut hasher = blake3::Hasher::new_derive_key("commonweal canary v1");
        hasher.update(&self.stable.0.to_le_bytes()).update(&device.0);
        let mut bytes = [0; 4];
        hasher.finalize_xof().fill(&mut bytes);
        let draw = f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0);
        if draw < share { head } else { self.stable }
    }
}

/// Whether more than the owner bears of so many devices cannot install it.
fn is_above(devices: &Count, settings: &config::Release, of: usize) -> bool {
    devices.failed() as f64 > settings.canary_failures * of as f64
}

fn keep(losses: &mut Vec<f32>, loss: f32, most: usize) {
    if losses.len() >= most {
        losses.remove(0);
    }
    losses.push(loss);
}

/// The middle one; none of none.
pub fn median(losses: &[f32]) -> Option<f32> {
    let mut sorted = losses.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

/// The z value of Mann–Whitney's U that `after`, less `rise`, is higher than `before`: normal approximation, with ties
/// and continuity corrected.
fn rank_test(after: &[f32], before: &[f32], rise: f64) -> f64 {
    let shifted = after.iter().map(|loss| (f64::from(*loss) - rise, true));
    let mut all: Vec<(f64, bool)> =
        shifted.chain(before.iter().map(|loss| (f64::from(*loss), false))).collect();
    all.sort_by(|one, other| one.0.total_cmp(&other.0));
    let (mut ranks, mut ties, mut place) = (0.0, 0.0, 0.0);
    for same in all.chunk_by(|one, other| one.0.total_cmp(&other.0).is_eq()) {
        let count = same.len() as f64;
        let ours = same.iter().filter(|(_, is_after)| *is_after).count() as f64;
        // All of them have the mean of the ranks place + 1 to place + count.
        ranks += ours * (place + f64::midpoint(count, 1.0));
        ties += count.powi(3) - count;
        place += count;
    }
    let (n, m) = (after.len() as f64, before.len() as f64);
    let u = ranks - n * (n + 1.0) / 2.0;
    let variance = n * m / 12.0 * ((n + m + 1.0) - ties / ((n + m) * (n + m - 1.0)));
    if variance > 0.0 { (u - n * m / 2.0 - 0.5) / variance.sqrt() } else { 0.0 }
}

#[cfg(test)]
mod tests;
