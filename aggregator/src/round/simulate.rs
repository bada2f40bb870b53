//! Random histories of events against the invariants that a round must keep.

use std::collections::BTreeSet;

use commonweal_protocol::Version;
use proptest::prelude::*;

use super::*;

fn device(number: u8) -> DeviceId {
    DeviceId([number; 16])
}

const START: Start = Start { version: Version(0), digest: Digest([7; 32]), length: 1 };

#[derive(Clone, Debug)]
enum Step {
    Poll(u8),
    Upload(u8),
    Wait(u32),
    Work(bool),
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (0..12_u8).prop_map(Step::Poll),
        4 => (0..12_u8).prop_map(Step::Upload),
        2 => (0..40_000_u32).prop_map(Step::Wait),
        3 => any::<bool>().prop_map(Step::Work),
        1 => Just(Step::Crash),
    ];
    proptest::collection::vec(step, 1..400)
}

fn policies() -> impl Strategy<Value = Policy> {
    let sampling = prop_oneof![Just(Sampling::First), Just(Sampling::Uniform), Just(Sampling::Fair)];
    (1..8_u32, 1.0..2.0_f64, 0..20_000_u64, 1_000..60_000_u64, sampling).prop_flat_map(
        |(goal, over, wait, deadline, sampling)| {
            (1..=goal).prop_map(move |quorum| Policy {
                goal,
                over_selection: over,
                quorum,
                wait_ms: wait,
                deadline_ms: deadline,
                sampling,
                ..Policy::default()
            })
        },
    )
}

/// A shell as `serve` is one, with everything durable in fields.
#[derive(Default)]
struct Shell {
    rounds: Rounds,
    saved: Rounds,
    inbox: BTreeSet<(u64, DeviceId)>,
    assigned: BTreeSet<(u64, DeviceId)>,
    records: Vec<Summary>,
    work: Option<Action>,
    now_ms: u64,
    next_version: u64,
}

impl Shell {
    fn tick(&mut self, policy: &Policy, event: Event) -> Vec<Action> {
        let actions = self.rounds.tick(policy, self.now_ms, event);
        for action in &actions {
            match action {
                Action::Save => self.saved = self.rounds.clone(),
                Action::Assign(device) => {
                    self.assigned.insert((self.rounds.round.0, *device));
                    assert!(
                        self.saved.admits(policy, self.rounds.round, device).is_ok(),
                        "assigned before saved"
                    );
                }
                Action::Finish(summary) => match self.records.last() {
                    Some(last) if last.round == summary.round => {}
                    _ => self.records.push(summary.clone()),
                },
                work @ (Action::Merge | Action::Align(_) | Action::Evaluate(_) | Action::Publish(..)) => {
                    assert_eq!(self.saved, self.rounds, "work before the state is durable");
                    self.work = Some(work.clone());
                }
                // Those that were drawn have a task, though they have not asked for it again.
                Action::Opened => {
                    if let Phase::Collecting { selected, .. } = &self.rounds.phase {
                        let round = self.rounds.round.0;
                        self.assigned.extend(selected.keys().map(|device| (round, *device)));
                    }
                }
                Action::Closed | Action::WakeAt(_) | Action::Stop => {}
            }
        }
        actions
    }

    fn work(&mut self, policy: &Policy, succeeds: bool) {
        let Some(work) = self.work.take() else { return };
        let candidate = Digest([1; 32]);
        let event = match work {
            _ if !succeeds => Event::Refused("a gate".to_owned()),
            Action::Merge => {
                let members = self.inbox.iter().filter(|(round, _)| *round == self.rounds.round.0).count();
                assert!(members >= policy.quorum as usize, "merged below the quorum");
                Event::Merged(candidate)
            }
            Action::Align(_) => Event::Aligned(candidate),
            Action::Evaluate(_) => Event::Accepted(Box::default()),
            _ => {
                self.next_version += 1;
                Event::Published(Version(self.next_version))
            }
        };
        self.tick(policy, event);
    }

