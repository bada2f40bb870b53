//! `status`, `pause`, `resume`: what the device is, has and did, and whether it takes part.

use anyhow::Result;
use commonweal_protocol::Version;
use commonweal_transport::Clock;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use super::{Shared, identity::Identity, member, open};
use crate::{
    budget::{self, BudgetPolicy, Ledger, Used, Wait},
    doing,
    events::{Event, Output},
    kept, personal, sensors,
    serve::Consent,
    spend,
    store::{Store, StoreError},
    trouble,
    units::Bytes,
    upload,
    watch::Heed,
    when::Unknown,
};

pub(super) fn status(shared: &Shared) -> Result<()> {
    let place = open::Place::find(shared)?;
    let store = place.look()?;
    let samples = kept::all(&store)?.len();
    let receipts = upload::delivered(&store)?;
    let installed = store
        .read("installed")?
        .and_then(|bytes| String::from_utf8(bytes).ok()?.split_whitespace().next()?.parse::<u64>().ok());
    let device = Identity::read(&store)?.map(|identity| identity.credentials.device().to_string());
    let paused = store.read(member::PAUSED)?.is_some();
    let in_progress = store.exists("round/task.json");
    let policy = place.policy(shared)?;
    let consent = Consent { policy: policy.serve.keep_chats, all: false };
    let has_personal = personal::exists(&store);
    let now_ms = Clock::system().unix_ms();
    let troubles = trouble::noted(&store)?;
    let trouble = troubles.newest(installed.map(Version)).map(|noted| noted.sentence(now_ms));
    let last_round = receipts.last().map(|delivered| delivered.round.0);
    let output = shared.output();
    let doing = doing::told(&store).filter(|_| device.is_some());
    let doing = if store.is_worked_in()? { doing } else { None };
    let mut heed = Heed { rules: policy.when, sensors: sensors::of_system() };
    let why = heed.why_not(false);
    let readings = heed.readings();
    let is_metered = readings.metered.unwrap_or(policy.when.unknown == Unknown::Wait);
    let costs = Costs::look(&store, policy.budget, is_metered)?;
    if output == Output::Json {
        let line = json!({
            "doing": doing, "may_work": why.is_nothing(), "why_not": why.to_string(), "rules_broken": why,
            "readings": readings,
            "budget": costs.json(),
            "device": device, "enrolled": device.is_some(), "paused": paused, "samples": samples,
            "installed": installed, "not_installed": trouble, "updates_accepted": receipts.len(), "last_round": last_round,
            "round_in_progress": in_progress, "chats": consent.words(), "keep_chats": consent.policy,
            "personal": has_personal,
        });
        output.say(&line);
        return Ok(());
    }
    match device {
        None => output.say("not enrolled: get an invitation from an operator, then `edge-client enroll`"),
        Some(device) if paused => {
            output.say(&format!("device {device}, paused: `edge-client resume` to take part again"));
        }
        Some(device) => match doing {
            Some(doing) => output.say(&format!("device {device}: {}", doing.sentence)),
            None => output.say(&format!("device {device}, takes part when `edge-client run` is running")),
        },
    }
    if why.is_nothing() {
        output.say("the rules of when to work hold");
    } else {
        output.say(&format!("`run` would wait: {why}"));
    }
    costs.lines().iter().for_each(|line| output.say(line));
    output.say(&format!("{samples} samples, {} updates accepted", receipts.len()));
    match installed {
        Some(version) => output.say(&format!("release {version} installed")),
        None => output.say("no release installed yet"),
    }
    if let Some(sentence) = trouble {
        output.say(&sentence);
    }
    if has_personal {
        output.say("a personal adapter, on this device only");
    }
    output.say(&format!("the local endpoint: {}", consent.words()));
    if in_progress {
        output.say("a round is in progress");
    }
    Ok(())
}

/// What the device costs, against what its owner allows.
struct Costs {
    budget: BudgetPolicy,
    network: Used,
    waits: Option<Wait>,
    /// Why the network's account cannot be read.
    damage: Option<String>,
    disk_bytes: u64,
}

impl Costs {
    fn look(store: &Store, budget: BudgetPolicy, is_metered: bool) -> Result<Self> {
        let now = spend::time(&Clock::system(), &TimeZone::system());
        let (ledger, damage) = match spend::read(store) {
            // As the next `run` or `once` will take it.
            Err(error @ StoreError::Damaged { .. }) => {
                (Ledger::unknown(&budget, now.date()), Some(error.to_string()))
            }
            ledger => (ledger?.unwrap_or_default(), None),
        };
        let waits = budget::wait(&budget, &ledger, &now, is_metered);
        let network = Used::of(&ledger, now.date());
        Ok(Self { budget, network, waits, damage, disk_bytes: store.disk_bytes()? })
    }

    fn json(&self) -> Value {
        let Self { budget, network, waits, damage, disk_bytes } = self;
        json!({
            "limits": budget, "network": network, "waits": waits, "damage": damage, "disk_bytes": disk_bytes,
        })
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        lines.extend(self.damage.as_ref().map(|damage| format!("{damage}; today's bytes count as used up")));
        lines.extend(self.waits.as_ref().map(|waits| format!("`run` would wait {waits}")));
        lines.push(format!("network: {}", self.network.sentence(&self.budget)));
        let of = self.budget.disk.0.map_or_else(String::new, |max| format!(" of {max}"));
        lines.push(format!("disk: {}{of}", Bytes::of(self.disk_bytes)));
        lines
    }
}

pub(super) fn pause(shared: &Shared) -> Result<()> {
    let store = open::Place::find(shared)?.look()?;
    store.write(member::PAUSED, b"")?;
    // A visit under way stops where it stands; from here on nothing of the owner's is read or sent.
    drop(store.hold_visit()?);
    shared.output().show(&Event::Paused);
    Ok(())
}

pub(super) fn resume(shared: &Shared) -> Result<()> {
    open::Place::find(shared)?.look()?.remove(member::PAUSED)?;
    shared.output().show(&Event::Resumed);
    Ok(())
}
