//! The devices of the load: identities that visit over connections of their own. Links, checks of signatures and digests
//! are the device's own; nothing is kept on a disk, so that the aggregator's is measured alone. A visit makes its connection,
//! or finds the one of before (`kept.rs`).

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use commonweal_protocol::{
    AggregatorKey, Content, DeviceReport, Invitation, KeyNumber, Poll, Refusal, RoundId, Version,
};
use commonweal_tests::visitor::{self, BASE};
use commonweal_transport::{Clock, Credentials, Link, LinkError, LinkLimits, QuicLink};
use edge_client::{compress::Packed, upload};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tokio::{runtime::Runtime, task::JoinSet};

use crate::{
    Arguments,
    kept::{Kept, Room},
};

/// Enrolments at once: those that an aggregator allows one address.
const ENROLLING_AT_ONCE: u32 = 8;
/// How often an enrolment is tried that was cut or refused a slot.
const TRIES_MAX: u32 = 20;

/// All devices, and where they go.
pub(super) struct Fleet {
    runtime: Runtime,
    shared: Arc<Shared>,
}

/// What the tasks share.
struct Shared {
    host: String,
    /// Those of all processes that answer; a visit goes to the next one, as a balancer has it.
    ports: Vec<u16>,
    visits: AtomicUsize,
    /// Every device's update: what it holds is the same, what it is counted by is not.
    update: Packed,
    waiting: Mutex<VecDeque<Device>>,
    /// Whether devices keep their connections.
    reuse: bool,
    room: Arc<Room>,
    counts: Counts,
}

/// A device between two visits.
struct Device {
    credentials: Credentials,
    installed: Option<Version>,
    delivered: Option<RoundId>,
    kept: Option<Kept>,
}

#[derive(Default)]
struct Counts {
    updates: AtomicU64,
    fetched: AtomicU64,
    busy: AtomicU64,
    failed: AtomicU64,
}

/// Quantiles of a time, in ms.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Quantiles {
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
}

/// One measurement.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Level {
    pub(super) at_once: u32,
    pub(super) seconds: f64,
    /// Visits that came to their end.
    pub(super) visits: u64,
    /// Over a connection that was kept from the visit before.
    pub(super) reused: u64,
    /// Devices that are connected between two visits, at its end.
    pub(super) connected: usize,
    /// From the first packet to the answer about work: the connection is made in it, unless it was kept.
    pub(super) poll: Quantiles,
    pub(super) visit: Quantiles,
    pub(super) updates: u64,
    pub(super) fetched: u64,
    /// Refused for want of a slot.
    pub(super) busy: u64,
    /// Anything else that went wrong.
    pub(super) failed: u64,
}

impl Level {
    /// Visits a second.
    pub(super) fn rate(&self) -> f64 {
        self.visits as f64 / self.seconds
    }
}

/// How long a visit took, and the asking in it.
#[derive(Clone, Copy)]
struct Took {
    poll: Duration,
    visit: Duration,
    /// Over a connection that was there.
    reused: bool,
}

impl Fleet {
    /// Enrols all devices over the network.
    pub(super) fn enroll(
        arguments: &Arguments,
        invitations: &[String],
        ports: &[u16],
    ) -> Result<(Self, Level)> {
        let runtime = Runtime::new().context("cannot start")?;
        let first: Invitation = invitations.first().context("no invitations")?.parse()?;
        let layout = visitor::layout(arguments.adapter_mb)?;
        let update = visitor::noise(&layout, &mut ChaCha8Rng::seed_from_u64(0))?;
        let shared = Arc::new(Shared {
            host: first.host.to_string(),
            ports: ports.to_vec(),
            visits: AtomicUsize::new(0),
            update,
            waiting: Mutex::default(),
            reuse: arguments.reuse,
            room: Arc::default(),
            counts: Counts::default(),
        });
        let invitations: VecDeque<Invitation> =
            invitations.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        let invitations = Arc::new(Mutex::new(invitations));
        let enrol = || {
            let (invitations, shared) = (invitations.clone(), shared.clone());
            async move {
                let mut times = Vec::new();
                loop {
                    let next = invitations.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(mut invitation) = next else { return Ok(times) };
                    invitation.port = shared.port()?;
                    let begun = Instant::now();
                    let credentials = enroll(&invitation).await?;
                    times.push(Took { poll: begun.elapsed(), visit: begun.elapsed(), reused: false });
                    shared.put_back(Device { credentials, installed: None, delivered: None, kept: None });
                }
            }
        };
        let begun = Instant::now();
        let times = runtime.block_on(together(ENROLLING_AT_ONCE, enrol))?;
        let level = shared.level(ENROLLING_AT_ONCE, begun.elapsed(), &times);
        Ok((Self { runtime, shared }, level))
    }

    /// Lets `at_once` devices visit at any time, whoever waited longest next.
    pub(super) fn visit(&mut self, at_once: u32, seconds: u64) -> Result<Level> {
        {
            let _inside = self.runtime.enter();
            self.shared.make_room(at_once);
        }
        let begun = Instant::now();
        let end = begun + Duration::from_secs(seconds);
        let visits = || {
            let shared = self.shared.clone();
            async move {
                let mut times = Vec::new();
                while Instant::now() < end {
                    // More at once than there are devices: the rest has nothing to do.
                    let Some(mut device) = shared.next() else { break };
                    match shared.visit(&mut device).await {
                        Ok(took) => times.push(took),
                        Err(error) => shared.counts.note(&error),
                    }
                    shared.put_back(device);
                }
                Ok(times)
            }
        };
        let times = self.runtime.block_on(together(at_once, visits))?;
        let level = self.shared.level(at_once, begun.elapsed(), &times);
        ensure!(level.visits > 0, "no visit of {at_once} at once came to its end");
        Ok(level)
    }
}

