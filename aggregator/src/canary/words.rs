//! What devices say of a release on trial: that they have it, or that they cannot install it.
//!
//! `receive` writes words down as they come, `drive` counts them; `canary` judges by the count. Each device has one
//! voice, its last word.

use std::collections::BTreeMap;

use commonweal_protocol::{DeviceId, Fault, Version};
use serde::{Deserialize, Serialize};

use crate::desk::DeskError;
use crate::store::{Coord, StoreError};

/// The log of words that are not counted yet.
pub const WORDS: &str = "canary-words";
/// Devices that are counted in a trial: the first.
const DEVICES_MAX: usize = 1_024;

/// How far a device is with a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Said {
    /// It was told of it, and has said nothing yet.
    Nothing,
    /// It has installed it.
    Installed,
    /// It cannot install it.
    Cannot(Fault),
}

/// A device's word on a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// Who.
    pub device: DeviceId,
    /// Of which.
    pub version: Version,
    /// What.
    pub said: Said,
}

/// The last word of each device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Words(BTreeMap<DeviceId, Said>);

impl Words {
    /// Takes a device's word in the place of the one before.
    pub fn hear(&mut self, device: DeviceId, said: Said) {
        let is_known = self.0.contains_key(&device);
        // That it was told of it takes no word back.
        let is_news = if is_known { said != Said::Nothing } else { self.0.len() < DEVICES_MAX };
        if is_news {
            self.0.insert(device, said);
        }
    }

    /// Leaves devices without a voice; true if there were any.
    pub fn silence(&mut self, is_out: impl Fn(&DeviceId) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|device, _| !is_out(device));
        self.0.len() < before
    }

    /// How many said what.
    pub fn count(&self) -> Count {
        let mut count = Count { told: self.0.len(), ..Count::default() };
        for said in self.0.values() {
            match said {
                Said::Nothing => {}
                Said::Installed => count.installed += 1,
                Said::Cannot(fault) => *count.faults.entry(*fault).or_default() += 1,
            }
        }
        count
    }
}

/// How many devices said what of a release on trial.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Were told of it, whatever they said.
    pub told: usize,
    /// Have installed it.
    pub installed: usize,
    /// Cannot, by reason.
    pub faults: BTreeMap<Fault, usize>,
}

impl Count {
    /// Cannot install it.
    pub fn failed(&self) -> usize {
        self.faults.values().sum()
    }

    /// Said whether they can.
    pub fn answered(&self) -> usize {
        self.installed + self.failed()
    }
}

/// "3 of 8 devices cannot install it: its bytes are damaged (3)", "5 of 8 devices have installed it".
impl std::fmt::Display for Count {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (failed, told) = (self.failed(), self.told);
        if failed == 0 {
            return write!(formatter, "{} of {told} devices have installed it", self.installed);
        }
        write!(formatter, "{failed} of {told} devices cannot install it: ")?;
        for (place, (fault, count)) in self.faults.iter().enumerate() {
            let comma = if place > 0 { ", " } else { "" };
            write!(formatter, "{comma}{fault} ({count})")?;
        }
        Ok(())
    }
}

/// Writes a device's word down for `drive` to count. If another front end's came between, it comes after that one.
pub fn tell(coord: &dyn Coord, word: &Word) -> Result<(), DeskError> {
    let bytes = postcard::to_allocvec(word).map_err(|error| DeskError::damaged("word on a trial", error))?;
    loop {
        let last = coord.head(WORDS)?.map_or(0, |entry| entry.sequence);
        match coord.compare_and_set(WORDS, last, &bytes) {
            Err(StoreError::Conflict { .. }) => {}
            written => return Ok(written.map(|_| ())?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(number: u32) -> DeviceId {
        let mut device = DeviceId([1; 16]);
        device.0[..4].copy_from_slice(&number.to_le_bytes());
        device
    }

    #[test]
    fn each_device_has_one_voice_and_its_last_word_counts() {
        let mut words = Words::default();
        for said in [Said::Nothing, Said::Cannot(Fault::Room), Said::Cannot(Fault::Room), Said::Nothing] {
            words.hear(device(1), said);
        }
        words.hear(device(2), Said::Cannot(Fault::Damaged));
        words.hear(device(3), Said::Nothing);
        let count = words.count();
        assert_eq!((count.told, count.answered(), count.failed()), (3, 2, 2));
        let faults = BTreeMap::from([(Fault::Damaged, 1), (Fault::Room, 1)]);
        assert_eq!(count.faults, faults);
        assert_eq!(
            count.to_string(),
            "2 of 3 devices cannot install it: its bytes are damaged (1), there is no room for it (1)"
        );
        words.hear(device(1), Said::Installed);
        assert!(words.silence(|id| *id == device(2)) && !words.silence(|id| *id == device(2)));
        assert_eq!(words.count().to_string(), "1 of 2 devices have installed it");
    }

    #[test]
    fn the_first_devices_are_counted_and_go_on_being_heard() {
        let mut words = Words::default();
        for number in 0..=DEVICES_MAX as u32 {
            words.hear(device(number), Said::Nothing);
        }
        words.hear(device(0), Said::Installed);
        words.hear(device(DEVICES_MAX as u32), Said::Installed);
        let count = words.count();
        assert_eq!((count.told, count.installed), (DEVICES_MAX, 1));
    }
}
