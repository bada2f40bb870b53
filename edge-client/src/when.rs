//! When a device may work: what its sensors say against its owner's rules, and one sentence of why not.
//!
//! Pure. The readings are of `sensors.rs`, the rules are `[when]` in `policy.toml`; `watch.rs` asks before a visit and
//! during it.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Hours, Span};

/// A device that waits begins only when it is cooler than its limit by so much: else it would begin and stop in turn.
const COOL_MARGIN_C: f64 = 5.0;

/// What to make of a rule whose sensor cannot tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unknown {
    /// Work.
    Allow,
    /// Wait.
    Wait,
}

/// The rules, all of which must hold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WhenPolicy {
    /// Nobody has touched the device for so long; `"0s"` for no such rule.
    pub idle: Span,
    /// Nor does logind say that somebody is there, for as long. Off is for desktops that never tell it that they are idle.
    /// Left out where it is the default, as it was before there was such a rule.
    #[serde(skip_serializing_if = "Clone::clone")]
    pub idle_hint: bool,
    /// On mains power only.
    pub power: bool,
    /// Not on a network that is paid for by the byte.
    pub unmetered: bool,
    /// The hottest sensor's most; half a step below to begin.
    pub temperature_max_c: f64,
    /// Memory that is left for others, this program's own counted as if it were free.
    pub memory_free_min: Bytes,
    /// Others' load at most to begin, in busy processors; none where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_max: Option<f64>,
    /// The hours of the day, in local time, over midnight if the end is before the beginning; all where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hours: Option<Hours>,
    /// What to make of a rule whose sensor cannot tell.
    pub unknown: Unknown,
    /// How much less than others this program asks of the processors, 0 to 19; below 0 is none of its business. With it
    /// goes the idle class of disk access.
    pub nice: u8,
}

impl Default for WhenPolicy {
    fn default() -> Self {
        Self {
            idle: Span::of_seconds(300),
            idle_hint: true,
            power: true,
            unmetered: true,
            temperature_max_c: 80.0,
            memory_free_min: Bytes::of(1_000_000_000),
            load_max: None,
            hours: None,
            unknown: Unknown::Allow,
            nice: 10,
        }
    }
}

impl WhenPolicy {
    /// Values out of their range.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !(self.temperature_max_c > 20.0 && self.temperature_max_c <= 120.0) {
            problems.push(format!(
                "when.temperature_max_c: expected above 20, at most 120, got {}",
                self.temperature_max_c
            ));
        }
        if self.load_max.is_some_and(|load| !(load > 0.0 && load.is_finite())) {
            problems.push("when.load_max: expected above 0".into());
        }
        if self.nice > 19 {
            problems.push(format!("when.nice: expected 0 to 19, got {}", self.nice));
        }
        problems
    }
}

/// What the sensors say; `None` is what they cannot tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Readings {
    /// Since a person last touched the device.
    #[serde(serialize_with = "seconds")]
    pub idle: Option<Duration>,
    /// Since everybody left, as logind has it.
    #[serde(serialize_with = "seconds")]
    pub hinted: Option<Duration>,
    /// Whether it is on mains power.
    pub power: Option<bool>,
    /// Whether its network is paid for by the byte.
    pub metered: Option<bool>,
    /// Of the hottest sensor.
    pub temperature_c: Option<f64>,
    /// What is free, or would be without this program.
    pub memory_free_bytes: Option<u64>,
    /// Busy processors over the last minute.
    pub load: Option<f64>,
    /// Of the day, in local time.
    pub minute: Option<u16>,
}

#[expect(clippy::ref_option, reason = "serde passes it so")]
fn seconds<S: serde::Serializer>(span: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    span.map(|span| span.as_secs()).serialize(to)
}

