//! What the system tells of itself: who touched it when, its power, network, heat and memory. For the rules of `when.rs`.
//!
//! Read from the kernel's files and from the system's bus (`bus.rs`), all below one root, so that tests drive this very
//! reader over files that they write. What cannot be read is not guessed.
//!
//! | reading | source |
//! |---|---|
//! | idle | `/dev/input/by-*/*-event-{kbd,mouse}` where this user may read them, else logind's `IdleHint`, asked once a second and heard at once when it changes; with both, the access times of `/dev/tty*` and `/dev/pts/*` |
//! | power | `/sys/class/power_supply`: a mains or USB supply that is online, or no battery at all |
//! | metered | NetworkManager's `Metered` |
//! | temperature | the hottest of `/sys/class/thermal/thermal_zone*/temp` |
//! | memory | `MemAvailable` of `/proc/meminfo`, and `RssAnon` of this process, which it would give back |
//! | load | the first number of `/proc/loadavg` |

use std::{
    fs::{self, File, OpenOptions},
    io::Read,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use crate::{bus::Bus, returns::Returns, when::Readings};

/// Heat, power and the like do not change faster, and asking a battery's controller can take some milliseconds.
const SLOW: Duration = Duration::from_secs(1);
/// Input devices that are plugged in later are found so late.
const INPUTS: Duration = Duration::from_secs(60);
/// Of a keyboard's events, read at a time; their content is thrown away.
const EVENT_BYTES: usize = 4096;
/// Thermal zones that say more than this, or less than nothing, are not connected to anything.
const HEAT_C_MAX: f64 = 150.0;

/// Tells how the device is.
pub trait Sensors: Send {
    /// As it is now. Called some 40 times a second while a round runs.
    fn read(&mut self) -> Readings;

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
    bus: Bus,
    inputs: Inputs,
    slow: Option<(Instant, Readings)>,
    hinted: Option<(Instant, Option<Duration>)>,
    returns: Option<Returns>,
    slow_again: Duration,
}

impl LinuxSensors {
    /// Below `/`, or wherever a test has laid the same files.
    pub fn under(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            bus: Bus::at(&socket(root)),
            inputs: Inputs::default(),
            slow: None,
            hinted: None,
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
        let touched = self.inputs.since_touched(&self.root);
        let hinted = if touched.is_none() { self.hinted() } else { None };
        // Where logind is not there to ask, nobody begins to listen to it; it may only be slow to answer.
        let returned = match &mut self.returns {
            Some(returns) if hinted.is_some() => returns.since(),
            Some(returns) => returns.heard(),
            None => None,
        };
        [touched, hinted, returned, since_typed(&self.root)].into_iter().flatten().min()
    }

    fn hinted(&mut self) -> Option<Duration> {
        match self.hinted {
            Some((read, hinted)) if read.elapsed() < self.slow_again => hinted,
            _ => {
                let hinted = self.bus.idle();
                self.hinted = Some((Instant::now(), hinted));
                hinted
            }
        }
    }

    fn slow(&mut self) -> Readings {
        if let Some((read, readings)) = self.slow
            && read.elapsed() < self.slow_again
        {
            return readings;
        }
        let readings = Readings {
            idle: None,
            power: on_power(&self.root.join("sys/class/power_supply")),
            metered: self.bus.metered(),
            temperature_c: hottest(&self.root.join("sys/class/thermal")),
            memory_free_bytes: memory_free(&self.root.join("proc")),
            load: text(&self.root.join("proc/loadavg"))
                .and_then(|load| load.split_whitespace().next()?.parse().ok()),
            minute: minute(),
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
        let idle = self.idle();
        Readings { idle, ..self.slow() }
    }

    fn metered(&mut self) -> Option<bool> {
        self.bus.metered()
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

/// Since anybody typed on a terminal here: reading one changes its access time, writing does not.
fn since_typed(root: &Path) -> Option<Duration> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
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

fn hottest(folder: &Path) -> Option<f64> {
    let zones = entries(folder, |name| name.starts_with("thermal_zone"));
    let heat = |zone: &PathBuf| text(&zone.join("temp"))?.parse::<f64>().ok().map(|heat| heat / 1000.0);
    zones.iter().filter_map(heat).filter(|heat| (0.0..=HEAT_C_MAX).contains(heat)).max_by(f64::total_cmp)
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

/// Keyboards and pointers that this user may read. What they say is thrown away: that they said something is all.
#[derive(Debug, Default)]
struct Inputs {
    open: Vec<(PathBuf, File)>,
    looked: Option<Instant>,
    touched: Option<Instant>,
}

impl Inputs {
    /// `None` if there are none to read. One that has just been found may have been touched a moment ago.
    fn since_touched(&mut self, root: &Path) -> Option<Duration> {
        if self.looked.is_none_or(|looked| looked.elapsed() >= INPUTS) {
            self.look(root);
        }
        let mut buffer = [0; EVENT_BYTES];
        let mut is_touched = false;
        self.open.retain_mut(|(_, file)| {
            loop {
                match file.read(&mut buffer) {
                    Ok(0) => return true,
                    Ok(_) => is_touched = true,
                    Err(error) => {
                        break matches!(
                            error.kind(),
                            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                        );
                    }
                }
            }
        });
        if is_touched {
            self.touched = Some(Instant::now());
        }
        if self.open.is_empty() { None } else { self.touched.map(|touched| touched.elapsed()) }
    }

    fn look(&mut self, root: &Path) {
        let is_persons = |name: &str| name.ends_with("-event-kbd") || name.ends_with("-event-mouse");
        let input = root.join("dev/input");
        for folder in ["by-path", "by-id"] {
            for path in entries(&input.join(folder), is_persons) {
                // Two names may be one device.
                let Ok(path) = fs::canonicalize(path) else { continue };
                if self.open.iter().any(|(known, _)| *known == path) {
                    continue;
                }
                if let Ok(file) = unblocked(&path) {
                    self.open.push((path, file));
                    self.touched = Some(Instant::now());
                }
            }
        }
        self.looked = Some(Instant::now());
    }
}

/// Opened so that reading it never waits.
fn unblocked(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(target_os = "linux")]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    options.open(path)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::{fs::FileTimes, io::Write};

    use super::*;

    struct System(tempfile::TempDir);

    impl System {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn put(&self, name: &str, content: &str) -> PathBuf {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, content).unwrap();
            path
        }

        fn sensors(&self) -> LinuxSensors {
            LinuxSensors::under(self.0.path()).always_anew()
        }

        fn read(&self) -> Readings {
            self.sensors().read()
        }

        fn typed(&self, name: &str, seconds_ago: u64) {
            let path = self.put(name, "");
            let at = SystemTime::now() - Duration::from_secs(seconds_ago);
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_times(FileTimes::new().set_accessed(at))
                .unwrap();
        }
    }

    #[test]
    fn what_is_not_there_is_not_guessed() {
        let readings = System::new().read();
        assert_eq!(Readings { minute: None, ..readings }, Readings::default());
        assert!(readings.minute.is_some_and(|minute| minute < 24 * 60));
    }

    #[test]
    fn power_is_a_supply_that_is_online_or_no_battery() {
        let system = System::new();
        system.put("sys/class/power_supply/hid-mouse/type", "Battery\n");
        system.put("sys/class/power_supply/hid-mouse/scope", "Device\n");
        assert_eq!(system.read().power, Some(true), "a desktop");
        system.put("sys/class/power_supply/BAT0/type", "Battery\n");
        assert_eq!(system.read().power, Some(false));
        system.put("sys/class/power_supply/AC/type", "Mains\n");
        system.put("sys/class/power_supply/AC/online", "0\n");
        assert_eq!(system.read().power, Some(false));
        system.put("sys/class/power_supply/ucsi/type", "USB\n");
        system.put("sys/class/power_supply/ucsi/online", "1\n");
        assert_eq!(system.read().power, Some(true));
    }

    #[test]
    fn the_hottest_zone_counts_and_one_without_a_sensor_does_not() {
        let system = System::new();
        for (zone, heat) in [("0", "41000\n"), ("1", "72500\n"), ("2", "-274000\n"), ("3", "nonsense")] {
            system.put(&format!("sys/class/thermal/thermal_zone{zone}/temp"), heat);
        }
        system.put("sys/class/thermal/cooling_device0/temp", "99000\n");
        assert_eq!(system.read().temperature_c, Some(72.5));
    }

    #[test]
    fn memory_is_what_others_would_have_without_this_program() {
        let system = System::new();
        system.put("proc/meminfo", "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:    3000 kB\n");
        assert_eq!(system.read().memory_free_bytes, Some(3000 * 1024));
        system.put("proc/self/status", "Name:\tx\nRssAnon:\t     500 kB\n");
        assert_eq!(system.read().memory_free_bytes, Some(3500 * 1024));
        system.put("proc/loadavg", "0.52 0.58 0.59 1/977 12345\n");
        assert_eq!(system.read().load, Some(0.52));
    }

    #[test]
    fn a_key_on_any_terminal_counts() {
        let system = System::new();
        system.typed("dev/tty1", 500);
        system.typed("dev/ttyS0", 1);
        system.typed("dev/pts/ptmx", 1);
        let idle = |system: &System| system.read().idle.unwrap().as_secs();
        assert!((499..510).contains(&idle(&system)));
        system.typed("dev/pts/0", 40);
        assert!((39..50).contains(&idle(&system)));
    }

    #[test]
    fn a_key_on_a_keyboard_counts_from_the_moment_it_is_pressed() {
        let system = System::new();
        let keyboard = system.put("dev/input/by-path/platform-i8042-serio-0-event-kbd", "of before");
        system.put("dev/input/by-path/platform-lid-event", "");
        let mut sensors = system.sensors();
        assert!(sensors.read().idle.is_some(), "found, and touched for all one knows");
        let mut sensors = LinuxSensors { slow_again: Duration::ZERO, ..sensors };
        sensors.inputs.touched = Instant::now().checked_sub(Duration::from_secs(900));
        assert!(sensors.read().idle.unwrap().as_secs() >= 900);
        File::options().append(true).open(keyboard).unwrap().write_all(&[1; 24]).unwrap();
        assert!(sensors.read().idle.unwrap().as_secs() < 900);
    }

    #[test]
    fn the_system_itself_can_be_read() {
        let readings = of_system().read();
        assert!(readings.memory_free_bytes.is_some_and(|free| free > 1_000_000), "{readings:?}");
        assert!(readings.load.is_some());
    }
}
