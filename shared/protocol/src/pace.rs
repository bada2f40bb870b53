//! When a device should come back: pace steering. Neighbours: the aggregator sets it in every final reply, the device
//! draws its own moment in the window.

use crate::{Invalid, bounds};
use serde::{Deserialize, Serialize};

/// Come back after `after_ms`, at a moment drawn evenly from the `spread_ms` that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReconnectWindow {
    /// Start of the window, from now.
    pub after_ms: u32,
    /// Length of the window.
    pub spread_ms: u32,
}

impl ReconnectWindow {
    /// The moment in the window, in ms from now, that this random number draws.
    pub fn delay_ms(&self, random: u64) -> u64 {
        u64::from(self.after_ms) + random % (u64::from(self.spread_ms) + 1)
    }

    pub(crate) fn check(self) -> Result<(), Invalid> {
        Invalid::unless_at_most("reconnect after_ms", self.after_ms, bounds::RECONNECT_MS_MAX)?;
        Invalid::unless_at_most("reconnect spread_ms", self.spread_ms, bounds::RECONNECT_MS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_in_its_window() {
        let window = ReconnectWindow { after_ms: 100, spread_ms: 9 };
        assert_eq!(window.delay_ms(0), 100);
        assert_eq!(window.delay_ms(9), 109);
        assert_eq!(window.delay_ms(10), 100);
        let widest = ReconnectWindow { after_ms: u32::MAX, spread_ms: u32::MAX };
        assert!(widest.delay_ms(u64::MAX) <= 2 * u64::from(u32::MAX));
    }
}
