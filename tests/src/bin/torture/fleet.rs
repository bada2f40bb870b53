//! The processes of one federation: started, killed and started again by `kills.rs` and `disks.rs`.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aggregator::{
    desk::{self, Record, records},
    serve::Role,
    store::{Access, Storage},
};
use anyhow::{Context, Result, bail};
use clap::ValueEnum as _;
use commonweal_protocol::{DeviceId, RoundId};
use commonweal_tests::{
    child::Child,
    modelless::{self, Modelless},
    postgres::Postgres,
    verdict::Held,
};

use crate::{
    device,
    serving::{self, Listening},
};

/// Processes that drive, where there are several: one does, the other stands by.
const DRIVERS: u32 = 2;
/// How long a federation that nobody harms any more may take to a release: rounds take a second or two.
const PATIENCE: Duration = Duration::from_secs(120);

/// An aggregator and its devices, all running.
pub(super) struct Fleet {
    place: PathBuf,
    devices: u32,
    /// Its processes; more than one over the database.
    servers: Vec<Server>,
    running: Vec<Child>,
    /// The devices, by number.
    ids: Vec<DeviceId>,
    /// Invitations that none of them used.
    spare: Vec<String>,
    /// How often a process of the aggregator's was killed.
    deaths: Arc<AtomicU64>,
    /// Where their state is, if not in the directory of the only one.
    storage: Option<Storage>,
    postgres: Option<Postgres>,
}

/// How others than its devices come to it.
pub(super) struct Door {
    /// Invitations that nobody has used.
    pub(super) invitations: Vec<String>,
    /// Those of each of the aggregator's processes that answers devices.
    pub(super) ports: Vec<u16>,
    /// How often one of them was killed, counted on.
    pub(super) deaths: Arc<AtomicU64>,
}

/// A process of the aggregator's.
struct Server {
    directory: PathBuf,
    port: u16,
    role: Role,
    child: Child,
}

impl Fleet {
    /// A fresh one, with the aggregator's directory at `aggregator_dir` and the devices' under `place`; over a database,
    /// with so many processes that answer devices, unless that is none.
    pub(super) fn start(aggregator_dir: &Path, place: &Path, devices: u32, fronts: u32) -> Result<Self> {
        let postgres = if fronts == 0 {
            None
        } else {
            Some(Postgres::start().context("there is no PostgreSQL (Debian: apt-get install postgresql)")?)
        };
        fs::create_dir_all(place)?;
        if let Some(postgres) = &postgres {
            modelless::share(place, postgres.settings(place))?;
        }
        // Its keys, and the first release.
        let first = serving::open(aggregator_dir, devices)?.parts().storage.clone();
        let storage = postgres.is_some().then_some(first);
        let mut roles = vec![if fronts == 0 { Role::All } else { Role::Front }];
        roles.extend((1..fronts).map(|_| Role::Front));
        roles.extend((0..if fronts == 0 { 0 } else { DRIVERS }).map(|_| Role::Drive));
        let mut invitations = Vec::new();
        let mut servers = Vec::new();
        for (number, role) in roles.into_iter().enumerate() {
            let directory = match number {
                0 => aggregator_dir.to_owned(),
                _ => aggregator_dir.with_file_name(format!("aggregator-{number}")),
            };
            if number > 0 {
                Modelless::copy_keys(aggregator_dir, &directory)?;
            }
            let (child, told) = serve(&directory, 0, devices, role)?;
            if number == 0 {
                invitations = told.invitations;
            }
            servers.push(Server { directory, port: told.port, role, child });
        }
        let ports = ports(&servers);
        let spare = invitations.split_off(invitations.len().min(devices as usize));
        let mut ids = Vec::new();
        for (number, invitation) in invitations.iter().enumerate() {
            let directory = device_dir(place, number);
            device::enroll(&directory, invitation, &ports)?;
            ids.push(device::id(&directory)?);
        }
        let running = (0..devices).map(|number| run(place, number as usize)).collect::<Result<_>>()?;
        let (place, deaths) = (place.to_owned(), Arc::default());
        Ok(Self { place, devices, servers, running, ids, spare, deaths, storage, postgres })
    }

