//! What a device asks, answered: work and news, resumable uploads, published content.
//!
//! First of the stages; `commonweal-transport` calls it through [`serve`](self::handler) with checked
//! messages, `desk` decides what belongs to the round. A receipt is signed only for bytes that are on disk,
//! decode, fit the base and are finite and not too long. A peer is told a coarse reason, the operator's
//! event has the rest.

mod pace;
mod words;
mod upload;
pub mod partial;
pub mod enroll;
pub mod handler;
mod limit;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use commonweal_adapter::{AdapterLayout, Trainable, pair};
use commonweal_protocol::{
    BaseHash, DeviceId, Digest, Fetch, KeyNumber, Open, Poll, PollReply, ReconnectWindow, Refusal, Refused,
    RoundId, RoundTask, Scaffold, Version,
};
use commonweal_transport::{Clock, ContentPart};

use crate::canary;
use crate::config::Config;
use crate::desk::{Desk, DeskError, start_of};
use crate::events::{Event, Events};
use crate::pause::PausePoint;
use crate::publish::Publisher;
use crate::round::{NotAdmitted, ROUNDS_BACK_MAX};
use crate::signer::Signer;
use crate::store::Storage;
use limit::Limits;
use pace::Crowd;
use partial::Partials;
use words::Heard;

/// What an aggregator needs to answer devices.
#[derive(Clone)]
pub struct Parts {
    /// The settings.
    pub config: Arc<Config>,
    /// The stores.
    pub storage: Storage,
    /// Unfinished uploads.
    pub partials: Arc<dyn Partials>,
    /// The releases.
    pub publisher: Publisher,
    /// The round.
    pub desk: Arc<Desk>,
    /// The frozen base of this federation.
    pub base: BaseHash,
    /// The adapter's shape.
    pub layout: Arc<AdapterLayout>,
    /// Signs receipts.
    pub signer: Signer,
    /// The time.
    pub clock: Clock,
    /// Where events go.
    pub events: Events,
    /// Where a test halts the process.
    pub pause: PausePoint,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Parts").field("base", &self.base).finish_non_exhaustive()
    }
}

/// Devices are spread over so many locks: two of them seldom share one, and no list of devices grows.
const LANES: usize = 64;

/// See the module. All calls block on the disk.
pub struct Receiver {
    parts: Parts,
    live: Mutex<Live>,
    /// Who comes, for when to come back.
    crowd: Mutex<Crowd>,
    /// Held by each step of an upload: a stream that a cut left behind may still be in the midst of the same one.
    lanes: [Mutex<()>; LANES],
    /// Held while an update is in memory whole, so that memory is bounded by one update and not by devices.
    whole: Mutex<()>,
}

/// What is forgotten with the process; bounded by the enrolled devices.
struct Live {
    /// The upload that each device opened last, of the current round only.
    opens: BTreeMap<DeviceId, Opening>,
    rates: Limits,
    published: Published,
    installed: BTreeMap<DeviceId, Version>,
    keys: BTreeMap<DeviceId, KeyNumber>,
    /// What each device said last of a release.
    heard: BTreeMap<DeviceId, Heard>,
    /// The round that was current when other processes' doings were last looked at.
    followed: RoundId,
}

/// An update that a device began to bring.
#[derive(Clone, Copy)]
struct Opening {
    open: Open,
    since_ms: u64,
}

/// What can be fetched, as of this head.
#[derive(Default)]
struct Published {
    head: Option<Version>,
    digests: BTreeSet<Digest>,
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Receiver").field("base", &self.parts.base).finish_non_exhaustive()
    }
}

impl Receiver {
    /// Ready to answer.
    pub fn new(parts: Parts) -> Self {
        let bytes_max = pair::bytes_max(&parts.layout, Trainable::Both, parts.config.train.scaffold);
        let rates = Limits::new(&parts.config.receive, bytes_max as u64);
        let (opens, installed, keys) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (published, heard, followed) = (Published::default(), BTreeMap::new(), RoundId(0));
        let live = Live { opens, rates, published, installed, keys, heard, followed };
        let lanes = std::array::from_fn(|_| Mutex::default());
        let crowd = Mutex::new(Crowd::default());
        Self { parts, live: Mutex::new(live), crowd, lanes, whole: Mutex::default() }
    }

    /// Most bytes of an update of a round.
    fn bytes_max(&self, round: RoundId) -> usize {
        let train = &self.parts.config.train;
        pair::bytes_max(&self.parts.layout, train.trainable(round), train.scaffold)
    }

    /// The earliest round whose updates are still taken when this one's are.
    fn oldest_round(&self, round: RoundId) -> RoundId {
        let back = if self.parts.config.round.is_buffered() { ROUNDS_BACK_MAX } else { 0 };
        RoundId(round.0.saturating_sub(back))
    }

