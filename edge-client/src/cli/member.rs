//! A device that takes part, as `run` and `once` hold it: its identity, its link, its owner's wishes, and a visit at a time.
//!
//! `rounds.rs` asks for turns and says when to come back; `pipeline.rs` is what a visit does. The package is at rest, its
//! files checked and no session open, until a visit has work for it, and again when the device has waited for a while.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use commonweal_protocol::Refusal;
use commonweal_runtime::{Cancel, measure, memory};
use commonweal_safety::Constitution;
use commonweal_transport::{Clock, QuicLink};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Runtime;

use super::{Shared, exit::BadInput, identity::Identity, open, policy_file::PolicyFile};
use crate::{
    doing, forget,
    install::Expected,
    metered::Metered,
    pipeline::{Device, Visit, until_cancelled},
    pipeline_error::PipelineError,
    policy::Policy,
    priority, sensors,
    settings::SettingsFile,
    spend::Spending,
    store::StoreError,
    traces::Tracer,
    trust::Trust,
    watch::{Heed, Watched, watched},
    when::{Unknown, Why},
};

/// Present while the owner wants no rounds.
pub(super) const PAUSED: &str = "paused";
/// Looks for `resume` so often.
const PAUSED_WAIT: Duration = Duration::from_secs(10);
/// Leaves a wish to forget so long to whoever made it, who waits for this process and tells what came of it.
const FORGET_WAIT: Duration = Duration::from_secs(1);
/// Looks for samples that are past their time so often.
const EXPIRE: Duration = Duration::from_secs(24 * 3600);
/// Looks so often whether the owner has changed the policy.
const POLICY_LOOK: Duration = Duration::from_secs(1);
/// Looks so often whether the owner's rules hold.
const RULES_WAIT: Duration = Duration::from_secs(10);
/// After this process held more memory than its budget.
const MEMORY_WAIT: Duration = Duration::from_secs(60);
/// What a visit opened is kept for so long while the device waits. A wish, heat or a network that ended the visit are often
/// over by then, and so is the wait for a busy federation's next round; to open all again takes up to some seconds, with
/// the guard's policy and the gradients. A person's return is followed by a longer wait (`idle`, five minutes by default):
/// the memory is theirs after the first of these, and opening again costs little beside them.
const KEPT: Duration = Duration::from_secs(60);

/// What a turn of `run` came to.
pub(super) enum Turn {
    /// A visit.
    Visited(Result<Visit, PipelineError>),
    /// None, or one that was broken off, for now.
    PutOff { why: String, wait: Duration },
}

impl Turn {
    fn by_rules(why: &Why) -> Self {
        let wait = if why.is_of_memory() { MEMORY_WAIT } else { RULES_WAIT };
        Self::PutOff { why: why.to_string(), wait }
    }
}

/// A device, its settings and the identity that it shows.
pub(super) struct Member {
    pub(super) settings: SettingsFile,
    identity: Identity,
    pub(super) device: Device<QuicLink>,
    runtime: Runtime,
    /// Of the process; the device's own handle is a visit's.
    pub(super) stop: Cancel,
    /// When it was last looked for samples that are older than the owner keeps them.
    expired_ms: u64,
    /// What the network costs.
    meter: Arc<Metered>,
    /// The owner's rules of when to work; none if this process is asked to work at any time.
    heed: Option<Heed>,
    /// What the package is opened with.
    opener: open::Opener,
    /// The device for it has not been chosen.
    is_untried: bool,
    policy_file: PolicyFile,
    policy_looked: Instant,
    constitution: Option<Constitution>,
    /// When the last visit that used the network ended, until what it opened was given back.
    rested: Option<Instant>,
}

