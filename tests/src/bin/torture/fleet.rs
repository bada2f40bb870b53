//! The processes of one federation: started, killed and started again by `kills.rs` and `disks.rs`.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use aggregator::{
    desk::{self, Record, records},
    store::{Access, Storage},
};
use anyhow::{Context, Result, bail};
use commonweal_protocol::RoundId;
use commonweal_tests::child::Child;

use crate::{
    device::{self, Held},
    serving::Listening,
};

/// How long a federation that nobody harms any more may take to a release: rounds take a second or two.
const PATIENCE: Duration = Duration::from_secs(120);

/// An aggregator and its devices, all running.
pub(super) struct Fleet {
    /// The aggregator's directory.
    aggregator_dir: PathBuf,
    place: PathBuf,
    port: u16,
    devices: u32,
    aggregator: Child,
    running: Vec<Child>,
}

impl Fleet {
    /// A fresh one, with the aggregator's directory at `aggregator_dir` and the devices' under `place`.
    pub(super) fn start(aggregator_dir: &Path, place: &Path, devices: u32) -> Result<Self> {
        let (aggregator, told) = serve(aggregator_dir, 0, devices)?;
        for (number, invitation) in told.invitations.iter().enumerate() {
            device::enroll(&device_dir(place, number), invitation)?;
        }
        let running = (0..devices).map(|number| run(place, number as usize)).collect::<Result<_>>()?;
        let (aggregator_dir, place) = (aggregator_dir.to_owned(), place.to_owned());
        Ok(Self { aggregator_dir, place, port: told.port, devices, aggregator, running })
    }

    /// Kills the aggregator, and starts it again.
    pub(super) fn kill_aggregator(&mut self) -> Result<()> {
        self.check()?;
        // A child dropped is waited for, and this one would wait for its standard input: kill first.
        self.aggregator.kill()?;
        self.aggregator = serve(&self.aggregator_dir, self.port, self.devices)?.0;
        Ok(())
    }

    /// Kills a device, and starts it again.
    pub(super) fn kill_device(&mut self, number: usize) -> Result<()> {
        self.check()?;
        self.running[number].kill()?;
        self.running[number] = run(&self.place, number)?;
        Ok(())
    }

    /// Everybody who runs does so still: whatever befalls them, nobody ends by themselves.
    fn check(&mut self) -> Result<()> {
        if let Some(status) = self.aggregator.ended()? {
            bail!("the aggregator ended by itself with {status}");
        }
        for (number, device) in self.running.iter_mut().enumerate() {
            if let Some(status) = device.ended()? {
                bail!("device {number} ended by itself with {status}");
            }
        }
        Ok(())
    }

    /// The rounds that are over.
    pub(super) fn rounds(&self) -> Result<Vec<Record>> {
        let storage = Storage::open(&self.aggregator_dir, Access::Shared)?;
        let current = desk::peek(storage.coord.as_ref())?.0.round.0;
        Ok(records(storage.coord.as_ref(), RoundId(0), current as usize + 2)?)
    }

    /// Waits until a round has come to a release that began after now: everybody who was killed is back at work.
    pub(super) fn goes_on(&mut self) -> Result<()> {
        let published = |rounds: Vec<Record>| rounds.iter().filter(|record| record.published).count();
        // The round under way began before.
        let wanted = published(self.rounds()?) + 2;
        let end = Instant::now() + PATIENCE;
        while published(self.rounds()?) < wanted {
            self.check()?;
            if Instant::now() > end {
                bail!("no release in {} s after the last harm", PATIENCE.as_secs());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Ends everybody in peace; gives what the devices hold.
    pub(super) fn stop(self) -> Result<Vec<Held>> {
        for device in self.running {
            device.end()?;
        }
        let status = self.aggregator.end()?;
        if !status.success() {
            bail!("the aggregator ended with {status}");
        }
        (0..self.devices as usize).map(|number| device::held(&device_dir(&self.place, number))).collect()
    }
}

fn device_dir(place: &Path, number: usize) -> PathBuf {
    place.join(format!("device-{number}"))
}

fn serve(directory: &Path, port: u16, devices: u32) -> Result<(Child, Listening)> {
    let arguments: [OsString; 4] =
        ["serve".into(), directory.into(), port.to_string().into(), devices.to_string().into()];
    let mut aggregator = Child::start(arguments)?;
    let told = aggregator.hear().context("the aggregator did not start")?;
    Ok((aggregator, told))
}

fn run(place: &Path, number: usize) -> Result<Child> {
    let arguments: [OsString; 3] =
        ["device".into(), device_dir(place, number).into(), number.to_string().into()];
    Child::start(arguments)
}
