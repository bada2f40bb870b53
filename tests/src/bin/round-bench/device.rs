//! The devices of the benchmark: `visitor.rs` of the tests, each with a directory, an identity and a link of its own.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, anyhow};
use commonweal_protocol::{Invitation, KeyNumber, Poll};
use commonweal_tests::visitor::{self, BASE, Visit, Visitor};
use commonweal_transport::{Link, LinkLimits};
use edge_client::compress::Packed;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Runtime;

use super::Arguments;

/// All devices, ready to run.
pub(super) struct Fleet {
    devices: Vec<Device>,
    runtime: Runtime,
}

struct Device {
    visitor: Visitor,
    /// One for each round: what training would have brought.
    updates: Vec<Packed>,
}

impl Fleet {
    /// Enrols the devices over the network and packs their updates of all rounds.
    pub(super) fn enroll(arguments: &Arguments, directory: &Path, invitations: &[String]) -> Result<Self> {
        let runtime = Runtime::new().context("cannot start")?;
        let layout = visitor::layout(arguments.adapter_mb)?;
        let mut devices = Vec::new();
        for (number, invitation) in (0_u64..).zip(invitations) {
            let invitation: Invitation = invitation.parse()?;
            let credentials = runtime.block_on(visitor::enroll(&invitation, &LinkLimits::default()))?;
            let address = (invitation.host.as_str(), invitation.port);
            let place = directory.join(format!("device-{number}"));
            let _inside = runtime.enter();
            let limits = LinkLimits { seed: number, ..LinkLimits::default() };
            let visitor = Visitor::new(address, credentials, (BASE, layout.clone()), &place, limits)?;
            let mut random = ChaCha8Rng::seed_from_u64(number);
            let rounds = 0..arguments.rounds_in_all();
            let updates = rounds.map(|_| visitor::noise(&layout, &mut random)).collect::<Result<_>>()?;
            devices.push(Device { visitor, updates });
        }
        Ok(Self { devices, runtime })
    }

    /// Bytes to each device in a round: the adapter's file.
    pub(super) fn down_bytes(&self) -> Result<u64> {
        let device = self.devices.first().context("no devices")?;
        let poll = Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None };
        let reply = self.runtime.block_on(device.visitor.link().poll(poll))?;
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
        let Self { visitor, updates } = &mut self;
        while !updates.is_empty() && !failed.load(Ordering::SeqCst) {
            let update = |_: &_| updates.pop().context("there are more rounds than updates");
            if let Visit::Wait(pause) = runtime.block_on(visitor.visit(update))? {
                thread::sleep(pause);
            }
        }
        Ok(())
    }
}
