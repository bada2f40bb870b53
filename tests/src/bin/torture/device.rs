//! A device's process: `visitor.rs` of the tests, whose identity is on disk, and whose update of a round is the same after
//! every start, as that of a device is which packed it before it was killed.

use std::{fs, io::Read as _, path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use commonweal_protocol::DeviceId;
use commonweal_tests::{
    verdict::Held,
    visitor::{self, BASE, Visit, Visitor},
};
use commonweal_transport::{Clock, Credentials, LinkLimits, QuicLink};
use edge_client::{store::Store, upload};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::serving::ADAPTER_MB;

const IDENTITY: &str = "identity.json";
/// How soon a visit is tried again that failed because the aggregator is dead.
const AGAIN: Duration = Duration::from_millis(20);

/// Who the device is, and where it goes.
#[derive(Serialize, Deserialize)]
struct Identity {
    pem: String,
    host: String,
    /// Those of each of the aggregator's processes that answers devices.
    ports: Vec<u16>,
}

/// Enrols a device over the network and keeps its identity in its directory.
pub(super) fn enroll(directory: &Path, invitation: &str, ports: &[u16]) -> Result<()> {
    let invitation: commonweal_protocol::Invitation = invitation.parse()?;
    let credentials = Runtime::new()?.block_on(visitor::enroll(&invitation, &LinkLimits::default()))?;
    let (pem, host) = (credentials.to_pem().to_string(), invitation.host.to_string());
    let identity = serde_json::to_vec(&Identity { pem, host, ports: ports.to_vec() })?;
    fs::create_dir_all(directory)?;
    fs::write(directory.join(IDENTITY), identity)?;
    Ok(())
}

fn identity(directory: &Path) -> Result<(Identity, Credentials)> {
    let identity: Identity = serde_json::from_slice(&fs::read(directory.join(IDENTITY))?)?;
    let credentials = Credentials::from_pem(&identity.pem)?;
    Ok((identity, credentials))
}

/// The name of an enrolled device.
pub(super) fn id(directory: &Path) -> Result<DeviceId> {
    Ok(identity(directory)?.1.device())
}

/// Takes part in rounds until the standard input ends.
pub(super) fn run(directory: &Path, number: u64) -> Result<()> {
    let runtime = Runtime::new()?;
    let (identity, credentials) = identity(directory)?;
    let layout = visitor::layout(ADAPTER_MB)?;
    // What is waited for after a kill is this, on each connection that the aggregator took with it.
    let limits = LinkLimits { seed: number, stall_ms: 500, ..LinkLimits::default() };
    let mut ports = identity.ports.clone().into_iter().cycle().skip(number as usize);
    let port = ports.next().context("an aggregator that listens")?;
    let mut visitor = {
        let _inside = runtime.enter();
        let (address, place) = ((identity.host.as_str(), port), directory.join("state"));
        Visitor::new(address, credentials.clone(), (BASE, layout.clone()), &place, limits)?
    };
    let others = identity.ports.len() > 1;
    thread::spawn(move || {
        loop {
            let update = |task: &commonweal_protocol::RoundTask| {
                let mut random = ChaCha8Rng::seed_from_u64((task.round.0 << 8) | number);
                visitor::noise(&layout, &mut random)
            };
            // Whatever goes wrong while somebody is dead passes; what does not shows in the verdict.
            let pause = match runtime.block_on(visitor.visit(update)) {
                Ok(Visit::Delivered(_)) => Duration::ZERO,
                Ok(Visit::Wait(pause)) => pause,
                Err(error) => {
                    tracing::info!("{error:#}");
                    AGAIN
                }
            };
            thread::sleep(pause);
            // The next visit is another process's, as a balancer has it.
            if let (true, Some(port)) = (others, ports.next()) {
                let _inside = runtime.enter();
                match QuicLink::new(&identity.host, port, credentials.clone(), limits, Clock::system()) {
                    Ok(link) => visitor.turn_to(link),
                    Err(error) => tracing::info!("{error}"),
                }
            }
        }
    });
    std::io::stdin().read_to_end(&mut Vec::new()).context("standard input")?;
    // The thread ends with the process.
    Ok(())
}

/// Reads the receipts of a device that does not run. Each is held to the aggregator's key.
pub(super) fn held(directory: &Path) -> Result<Held> {
    let (_, credentials) = identity(directory)?;
    let store = Store::open(&directory.join("state"))?;
    let delivered = upload::delivered(&store)?;
    for delivered in &delivered {
        delivered.receipt.verify(credentials.signing_key()).context("a receipt on disk")?;
    }
    let receipts = delivered.into_iter().map(|delivered| delivered.receipt).collect();
    Ok(Held { id: credentials.device(), receipts })
}