impl Member {
    pub(super) fn open(shared: &Shared, heeds: bool) -> Result<Self> {
        let place = open::Place::find(shared)?;
        let mut policy_file = place.policy_file(shared);
        let policy = policy_file.read()?;
        if heeds && let Err(error) = priority::lower(policy.when.nice) {
            tracing::warn!("this process cannot ask for less than others: {error}");
        }
        let store = place.store()?.within(policy.budget.disk);
        let Some(identity) = Identity::read(&store)? else {
            let directory = place.directory.display();
            return Err(
                BadInput(format!("{directory} is not enrolled: edge-client enroll INVITATION")).into()
            );
        };
        let heed = heeds.then(|| Heed { rules: policy.when, sensors: sensors::of_watcher() });
        let runtime = Runtime::new().context("cannot start")?;
        let cancel = open::stop_on_signal(runtime.handle());
        let zone = jiff::tz::TimeZone::system();
        let spending = Arc::new(Spending::open(&store, policy.budget, Clock::system(), zone)?);
        let meter = Metered::new(spending, sensors::of_system(), policy.when.unknown == Unknown::Wait);
        let meter = Arc::new(meter);
        let link = connect(&runtime, &identity, &place.settings, &meter)?;
        let mut opener = open::Opener::find(shared, &place)?;
        // Trying a device opens the package, for which it may be too early. Until then the processor stands for it.
        let is_untried = heeds && opener.would_try()?;
        if !is_untried {
            opener.choose(&cancel)?;
        }
        let constitution = open::constitution(shared)?;
        let open::Stages { model, guard, reviser } = opener.at_rest(&policy, constitution.clone())?;
        let endpoint = place.settings.collector(shared.traces.as_deref())?;
        let trace = |endpoint: &_| {
            Tracer::start(endpoint, *identity.credentials.signing_key(), identity.credentials.device())
        };
        let tracer = endpoint.as_ref().map(trace).transpose()?;
        let (trust, base) = (Trust::open(&store, &identity.credentials)?, crate::pipeline::base_of(&model));
        let device = Device {
            id: identity.credentials.device(),
            store,
            policy,
            expected: Expected { trust, base, layout: model.layout().clone() },
            model,
            guard,
            reviser,
            link,
            output: shared.output(),
            runtime: runtime.handle().clone(),
            cancel: cancel.clone(),
            tracer,
        };
        let mut member = Self {
            settings: place.settings,
            identity,
            device,
            runtime,
            stop: cancel,
            expired_ms: 0,
            meter,
            heed,
            opener,
            is_untried,
            policy_file,
            policy_looked: Instant::now(),
            constitution,
            rested: None,
        };
        let visiting = member.device.store.hold_visit()?;
        member.forget()?;
        drop(visiting);
        Ok(member)
    }

    /// While no visit is under way: carries out what the owner wants forgotten, and once a day what is past its time.
    fn forget(&mut self) -> Result<(), StoreError> {
        let store = &self.device.store;
        forget::carry_out(store)?;
        let now_ms = Clock::system().unix_ms();
        if now_ms.abs_diff(self.expired_ms) >= EXPIRE.as_millis() as u64 {
            forget::expire(store, self.device.policy.store.keep, now_ms)?;
            self.expired_ms = now_ms;
        }
        Ok(())
    }

    /// A visit that a pause, a wish to forget, a broken rule or a signal ends where it stands; none while there is one of
    /// them. `edge-client pause` and `forget` wait for its end.
    pub(super) fn turn(&mut self) -> Result<Turn> {
        self.renew_policy();
        let _visiting = self.device.store.hold_visit()?;
        self.forget()?;
        self.device.cancel = Cancel::new();
        let why = self.heed.as_mut().map(|heed| heed.why_not(false)).filter(|why| !why.is_nothing());
        if let Some(put_off) = self.wished().or(why.as_ref().map(Turn::by_rules)) {
            return Ok(put_off);
        }
        self.tell("asks the aggregator for work".to_owned());
        self.meter.look();
        let mut heed = self.heed.take();
        let watch = Watched {
            visit: self.device.cancel.clone(),
            stop: self.stop.clone(),
            wishes: [PAUSED, forget::WISH, forget::WISH_ALL].map(|name| self.device.store.path(name)).into(),
            heed: heed.as_mut(),
            memory_max: self.device.policy.budget.memory,
        };
        let calls = measure::calls();
        let (visited, broken) = watched(watch, || self.try_devices_and_visit());
        self.heed = heed;
        self.meter.spending.rest();
        // A visit that found nothing to do, or nobody to ask, used nothing: the wait goes on that began with the last work.
        if measure::calls() != calls {
            self.rested = Some(Instant::now());
        }
        if broken.as_ref().is_some_and(Why::is_of_memory) {
            self.give_memory_back();
        }
        match visited? {
            Ok(visit) => Ok(Turn::Visited(Ok(visit))),
            Err(error) => {
                let put_off = self.wished().or(broken.as_ref().map(Turn::by_rules));
                Ok(put_off.unwrap_or(Turn::Visited(Err(error))))
            }
        }
    }

    /// To be called now and then while the device waits. Says whether its owner has changed the policy meanwhile.
    pub(super) fn waits(&mut self, now: Instant) -> bool {
        if self.rested.is_some_and(|rested| now.duration_since(rested) >= KEPT) {
            self.give_memory_back();
        }
        self.renew_policy()
    }

    fn renew_policy(&mut self) -> bool {
        self.policy_looked.elapsed() >= POLICY_LOOK && self.look_at_policy()
    }