    /// The way in for others.
    pub(super) fn door(&self) -> Door {
        Door { invitations: self.spare.clone(), ports: ports(&self.servers), deaths: self.deaths.clone() }
    }

    /// Kills a process of the aggregator's, drawn by any number, and starts it again.
    pub(super) fn kill_aggregator(&mut self, drawn: u32) -> Result<()> {
        self.check()?;
        let index = drawn as usize % self.servers.len();
        let server = &mut self.servers[index];
        // Before: what ends by it must not seem to have been ended.
        self.deaths.fetch_add(1, Ordering::SeqCst);
        // A child dropped is waited for, and this one would wait for its standard input: kill first.
        server.child.kill()?;
        server.child = serve(&server.directory, server.port, self.devices, server.role)?.0;
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
        for server in &mut self.servers {
            if let Some(status) = server.child.ended()? {
                bail!("the aggregator ended by itself with {status}");
            }
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
        let storage = match (&self.storage, self.servers.first()) {
            (None, Some(only)) => Storage::open(&only.directory, Access::Shared)?,
            (storage, _) => storage.clone().context("no aggregator")?,
        };
        let coord = storage.coord.as_ref();
        let current = desk::peek(coord)?.0.round.0;
        Ok(records(coord, RoundId(0), current as usize + 2)?)
    }

    /// Waits until a round that began after now has come to a release with an update of any of its devices in it: everybody
    /// who was killed is back at work.
    pub(super) fn goes_on(&mut self) -> Result<()> {
        let all = self.ids.iter().copied().collect();
        self.wait_for(&all)
    }

    /// The same, with an update of this device in it.
    pub(super) fn takes_part(&mut self, number: usize) -> Result<()> {
        let one = self.ids.get(number).copied().into_iter().collect();
        self.wait_for(&one).with_context(|| format!("device {number}"))
    }

    fn wait_for(&mut self, devices: &BTreeSet<DeviceId>) -> Result<()> {
        let has_one = |record: &&Record| record.lineage.iter().any(|origin| devices.contains(&origin.device));
        let published =
            |rounds: Vec<Record>| rounds.iter().filter(|record| record.published).filter(has_one).count();
        // The round under way began before.
        let wanted = published(self.rounds()?) + 2;
        let end = Instant::now() + PATIENCE;
        while published(self.rounds()?) < wanted {
            self.check()?;
            if Instant::now() > end {
                bail!("no release with an update of theirs in {} s after the last harm", PATIENCE.as_secs());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Ends everybody in peace; gives what the devices hold, and the database, if there is one.
    pub(super) fn stop(self) -> Result<(Vec<Held>, Option<Postgres>)> {
        for device in self.running {
            device.end()?;
        }
        for server in self.servers {
            let status = server.child.end()?;
            if !status.success() {
                bail!("the aggregator ended with {status}");
            }
        }
        let held = (0..self.devices as usize).map(|number| device::held(&device_dir(&self.place, number)));
        Ok((held.collect::<Result<_>>()?, self.postgres))
    }
}

fn ports(servers: &[Server]) -> Vec<u16> {
    servers.iter().filter(|server| server.role.receives()).map(|server| server.port).collect()
}

/// Where a device's files are.
pub(super) fn device_dir(place: &Path, number: usize) -> PathBuf {
    place.join(format!("device-{number}"))
}

fn serve(directory: &Path, port: u16, devices: u32, role: Role) -> Result<(Child, Listening)> {
    let role = role.to_possible_value().context("a role with a name")?.get_name().to_owned();
    let arguments: [OsString; 5] =
        ["serve".into(), directory.into(), port.to_string().into(), devices.to_string().into(), role.into()];
    let mut aggregator = Child::start(arguments)?;
    let told = aggregator.hear().context("the aggregator did not start")?;
    Ok((aggregator, told))
}

fn run(place: &Path, number: usize) -> Result<Child> {
    let arguments: [OsString; 3] =
        ["device".into(), device_dir(place, number).into(), number.to_string().into()];
    Child::start(arguments)
}