    fn crash(&mut self, policy: &Policy) {
        self.rounds = self.saved.clone();
        self.work = None;
        self.tick(policy, Event::Resumed);
        let round = self.rounds.round;
        let members: Vec<_> = self.inbox.iter().filter(|(of, _)| *of == round.0).copied().collect();
        for (_, device) in members {
            self.tick(policy, Event::Received(device));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_history_keeps_the_invariants(policy in policies(), steps in steps()) {
        prop_assume!(policy.problems().is_empty());
        let mut shell = Shell::default();
        for step in steps {
            match step {
                Step::Poll(number) => {
                    shell.tick(&policy, Event::Polled(device(number), START));
                }
                Step::Upload(number) => {
                    let round = shell.rounds.round;
                    if let Ok(already) = shell.rounds.admits(&policy, round, &device(number)) {
                        let new = shell.inbox.insert((round.0, device(number)));
                        prop_assert_eq!(already, !new, "the state and the inbox disagree");
                        shell.tick(&policy, Event::Received(device(number)));
                    }
                }
                Step::Wait(ms) => {
                    shell.now_ms += u64::from(ms);
                    shell.tick(&policy, Event::TimePassed);
                }
                Step::Work(succeeds) => shell.work(&policy, succeeds),
                Step::Crash => shell.crash(&policy),
            }
            let selected = match &shell.rounds.phase {
                Phase::Collecting { selected, .. } => selected.len(),
                // A draw is of all that are ready.
                Phase::Waiting { ready, .. } if policy.sampling == Sampling::First => ready.len(),
                _ => 0,
            };
            prop_assert!(selected as u32 <= policy.selected_max(policy.goal), "the state grows");
        }
        for (index, summary) in shell.records.iter().enumerate() {
            prop_assert_eq!(summary.round.0, index as u64 + 1, "rounds follow each other");
            let members = shell.inbox.iter().filter(|(round, _)| *round == summary.round.0).count();
            prop_assert_eq!(members as u32, summary.received, "an accepted update is lost or counted twice");
            prop_assert!(summary.received <= summary.selected);
            prop_assert!(summary.opened_ms <= summary.closed_ms && summary.closed_ms <= summary.finished_ms);
            if !matches!(summary.outcome, Outcome::Abandoned { .. }) {
                prop_assert!(summary.received >= policy.quorum);
            }
        }
        prop_assert!(shell.inbox.is_subset(&shell.assigned), "an update of a device without a task");
    }
}

fn policy() -> Policy {
    Policy { goal: 4, quorum: 2, wait_ms: 10_000, deadline_ms: 60_000, ..Policy::default() }
}

fn collecting(policy: &Policy, devices: u8) -> Rounds {
    let mut rounds = Rounds::default();
    for number in 0..devices {
        rounds.tick(policy, 0, Event::Polled(device(number), START));
    }
    for number in 0..devices {
        rounds.tick(policy, 20_000, Event::Polled(device(number), START));
    }
    assert!(matches!(rounds.phase, Phase::Collecting { .. }), "{rounds:?}");
    rounds
}

#[test]
fn a_round_closes_at_its_goal_and_takes_nothing_after() {
    let policy = policy();
    let mut rounds = collecting(&policy, 6);
    assert_eq!(rounds.admits(&policy, RoundId(1), &device(5)), Ok(false), "over-selected: ceil(4 · 1.3)");
    assert_eq!(rounds.admits(&policy, RoundId(1), &device(6)), Err(NotAdmitted::NotSelected));
    for number in 0..3 {
        assert_eq!(rounds.tick(&policy, 30_000, Event::Received(device(number))), []);
    }
    let actions = rounds.tick(&policy, 30_000, Event::Received(device(5)));
    assert_eq!(actions, [Action::Save, Action::Closed, Action::Merge]);
    let stale = NotAdmitted::StaleRound { named: 1, current: 1 };
    assert_eq!(rounds.admits(&policy, RoundId(1), &device(4)), Err(stale), "late");
}

#[test]
fn devices_that_vanish_do_not_stop_a_round() {
    let policy = policy();
    let mut rounds = collecting(&policy, 4);
    rounds.tick(&policy, 30_000, Event::Received(device(0)));
    rounds.tick(&policy, 30_000, Event::Received(device(1)));
    assert_eq!(rounds.tick(&policy, 59_000, Event::TimePassed), [Action::WakeAt(60_000)]);
    assert!(rounds.tick(&policy, 60_000, Event::TimePassed).contains(&Action::Merge));
}

#[test]
fn a_round_below_its_quorum_is_abandoned_and_the_next_begins() {
    let policy = policy();
    let mut rounds = collecting(&policy, 4);
    rounds.tick(&policy, 30_000, Event::Received(device(0)));
    let actions = rounds.tick(&policy, 60_000, Event::TimePassed);
    let Some(Action::Finish(summary)) = actions.get(1) else { panic!("{actions:?}") };
    assert_eq!(summary.outcome, Outcome::Abandoned { quorum: 2 });
    assert_eq!((summary.received, rounds.round), (1, RoundId(2)));
}

#[test]
fn fewer_devices_than_the_goal_begin_after_the_wait() {
    let policy = policy();
    let rounds = collecting(&policy, 2);
    let Phase::Collecting { target, .. } = rounds.phase else { panic!() };
    assert_eq!(target, 2);
    let mut rounds = Rounds::default();
    rounds.tick(&policy, 0, Event::Polled(device(0), START));
    rounds.tick(&policy, 90_000, Event::Polled(device(0), START));
    assert!(matches!(rounds.phase, Phase::Waiting { .. }), "one is below the quorum");
}

#[test]
fn a_drawn_round_asks_those_that_were_drawn_and_nobody_else() {
    let policy = Policy { sampling: Sampling::Fair, over_selection: 1.0, sampling_seed: 9, ..policy() };
    let mut rounds = Rounds::default();
    let mut asked_in_all = BTreeSet::new();
    for round in 1..=3 {
        let opened_ms = round * 1_000_000;
        for number in 0..12 {
            let actions = rounds.tick(&policy, opened_ms - 20_000, Event::Polled(device(number), START));
            assert!(matches!(actions[..], [Action::WakeAt(_)]), "before the time is over: {actions:?}");
        }
        let asked: BTreeSet<u8> = (0..12)
            .filter(|number| {
                let actions = rounds.tick(&policy, opened_ms, Event::Polled(device(*number), START));
                actions.contains(&Action::Assign(device(*number)))
            })
            .collect();
        assert_eq!((asked.len(), rounds.selected()), (4, 4));
        let late = rounds.tick(&policy, opened_ms, Event::Polled(device(50), START));
        assert_eq!(late, [], "one that was not drawn");
        for number in &asked {
            rounds.tick(&policy, opened_ms + 1, Event::Received(device(*number)));
        }
        asked_in_all.extend(asked);
        rounds.tick(&policy, opened_ms + 2, Event::Refused("no".to_owned()));
    }
    assert_eq!(asked_in_all.len(), 12, "in three rounds of four, each of twelve once");
}

#[test]
fn a_refused_candidate_ends_the_round_with_a_bounded_reason() {
    let policy = policy();
    let mut rounds = collecting(&policy, 4);
    for number in 0..4 {
        rounds.tick(&policy, 30_000, Event::Received(device(number)));
    }
    rounds.tick(&policy, 31_000, Event::Merged(Digest([1; 32])));
    let actions = rounds.tick(&policy, 32_000, Event::Refused("é".repeat(4_000)));
    let Some(Action::Finish(Summary { outcome: Outcome::Rejected { reason }, .. })) = actions.first() else {
        panic!("{actions:?}")
    };
    assert!(reason.len() <= 2_000 && reason.starts_with('é'));
}

#[test]
fn the_last_round_is_followed_by_none() {
    let policy = Policy { last: Some(RoundId(1)), goal: 1, quorum: 1, ..policy() };
    let mut rounds = Rounds::default();
    rounds.tick(&policy, 0, Event::Polled(device(0), START));
    rounds.tick(&policy, 0, Event::Received(device(0)));
    let actions = rounds.tick(&policy, 0, Event::Refused("no".to_owned()));
    assert_eq!(actions.last(), Some(&Action::Stop));
    assert_eq!(rounds.tick(&policy, 0, Event::Polled(device(0), START)), [Action::Stop]);
    assert_eq!(rounds.tick(&policy, 0, Event::Resumed), [Action::Stop]);
}

#[test]
fn the_state_survives_its_serialization() {
    let rounds = collecting(&policy(), 4);
    let text = serde_json::to_string(&rounds).unwrap();
    assert_eq!(serde_json::from_str::<Rounds>(&text).unwrap(), rounds);
}
