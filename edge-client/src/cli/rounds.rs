//! `run` and `once`: the device visits the aggregator, as often as it is asked to come back.

use std::{num::NonZeroU64, thread, time::Duration};

use anyhow::{Context, Result, bail};
use commonweal_protocol::Invitation;
use commonweal_runtime::Cancel;
use commonweal_transport::{Clock, Credentials, DeviceKey, Link, LinkLimits, QuicLink};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use super::{Shared, exit::BadInput, open};
use crate::{
    events::{Event, Output},
    install::Expected,
    pipeline::{Device, Outcome, Visit},
    store::{Store, StoreError},
};

/// Present while the owner wants no rounds.
pub(super) const PAUSED: &str = "paused";
const CREDENTIALS: &str = "identity/credentials.pem";
const ADDRESS: &str = "identity/aggregator.json";
/// Longest wait between two polls if the settings say nothing: an aggregator that was away is found again in minutes.
const POLL_SECONDS_MAX: u64 = 300;
/// Wait after a failure that may pass.
const RETRY_SECONDS: u64 = 5;

/// Where the aggregator is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
}

impl Address {
    pub(super) fn of(invitation: &Invitation) -> Self {
        Self { host: invitation.host.to_string(), port: invitation.port }
    }
}

/// The device's identity and its aggregator, if it is enrolled.
pub(super) fn credentials(store: &Store) -> Result<Option<(Credentials, Address)>> {
    let (Some(pem), Some(address)) = (store.read(CREDENTIALS)?, store.read(ADDRESS)?) else {
        return Ok(None);
    };
    let damaged = |reason: &str| StoreError::Damaged { path: store.path("identity"), reason: reason.into() };
    let pem = String::from_utf8(pem).map_err(|_| damaged("expected PEM text"))?;
    let address = serde_json::from_slice(&address).map_err(|_| damaged("expected host and port"))?;
    Ok(Some((Credentials::from_pem(&pem)?, address)))
}

pub(super) fn keep_credentials(store: &Store, credentials: &Credentials, address: &Address) -> Result<()> {
    store.write(ADDRESS, &serde_json::to_vec(address)?)?;
    store.write(CREDENTIALS, credentials.to_pem().as_bytes())?;
    Ok(())
}

/// One visit; exit code 4 when the update was refused.
pub(super) fn once(shared: &Shared) -> Result<()> {
    let (runtime, device) = ready(shared)?;
    let Visit { outcome, .. } = device.visit()?;
    // A release may have been published while this device worked.
    if let Outcome::Delivered(_) = outcome {
        device.poll()?;
    }
    drop(runtime);
    match outcome {
        Outcome::Refused(round, refusal) => {
            let reconnect = commonweal_protocol::ReconnectWindow::default();
            let refused = commonweal_transport::LinkError::Refused { reason: refusal, reconnect };
            Err(anyhow::Error::new(refused).context(format!("round {}", round.0)))
        }
        outcome => {
            tracing::info!(?outcome, "visit ended");
            Ok(())
        }
    }
}

/// Visits until stopped, or until enough updates were accepted.
pub(super) fn run(shared: &Shared, rounds: Option<u64>) -> Result<()> {
    let (runtime, device) = ready(shared)?;
    let seconds_max =
        open::Place::find(shared)?.settings.poll_seconds_max.map_or(POLL_SECONDS_MAX, NonZeroU64::get);
    let mut random = ChaCha8Rng::from_os_rng();
    let mut delivered = 0;
    while !device.cancel.is_cancelled() {
        let wait = if device.store.read(PAUSED)?.is_some() {
            (Duration::from_secs(seconds_max.min(10)), "paused".to_owned())
        } else {
            match device.visit() {
                Ok(Visit { outcome, reconnect }) => {
                    delivered += u64::from(matches!(outcome, Outcome::Delivered(_)));
                    if rounds.is_some_and(|rounds| delivered >= rounds) {
                        break;
                    }
                    let wait = Duration::from_millis(reconnect.delay_ms(random.next_u64()));
                    (wait.min(Duration::from_secs(seconds_max)), describe(outcome).to_owned())
                }
                Err(_) if device.cancel.is_cancelled() => break,
                Err(error) if error.is_transient() => {
                    let error = anyhow::Error::new(error);
                    tracing::warn!("{error:#}; trying again in {RETRY_SECONDS} s");
                    (Duration::from_secs(RETRY_SECONDS), "the aggregator is away".to_owned())
                }
                Err(error) => return Err(error.into()),
            }
        };
        if shared.output() == Output::Text {
            tracing::debug!(seconds = wait.0.as_secs_f64(), why = wait.1, "waiting");
        } else {
            shared.output().show(&Event::Waiting { seconds: wait.0.as_secs_f64(), why: wait.1 });
        }
        sleep(wait.0, &device.cancel);
    }
    drop(runtime);
    Ok(())
}

