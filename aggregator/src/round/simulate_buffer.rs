//! Random histories of buffered rounds against what they must keep, and the ordinary cases one by one.

use std::collections::{BTreeMap, BTreeSet};

use commonweal_protocol::Version;
use proptest::prelude::*;

use super::*;

fn device(number: u8) -> DeviceId {
    DeviceId([number; 16])
}

fn start(version: u64) -> Start {
    Start { version: Version(version), digest: Digest([version as u8; 32]), length: 1 }
}

fn policy() -> Policy {
    Policy {
        mode: RoundMode::Buffered,
        goal: 3,
        quorum: 2,
        over_selection: 2.0,
        deadline_ms: 60_000,
        staleness_max: 2,
        ..Policy::default()
    }
}

/// As `desk`, `receive` and `drive` are together: the head, an inbox, a saved state, and devices that keep their task.
struct Shell {
    policy: Policy,
    rounds: Rounds,
    saved: Rounds,
    head: u64,
    now_ms: u64,
    /// By the round that took it: device, round of its task, release that it was trained from.
    inbox: BTreeMap<u64, BTreeMap<DeviceId, (RoundId, u64)>>,
    /// What each device is at work on.
    at_work: BTreeMap<DeviceId, (RoundId, u64)>,
    records: Vec<Summary>,
    work: Option<Action>,
}

impl Shell {
    fn new(policy: Policy) -> Self {
        let (rounds, saved) = (Rounds::default(), Rounds::default());
        let (inbox, at_work) = (BTreeMap::new(), BTreeMap::new());
        Self { policy, rounds, saved, head: 0, now_ms: 0, inbox, at_work, records: Vec::new(), work: None }
    }

    fn tick(&mut self, event: Event) -> Vec<Action> {
        let had = match &event {
            Event::Polled(device, _) => self.rounds.given(device),
            _ => None,
        };
        let actions = self.rounds.tick(&self.policy.clone(), self.now_ms, event);
        for action in &actions {
            match action {
                Action::Save => self.saved = self.rounds.clone(),
                Action::Assign(device) => {
                    let (round, start, left_ms) = self.rounds.task(device, self.now_ms).unwrap();
                    assert!(left_ms >= 1);
                    assert_eq!(self.saved.given(device), Some(round), "assigned before saved");
                    if let Some((before, from)) = self.at_work.insert(*device, (round, start.version.0)) {
                        // One that lost its place and has one again begins anew.
                        let is_repeated = before == round && had == Some(round);
                        assert!(!is_repeated || from == start.version.0, "a task is repeated word for word");
                    }
                }
                Action::Finish(summary) => self.records.push(summary.clone()),
                work @ (Action::Merge | Action::Align(_) | Action::Evaluate(_) | Action::Publish(..)) => {
                    assert_eq!(self.saved, self.rounds, "work before the state is durable");
                    self.work = Some(work.clone());
                }
                Action::Opened | Action::Closed | Action::WakeAt(_) | Action::Stop => {}
            }
        }
        actions
    }

    fn poll(&mut self, number: u8) {
        self.tick(Event::Polled(device(number), start(self.head)));
    }

    /// A device delivers; the aggregator may be killed between the inbox and the state.
    fn deliver(&mut self, number: u8, killed: bool) -> Result<bool, NotAdmitted> {
        let Some((round, from)) = self.at_work.get(&device(number)).copied() else { return Ok(true) };
        let admitted = self.rounds.admits(&self.policy, round, &device(number));
        if admitted == Ok(false) {
            let behind = self.rounds.start.unwrap().version.0.saturating_sub(from);
            assert_eq!(u64::from(self.rounds.staleness(Version(from))), behind);
            assert!(behind <= u64::from(self.policy.staleness_max), "{behind} releases behind");
            assert_eq!(self.rounds.trained_from(&device(number)), Some(Version(from)));
            let buffer = self.inbox.entry(self.rounds.round.0).or_default();
            assert_eq!(buffer.insert(device(number), (round, from)), None, "twice in one buffer");
            self.at_work.remove(&device(number));
            if killed {
                self.crash();
            } else {
                self.tick(Event::Received(device(number)));
            }
        }
        admitted
    }