    /// One step of a device's upload at a time.
    fn lane(&self, device: DeviceId) -> MutexGuard<'_, ()> {
        let lane = usize::from(device.0[0]) % LANES;
        self.lanes[lane].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        self.parts.clock.unix_ms()
    }

    /// The release that each device said to have installed.
    pub fn installed(&self) -> BTreeMap<DeviceId, Version> {
        self.live().installed.clone()
    }

    /// The newest signing key that each device said to know.
    pub fn keys_known(&self) -> BTreeMap<DeviceId, KeyNumber> {
        self.live().keys.clone()
    }

    /// When each device asked last, of those that did since this start.
    pub fn seen(&self) -> BTreeMap<DeviceId, u64> {
        self.live().rates.seen()
    }

    /// Requests refused because they came too fast.
    pub fn throttled(&self) -> u64 {
        self.live().rates.throttled()
    }

    /// Takes up what other processes did; after a round, forgets its unfinished uploads.
    pub fn follow(&self) -> Result<(), DeskError> {
        self.parts.desk.look()?;
        let round = self.parts.desk.round();
        let is_news = std::mem::replace(&mut self.live().followed, round) != round;
        if is_news && let Err(error) = self.parts.partials.discard_before(self.oldest_round(round).0) {
            tracing::warn!(%round, %error, "unfinished uploads are left over");
        }
        Ok(())
    }

    fn reconnect(&self) -> ReconnectWindow {
        let receive = &self.parts.config.receive;
        let least =
            ReconnectWindow { after_ms: receive.reconnect_after_ms, spread_ms: receive.reconnect_spread_ms };
        let devices = self.crowd.lock().unwrap_or_else(PoisonError::into_inner).devices();
        pace::window(devices, receive.visits_per_second, least)
    }

    /// Tells the operator why, the peer only what to do. Of strangers, who have no budget of requests, not every one.
    fn refuse(
        &self,
        device: Option<DeviceId>,
        request: &'static str,
        reason: Refusal,
        detail: impl std::fmt::Display,
    ) -> Refused {
        self.refuse_update(device, request, None, reason, detail)
    }

    /// The same, of a request that is about an update.
    fn refuse_update(
        &self,
        device: Option<DeviceId>,
        request: &'static str,
        update: Option<Digest>,
        reason: Refusal,
        detail: impl std::fmt::Display,
    ) -> Refused {
        let untold = if device.is_some() { Some(0) } else { self.live().rates.tell_stranger(self.now_ms()) };
        let Some(untold) = untold else { return Refused { reason, reconnect: self.reconnect() } };
        let told = match untold {
            0 => format!("{reason}: {detail}"),
            _ => format!("{reason}: {detail}; {untold} refusals before it were not told"),
        };
        self.parts.events.tell(&Event::Refused {
            device,
            request,
            round: self.parts.desk.round(),
            update,
            refusal: reason,
            reason: told,
            untold,
        });
        Refused { reason, reconnect: self.reconnect() }
    }

    fn failed(&self, device: DeviceId, request: &'static str, error: &dyn std::error::Error) -> Refused {
        self.refuse(Some(device), request, Refusal::Internal, chain(error))
    }

    fn not_admitted(
        &self,
        device: DeviceId,
        request: &'static str,
        update: Digest,
        error: NotAdmitted,
    ) -> Refused {
        let reason = match error {
            NotAdmitted::StaleRound { .. } | NotAdmitted::TooStale { .. } => Refusal::StaleRound,
            NotAdmitted::NotSelected => Refusal::NotInRound,
            NotAdmitted::Merging { .. } => {
                // Ordinary, and as often as devices look again: nothing to tell an operator.
                tracing::debug!(%device, request, %error, "to come back");
                return Refused { reason: Refusal::Busy, reconnect: self.reconnect() };
            }
        };
        self.refuse_update(Some(device), request, Some(update), reason, error)
    }

    /// Answers with work and news.
    pub fn poll(&self, device: DeviceId, poll: Poll) -> Result<PollReply, Refused> {
        const REQUEST: &str = "poll";
        if poll.base != self.parts.base {
            let detail = format!("expected base {}, got {}", self.parts.base, poll.base);
            return Err(self.refuse(Some(device), REQUEST, Refusal::WrongBase, detail));
        }
        let head =
            self.parts.publisher.head().map_err(|error| self.failed(device, REQUEST, &error))?.ok_or_else(
                || self.refuse(Some(device), REQUEST, Refusal::Internal, "there is no release"),
            )?;
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner).see(&device, self.now_ms());
        {
            let mut live = self.live();
            live.keys.insert(device, poll.key);
            if let Some(installed) = poll.installed {
                live.installed.insert(device, installed);
            }
        }
        let canary = match self.canary(&head) {
            // Who drives tells of it. Nobody is shown another release until it is known who may see which.
            Err(DeskError::Damaged { .. }) => None,
            canary => Some(canary.map_err(|error| self.failed(device, REQUEST, &error))?),
        };
        self.hear(device, &poll, head.release.version, canary.as_ref().and_then(Option::as_ref))
            .map_err(|error| self.failed(device, REQUEST, &error))?;
        let start = start_of(&head.release);
        let assigned = self
            .parts
            .desk
            .poll(self.now_ms(), device, start)
            .map_err(|error| self.failed(device, REQUEST, &error))?;
        // Whatever key signed it then, what this reply says is the word of one key, to which its steps lead.
        let keys = self.parts.signer.keys();
        let unsigned = |error| self.failed(device, REQUEST, &error);
        let config = &self.parts.config;
        let control = self.parts.desk.control().filter(|_| config.train.scaffold);
        let control = control.map(|control| keys.again(control)).transpose().map_err(unsigned)?;
        let task = assigned.map(|(round, start, deadline_ms)| RoundTask {
            round,
            base: self.parts.base,
            start,
            mode: config.train.mode,
            train: config.train.settings(),
            scaffold: match (config.train.scaffold, control) {
                (false, _) => Scaffold::Off,
                (true, None) => Scaffold::Zero,
                (true, Some(control)) => Scaffold::Control(control),
            },
            compress: config.compress.settings(),
            seed: round_seed(self.parts.base, round.0),
            deadline_ms,
        });
        let release = match canary {
            Some(canary) => self
                .news(device, poll.installed, head, canary.as_ref())
                .map_err(|error| self.failed(device, REQUEST, &error))?,
            None => None,
        };
        let release = release.map(|release| keys.again(release)).transpose().map_err(unsigned)?;
        let successions = keys.lineage().after(poll.key).to_vec();
        if poll.key > keys.lineage().number() {
            tracing::debug!(%device, key = poll.key.0, "knows a later signing key than there is here");
        }
        Ok(PollReply { task, release, successions, reconnect: self.reconnect() })
    }

    /// Reads published content; nothing else that is stored can be named.
    pub fn read(&self, device: DeviceId, fetch: Fetch, length_max: usize) -> Result<ContentPart, Refused> {
        const REQUEST: &str = "fetch";
        let unknown = |detail: String| self.refuse(Some(device), REQUEST, Refusal::ContentUnknown, detail);
        if !self.is_published(&fetch.digest).map_err(|error| self.failed(device, REQUEST, &error))? {
            return Err(unknown(format!("{} is not published", fetch.digest)));
        }
        let blob = &self.parts.storage.blob;
        let length = blob
            .length(&fetch.digest)
            .map_err(|error| self.failed(device, REQUEST, &error))?
            .ok_or_else(|| unknown(format!("{} is no longer kept", fetch.digest)))?;
        if fetch.offset > length {
            return Err(unknown(format!("expected an offset of at most {length}, got {}", fetch.offset)));
        }
        let bytes = blob
            .read_range(&fetch.digest, fetch.offset, length_max)
            .map_err(|error| self.failed(device, REQUEST, &error))?;
        Ok(ContentPart { length, bytes })
    }

    fn is_published(&self, digest: &Digest) -> Result<bool, DeskError> {
        let control = self.parts.desk.control().map(|signed| signed.control.digest);
        if control == Some(*digest) || self.live().published.digests.contains(digest) {
            return Ok(true);
        }
        // What nobody published costs a look at the head, however often it is asked for.
        let head = self.parts.publisher.head()?.map(|signed| signed.release.version);
        {
            // Another request may have looked meanwhile: what it found is asked again, or this one would miss it.
            let live = self.live();
            let published = &live.published;
            if published.head == head {
                return Ok(published.digests.contains(digest));
            }
        }
        let mut digests = self.parts.publisher.kept(self.parts.config.receive.releases_kept)?;
        // However long the trial, whoever is not in its share may fetch what all have.
        match canary::read(self.parts.storage.coord.as_ref()) {
            Ok(Some((canary, _))) => {
                digests.insert(self.parts.publisher.release(canary.stable)?.release.digest);
            }
            Ok(None) | Err(DeskError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
        let is_published = digests.contains(digest);
        self.live().published = Published { head, digests };
        Ok(is_published)
    }
}

/// The seed of whatever must be the same on every device of a round.
fn round_seed(base: BaseHash, round: u64) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("commonweal round seed v1");
    hasher.update(&base.0).update(&round.to_le_bytes());
    let mut seed = [0; 8];
    hasher.finalize_xof().fill(&mut seed);
    u64::from_le_bytes(seed)
}

/// An error with all its causes, for the operator.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
