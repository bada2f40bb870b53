//! The aggregator's disk fills up, or turns read-only, while rounds go on; then it has room again. On a small file system
//! in memory of its own, which takes the rights of an administrator.

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

use crate::{fleet::Fleet, serving};

/// How long the disk stays as it was made.
const SPOILED: Duration = Duration::from_secs(5);
/// How often each harm is done.
const TIMES: u32 = 3;

/// What was done to a disk, and what was found afterwards.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Spoiled {
    harm: Harm,
    /// Nothing when the machine does not allow it; why, then.
    found: Result<Found, String>,
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
        let name = match self.harm {
            Harm::Full => "a full disk",
            Harm::ReadOnly => "a read-only disk",
        };
        match &self.found {
            Ok(found) => write!(formatter, "{name}, {TIMES} times: {found}"),
            Err(why) => write!(formatter, "{name}: SKIPPED, {why}"),
        }
    }
}

/// Both harms, each to a federation of its own.
pub(super) fn spoil(place: &Path, devices: u32) -> Result<Vec<Spoiled>> {
    [Harm::Full, Harm::ReadOnly]
        .into_iter()
        .map(|harm| {
            let place = place.join(if harm == Harm::Full { "full" } else { "read-only" });
            let disk = match Disk::mount(&place.join("disk")) {
                Ok(disk) => disk,
                Err(error) => return Ok(Spoiled { harm, found: Err(format!("{error:#}")) }),
            };
            eprintln!("harming a disk: {harm:?}");
            let found = federation(&disk, harm, &place, devices).with_context(|| format!("{harm:?}"))?;
            Ok(Spoiled { harm, found: Ok(found) })
        })
        .collect()
}

fn federation(disk: &Disk, harm: Harm, place: &Path, devices: u32) -> Result<Found> {
    let directory = disk.0.join("aggregator");
    let mut fleet = Fleet::start(&directory, place, devices, 0)?;
    for _ in 0..TIMES {
        fleet.goes_on()?;
        match harm {
            Harm::Full => disk.fill()?,
            Harm::ReadOnly => disk.forbid()?,
        }
        thread::sleep(SPOILED);
        match harm {
            Harm::Full => disk.empty()?,
            Harm::ReadOnly => disk.allow()?,
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

    /// Makes it read-only for whatever is opened from now on. What the aggregator has open for writing, its database,
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