    fn work(&mut self, succeeds: bool) {
        let Some(work) = self.work.take() else { return };
        let candidate = Digest([1; 32]);
        let event = match work {
            _ if !succeeds => Event::Refused("a gate".to_owned()),
            Action::Merge => {
                let members = self.inbox.get(&self.rounds.round.0).map_or(0, BTreeMap::len);
                assert!(members >= self.policy.quorum as usize, "merged below the quorum");
                Event::Merged(candidate)
            }
            Action::Align(_) => Event::Aligned(candidate),
            Action::Evaluate(_) => Event::Accepted(Box::default()),
            _ => {
                self.head += 1;
                Event::Published(Version(self.head))
            }
        };
        self.tick(event);
    }

    fn crash(&mut self) {
        self.rounds = self.saved.clone();
        self.work = None;
        self.tick(Event::Resumed);
        let buffer = self.inbox.get(&self.rounds.round.0).cloned().unwrap_or_default();
        for device in buffer.into_keys() {
            self.tick(Event::Received(device));
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Poll(u8),
    Deliver(u8, bool),
    Vanish(u8),
    Wait(u32),
    Open,
    Work(bool),
    RollBack,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..12_u8).prop_map(Step::Poll),
        6 => (0..12_u8, prop::bool::weighted(0.1)).prop_map(|(number, killed)| Step::Deliver(number, killed)),
        1 => (0..12_u8).prop_map(Step::Vanish),
        2 => (0..40_000_u32).prop_map(Step::Wait),
        2 => Just(Step::Open),
        8 => prop::bool::weighted(0.9).prop_map(Step::Work),
        1 => Just(Step::RollBack),
        1 => Just(Step::Crash),
    ];
    proptest::collection::vec(step, 1..500)
}

