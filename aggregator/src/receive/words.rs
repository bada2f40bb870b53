//! What a poll says of releases, and which release it is answered with.
//!
//! Of `poll`. A word on what is on trial is written down for `drive` to count (`canary`). Devices say what they like:
//! only those that are shown what is on trial have a voice, and none can write or tell the operator without end.

use commonweal_protocol::{DeviceId, Poll, SignedRelease, Version};

use super::Receiver;
use crate::canary::{self, Canary, Said, Word};
use crate::desk::DeskError;
use crate::events::Event;

/// How often a device is heard while one release is the newest.
const HEARD_MAX: u8 = 8;

/// What a device said last.
#[derive(Clone, Copy)]
pub(super) struct Heard {
    /// The newest release then.
    head: Version,
    /// What all devices had then, if this one was shown what was on trial: with the next trial of the same release it is
    /// asked anew.
    stable: Option<Version>,
    /// On which release, and what.
    word: (Version, Said),
    /// How often it said something new since that was the newest.
    times: u8,
}

impl Receiver {
    /// Takes a device's word: that it has a release, that it cannot install one, or that it is told of what is on trial.
    pub(super) fn hear(
        &self,
        device: DeviceId,
        poll: &Poll,
        head: Version,
        canary: Option<&Canary>,
    ) -> Result<(), DeskError> {
        let share = self.parts.config.release.canary_share;
        let canary = canary
            .filter(|canary| canary.is_on_trial(head) && canary.release_for(&device, head, share) == head);
        let said = said(poll, head);
        let word = match (said, canary) {
            (Some((version, _)), Some(canary)) if canary.is_on_trial(version) => said,
            // Of another release it has nothing to say that counts, but to the operator.
            (Some((_, Said::Cannot(_))), _) => said,
            (_, Some(_)) => Some((head, Said::Nothing)),
            (_, None) => None,
        };
        let Some(word @ (version, said)) = word else { return Ok(()) };
        let stable = canary.map(|canary| canary.stable);
        let Some(times) = self.is_news(device, (head, stable), word) else { return Ok(()) };
        if canary.is_some_and(|canary| canary.is_on_trial(version)) {
            canary::tell(self.parts.storage.coord.as_ref(), &Word { device, version, said })?;
        }
        if let Said::Cannot(fault) = said {
            self.parts.events.tell(&Event::Troubled { device, version, fault });
            self.parts.storage.watch.notify();
        }
        self.live().heard.insert(device, Heard { head, stable, word, times });
        Ok(())
    }

    /// How often this device has said something new by now, if this is new.
    fn is_news(
        &self,
        device: DeviceId,
        trial: (Version, Option<Version>),
        word: (Version, Said),
    ) -> Option<u8> {
        match self.live().heard.get(&device) {
            Some(heard) if (heard.head, heard.stable) == trial => {
                let times = heard.times.saturating_add(1);
                (heard.word != word && times <= HEARD_MAX).then_some(times)
            }
            // Without a trial only what is new is told.
            Some(heard) if trial.1.is_none() && heard.word == word => None,
            _ => Some(1),
        }
    }

    /// What is on trial; from the moment of its publication on, before the trial is written down.
    pub(super) fn canary(&self, head: &SignedRelease) -> Result<Option<Canary>, DeskError> {
        if !self.parts.config.release.is_canary() {
            return Ok(None);
        }
        let Some((mut canary, _)) = canary::read(self.parts.storage.coord.as_ref())? else { return Ok(None) };
        canary.see_head(head.release.version, head.release.round.is_some(), self.now_ms());
        Ok(Some(canary))
    }

    /// The release that a device is to install, if it has not: the head, or while that is on trial with others, the one
    /// before it.
    pub(super) fn news(
        &self,
        device: DeviceId,
        installed: Option<Version>,
        head: SignedRelease,
        canary: Option<&Canary>,
    ) -> Result<Option<SignedRelease>, DeskError> {
        let (share, version) = (self.parts.config.release.canary_share, head.release.version);
        let seen = canary.map_or(version, |canary| canary.release_for(&device, version, share));
        if seen == version {
            return Ok((installed != Some(version)).then_some(head));
        }
        // Who saw more than that keeps it until the trial ends.
        let is_news = installed.is_none_or(|installed| installed < seen);
        if is_news { Ok(Some(self.parts.publisher.release(seen)?)) } else { Ok(None) }
    }
}

/// What a poll says; nothing of releases that there are not.
fn said(poll: &Poll, head: Version) -> Option<(Version, Said)> {
    let trouble = poll.trouble.filter(|trouble| trouble.version <= head);
    let trouble = trouble.map(|trouble| (trouble.version, Said::Cannot(trouble.fault)));
    trouble
        .or(poll.installed.filter(|installed| *installed <= head).map(|version| (version, Said::Installed)))
}
