//! Lengths of time as a person writes them in a policy or behind an option: `90d`, `12h`, `5m`, `30s`.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

const DAY_SECONDS: u64 = 24 * 3600;
/// A hundred years: more is a slip of the pen.
const SPAN_SECONDS_MAX: u64 = 36_525 * DAY_SECONDS;
const SPAN_UNITS: [(&str, u64); 4] = [("d", DAY_SECONDS), ("h", 3600), ("m", 60), ("s", 1)];

/// A length of time in whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span {
    seconds: u64,
}

impl Span {
    /// So many seconds.
    pub const fn of_seconds(seconds: u64) -> Self {
        Self { seconds }
    }

    /// As the standard library has it.
    pub const fn duration(self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    /// Milliseconds.
    pub const fn ms(self) -> u64 {
        self.seconds * 1000
    }
}

impl FromStr for Span {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (unit, seconds) = SPAN_UNITS.iter().find(|(unit, _)| text.ends_with(unit))?;
            let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
            count.checked_mul(*seconds).filter(|&seconds| seconds <= SPAN_SECONDS_MAX)
        };
        let seconds = parse().ok_or_else(|| {
            format!(
                "expected a length of time such as 90d, 12h, 5m or 30s, a hundred years at most, got {text:?}"
            )
        })?;
        Ok(Self { seconds })
    }
}

impl TryFrom<String> for Span {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

/// In the largest unit that needs no fraction.
impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole =
            SPAN_UNITS.iter().find(|(_, seconds)| self.seconds > 0 && self.seconds.is_multiple_of(*seconds));
        let (unit, seconds) = whole.unwrap_or(&("s", 1));
        write!(f, "{}{unit}", self.seconds / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_read_as_it_is_written() {
        for (text, seconds) in [("90d", 7_776_000), ("12h", 43_200), ("5m", 300), ("30s", 30), ("0s", 0)] {
            let span: Span = text.parse().unwrap();
            assert_eq!((span.duration().as_secs(), span.to_string()), (seconds, text.to_owned()));
        }
        assert_eq!("48h".parse::<Span>().unwrap().to_string(), "2d");
        for text in ["", "d", "5", "-1d", "1.5h", "5 m", "36526d", "99999999999999999999d", "5min"] {
            let error = text.parse::<Span>().unwrap_err();
            assert!(error.contains("90d"), "{error}");
        }
    }
}