fn policies() -> impl Strategy<Value = Policy> {
    (1..6_u32, 1.0..4.0_f64, 1_000..60_000_u64, 1..6_u32).prop_flat_map(
        |(goal, over, deadline, staleness)| {
            (1..=goal).prop_map(move |quorum| Policy {
                mode: RoundMode::Buffered,
                goal,
                over_selection: over,
                quorum,
                deadline_ms: deadline,
                staleness_max: staleness,
                ..Policy::default()
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_history_of_buffers_keeps_the_invariants(policy in policies(), steps in steps()) {
        prop_assume!(policy.problems().is_empty());
        let mut shell = Shell::new(policy);
        for step in steps {
            match step {
                Step::Poll(number) => shell.poll(number),
                Step::Deliver(number, killed) => {
                    if let Err(NotAdmitted::TooStale { .. } | NotAdmitted::StaleRound { .. }) = shell.deliver(number, killed) {
                        // The device gives that round up and asks for another task.
                        shell.at_work.remove(&device(number));
                    }
                }
                Step::Vanish(number) => { shell.at_work.remove(&device(number)); }
                Step::Wait(ms) => {
                    shell.now_ms += u64::from(ms);
                    shell.tick(Event::TimePassed);
                }
                Step::Open => { shell.tick(Event::Head(start(shell.head))); }
                Step::Work(succeeds) => shell.work(succeeds),
                Step::RollBack => shell.head += 1,
                Step::Crash => shell.crash(),
            }
            prop_assert!(shell.rounds.tasks.len() as u32 <= shell.policy.selected_max(shell.policy.goal), "the state grows");
        }
        let mut taken = BTreeSet::new();
        for (device, (round, _)) in shell.inbox.values().flatten() {
            prop_assert!(taken.insert((*device, *round)), "an update is in two buffers");
        }
        for (index, summary) in shell.records.iter().enumerate() {
            prop_assert_eq!(summary.round.0, index as u64 + 1, "rounds follow each other");
            let members = shell.inbox.get(&summary.round.0).map_or(0, BTreeMap::len) as u32;
            prop_assert_eq!(members, summary.received, "an accepted update is lost or counted twice");
            prop_assert!(summary.received <= summary.selected, "{:?}", summary);
            prop_assert!(summary.opened_ms <= summary.closed_ms && summary.closed_ms <= summary.finished_ms);
            match summary.outcome {
                Outcome::Abandoned { .. } => prop_assert_eq!(members, 0, "an accepted update was thrown away"),
                _ => prop_assert!(members >= shell.policy.quorum),
            }
        }
        // Whatever happened, devices that come now bring the next release.
        let before = shell.records.len();
        for number in (20..120).cycle().take(3_000) {
            shell.now_ms += 1_000;
            shell.tick(Event::TimePassed);
            shell.work(true);
            shell.poll(number);
            let _ = shell.deliver(number, false);
        }
        prop_assert!(shell.records.len() > before, "rounds have come to a standstill: {:?}", shell.rounds);
    }
}

#[test]
fn an_update_counts_in_a_later_buffer_until_it_is_too_old() {
    let mut shell = Shell::new(policy());
    for number in 0..7 {
        shell.poll(number);
    }
    assert_eq!(shell.at_work.len(), 6, "three places, two devices for each");
    let publish = |shell: &mut Shell, devices: [u8; 2]| {
        for number in devices {
            shell.poll(number);
            shell.deliver(number, false).unwrap();
        }
        let busy = shell.deliver(5, false);
        assert!(matches!(busy, Err(NotAdmitted::Merging { .. })), "a full buffer takes nothing: {busy:?}");
        for _ in 0..4 {
            shell.work(true);
        }
        shell.tick(Event::Head(start(shell.head)));
    };
    assert_eq!(shell.deliver(2, false), Ok(false));
    publish(&mut shell, [0, 1]);
    assert_eq!(shell.deliver(3, false), Ok(false), "one behind");
    publish(&mut shell, [10, 11]);
    assert_eq!(shell.deliver(4, false), Ok(false), "two behind");
    publish(&mut shell, [10, 11]);
    let refused = shell.deliver(5, false);
    assert_eq!(refused, Err(NotAdmitted::StaleRound { named: 1, current: 4 }), "its task is forgotten");
    assert_eq!(shell.inbox[&3][&device(4)], (RoundId(1), 0));
}

#[test]
fn a_device_counts_once_in_a_buffer_and_begins_anew_in_the_next() {
    let mut shell = Shell::new(policy());
    shell.poll(0);
    assert_eq!(shell.deliver(0, false), Ok(false));
    shell.poll(0);
    assert!(shell.at_work.is_empty(), "a second task in the same buffer");
    for number in [1, 2] {
        shell.poll(number);
        shell.deliver(number, false).unwrap();
    }
    for _ in 0..4 {
        shell.work(true);
    }
    shell.poll(0);
    assert_eq!(shell.at_work[&device(0)], (RoundId(2), 1));
}

#[test]
fn a_vanished_device_keeps_its_place_no_longer_than_the_deadline() {
    let mut shell = Shell::new(Policy { goal: 1, quorum: 1, over_selection: 1.0, ..policy() });
    shell.poll(0);
    shell.poll(1);
    assert_eq!(shell.at_work.keys().collect::<Vec<_>>(), [&device(0)]);
    shell.now_ms = 60_000;
    shell.poll(1);
    assert_eq!(shell.deliver(1, false), Ok(false));
    assert_eq!(shell.deliver(0, false), Err(NotAdmitted::NotSelected), "another has its place");
}

#[test]
fn the_deadline_merges_a_quorum_keeps_less_and_abandons_nothing_but_nothing() {
    let mut shell = Shell::new(policy());
    shell.poll(0);
    shell.now_ms = 60_000;
    assert!(shell.tick(Event::TimePassed).contains(&Action::Closed));
    assert_eq!(shell.records[0].outcome, Outcome::Abandoned { quorum: 2 });
    shell.tick(Event::Head(start(0)));
    assert_eq!(shell.deliver(0, false), Ok(false), "the task of the abandoned round counts in the next");
    shell.now_ms = 120_000;
    assert_eq!(shell.tick(Event::TimePassed), [Action::Save, Action::WakeAt(180_000)]);
    shell.poll(1);
    shell.deliver(1, false).unwrap();
    shell.now_ms = 180_000;
    assert!(shell.tick(Event::TimePassed).contains(&Action::Merge));
}

#[test]
fn a_roll_back_under_an_open_buffer_moves_its_start() {
    let mut shell = Shell::new(policy());
    shell.poll(0);
    shell.head = 5;
    shell.poll(1);
    assert_eq!(shell.rounds.start, Some(start(5)));
    assert_eq!(shell.at_work[&device(1)], (RoundId(1), 5));
    shell.poll(0);
    assert_eq!(shell.at_work[&device(0)], (RoundId(1), 0), "a task is repeated word for word");
    assert!(matches!(shell.deliver(0, false), Err(NotAdmitted::TooStale { got: 5, most: 2, .. })));
}

#[test]
fn the_last_buffer_is_followed_by_none() {
    let mut shell = Shell::new(Policy { last: Some(RoundId(1)), goal: 1, quorum: 1, ..policy() });
    shell.poll(0);
    shell.deliver(0, false).unwrap();
    assert_eq!(shell.tick(Event::Refused("no".to_owned())).last(), Some(&Action::Stop));
    assert_eq!(shell.tick(Event::Head(start(0))), [Action::Stop]);
    shell.poll(0);
    assert!(shell.at_work.is_empty());
}
