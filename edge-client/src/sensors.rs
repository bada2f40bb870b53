//! What the system tells of itself: who touched it when, its power, network, heat and memory. For the rules of `when.rs`.
//!
//! Read from the kernel's files and from the system's bus (`bus.rs`), all below one root, so that tests drive this very
//! reader over files that they write. What cannot be read is not guessed.
//!
//! | reading | source |
//! |---|---|
//! | idle | whatever of `/dev/input/event*` a person touches (`inputs.rs`), where this user may read it, and the access times of `/dev/tty*` and `/dev/pts/*` |
//! | hinted | logind's `IdleHint`, asked once a second and heard at once when it changes: it knows of sessions from elsewhere |
//! | power | `/sys/class/power_supply`: a mains or USB supply that is online, or no battery at all |
//! | metered | NetworkManager's `Metered` |
//! | temperature | the hottest of `/sys/class/thermal/thermal_zone*/temp` and of the processors' own under `/sys/class/hwmon` (`heat.rs`) |
//! | memory | `MemAvailable` of `/proc/meminfo`, and `RssAnon` of this process, which it would give back |
//! | load | the first number of `/proc/loadavg` |

mod asking;
mod heat;
mod inputs;

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use self::{asking::Asking, inputs::Inputs};
use crate::{bus::Bus, returns::Returns, when::Readings};

/// Heat, power and the like do not change faster, and asking a battery's controller can take some milliseconds.
const SLOW: Duration = Duration::from_secs(1);

/// Tells how the device is.
pub trait Sensors: Send {
    /// As it is now. May take some seconds.
    fn read(&mut self) -> Readings;

    /// The same at once: what is not known at once is as it was a moment ago. Called some 40 times a second while a round
    /// runs.
    fn glance(&mut self) -> Readings {
        self.read()
    }

    /// Whether the network is paid for by the byte, alone; a transfer waits for it.
    fn metered(&mut self) -> Option<bool> {
        self.read().metered
    }
}

/// The sensors of this system: all there are on Linux, none elsewhere.
pub fn of_system() -> Box<dyn Sensors> {
    if cfg!(target_os = "linux") {
        Box::new(LinuxSensors::under(Path::new("/")))
    } else {
        Box::new(NoSensors)
    }
}

/// The same, for whoever watches long: they hear at once that the person came back.
pub fn of_watcher() -> Box<dyn Sensors> {
    if cfg!(target_os = "linux") {
        Box::new(LinuxSensors::under(Path::new("/")).listening())
    } else {
        Box::new(NoSensors)
    }
}

/// Knows nothing.
struct NoSensors;

impl Sensors for NoSensors {
    fn read(&mut self) -> Readings {
        Readings::default()
    }
}

/// Linux's files and bus below a root.
#[derive(Debug)]
pub struct LinuxSensors {
    root: PathBuf,
    inputs: Inputs,
    slow: Option<(Instant, Readings)>,
    hint: Asking<Duration>,
    network: Asking<bool>,
    returns: Option<Returns>,
    slow_again: Duration,
}

impl LinuxSensors {
    /// Below `/`, or wherever a test has laid the same files.
    pub fn under(root: &Path) -> Self {
        // Each on its own: one that hangs holds the other up no more than it holds up who watches.
        let [mut logind, mut network] = [(); 2].map(|()| Bus::at(&socket(root)));
        Self {
            root: root.to_owned(),
            inputs: Inputs::default(),
            slow: None,
            hint: Asking::of("logind", move || logind.idle()),
            network: Asking::of("network", move || network.metered()),
            returns: None,
            slow_again: SLOW,
        }
    }

    /// The same, which reads everything anew each time.
    #[must_use]
    pub fn always_anew(self) -> Self {
        Self { slow_again: Duration::ZERO, ..self }
    }

    /// The same, which listens to logind besides asking it.
    #[must_use]
    pub fn listening(self) -> Self {
        let returns = Some(Returns::at(&socket(&self.root)));
        Self { returns, ..self }
    }

    fn idle(&mut self) -> Option<Duration> {
        let touched = self.inputs.since_touched(&self.root, self.slow_again);
        [touched, since_typed(&self.root)].into_iter().flatten().min()
    }

