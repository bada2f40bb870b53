//! Hostile peers, at the aggregator all the while that `kills.rs` kills it: some dribble and hold what they have
//! (`peers/slow.rs`), one says again what it said before (`peers/replay.rs`), one sends damaged frames and garbage
//! (`peers/corrupt.rs`). They are tasks of this process; what they say is drawn by the seed, when it arrives is not.
//!
//! What became of each try is counted here; a receipt that may not be, a stranger who is let in, a stream that dribbles and is
//! borne, or an aggregator that fails at what was said ends the program.

mod raw;
mod member;
mod slow;
mod replay;
mod corrupt;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use commonweal_protocol::{Digest, Invitation, Refusal};
use commonweal_tests::verdict::{Held, Peer};
use commonweal_transport::{Clock, LinkLimits, QuicWire};
use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tokio::{runtime::Runtime, task::JoinSet};

use crate::fleet::Door;
use member::Member;
use raw::End;

/// Peers that are enrolled: one dribbles, one repeats itself, one sends what is damaged.
pub(super) const ENROLLED: u32 = 3;
/// Strangers that dribble. One address has 8 seats on the enrolment ALPN: one is left for damaged enrolments.
const SLOW_STRANGERS: u64 = 7;
/// Streams that the device which dribbles holds on one connection, and uploads that it holds, each on one of its own.
const SLOW_STREAMS: u64 = 8;
const SLOW_UPLOADS: u64 = 3;
/// Tasks that repeat the frames of one device, beside the one that makes them.
const REPLAYS: u64 = 2;

/// What was tried, and what came of it: each try is a stream, and counted once.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Tally {
    tries: u64,
    /// By reason, as docs/wire.md names them.
    refused: BTreeMap<String, u64>,
    /// Answered with the device's own receipt of the round, the same whenever it is asked for.
    receipts: u64,
    /// Answered in another way: an offset, work, content.
    answered: u64,
    /// Ended by the aggregator without an answer, or not let in.
    dropped: u64,
    /// Ended with the aggregator, which was killed meanwhile or had not started again.
    lost: u64,
}

/// What the peers did.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Report {
    slow_strangers: Tally,
    slow_device: Tally,
    replays: Tally,
    corrupted: Tally,
    /// Updates of theirs that became part of a release: of each round at most one of each device, its own.
    pub(super) merged: u64,
}

/// The peers when they have ended.
pub(super) struct Ended {
    pub(super) report: Report,
    /// What they were promised.
    pub(super) held: Vec<Held>,
    /// What they may have merged.
    pub(super) peers: Vec<Peer>,
}

/// What all peers share.
struct Site {
    host: String,
    ports: Vec<u16>,
    authority: Digest,
    /// How often a process of the aggregator's was killed.
    deaths: Arc<AtomicU64>,
    stop: AtomicBool,
    seed: u64,
    tallies: [Mutex<Tally>; 4],
}

/// Whose tries are counted together.
#[derive(Clone, Copy)]
enum Kind {
    SlowStrangers,
    SlowDevice,
    Replays,
    Corrupted,
}

/// The peers, at work.
pub(super) struct Peers {
    runtime: Runtime,
    site: Arc<Site>,
    members: Vec<Arc<Member>>,
    tasks: JoinSet<Result<()>>,
}

impl Peers {
    /// Enrols those that need it, and lets all begin.
    pub(super) fn start(door: Door, seed: u64) -> Result<Self> {
        let runtime = Runtime::new().context("cannot start")?;
        let invitations: Vec<Invitation> =
            door.invitations.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        let first = invitations.first().context("no invitation for hostile peers")?;
        let site = Arc::new(Site {
            host: first.host.to_string(),
            ports: door.ports,
            authority: first.authority,
            deaths: door.deaths,
            stop: AtomicBool::new(false),
            seed,
            tallies: Default::default(),
        });
        let mut members = Vec::new();
        for (number, invitation) in invitations.iter().enumerate() {
            members.push(Arc::new(runtime.block_on(Member::enroll(&site, invitation, number as u64))?));
        }
        let [slow, repeating, damaging] = members.as_slice() else {
            bail!("expected {ENROLLED} invitations for hostile peers, got {}", members.len());
        };
        let tasks = {
            let _inside = runtime.enter();
            let mut tasks = JoinSet::new();
            for number in 0..SLOW_STRANGERS {
                tasks.spawn(slow::stranger(site.clone(), site.random(number)));
            }
            for number in 0..SLOW_STREAMS {
                tasks.spawn(slow::question(site.clone(), slow.clone(), site.random(100 + number)));
            }
            for number in 0..SLOW_UPLOADS {
                tasks.spawn(slow::upload(site.clone(), slow.clone(), site.random(200 + number)));
            }
            tasks.spawn(replay::deliver(site.clone(), repeating.clone(), site.random(300)));
            for number in 1..=REPLAYS {
                tasks.spawn(replay::repeat(site.clone(), repeating.clone(), site.random(300 + number)));
            }
            tasks.spawn(corrupt::damage(site.clone(), damaging.clone(), site.random(400)));
            tasks
        };
        Ok(Self { runtime, site, members, tasks })
    }

