//! The devices of the benchmark: what `edge_client::pipeline` does in a visit, with the same functions, but for the work
//! of a model. Each has a directory, an identity and a link of its own.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use commonweal_adapter::{AdapterDelta, AdapterLayout, Bits, CompressOptions, Residual, Trainable};
use commonweal_protocol::{Content, DeviceId, DeviceReport, Invitation, Poll, RoundTask};
use commonweal_transport::{Clock, DeviceKey, Link, LinkLimits, QuicLink};
use edge_client::{
    compress::Packed,
    install::{self, Expected},
    store::Store,
    upload,
};
use rand::{Rng as _, RngCore as _, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Runtime;

use super::{Arguments, BASE};

/// All devices, ready to run.
pub(super) struct Fleet {
    devices: Vec<Device>,
    runtime: Runtime,
}

struct Device {
    id: DeviceId,
    store: Store,
    link: QuicLink,
    expected: Expected,
    random: ChaCha8Rng,
    /// One for each round: what training would have brought.
    updates: Vec<Packed>,
}

impl Fleet {
    /// Enrols the devices over the network and packs their updates of all rounds.
    pub(super) fn enroll(arguments: &Arguments, directory: &Path, invitations: &[String]) -> Result<Self> {
        let runtime = Runtime::new().context("cannot start")?;
        let layout = arguments.layout()?;
        let mut devices = Vec::new();
        for (number, invitation) in invitations.iter().enumerate() {
            let invitation: Invitation = invitation.parse()?;
            let limits = LinkLimits { seed: number as u64, ..LinkLimits::default() };
            let (key, clock) = (DeviceKey::generate()?, Clock::system());
            let enrolment = commonweal_transport::enroll(&invitation, key, &limits, &clock);
            let credentials = runtime.block_on(enrolment)?;
            let expected = Expected { key: *credentials.signing_key(), base: BASE, layout: layout.clone() };
            let id = credentials.device();
            let link = {
                let _inside = runtime.enter();
                let (host, port) = (invitation.host.as_str(), invitation.port);
                QuicLink::new(host, port, credentials, limits, clock)?
            };
            let mut random = ChaCha8Rng::seed_from_u64(number as u64);
            let store = Store::open(&directory.join(format!("device-{number}")))?;
            let updates = (0..arguments.rounds_in_all())
                .map(|_| noise(&layout, &mut random))
                .collect::<Result<Vec<_>>>()?;
            devices.push(Device { id, store, link, expected, random, updates });
        }
        Ok(Self { devices, runtime })
    }

    /// Bytes to each device in a round: the adapter's file.
    pub(super) fn down_bytes(&self) -> Result<u64> {
        let device = self.devices.first().context("no devices")?;
        let poll = Poll { base: BASE, installed: None };
        let reply = self.runtime.block_on(device.link.poll(poll))?;
        Ok(reply.release.context("there is no release")?.release.length)
    }

    /// Bytes from each device in a round: its update.
    pub(super) fn up_bytes(&self) -> u64 {
        let update = self.devices.first().and_then(|device| device.updates.first());
        update.map_or(0, |packed| packed.bytes().len() as u64)
    }

    /// Takes part in all rounds, each device on a thread of its own.
    pub(super) fn run(self) -> Result<()> {
        let Self { devices, runtime } = self;
        // One that failed ends the others: their round has no quorum any more.
        let failed = AtomicBool::new(false);
        thread::scope(|scope| {
            let run = |device: Device| {
                device.run(&runtime, &failed).inspect_err(|_| failed.store(true, Ordering::SeqCst))
            };
            let threads: Vec<_> =
                devices.into_iter().map(|device| scope.spawn(move || run(device))).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a device ended with a panic"))?)
        })
    }
}

impl Device {
    fn run(mut self, runtime: &Runtime, failed: &AtomicBool) -> Result<()> {
        while !self.updates.is_empty() && !failed.load(Ordering::SeqCst) {
            let installed = install::installed_version(&self.store, &self.expected)?;
            let reply = runtime.block_on(self.link.poll(Poll { base: BASE, installed }))?;
            if let Some(release) = reply.release.as_ref().filter(|it| Some(it.release.version) != installed) {
                runtime.block_on(install::install(&self.link, &self.store, &self.expected, release))?;
            }
            match reply.task {
                Some(task) if !self.is_delivered(&task)? => self.take_part(&task, runtime)?,
                _ => thread::sleep(Duration::from_millis(reply.reconnect.delay_ms(self.random.next_u64()))),
            }
        }
        Ok(())
    }

    fn is_delivered(&self, task: &RoundTask) -> Result<bool> {
        Ok(upload::delivered(&self.store)?.iter().any(|known| known.round == task.round))
    }

    /// What a round asks of a device, but for training.
    fn take_part(&mut self, task: &RoundTask, runtime: &Runtime) -> Result<()> {
        let content = Content { digest: task.start.digest, length: task.start.length };
        runtime.block_on(install::obtain(&self.link, &self.store, &self.expected, content))?;
        let packed = self.updates.pop().context("there are more rounds than updates")?;
        let open = upload::announce(task.round, BASE, &packed, DeviceReport::default(), 1);
        let Self { link, store, expected, id, .. } = self;
        runtime.block_on(upload::upload(link, &expected.key, *id, store, &open, &packed))?;
        Ok(())
    }
}

/// An update of evenly distributed values, which an entropy coder cannot make smaller.
fn noise(layout: &Arc<AdapterLayout>, random: &mut ChaCha8Rng) -> Result<Packed> {
    let trainable = Trainable::Both;
    let values =
        (0..layout.trainable_parameters(trainable)).map(|_| random.random_range(-1e-3..1e-3)).collect();
    let delta = AdapterDelta::from_values(layout.clone(), trainable, values)?;
    let mut residual = Residual::zeros(layout.clone(), trainable);
    let options = CompressOptions { bits: Bits::Eight, ..CompressOptions::default() };
    let bytes = commonweal_adapter::compress(&delta, &mut residual, &options, random)?.into_bytes();
    Ok(Packed::from_disk(bytes, layout, trainable, false)?)
}