fn describe(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Idle => "no work",
        Outcome::NoSamples => "nothing to train on: `edge-client add FILE`",
        Outcome::AlreadyDelivered(_) => "this round's update is delivered",
        Outcome::Delivered(_) => "delivered",
        Outcome::Diverged(_) => "training with this round's settings diverged",
        Outcome::Refused(..) => "the update was refused",
    }
}

/// Sleeps in short pieces, so that a signal ends it.
fn sleep(total: Duration, cancel: &Cancel) {
    let piece = Duration::from_millis(50);
    let mut left = total;
    while !left.is_zero() && !cancel.is_cancelled() {
        thread::sleep(left.min(piece));
        left = left.saturating_sub(piece);
    }
}

fn ready(shared: &Shared) -> Result<(Runtime, Device<QuicLink>)> {
    let place = open::Place::find(shared)?;
    let store = place.store()?;
    let Some((credentials, address)) = credentials(&store)? else {
        let directory = place.directory.display();
        return Err(BadInput(format!("{directory} is not enrolled: edge-client enroll INVITATION")).into());
    };
    let policy = place.policy(shared)?;
    let runtime = Runtime::new().context("cannot start")?;
    let cancel = open::stop_on_signal(runtime.handle());
    let link = connect(&runtime, &credentials, &address)?;
    let credentials = renewed(&runtime, &store, &link, credentials, &address)?;
    let link = connect(&runtime, &credentials, &address)?;
    let stages = open::Stages::open(shared, &place, &policy, &cancel)?;
    let expected = Expected { key: *credentials.signing_key(), base: stages.base(), layout: stages.layout() };
    let open::Stages { model, guard, reviser } = stages;
    let device = Device {
        store,
        policy,
        model,
        guard,
        reviser,
        link,
        expected,
        output: shared.output(),
        runtime: runtime.handle().clone(),
        cancel,
    };
    Ok((runtime, device))
}

fn connect(runtime: &Runtime, credentials: &Credentials, address: &Address) -> Result<QuicLink> {
    let limits = LinkLimits { seed: ChaCha8Rng::from_os_rng().next_u64(), ..LinkLimits::default() };
    let _inside = runtime.enter();
    Ok(QuicLink::new(&address.host, address.port, credentials.clone(), limits, Clock::system())?)
}

/// A fresh certificate once two thirds of the old one's life are over. A failure is not the end: the old one holds.
fn renewed(
    runtime: &Runtime,
    store: &Store,
    link: &QuicLink,
    credentials: Credentials,
    address: &Address,
) -> Result<Credentials> {
    if !credentials.should_renew(Clock::system().unix_ms()) {
        return Ok(credentials);
    }
    let key = DeviceKey::generate()?;
    let chain = match runtime.block_on(link.renew(key.csr()?)) {
        Ok(chain) => chain,
        Err(error) if error.is_transient() => {
            tracing::warn!("certificate not renewed: {error}");
            return Ok(credentials);
        }
        Err(error) => bail!(error),
    };
    let fresh = credentials.renewed(key, &chain)?;
    keep_credentials(store, &fresh, address)?;
    Ok(fresh)
}
