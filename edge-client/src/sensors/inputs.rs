//! Whatever a person touches: keyboards, pointers, screens, gamepads. That they said something is all that is kept of it.
//! Of `sensors.rs`.
//!
//! Every `/dev/input/event*` counts that has keys or axes by the kernel's word, in `capabilities` under `/sys/class/input`:
//! the names that udev gives are for some of them only, and for none that is connected by radio. Left out are buttons that
//! switch the machine, jacks, lids and speakers, which have nothing else, and what feels its own motion, which never rests.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{entries, is_number, text};

/// Of a device's events, read at a time; their content is thrown away.
const EVENT_BYTES: usize = 4096;
/// The kernel's `KEY_POWER`, `KEY_SLEEP` and `KEY_WAKEUP`.
const SWITCHES: [usize; 3] = [116, 142, 143];
/// The kernel's `INPUT_PROP_ACCELEROMETER`.
const FEELS_MOTION: usize = 6;

/// What a person touches, as far as this user may read it.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    open: Vec<(PathBuf, File)>,
    looked: Option<Instant>,
    pub(super) touched: Option<Instant>,
}

impl Inputs {
    /// `None` if there is nothing to read. What has just been found may have been touched a moment ago: a keyboard that
    /// slept is there again with its first key. Looks for such as often as `again`.
    pub(super) fn since_touched(&mut self, root: &Path, again: Duration) -> Option<Duration> {
        if self.looked.is_none_or(|looked| looked.elapsed() >= again) {
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
                        break matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted);
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
        self.looked = Some(Instant::now());
        let is_event = |name: &str| name.strip_prefix("event").is_some_and(is_number);
        for path in entries(&root.join("dev/input"), is_event) {
            if self.open.iter().any(|(known, _)| *known == path) {
                continue;
            }
            let Some(name) = path.file_name() else { continue };
            if is_persons(&root.join("sys/class/input").join(name).join("device"))
                && let Ok(file) = unblocked(&path)
            {
                self.open.push((path, file));
                self.touched = Some(Instant::now());
            }
        }
    }
}

/// Whether a person has something to touch there. What the kernel does not tell of may be a person's.
fn is_persons(device: &Path) -> bool {
    let has = |name: &str| bits(&device.join("capabilities").join(name));
    let (Some(keys), Some(relative), Some(absolute)) = (has("key"), has("rel"), has("abs")) else {
        return true;
    };
    let feels_motion = bits(&device.join("properties")).is_some_and(|bits| bits.contains(&FEELS_MOTION));
    let has_axes = !relative.is_empty() || !absolute.is_empty();
    !feels_motion && (has_axes || keys.iter().any(|key| !SWITCHES.contains(key)))
}

/// The numbers of the bits that are set: the kernel writes them in words of its own width, the highest first.
fn bits(path: &Path) -> Option<Vec<usize>> {
    let width = usize::BITS as usize;
    let mut bits = Vec::new();
    for (at, word) in text(path)?.split_whitespace().rev().enumerate() {
        let word = usize::from_str_radix(word, 16).ok()?;
        bits.extend((0..width).filter(|bit| (word >> bit) & 1 == 1).map(|bit| at * width + bit));
    }
    Some(bits)
}

/// Opened so that reading it never waits.
fn unblocked(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(target_os = "linux")]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    options.open(path)
}