    /// As logind has it, whose hint is `hinted`.
    fn left(&mut self, hinted: Option<Duration>) -> Option<Duration> {
        // Where logind is not there to ask, nobody begins to listen to it; it may only be slow to answer.
        let returned = match &mut self.returns {
            Some(returns) if hinted.is_some() => returns.since(),
            Some(returns) => returns.heard(),
            None => None,
        };
        [hinted, returned].into_iter().flatten().min()
    }

    fn with(&mut self, hinted: Option<Duration>, metered: Option<bool>) -> Readings {
        Readings { idle: self.idle(), hinted: self.left(hinted), metered, ..self.slow() }
    }

    fn slow(&mut self) -> Readings {
        if let Some((read, readings)) = self.slow
            && read.elapsed() < self.slow_again
        {
            return readings;
        }
        let readings = Readings {
            power: on_power(&self.root.join("sys/class/power_supply")),
            temperature_c: heat::hottest_c(&self.root.join("sys/class")),
            memory_free_bytes: memory_free(&self.root.join("proc")),
            load: text(&self.root.join("proc/loadavg"))
                .and_then(|load| load.split_whitespace().next()?.parse().ok()),
            minute: minute(),
            ..Readings::default()
        };
        self.slow = Some((Instant::now(), readings));
        readings
    }
}

/// Of the system's bus.
fn socket(root: &Path) -> PathBuf {
    root.join("run/dbus/system_bus_socket")
}

impl Sensors for LinuxSensors {
    fn read(&mut self) -> Readings {
        let again = self.slow_again;
        self.network.wish(again);
        let (hinted, metered) = (self.hint.fresh(again), self.network.fresh(again));
        self.with(hinted, metered)
    }

    fn glance(&mut self) -> Readings {
        let again = self.slow_again;
        let (hinted, metered) = (self.hint.last(again), self.network.last(again));
        self.with(hinted, metered)
    }

    fn metered(&mut self) -> Option<bool> {
        self.network.fresh(Duration::ZERO)
    }
}

/// A small file of the kernel's, without the line's end.
fn text(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(64 * 1024).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned())
}

/// What is in a folder whose name begins or ends as wanted; nothing if there is no folder.
fn entries(folder: &Path, is_wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let wanted = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(&is_wanted));
    wanted.map(|entry| entry.path()).collect()
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Since anybody typed on a terminal here: reading one changes its access time, writing does not.
fn since_typed(root: &Path) -> Option<Duration> {
    let consoles = entries(&root.join("dev"), |name| name.strip_prefix("tty").is_some_and(is_number));
    let terminals = entries(&root.join("dev/pts"), is_number);
    let read = |path: &PathBuf| fs::metadata(path).and_then(|metadata| metadata.accessed()).ok();
    let last = consoles.iter().chain(&terminals).filter_map(read).max()?;
    // A time to come is of a clock that was set back: then somebody is there.
    Some(SystemTime::now().duration_since(last).unwrap_or_default())
}

/// On mains: some supply that is no battery is online. Without a battery there is nothing else.
fn on_power(folder: &Path) -> Option<bool> {
    fs::read_dir(folder).ok()?;
    let (mut has_battery, mut is_online) = (false, false);
    for supply in entries(folder, |_| true) {
        // A mouse's battery says nothing of the device's.
        if text(&supply.join("scope")).is_some_and(|scope| scope == "Device") {
            continue;
        }
        match text(&supply.join("type")).as_deref() {
            Some("Battery") => has_battery = true,
            Some(_) => is_online |= text(&supply.join("online")).is_some_and(|online| online == "1"),
            None => {}
        }
    }
    Some(is_online || !has_battery)
}

fn memory_free(proc: &Path) -> Option<u64> {
    let of = |path: PathBuf, name: &str| -> Option<u64> {
        let text = text(&path)?;
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let own = of(proc.join("self/status"), "RssAnon:").unwrap_or(0);
    Some(of(proc.join("meminfo"), "MemAvailable:")? + own)
}

/// Of the day, where this machine is.
fn minute() -> Option<u16> {
    let now = jiff::ZonedDateTime::now();
    u16::try_from(i32::from(now.hour()) * 60 + i32::from(now.minute())).ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
