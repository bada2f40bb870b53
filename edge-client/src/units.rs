//! What a person writes in a policy or behind an option: lengths of time (`90d`, `12h`, `5m`, `30s`), bytes (`500MB`) and
//! limits of them (`500MB`, `off`), hours of the day (`22:00-06:00`).

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

/// Bytes, as a person writes them: `500MB`, `1 GB`; a thousand at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bytes {
    count: u64,
}

const BYTE_UNITS: [(&str, u64); 5] =
    [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000), ("B", 1)];

impl Bytes {
    /// So many.
    pub const fn of(count: u64) -> Self {
        Self { count }
    }

    /// How many.
    pub const fn count(self) -> u64 {
        self.count
    }
}

impl FromStr for Bytes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (unit, bytes) = BYTE_UNITS.iter().find(|(unit, _)| text.ends_with(unit))?;
            text.strip_suffix(unit)?.trim_end().parse::<u64>().ok()?.checked_mul(*bytes)
        };
        let count = parse().ok_or_else(|| format!("expected bytes such as 500MB or 1GB, got {text:?}"))?;
        Ok(Self { count })
    }
}

impl TryFrom<String> for Bytes {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        BYTE_UNITS
            .iter()
            .find(|(_, unit)| bytes.count > 0 && bytes.count.is_multiple_of(*unit))
            .map_or_else(|| "0B".to_owned(), |(name, unit)| format!("{}{name}", bytes.count / unit))
    }
}

/// Rounded to the unit that shows most of it.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = BYTE_UNITS.iter().find(|(_, unit)| self.count >= *unit).unwrap_or(&("B", 1));
        let tenths = self.count / (unit / 10).max(1);
        match tenths % 10 {
            tenth if *unit > 1 && tenth > 0 && tenths < 100 => write!(f, "{}.{tenth}{name}", tenths / 10),
            _ => write!(f, "{}{name}", self.count / unit),
        }
    }
}

/// At most so many bytes, or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Limit(pub Option<Bytes>);

impl Limit {
    /// No limit.
    pub const OFF: Self = Self(None);

    /// So many.
    pub const fn of(count: u64) -> Self {
        Self(Some(Bytes::of(count)))
    }

    /// How many, if there is a limit.
    pub fn count(self) -> Option<u64> {
        self.0.map(Bytes::count)
    }
}

impl TryFrom<String> for Limit {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "off" => Ok(Self::OFF),
            bytes => bytes.parse().map(|bytes| Self(Some(bytes))).map_err(|error| format!("{error}, or off")),
        }
    }
}

impl From<Limit> for String {
    fn from(limit: Limit) -> Self {
        limit.0.map_or_else(|| "off".to_owned(), Self::from)
    }
}

/// Hours of the day: `22:00-06:00` goes over midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hours {
    /// Minutes since midnight.
    from: u16,
    to: u16,
}

impl Hours {
    /// Whether a minute of the day is among them.
    pub const fn hold(self, minute: u16) -> bool {
        if self.from <= self.to {
            self.from <= minute && minute < self.to
        } else {
            self.from <= minute || minute < self.to
        }
    }
}

impl FromStr for Hours {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let minute = |text: &str| {
            let (hour, minute) = text.trim().split_once(':')?;
            let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
            (hour < 24 && minute < 60).then_some(hour * 60 + minute)
        };
        let parse = || {
            let (from, to) = text.split_once('-')?;
            let (from, to) = (minute(from)?, minute(to)?);
            (from != to).then_some(Self { from, to })
        };
        parse().ok_or_else(|| format!("expected two times of the day such as 22:00-06:00, got {text:?}"))
    }
}

impl TryFrom<String> for Hours {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Hours> for String {
    fn from(hours: Hours) -> Self {
        hours.to_string()
    }
}

impl fmt::Display for Hours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to } = self;
        write!(f, "{:02}:{:02}-{:02}:{:02}", from / 60, from % 60, to / 60, to % 60)
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

    #[test]
    fn bytes_are_read_exactly_and_shown_shortly() {
        for (text, count) in [("1GB", 1_000_000_000), ("500MB", 500_000_000), ("12kB", 12_000), ("7B", 7)] {
            let bytes: Bytes = text.parse().unwrap();
            assert_eq!(
                (bytes.count(), String::from(bytes), bytes.to_string()),
                (count, text.into(), text.into())
            );
        }
        let shown =
            [(0, "0B"), (999, "999B"), (1_500, "1.5kB"), (12_345_678, "12MB"), (2_345_678_901, "2.3GB")];
        for (count, text) in shown {
            assert_eq!(Bytes::of(count).to_string(), text);
        }
        // Exactly what it was, for a file.
        assert_eq!(String::from(Bytes::of(1_500_001)), "1500001B");
        assert_eq!("200 MB".parse::<Bytes>().unwrap(), Bytes::of(200_000_000));
        for text in ["", "GB", " GB", "1", "1.5GB", "-1B", " 1GB", "1 000GB", "1gb", "99999999999TB"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        for (text, limit) in [("off", Limit::OFF), ("2GB", Limit::of(2_000_000_000))] {
            let read = Limit::try_from(text.to_owned()).unwrap();
            assert_eq!((read, String::from(read)), (limit, text.to_owned()));
        }
        let error = Limit::try_from("none".to_owned()).unwrap_err();
        assert!(error.contains("500MB") && error.contains("off"), "{error}");
    }

    #[test]
    fn hours_may_go_over_midnight() {
        let night: Hours = "22:00-06:00".parse().unwrap();
        let day: Hours = "9:30-17:00".parse().unwrap();
        let among = |hours: Hours| [0, 359, 360, 570, 1019, 1020, 1319, 1320, 1439].map(|at| hours.hold(at));
        assert_eq!(among(night), [true, true, false, false, false, false, false, true, true]);
        assert_eq!(among(day), [false, false, false, true, true, false, false, false, false]);
        assert_eq!((night.to_string(), day.to_string()), ("22:00-06:00".into(), "09:30-17:00".into()));
        for text in ["", "22-6", "24:00-06:00", "10:60-11:00", "10:00-10:00", "10:00"] {
            assert!(text.parse::<Hours>().is_err(), "{text}");
        }
    }
}