    /// Whether another policy is in force now. One that cannot be used changes nothing: to end would be no better, and to
    /// fall back to the defaults could allow what the owner forbids.
    fn look_at_policy(&mut self) -> bool {
        self.policy_looked = Instant::now();
        let Some(read) = self.policy_file.changed() else { return false };
        let taken = read.and_then(|policy| self.take_up(policy));
        let path = self.policy_file.path().display();
        match &taken {
            Ok(true) => tracing::info!("{path} has changed, and is in force"),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!("{path} has changed, but the policy of before stays in force: {error:#}");
            }
        }
        taken.unwrap_or(false)
    }

    /// Whether it is another one.
    fn take_up(&mut self, policy: Policy) -> Result<bool> {
        let before = &self.device.policy;
        if *before == policy {
            return Ok(false);
        }
        if before.filter != policy.filter {
            // The guard's thresholds are the owner's; the guard that was is of the policy of before.
            self.open_stages(&policy)?;
        }
        let before = std::mem::replace(&mut self.device.policy, policy);
        let Policy { when, budget, store, .. } = &self.device.policy;
        if let Some(heed) = &mut self.heed {
            heed.rules = *when;
            if before.when.nice != when.nice {
                tracing::info!("nice is {} from the next start on: it is the threads' own", when.nice);
            }
        }
        self.meter.set(*budget, when.unknown == Unknown::Wait);
        memory::set_budget(budget.memory.count());
        if before.store != *store {
            self.expired_ms = 0;
        }
        self.device.store.set_disk_max(budget.disk);
        Ok(true)
    }

    fn open_stages(&mut self, policy: &Policy) -> Result<()> {
        let open::Stages { model, guard, reviser } =
            self.opener.at_rest(policy, self.constitution.clone())?;
        self.device.model = model;
        self.device.guard = guard;
        self.device.reviser = reviser;
        self.rested = None;
        Ok(())
    }

    fn give_memory_back(&mut self) {
        let Device { model, guard, .. } = &self.device;
        model.close();
        guard.close();
        self.rested = None;
    }

    /// The first visit that the rules allow begins with choosing what the network runs on.
    fn try_devices_and_visit(&mut self) -> Result<Result<Visit, PipelineError>> {
        if self.is_untried
            && let Err(error) = self.opener.ask_for_memory()
        {
            return Ok(Err(error.into()));
        }
        match self.try_devices() {
            Err(_) if self.device.cancel.is_cancelled() => Ok(Err(PipelineError::Cancelled)),
            tried => tried.map(|()| self.visit()),
        }
    }

    fn try_devices(&mut self) -> Result<()> {
        if self.is_untried {
            self.opener.choose(&self.device.cancel)?;
            self.open_stages(&self.device.policy.clone())?;
            self.is_untried = false;
        }
        Ok(())
    }

    /// What the owner wants first.
    fn wished(&self) -> Option<Turn> {
        let store = &self.device.store;
        let (why, wait) = if store.exists(PAUSED) {
            ("paused", PAUSED_WAIT)
        } else if forget::is_wished(store) {
            ("something is to be forgotten first", FORGET_WAIT)
        } else {
            return None;
        };
        Some(Turn::PutOff { why: why.to_owned(), wait })
    }

    pub(super) fn tell(&self, sentence: String) {
        doing::tell(&self.device.store, sentence, Clock::system().unix_ms());
    }

    /// One visit, with a certificate that is renewed in time. If it ended all the same, the update is still on disk: it
    /// is offered again if there is a fresh one.
    fn visit(&mut self) -> Result<Visit, PipelineError> {
        if self.identity.credentials.should_renew(Clock::system().unix_ms()) {
            self.renew();
        }
        match self.device.visit() {
            Err(error) if error.refusal() == Some(Refusal::Expired) && self.renew() => self.device.visit(),
            visited => visited,
        }
    }

    /// Whether a fresh certificate came. If none did, that is not the end: the old one holds until its own.
    fn renew(&mut self) -> bool {
        let Device { store, link, .. } = &self.device;
        let cancel = self.device.cancel.clone();
        let renewed = self.runtime.block_on(async {
            tokio::select! {
                renewed = self.identity.renew(store, link) => renewed,
                () = until_cancelled(&cancel) => Err(PipelineError::Cancelled.into()),
            }
        });
        renewed.inspect_err(|error| tracing::warn!("certificate not renewed: {error:#}")).is_ok()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // While the directory is held.
        self.meter.spending.end();
    }
}

fn connect(
    runtime: &Runtime,
    identity: &Identity,
    settings: &SettingsFile,
    meter: &Arc<Metered>,
) -> Result<QuicLink> {
    let limits = settings.link(ChaCha8Rng::from_os_rng().next_u64());
    let Identity { credentials, address } = identity;
    let _inside = runtime.enter();
    let (host, credentials, meter) = (address.host.as_str(), credentials.clone(), Arc::clone(meter));
    Ok(QuicLink::metered(host, address.port, credentials, limits, Clock::system(), meter)?)
}

#[cfg(test)]
mod tests;
