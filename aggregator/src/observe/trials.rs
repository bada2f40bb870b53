//! Releases on trial as an operator sees them: who has them, what was reported of them, and how trials before ended.
//! What the dashboard shows of `canary.rs`.

use commonweal_protocol::Version;
use serde::Serialize;

use super::{ObserveError, Observer};
use crate::canary::{self, Canary, Count, Ended, Trial};
use crate::receive::enroll::DeviceRecord;

/// See the module.
#[derive(Clone, Debug, Serialize)]
pub struct Trials {
    /// Share of the devices that a release is tried on first; 0 for no trials.
    pub share: f64,
    /// Reports of either kind that end a trial.
    pub reports_wanted: u32,
    /// Share of the devices that may be unable to install it.
    pub failures_max: f64,
    /// The release that every device may have.
    pub stable: Option<Version>,
    /// What is on trial, if anything is.
    pub trial: Option<TrialStanding>,
    /// How earlier ones ended, newest first.
    pub ended: Vec<Ended>,
}

/// A trial under way.
#[derive(Clone, Debug, Serialize)]
pub struct TrialStanding {
    /// The newest release on trial.
    pub version: Version,
    /// Since when, ms since 1970.
    pub since_ms: u64,
    /// When it is over without a verdict, ms since 1970.
    pub until_ms: u64,
    /// Active devices of the share, whether or not they asked since it began.
    pub active: usize,
    /// What devices said of it.
    pub devices: Count,
    /// Losses reported of it, and their median.
    pub reports: usize,
    /// None without a report.
    pub loss: Option<f32>,
    /// Losses reported of the release that all have, and their median.
    pub reports_before: usize,
    /// None without a report.
    pub loss_before: Option<f32>,
}

impl Observer {
    /// What is on trial, and how earlier trials ended.
    pub fn trials(&self) -> Result<Trials, ObserveError> {
        let parts = &self.view.parts;
        let settings = &parts.config.release;
        let canary = canary::read(parts.storage.coord.as_ref())?.map(|(canary, _)| canary);
        let trial = match canary.as_ref().and_then(|canary| Some((canary, canary.trial.as_ref()?))) {
            Some((canary, trial)) => Some(self.trial(canary, trial)?),
            None => None,
        };
        let ended = canary.as_ref().map(|canary| canary.ended.iter().rev().cloned().collect());
        Ok(Trials {
            share: settings.canary_share,
            reports_wanted: settings.canary_reports,
            failures_max: settings.canary_failures,
            stable: canary.map(|canary| canary.stable),
            trial,
            ended: ended.unwrap_or_default(),
        })
    }

    fn trial(&self, canary: &Canary, trial: &Trial) -> Result<TrialStanding, ObserveError> {
        let parts = &self.view.parts;
        let (settings, now_ms) = (&parts.config.release, parts.clock.unix_ms());
        let active =
            |(_, record): &(_, DeviceRecord)| record.revoked_ms.is_none() && record.expires_ms >= now_ms;
        let share = settings.canary_share;
        let is_of_share = |device: &_| canary.release_for(device, trial.version, share) == trial.version;
        let devices = self.registry.devices()?.into_iter().filter(active);
        Ok(TrialStanding {
            version: trial.version,
            since_ms: trial.since_ms,
            until_ms: trial.since_ms.saturating_add((settings.canary_hours * 3_600_000.0) as u64),
            active: devices.filter(|(device, _)| is_of_share(device)).count(),
            devices: trial.words.count(),
            reports: trial.losses.len(),
            loss: canary::median(&trial.losses),
            reports_before: canary.before.len(),
            loss_before: canary::median(&canary.before),
        })
    }
}