/// A rule that does not hold, as a clause: "it runs on its battery".
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "rule", rename_all = "snake_case")]
pub enum Broken {
    /// Outside of the hours.
    Hours {
        /// The owner's.
        hours: Hours,
    },
    /// Somebody uses it.
    Idle {
        /// Since the last touch.
        seconds: u64,
        /// The owner's.
        idle: Span,
    },
    /// Somebody is there, or was a moment ago, as logind has it.
    Session {
        /// Since everybody left; none while somebody is there.
        seconds: u64,
        /// The owner's.
        idle: Span,
    },
    /// On its battery.
    Power,
    /// On a metered network.
    Unmetered,
    /// Too hot.
    Temperature {
        /// Now.
        temperature_c: f64,
        /// Most.
        max_c: f64,
    },
    /// Too little memory for others.
    Memory {
        /// Now.
        free: Bytes,
        /// Least.
        min: Bytes,
    },
    /// Others are busy.
    Load {
        /// Now.
        load: f64,
        /// Most.
        max: f64,
    },
    /// This process holds more than the policy's `[budget]` allows it.
    Budget {
        /// Now.
        held: Bytes,
        /// Most.
        max: Bytes,
    },
    /// A sensor cannot tell, and the policy says to wait then.
    Unknown {
        /// Which.
        sensor: &'static str,
    },
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hours { hours } => write!(f, "it is not between {hours}"),
            Self::Idle { seconds, idle } => {
                write!(f, "the device is in use (touched {seconds} s ago, {idle} asked for)")
            }
            Self::Session { seconds: 0, .. } => f.write_str("logind says that somebody is there"),
            Self::Session { seconds, idle } => {
                write!(f, "logind says that everybody left {seconds} s ago ({idle} asked for)")
            }
            Self::Power => f.write_str("it runs on its battery"),
            Self::Unmetered => f.write_str("its network is metered"),
            Self::Temperature { temperature_c, max_c } => {
                write!(f, "it is hot ({temperature_c:.0} °C, at most {max_c:.0} asked for)")
            }
            Self::Memory { free, min } => write!(f, "memory is short ({free} free, {min} asked for)"),
            Self::Load { load, max } => {
                write!(f, "others are busy (load {load:.1}, at most {max:.1} asked for)")
            }
            Self::Budget { held, max } => {
                write!(f, "it holds {held} of memory, {max} are its budget")
            }
            Self::Unknown { sensor } => write!(f, "{sensor} is not known, and the policy says to wait then"),
        }
    }
}

/// Every rule that does not hold, the one first that a person would look for first.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Why(pub Vec<Broken>);

impl Why {
    /// Whether all rules hold.
    pub fn is_nothing(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this process holds too much memory.
    pub(crate) fn is_of_memory(&self) -> bool {
        self.0.iter().any(|broken| matches!(broken, Broken::Budget { .. }))
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, broken) in self.0.iter().enumerate() {
            let between = match at {
                0 => "",
                at if at + 1 == self.0.len() => ", and ",
                _ => ", ",
            };
            write!(f, "{between}{broken}")?;
        }
        Ok(())
    }
}

