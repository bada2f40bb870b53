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

use commonweal_protocol::{DeviceId, Version};
use serde::{Deserialize, Serialize};

use crate::config;
use crate::desk::DeskError;
use crate::store::Coord;

/// The log of the state; only its newest entry matters.
pub const LOG: &str = "canary";
/// Losses kept of the release that all devices have: the newest.
const BEFORE_MAX: usize = 256;
/// Losses kept of a trial: the newest.
const TRIAL_MAX: usize = 1_024;
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
    /// How the last trial ended.
    pub last: Option<Ended>,
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
    /// When.
    pub ended_ms: u64,
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
                self.trial =
                    Some(Trial { version: head, reported: None, since_ms: now_ms, losses: Vec::new() });
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

    /// What to do with what is on trial.
    pub fn judge(&self, settings: &config::Release, now_ms: u64) -> Verdict {
        let Some(trial) = &self.trial else { return Verdict::Wait };
        let wanted = settings.canary_reports as usize;
        let (after, before) = (trial.losses.len(), self.before.len());
        if after >= wanted && before >= wanted {
            let z = rank_test(&trial.losses, &self.before, settings.canary_loss_rise);
            let told = format!(
                "loss on devices' own pairs: median {:.2} of {after} reports, before {:.2} of {before}; z = {z:.2}",
                median(&trial.losses),
                median(&self.before),
            );
            return if z > SIGNIFICANT { Verdict::Worse(told) } else { Verdict::Fine(told) };
        }
        let most_ms = (settings.canary_hours * 3_600_000.0) as u64;
        if now_ms.saturating_sub(trial.since_ms) < most_ms {
            return Verdict::Wait;
        }
        let hours = settings.canary_hours;
        Verdict::Fine(format!(
            "no verdict in {hours} hours: {after} reports, {before} before, {wanted} wanted"
        ))
    }

    /// All devices may have what was reported of; a newer release begins a trial of its own.
    pub fn promote(&mut self, reason: String, now_ms: u64) {
        let Some(trial) = self.trial.take() else { return };
        let version = trial.reported.unwrap_or(trial.version);
        let newest = trial.losses.len().saturating_sub(BEFORE_MAX);
        self.before = trial.losses.get(newest..).unwrap_or_default().to_vec();
        self.stable = version;
        self.last = Some(Ended { version, rolled_back: false, reason, ended_ms: now_ms });
        self.see_head(trial.version, true, now_ms);
    }

    /// What was on trial was replaced by `version`, which holds the adapter that all devices had.
    pub fn roll_back(&mut self, version: Version, reason: String, now_ms: u64) {
        self.end(version, true, reason, now_ms);
    }

    fn end(&mut self, stable: Version, rolled_back: bool, reason: String, now_ms: u64) {
        self.verdict = None;
        if let Some(trial) = self.trial.take() {
            self.last = Some(Ended { version: trial.version, rolled_back, reason, ended_ms: now_ms });
        }
        self.stable = stable;
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

fn keep(losses: &mut Vec<f32>, loss: f32, most: usize) {
    if losses.len() >= most {
        losses.remove(0);
    }
    losses.push(loss);
}

fn median(losses: &[f32]) -> f32 {
    let mut sorted = losses.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
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

/// The stored state and its place in the log; none before the first trial.
pub fn read(coord: &dyn Coord) -> Result<Option<(Canary, u64)>, DeskError> {
    let Some(entry) = coord.head(LOG)? else { return Ok(None) };
    let canary =
        postcard::from_bytes(&entry.value).map_err(|error| DeskError::damaged("state of trials", error))?;
    Ok(Some((canary, entry.sequence)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> config::Release {
        config::Release { canary_share: 0.1, canary_reports: 8, canary_hours: 24.0, canary_loss_rise: 0.0 }
    }

    /// A trial of release 1 after release 0.
    fn trial(before: &[f32], after: &[f32]) -> Canary {
        let mut canary = Canary::stable(Version(0));
        canary.count(1, before.iter().map(|loss| (Version(0), *loss)));
        assert!(canary.see_head(Version(1), true, 1_000));
        canary.count(2, after.iter().map(|loss| (Version(1), *loss)));
        canary
    }

    #[test]
    fn the_rank_test_is_scipys() {
        // scipy.stats.mannwhitneyu(after, before, alternative="greater", method="asymptotic").pvalue is
        // 0.010785873974 and, with ties, 0.086016854461; the z of these, by norm.isf, are below.
        let (after, before) = ([1.9, 2.1, 2.3, 2.6, 2.9], [1.0, 1.2, 1.5, 1.7, 2.0]);
        assert!((rank_test(&after, &before, 0.0) - 2.297_825_058_615_212_4).abs() < 1e-9);
        let (after, before) = ([2.0, 2.0, 3.0, 1.0], [1.0, 1.0, 2.0, 0.5]);
        assert!((rank_test(&after, &before, 0.0) - 1.365_698_202_000_488_9).abs() < 1e-9);
        assert!(rank_test(&[1.0; 9], &[1.0; 9], 0.0).abs() < 1e-12, "no difference at all");
    }

    #[test]
    fn what_is_worse_by_more_than_chance_is_rolled_back_and_what_is_not_is_for_all() {
        let before: Vec<f32> = (0..12).map(|number| 2.0 + number as f32 * 0.05).collect();
        let higher = |by: f32| before.iter().map(|loss| loss + by).collect::<Vec<_>>();
        let judged = |by: f32, rise: f64| {
            let settings = config::Release { canary_loss_rise: rise, ..settings() };
            trial(&before, &higher(by)).judge(&settings, 2_000)
        };
        assert!(matches!(judged(0.5, 0.0), Verdict::Worse(_)));
        assert!(matches!(judged(0.5, 0.5), Verdict::Fine(_)), "within what is allowed");
        assert!(matches!(judged(0.0, 0.0), Verdict::Fine(_)));
        assert!(matches!(judged(-0.5, 0.0), Verdict::Fine(_)));
    }

    #[test]
    fn a_few_liars_neither_force_a_roll_back_nor_prevent_one() {
        let before: Vec<f32> = (0..20).map(|number| 2.0 + number as f32 * 0.05).collect();
        let mut same = before.clone();
        same[..3].fill(1e6);
        assert!(matches!(trial(&before, &same).judge(&settings(), 2_000), Verdict::Fine(_)));
        let mut worse: Vec<f32> = before.iter().map(|loss| loss + 1.0).collect();
        worse[..3].fill(-1e6);
        assert!(matches!(trial(&before, &worse).judge(&settings(), 2_000), Verdict::Worse(_)));
    }

    #[test]
    fn too_few_reports_are_waited_for_until_the_time_is_over() {
        let canary = trial(&[2.0; 8], &[9.0; 7]);
        assert_eq!(canary.judge(&settings(), 2_000), Verdict::Wait);
        assert!(matches!(canary.judge(&settings(), 1_000 + 24 * 3_600_000), Verdict::Fine(_)));
        assert_eq!(
            Canary::stable(Version(3)).judge(&settings(), u64::MAX),
            Verdict::Wait,
            "nothing is on trial"
        );
    }

    #[test]
    fn later_releases_join_a_trial_and_what_nobody_reported_of_begins_another() {
        let mut canary = trial(&[2.0; 8], &[2.0; 4]);
        canary.see_head(Version(2), true, 2_000);
        canary.count(3, std::iter::repeat_n((Version(2), 2.0), 4));
        canary.count(3, std::iter::repeat_n((Version(2), 9.0), 40));
        canary.see_head(Version(3), true, 3_000);
        let Verdict::Fine(reason) = canary.judge(&settings(), 3_000) else { panic!("{canary:?}") };
        canary.promote(reason, 3_000);
        assert_eq!(canary.stable, Version(2));
        let trial = canary.trial.clone().unwrap();
        assert_eq!((trial.version, trial.losses.len()), (Version(3), 0));
        canary.roll_back(Version(4), "worse".to_owned(), 4_000);
        assert_eq!((canary.stable, &canary.trial), (Version(4), &None));
        assert!(!canary.see_head(Version(4), false, 5_000));
    }

    #[test]
    fn an_operators_roll_back_is_for_all_at_once() {
        let mut canary = trial(&[2.0; 8], &[]);
        assert!(canary.see_head(Version(2), false, 2_000));
        assert_eq!((canary.stable, &canary.trial), (Version(2), &None));
        assert!(canary.last.unwrap().rolled_back);
    }

    #[test]
    fn the_share_is_a_share_and_another_one_in_the_next_trial() {
        let device = |number: u32| {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&number.to_le_bytes());
            DeviceId(id)
        };
        let seen = |stable: u64| -> Vec<bool> {
            let mut canary = Canary::stable(Version(stable));
            canary.see_head(Version(stable + 1), true, 0);
            let head = Version(stable + 1);
            (0..10_000).map(|number| canary.release_for(&device(number), head, 0.1) == head).collect()
        };
        let (first, second) = (seen(0), seen(1));
        let count = |seen: &[bool]| seen.iter().filter(|seen| **seen).count();
        // Deviation: √(10000 · 0.1 · 0.9) = 30.
        assert!((850..=1_150).contains(&count(&first)), "{}", count(&first));
        let both = first.iter().zip(&second).filter(|(one, other)| **one && **other).count();
        assert!((50..=150).contains(&both), "{both}");
        let none = Canary::stable(Version(7));
        assert_eq!(none.release_for(&device(1), Version(7), 0.0), Version(7));
    }
}