/// Runs as many tasks, and joins what they give.
async fn together<F, T>(tasks: u32, task: impl Fn() -> F) -> Result<Vec<T>>
where
    F: Future<Output = Result<Vec<T>>> + Send + 'static,
    T: Send + 'static,
{
    let mut set = JoinSet::new();
    for _ in 0..tasks {
        set.spawn(task());
    }
    let mut all = Vec::new();
    while let Some(done) = set.join_next().await {
        all.extend(done.context("a device ended with a panic")??);
    }
    Ok(all)
}

async fn enroll(invitation: &Invitation) -> Result<Credentials> {
    let mut tries = 0;
    loop {
        match visitor::enroll(invitation, &limits()).await {
            Ok(credentials) => return Ok(credentials),
            Err(error) if tries < TRIES_MAX => {
                tries += 1;
                tracing::warn!("an enrolment is tried again: {error}");
            }
            Err(error) => bail!(error),
        }
    }
}

/// No retries: what is refused is counted.
fn limits() -> LinkLimits {
    LinkLimits { retries_max: 0, ..LinkLimits::default() }
}

impl Shared {
    fn next(&self) -> Option<Device> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Whose turn it is of those that answer.
    fn port(&self) -> Result<u16> {
        let visit = self.visits.fetch_add(1, Ordering::Relaxed);
        self.ports.get(visit % self.ports.len().max(1)).copied().context("nobody answers devices")
    }

    fn put_back(&self, device: Device) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(device);
    }

    /// Gives up the connections that have no room beside so many visits at once.
    fn make_room(&self, at_once: u32) {
        if self.reuse {
            self.room.resize(self.ports.len(), at_once);
        }
        for device in self.waiting.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            if !self.room.is_over() {
                break;
            }
            device.kept = None;
        }
    }

    async fn visit(&self, device: &mut Device) -> Result<Took, LinkError> {
        let begun = Instant::now();
        let key = *device.credentials.signing_key();
        // Of a visit that fails it is given up.
        let kept = device.kept.take().filter(Kept::is_fresh);
        let (link, place) = if let Some(Kept { link, place, .. }) = kept {
            (link, Some(place))
        } else {
            let (port, credentials) = (self.port().unwrap_or_default(), device.credentials.clone());
            (QuicLink::new(&self.host, port, credentials, limits(), Clock::system())?, None)
        };
        let reply = link
            .poll(Poll { base: BASE, installed: device.installed, key: KeyNumber(0), trouble: None })
            .await?;
        let poll = begun.elapsed();
        if let Some(signed) = reply.release.filter(|it| Some(it.release.version) != device.installed) {
            let (digest, length) = (signed.release.digest, signed.release.length);
            link.fetch(Content { digest, length }, &mut Vec::new()).await?;
            device.installed = Some(signed.release.version);
            self.counts.fetched.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(task) = reply.task.filter(|task| device.delivered != Some(task.round)) {
            self.deliver(&link, &key, task.round).await?;
            device.delivered = Some(task.round);
        }
        let reused = place.is_some();
        device.kept = place.or_else(|| self.room.take()).map(|place| Kept::new(link, place));
        Ok(Took { poll, visit: begun.elapsed(), reused })
    }

    async fn deliver(&self, link: &QuicLink, key: &AggregatorKey, round: RoundId) -> Result<(), LinkError> {
        let open = upload::announce(round, BASE, &self.update, DeviceReport::default(), 1);
        let uploaded = link.upload(&open, self.update.bytes()).await?;
        let counts = &self.counts;
        let counter = if uploaded.receipt.verify(key).is_ok() { &counts.updates } else { &counts.failed };
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The counts since the last call, with the times.
    fn level(&self, at_once: u32, passed: Duration, times: &[Took]) -> Level {
        let counts = &self.counts;
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        Level {
            at_once,
            seconds: passed.as_secs_f64(),
            visits: times.len() as u64,
            reused: times.iter().filter(|took| took.reused).count() as u64,
            connected: self.room.held(),
            poll: quantiles(times.iter().map(|took| took.poll)),
            visit: quantiles(times.iter().map(|took| took.visit)),
            updates: take(&counts.updates),
            fetched: take(&counts.fetched),
            busy: take(&counts.busy),
            failed: take(&counts.failed),
        }
    }
}

impl Counts {
    fn note(&self, error: &LinkError) {
        match error.refusal() {
            Some(Refusal::Busy) => self.busy.fetch_add(1, Ordering::Relaxed),
            // A round ended between the task and the update.
            Some(Refusal::StaleRound) => 0,
            _ => {
                tracing::warn!("a visit failed: {error:?}");
                self.failed.fetch_add(1, Ordering::Relaxed)
            }
        };
    }
}

/// The nearest ranks.
fn quantiles(times: impl Iterator<Item = Duration>) -> Quantiles {
    let mut sorted: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    };
    Quantiles { p50: at(0.5), p95: at(0.95), p99: at(0.99) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let found = quantiles((1..=100).rev().map(Duration::from_millis));
        for (got, expected) in [(found.p50, 50.0), (found.p95, 95.0), (found.p99, 99.0)] {
            assert!((got - expected).abs() < 1e-9, "expected {expected}, got {got}");
        }
    }
}