/// Why the device must wait, or stop if it works; nothing if it may work.
pub fn why_not(rules: &WhenPolicy, readings: &Readings, is_working: bool) -> Why {
    let mut why = Vec::new();
    let mut hold = |sensor: &'static str, is_asked: bool, broken: Option<Option<Broken>>| match broken {
        _ if !is_asked => {}
        Some(broken) => why.extend(broken),
        None if rules.unknown == Unknown::Wait => why.push(Broken::Unknown { sensor }),
        None => {}
    };
    let when = |is_broken: bool, broken: Broken| is_broken.then_some(broken);
    if let Some(hours) = rules.hours {
        let broken = readings.minute.map(|minute| when(!hours.hold(minute), Broken::Hours { hours }));
        hold("the time", true, broken);
    }
    let idle = rules.idle.duration();
    let touched = readings
        .idle
        .map(|since| when(since < idle, Broken::Idle { seconds: since.as_secs(), idle: rules.idle }));
    let left = readings
        .hinted
        .filter(|_| rules.idle_hint)
        .map(|since| when(since < idle, Broken::Session { seconds: since.as_secs(), idle: rules.idle }));
    // Whichever of the two says that somebody is there is believed.
    let used = if let Some(None) | None = touched { left.or(touched) } else { touched };
    hold("whether somebody uses the device", !idle.is_zero(), used);
    hold("its power supply", rules.power, readings.power.map(|power| when(!power, Broken::Power)));
    let metered = readings.metered.map(|metered| when(metered, Broken::Unmetered));
    hold("whether its network is metered", rules.unmetered, metered);
    let max_c = rules.temperature_max_c;
    let limit_c = if is_working { max_c } else { max_c - COOL_MARGIN_C };
    let hot =
        |temperature_c| when(temperature_c > limit_c, Broken::Temperature { temperature_c, max_c: limit_c });
    hold("its temperature", true, readings.temperature_c.map(hot));
    let min = rules.memory_free_min;
    let short = |free: u64| when(free < min.count(), Broken::Memory { free: Bytes::of(free), min });
    hold("free memory", min.count() > 0, readings.memory_free_bytes.map(short));
    if let Some(max) = rules.load_max.filter(|_| !is_working) {
        hold("its load", true, readings.load.map(|load| when(load > max, Broken::Load { load, max })));
    }
    Why(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_rest() -> Readings {
        Readings {
            idle: Some(Duration::from_secs(600)),
            hinted: Some(Duration::from_secs(500)),
            power: Some(true),
            metered: Some(false),
            temperature_c: Some(50.0),
            memory_free_bytes: Some(4_000_000_000),
            load: Some(0.1),
            minute: Some(23 * 60),
        }
    }

    fn said(rules: &WhenPolicy, readings: Readings) -> String {
        why_not(rules, &readings, false).to_string()
    }

    #[test]
    fn each_rule_alone_makes_the_device_wait_and_says_so() {
        let rules = WhenPolicy {
            hours: Some("22:00-06:00".parse().unwrap()),
            load_max: Some(1.0),
            ..WhenPolicy::default()
        };
        assert!(why_not(&rules, &at_rest(), false).is_nothing());
        let cases: [(Readings, &str); 7] = [
            (
                Readings { idle: Some(Duration::from_secs(299)), ..at_rest() },
                "touched 299 s ago, 5m asked for",
            ),
            (Readings { power: Some(false), ..at_rest() }, "battery"),
            (Readings { metered: Some(true), ..at_rest() }, "metered"),
            (Readings { temperature_c: Some(80.5), ..at_rest() }, "80 °C"),
            (Readings { memory_free_bytes: Some(900_000_000), ..at_rest() }, "900MB free, 1GB asked for"),
            (Readings { load: Some(1.5), ..at_rest() }, "load 1.5"),
            (Readings { minute: Some(12 * 60), ..at_rest() }, "22:00-06:00"),
        ];
        for (readings, words) in cases {
            let why = why_not(&rules, &readings, false);
            assert_eq!(why.0.len(), 1, "{words}: {why}");
            assert!(why.to_string().contains(words), "{words}: {why}");
        }
        let both = Readings { power: Some(false), metered: Some(true), ..at_rest() };
        assert_eq!(said(&rules, both), "it runs on its battery, and its network is metered");
    }

    #[test]
    fn nobody_is_there_only_if_both_the_devices_and_logind_say_so() {
        let rules = WhenPolicy { unknown: Unknown::Wait, ..WhenPolicy::default() };
        let with = |idle: Option<u64>, hinted: Option<u64>| {
            let [idle, hinted] = [idle, hinted].map(|seconds| seconds.map(Duration::from_secs));
            Readings { idle, hinted, ..at_rest() }
        };
        for (idle, hinted, words) in [
            (Some(600), Some(0), "logind says that somebody is there"),
            (Some(600), Some(20), "logind says that everybody left 20 s ago (5m asked for)"),
            (Some(20), Some(600), "the device is in use (touched 20 s ago, 5m asked for)"),
            (Some(20), Some(0), "the device is in use (touched 20 s ago, 5m asked for)"),
            (None, Some(0), "logind says that somebody is there"),
            (Some(20), None, "the device is in use (touched 20 s ago, 5m asked for)"),
            (None, None, "whether somebody uses the device is not known, and the policy says to wait then"),
            (Some(600), Some(600), ""),
            (Some(600), None, ""),
            (None, Some(600), ""),
        ] {
            assert_eq!(said(&rules, with(idle, hinted)), words, "{idle:?} {hinted:?}");
        }
        // A desktop that never says that it is idle.
        let rules = WhenPolicy { idle_hint: false, ..rules };
        assert_eq!(said(&rules, with(Some(600), Some(0))), "");
        assert!(said(&rules, with(None, Some(600))).contains("not known"));
    }

    #[test]
    fn a_device_at_work_may_be_warmer_and_its_own_load_is_no_reason() {
        let rules = WhenPolicy { load_max: Some(1.0), ..WhenPolicy::default() };
        let warm = Readings { temperature_c: Some(78.0), load: Some(8.0), ..at_rest() };
        assert_eq!(why_not(&rules, &warm, false).0.len(), 2);
        assert!(why_not(&rules, &warm, true).is_nothing());
        let hot = Readings { temperature_c: Some(80.1), ..at_rest() };
        assert_eq!(why_not(&rules, &hot, true).0.len(), 1);
    }

    #[test]
    fn what_no_sensor_tells_is_as_the_policy_says() {
        let unknown = Readings::default();
        assert!(why_not(&WhenPolicy::default(), &unknown, false).is_nothing());
        let strict = WhenPolicy { unknown: Unknown::Wait, ..WhenPolicy::default() };
        assert_eq!(why_not(&strict, &unknown, false).0.len(), 5);
        assert!(said(&strict, unknown).contains("whether its network is metered is not known"));
        // A rule that is not asked needs no sensor.
        let none = WhenPolicy {
            idle: Span::of_seconds(0),
            power: false,
            unmetered: false,
            memory_free_min: Bytes::of(0),
            ..strict
        };
        assert_eq!(said(&none, Readings { temperature_c: Some(20.0), ..unknown }), "");
    }
}