    /// Lets them end, while the aggregator is still there.
    ///
    /// # Errors
    /// One of them was given what it may not have.
    pub(super) fn stop(self) -> Result<Ended> {
        let Self { runtime, site, members, mut tasks } = self;
        site.stop.store(true, Ordering::SeqCst);
        runtime.block_on(async {
            while let Some(ended) = tasks.join_next().await {
                ended.context("a hostile peer ended with a panic")?.context("a hostile peer")?;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        let of = |kind| site.tally(kind, |tally| tally.clone());
        let report = Report {
            slow_strangers: of(Kind::SlowStrangers),
            slow_device: of(Kind::SlowDevice),
            replays: of(Kind::Replays),
            corrupted: of(Kind::Corrupted),
            merged: 0,
        };
        let (held, peers) = members.iter().map(|member| member.account()).unzip();
        Ok(Ended { report, held, peers })
    }
}

impl Site {
    /// What a task draws from.
    fn random(&self, task: u64) -> ChaCha8Rng {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        // The first is that of who is killed.
        random.set_stream(1 + task);
        random
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// How often the aggregator was killed so far.
    fn deaths(&self) -> u64 {
        self.deaths.load(Ordering::SeqCst)
    }

    /// The way in of a stranger, to one of the aggregator's processes.
    fn stranger(&self, random: &mut ChaCha8Rng) -> Result<QuicWire> {
        let port =
            self.ports.get(random.random_range(0..self.ports.len().max(1))).context("nobody answers")?;
        Ok(QuicWire::enrolment(&self.host, *port, self.authority, &Clock::system(), &limits(0))?)
    }

    fn tally<T>(&self, kind: Kind, with: impl FnOnce(&mut Tally) -> T) -> T {
        with(&mut self.tallies[kind as usize].lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts what becomes of a try, and gives it. What the peers themselves cut short, as they end, is not counted.
    async fn count(&self, kind: Kind, attempt: impl Future<Output = Result<End>>) -> Result<End> {
        let deaths = self.deaths();
        let end = attempt.await?;
        // Whatever a peer says is either fine or its own fault.
        ensure!(
            !matches!(end, End::Refused(Refusal::Internal)),
            "what a hostile peer said made the aggregator fail"
        );
        let was_killed = self.deaths() != deaths;
        if !self.is_over() {
            self.tally(kind, |tally| tally.add(&end, was_killed));
        }
        Ok(end)
    }

    async fn pause(&self, random: &mut ChaCha8Rng, ms: std::ops::RangeInclusive<u64>) {
        tokio::time::sleep(Duration::from_millis(random.random_range(ms))).await;
    }
}

/// A peer gives up sooner than a device: it wants to be at it again as soon as the aggregator is.
fn limits(retries_max: u32) -> LinkLimits {
    LinkLimits { stall_ms: 2_000, retry_first_ms: 50, retries_max, ..LinkLimits::default() }
}

impl Tally {
    fn add(&mut self, end: &End, was_killed: bool) {
        self.tries += 1;
        match end {
            End::Refused(reason) => *self.refused.entry(format!("{reason:?}")).or_default() += 1,
            End::Receipt(_) => self.receipts += 1,
            End::Answered => self.answered += 1,
            End::Ended if was_killed => self.lost += 1,
            End::Ended => self.dropped += 1,
            End::Nobody => self.lost += 1,
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reasons: Vec<String> =
            self.refused.iter().map(|(reason, times)| format!("{reason} {times}")).collect();
        let refused = match reasons.as_slice() {
            [] => "refused".to_owned(),
            reasons => format!("refused ({})", reasons.join(", ")),
        };
        let parts = [
            (self.refused.values().sum(), refused.as_str()),
            (self.dropped, "dropped"),
            (self.receipts, "answered with the same receipt"),
            (self.answered, "answered otherwise"),
            (self.lost, "lost with the aggregator"),
        ];
        write!(formatter, "{} tries", self.tries)?;
        let parts = parts.iter().filter(|(times, _)| *times > 0);
        for (index, (times, what)) in parts.enumerate() {
            write!(formatter, "{} {times} {what}", if index == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { slow_strangers, slow_device, replays, corrupted, merged } = self;
        writeln!(formatter, "strangers that dribble, meanwhile: {slow_strangers}")?;
        writeln!(formatter, "a device that dribbles: {slow_device}")?;
        writeln!(formatter, "a device's frames said again: {replays}")?;
        writeln!(formatter, "damaged frames and garbage: {corrupted}")?;
        write!(formatter, "of these peers' own updates {merged} were merged, each once")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_try_is_counted_once_and_told() {
        let mut tally = Tally::default();
        for (end, was_killed) in [
            (End::Refused(Refusal::StaleRound), false),
            (End::Refused(Refusal::StaleRound), true),
            (End::Answered, true),
            (End::Ended, false),
            (End::Ended, true),
            (End::Nobody, false),
        ] {
            tally.add(&end, was_killed);
        }
        assert_eq!(
            tally.to_string(),
            "6 tries: 2 refused (StaleRound 2), 1 dropped, 1 answered otherwise, 2 lost with the aggregator"
        );
        assert_eq!(Tally::default().to_string(), "0 tries");
    }
}
