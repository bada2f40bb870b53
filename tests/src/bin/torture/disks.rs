//! The aggregator's disk, or a device's, fills up or turns read-only while rounds go on; then it has room again. On a small
//! file system in memory of its own, which takes the rights of an administrator.

use std::{
    fmt, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use commonweal_tests::verdict::{self, Found};

use crate::{
    fleet::{Fleet, device_dir},
    serving,
};

/// How long the disk stays as it was made.
const SPOILED: Duration = Duration::from_secs(5);
/// How often each harm is done.
const TIMES: u32 = 3;

/// The device whose disk is spoiled.
const DEVICE: usize = 0;

/// What was done to a disk, and what was found afterwards.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Spoiled {
    whose: Whose,
    harm: Harm,
    /// Nothing when the machine does not allow it; why, then.
    found: Result<Found, String>,
}

/// To whose disk.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Whose {
    Aggregator,
    Device,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Harm {
    /// A file takes all that is free.
    Full,
    /// Nothing can be made or opened for writing any more.
    ReadOnly,
}

impl fmt::Display for Spoiled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.whose, self.harm) {
            (Whose::Aggregator, Harm::Full) => "a full disk",
            (Whose::Aggregator, Harm::ReadOnly) => "a read-only disk",
            (Whose::Device, Harm::Full) => "a device's full disk",
            (Whose::Device, Harm::ReadOnly) => "a device's read-only disk",
        };
        match &self.found {
            Ok(found) => write!(formatter, "{name}, {TIMES} times: {found}"),
            Err(why) => write!(formatter, "{name}: SKIPPED, {why}"),
        }
    }
}

/// Both harms to both, each to a federation of its own.
pub(super) fn spoil(place: &Path, devices: u32) -> Result<Vec<Spoiled>> {
    [Whose::Aggregator, Whose::Device]
        .into_iter()
        .flat_map(|whose| [Harm::Full, Harm::ReadOnly].map(|harm| (whose, harm)))
        .map(|(whose, harm)| {
            let place = place.join(match (whose, harm) {
                (Whose::Aggregator, Harm::Full) => "full",
                (Whose::Aggregator, Harm::ReadOnly) => "read-only",
                (Whose::Device, Harm::Full) => "device-full",
                (Whose::Device, Harm::ReadOnly) => "device-read-only",
            });
            let disk = match Disk::mount(&match whose {
                Whose::Aggregator => place.join("disk"),
                Whose::Device => device_dir(&place, DEVICE),
            }) {
                Ok(disk) => disk,
                Err(error) => return Ok(Spoiled { whose, harm, found: Err(format!("{error:#}")) }),
            };
            eprintln!("harming a disk: {whose:?}, {harm:?}");
            let found = federation(&disk, (whose, harm), &place, devices)
                .with_context(|| format!("{whose:?}, {harm:?}"))?;
            Ok(Spoiled { whose, harm, found: Ok(found) })
        })
        .collect()
}

fn federation(disk: &Disk, (whose, harm): (Whose, Harm), place: &Path, devices: u32) -> Result<Found> {
    let directory = match whose {
        Whose::Aggregator => disk.0.join("aggregator"),
        Whose::Device => place.join("aggregator"),
    };
    let mut fleet = Fleet::start(&directory, place, devices, 0)?;
    for _ in 0..TIMES {
        fleet.goes_on()?;
        match harm {
            Harm::Full => disk.fill()?,
            Harm::ReadOnly => disk.forbid()?,
        }
        thread::sleep(SPOILED);
        if whose == Whose::Device {
            // The others do not wait for it.
            fleet.goes_on()?;
        }
        match harm {
            Harm::Full => disk.empty()?,
            Harm::ReadOnly => disk.allow()?,
        }
        if whose == Whose::Device {
            fleet.takes_part(DEVICE)?;
        }
    }
    fleet.goes_on()?;
    let (held, _) = fleet.stop()?;
    verdict::judge(serving::open(&directory, devices)?.parts(), &held)
}

/// A mounted file system in memory; unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(place: &Path) -> Result<Self> {
        fs::create_dir_all(place)?;
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=128m", "none"]).arg(place))?;
        Ok(Self(place.to_owned()))
    }

    /// Makes it read-only for whatever is opened from now on. What is open for writing, such as the aggregator's database,
    /// keeps the system from taking that away too.
    fn forbid(&self) -> Result<()> {
        run(Command::new("mount").arg("--bind").args([&self.0, &self.0]))?;
        run(Command::new("mount").args(["-o", "remount,bind,ro"]).arg(&self.0))
    }

    fn allow(&self) -> Result<()> {
        run(Command::new("umount").arg("--lazy").arg(&self.0))
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    fn fill(&self) -> Result<()> {
        let mut file = fs::File::create(self.filler())?;
        let piece = vec![1; 1 << 16];
        loop {
            match file.write_all(&piece) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg("--lazy").arg(&self.0)) {
            tracing::warn!("{error:#}");
        }
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", words.trim());
    Ok(())
}
