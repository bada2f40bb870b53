//! The sensors over files that a test writes.

use std::{fs::FileTimes, io::Write, thread};

use commonweal_runtime::Cancel;

use super::*;
use crate::{
    units::Limit,
    watch::{Heed, Watched, watched},
    when::{Broken, WhenPolicy},
};

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
        File::options().write(true).open(path).unwrap().set_times(FileTimes::new().set_accessed(at)).unwrap();
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
fn a_processor_tells_its_heat_where_no_zone_does() {
    let system = System::new();
    let chip = |number: u32, name: &str, inputs: &[(&str, &str)]| {
        system.put(&format!("sys/class/hwmon/hwmon{number}/name"), &format!("{name}\n"));
        for (file, text) in inputs {
            system.put(&format!("sys/class/hwmon/hwmon{number}/{file}"), &format!("{text}\n"));
        }
    };
    chip(0, "nvme", &[("temp1_input", "95000")]);
    chip(1, "amdgpu", &[("temp1_input", "96000")]);
    assert_eq!(system.read().temperature_c, None, "they have limits of their own");
    // What is absurd, or no temperature, is left out.
    let absurd = [("temp1_input", "61500"), ("temp3_input", "255000"), ("temp4_input", "-128000")];
    chip(2, "k10temp", &absurd);
    chip(2, "k10temp", &[("temp1_max", "99000"), ("in1_input", "99000"), ("temp5_input", "")]);
    assert_eq!(system.read().temperature_c, Some(61.5));
    // The fans' measure of a processor that has the heat itself too.
    let labels = [("temp1_label", "Tctl"), ("temp2_label", "Tdie"), ("temp2_input", "34500")];
    chip(2, "k10temp", &labels);
    assert_eq!(system.read().temperature_c, Some(34.5));
    chip(3, "cpu_thermal", &[("temp1_input", "52000")]);
    assert_eq!(system.read().temperature_c, Some(52.0));
    chip(4, "coretemp", &[("temp1_input", "58000"), ("temp12_input", "63000")]);
    assert_eq!(system.read().temperature_c, Some(63.0));
    system.put("sys/class/thermal/thermal_zone0/temp", "70000\n");
    assert_eq!(system.read().temperature_c, Some(70.0), "the hottest of all");
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

/// As the kernel lists what such a device has; of `evtest` on real ones.
const KEYBOARD: [&str; 3] = ["402000000 3803078f800d001 feffffdfffefffff fffffffffffffffe", "0", "0"];
const MOUSE: [&str; 3] = ["1f0000 0 0 0 0", "903", "0"];
const TOUCHSCREEN: [&str; 3] = ["400 0 0 0 0 0", "0", "260800000000003"];
const GAMEPAD: [&str; 3] = ["7cdb000000000000 0 0 0 0", "0", "3003f"];
const POWER_BUTTON: [&str; 3] = ["10000000000000 0", "0", "0"];
const LID: [&str; 3] = ["0", "0", "0"];
const MOTION: [&str; 3] = ["0", "0", "3f"];

impl System {
    fn input(&self, number: u32, [keys, relative, absolute]: [&str; 3]) -> PathBuf {
        let device = format!("sys/class/input/event{number}/device");
        for (name, bits) in [("key", keys), ("rel", relative), ("abs", absolute)] {
            self.put(&format!("{device}/capabilities/{name}"), &format!("{bits}\n"));
        }
        self.put(&format!("{device}/properties"), "0\n");
        self.put(&format!("dev/input/event{number}"), "")
    }
}

fn touch(path: &Path) {
    File::options().append(true).open(path).unwrap().write_all(&[1; 24]).unwrap();
}

/// Sensors that have found what is there, as if nobody had touched it for long.
fn untouched(system: &System) -> LinuxSensors {
    let mut sensors = system.sensors();
    assert!(sensors.read().idle.is_some(), "found, and touched for all one knows");
    sensors.inputs.touched = Instant::now().checked_sub(Duration::from_secs(900));
    assert!(sensors.read().idle.unwrap().as_secs() >= 900);
    sensors
}

#[cfg(target_pointer_width = "64")]
#[test]
fn whatever_a_person_touches_counts_from_that_moment() {
    for (what, capabilities) in
        [("keyboard", KEYBOARD), ("mouse", MOUSE), ("touchscreen", TOUCHSCREEN), ("gamepad", GAMEPAD)]
    {
        let system = System::new();
        let device = system.input(7, capabilities);
        let mut sensors = untouched(&system);
        touch(&device);
        assert!(sensors.read().idle.unwrap().as_secs() < 900, "{what}");
    }
}

#[cfg(target_pointer_width = "64")]
#[test]
fn a_keyboard_that_comes_later_counts_from_then_on() {
    let system = System::new();
    system.input(3, MOUSE);
    let mut sensors = untouched(&system);
    let keyboard = system.input(12, KEYBOARD);
    assert!(sensors.read().idle.unwrap().as_secs() < 900, "it came");
    sensors.inputs.touched = Instant::now().checked_sub(Duration::from_secs(900));
    touch(&keyboard);
    assert!(sensors.read().idle.unwrap().as_secs() < 900, "it was touched");
}

#[cfg(target_pointer_width = "64")]
#[test]
fn what_nobody_touches_is_not_listened_to() {
    let system = System::new();
    system.input(0, POWER_BUTTON);
    system.input(1, LID);
    system.input(2, MOTION);
    system.put("sys/class/input/event2/device/properties", "40\n");
    system.put("dev/input/mice", "");
    assert_eq!(system.read().idle, None);
    // One that the kernel tells nothing of may be a person's.
    system.put("dev/input/event3", "");
    assert!(system.read().idle.is_some());
}

#[cfg(target_pointer_width = "64")]
#[test]
fn logind_is_asked_also_where_keyboards_can_be_read() {
    let system = System::new();
    system.input(0, KEYBOARD);
    let mut sensors = untouched(&system);
    sensors.hint = Asking::of("logind", || Some(Duration::ZERO));
    let readings = sensors.read();
    assert!(readings.idle.unwrap().as_secs() >= 900);
    assert_eq!(readings.hinted, Some(Duration::ZERO), "somebody is there from elsewhere");
}

#[cfg(target_pointer_width = "64")]
#[test]
fn a_sensor_that_hangs_blinds_nobody_who_watches() {
    let system = System::new();
    let keyboard = system.input(0, KEYBOARD);
    let hint = Asking::of("hangs", || {
        loop {
            thread::park();
        }
    });
    let network = Asking::of("hangs", || {
        loop {
            thread::park();
        }
    });
    let sensors = LinuxSensors { hint, network, ..untouched(&system) };
    let mut heed = Heed { rules: WhenPolicy::default(), sensors: Box::new(sensors) };
    let visit = Cancel::new();
    let watch = Watched {
        visit: visit.clone(),
        stop: Cancel::new(),
        wishes: Vec::new(),
        heed: Some(&mut heed),
        memory_max: Limit::OFF,
    };
    let (took, broken) = watched(watch, || {
        thread::sleep(Duration::from_millis(200));
        assert!(!visit.is_cancelled());
        touch(&keyboard);
        let touched = Instant::now();
        while !visit.is_cancelled() {
            thread::sleep(Duration::from_millis(1));
        }
        touched.elapsed()
    });
    assert!(matches!(broken.unwrap().0[..], [Broken::Idle { .. }]));
    // 25 ms, and what a busy machine makes of them. Whoever waits for one of the two takes 3 s (`asking.rs`), for both 6 s,
    // of which 0.2 s are over before the touch.
    assert!(took < Duration::from_millis(2500), "{took:?}");
}

#[test]
fn the_system_itself_can_be_read() {
    let readings = of_system().read();
    assert!(readings.memory_free_bytes.is_some_and(|free| free > 1_000_000), "{readings:?}");
    assert!(readings.load.is_some());
}
