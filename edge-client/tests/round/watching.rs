//! A person comes back in the middle of a round, and leaves again.

use std::{
    collections::BTreeSet,
    error::Error,
    fs::{self, File},
    io::Write,
    thread,
    time::{Duration, Instant},
};

use commonweal_protocol::{Digest, Refusal, RoundId};
use commonweal_runtime::{Cancel, settle};
use commonweal_safety::Reviser;
use edge_client::{
    forget, kept,
    pipeline::Outcome,
    rows::Parsed,
    sample::Sample,
    sensors::LinuxSensors,
    units::{Limit, Span},
    watch::{Heed, Watched, watched},
    when::{Broken, WhenPolicy},
};

use crate::world::*;

/// What has not come so long after a visit began never comes: the visit is ended, and the test says what is missing.
const PATIENCE: Duration = Duration::from_secs(120);

fn long_round(world: &mut World) {
    world.device.policy.train.checkpoint_steps = 1_000;
    world.tell(|told| told.task.as_mut().unwrap().train.steps_max = 60);
}

#[test]
fn a_touch_ends_the_round_where_it_is_and_the_rest_follows_to_the_same_bits() {
    let mut undisturbed = World::new();
    long_round(&mut undisturbed);
    assert_eq!(undisturbed.visit(), Outcome::Delivered(RoundId(1)));

    let mut world = World::new();
    long_round(&mut world);
    let system = tempfile::tempdir().unwrap();
    let keyboard = system.path().join("dev/input/event0");
    fs::create_dir_all(keyboard.parent().unwrap()).unwrap();
    fs::write(&keyboard, b"").unwrap();
    let rules = WhenPolicy { idle: Span::of_seconds(1), ..WhenPolicy::default() };
    let mut heed = Heed { rules, sensors: Box::new(LinuxSensors::under(system.path()).always_anew()) };
    while !heed.why_not(false).is_nothing() {
        thread::sleep(Duration::from_millis(20));
    }

    let (doing, visit) = (world.directory.path().join("doing.json"), world.device.cancel.clone());
    let touched = thread::spawn(move || {
        let is_training = || fs::read_to_string(&doing).is_ok_and(|doing| doing.contains("trains, step"));
        let begun = Instant::now();
        while !is_training() && begun.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(2));
        }
        File::options().append(true).open(keyboard).unwrap().write_all(&[1; 24]).unwrap();
    });
    let watch = Watched {
        visit,
        stop: Cancel::new(),
        wishes: Vec::new(),
        heed: Some(&mut heed),
        memory_max: Limit::OFF,
    };
    let (ended, broken) = watched(watch, || world.device.visit());
    touched.join().unwrap();
    ended.unwrap_err();
    assert!(matches!(broken.unwrap().0[..], [Broken::Idle { .. }]));
    assert!(world.has("round/training.safetensors"), "what was trained is kept at whatever step it was");

    world.device.cancel = Cancel::new();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let [with, without] = [&world, &undisturbed].map(|world| Digest::of(&world.told.lock().unwrap().offered));
    assert_eq!(with, without);
}

/// A visit holds a session from before it is opened. Whoever comes just then may be late for once, and comes again.
#[test]
fn who_comes_while_a_session_is_opened_ends_the_visit_and_the_next_one_opens_it() {
    let undisturbed = World::new();
    assert_eq!(undisturbed.visit(), Outcome::Delivered(RoundId(1)));

    let mut world = World::new();
    let mut is_left = || {
        world.device.model.close();
        world.device.cancel = Cancel::new();
        let (model, visit) = (world.device.model.clone(), world.device.cancel.clone());
        let came = thread::spawn(move || {
            let begun = Instant::now();
            while !model.is_open() && begun.elapsed() < PATIENCE {
                thread::yield_now();
            }
            visit.cancel();
        });
        let ended = world.device.visit().unwrap_err();
        came.join().unwrap();
        assert!(causes(&ended).contains("cancelled"), "{}", causes(&ended));
        settle();
        !world.device.model.is_open()
    };
    assert!((0..20).any(|_| is_left()), "every opening was waited for");

    world.device.cancel = Cancel::new();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let [with, without] = [&world, &undisturbed].map(|world| Digest::of(&world.told.lock().unwrap().offered));
    assert_eq!(with, without);
}

fn causes(error: &(dyn Error + 'static)) -> String {
    let all = std::iter::successors(Some(error), |&error| error.source());
    all.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Ends the visit once a file is there.
fn until_there(world: &World, name: &str) {
    let (path, visit) = (world.directory.path().join(name), world.device.cancel.clone());
    let ended = thread::spawn(move || {
        let begun = Instant::now();
        while !path.exists() && begun.elapsed() < PATIENCE {
            thread::sleep(Duration::from_micros(200));
        }
        visit.cancel();
    });
    world.device.visit().unwrap_err();
    ended.join().unwrap();
}

/// Of 150 harmless and 50 harmful samples: several chunks to judge, and several to rewrite.
fn many(world: &World, texts: &str) {
    let good = [samples("device-1.jsonl", 150), samples("hostile.jsonl", 50)].concat();
    kept::keep(&world.device.store, &Parsed { good, bad: Vec::new() }, texts, 0).unwrap();
}

#[test]
fn what_was_judged_and_rewritten_before_a_break_is_not_done_again_and_the_bits_are_the_same() {
    let undisturbed = World::new();
    many(&undisturbed, "many");
    assert_eq!(undisturbed.visit(), Outcome::Delivered(RoundId(1)));

    let mut world = World::new();
    many(&world, "many");
    let of = |world: &World, name: &str| fs::read(world.directory.path().join(name)).ok();
    let [first, second, third] = [0, 1, 2].map(|number| format!("round/judged-{number:04}.bin"));
    until_there(&world, &first);
    let judged = of(&world, &first).unwrap();
    assert!(!judged.windows(4).any(|bytes| bytes == b"eggs"), "it is sealed");
    // What is added now waits for another round.
    let late = vec![(0, Sample::from_pair("How do I boil rice?".into(), "In water.".into()).unwrap())];
    kept::keep(&world.device.store, &Parsed { good: late, bad: Vec::new() }, "late", 0).unwrap();

    world.device.cancel = Cancel::new();
    until_there(&world, &second);
    assert_eq!(of(&world, &first).unwrap(), judged, "it was sealed once");
    // One that does not open is judged again.
    fs::write(world.directory.path().join(&second), b"damaged").unwrap();
    world.device.cancel = Cancel::new();
    until_there(&world, &third);
    assert_ne!(of(&world, &second).unwrap(), b"damaged");

    world.device.cancel = Cancel::new();
    let rewritten = "round/rewritten-0000.bin";
    until_there(&world, rewritten);
    let kept_one = of(&world, rewritten).unwrap();
    world.device.cancel = Cancel::new();
    until_there(&world, "round/rewritten-0001.bin");
    assert_eq!(of(&world, rewritten).unwrap(), kept_one, "it was sealed once");

    world.device.cancel = Cancel::new();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let [with, without] = [&world, &undisturbed].map(|world| Digest::of(&world.told.lock().unwrap().offered));
    assert_eq!(with, without);
    let [with, without] = [&world, &undisturbed].map(|world| world.opened()[0].report);
    assert_eq!(with, without);
    assert!(!world.has(&first) && !world.has(rewritten) && !world.has("round/drawn.samples"));
}

#[test]
fn what_another_constitution_judged_or_rewrote_is_done_again() {
    let mut world = World::new();
    many(&world, "many");
    until_there(&world, "round/rewritten-0000.bin");
    let before = ["round/judged-0000.bin", "round/rewritten-0000.bin"]
        .map(|name| fs::read(world.directory.path().join(name)).unwrap());
    let mut constitution = world.device.reviser.constitution().clone();
    constitution.name.push_str(", of the owner");
    world.device.reviser =
        Reviser::from_package(&world.device.model).unwrap().with_constitution(constitution);
    world.device.cancel = Cancel::new();
    // Somebody lays the old chunks beside the new round.
    until_there(&world, "round/task.json");
    for (name, bytes) in ["round/judged-0000.bin", "round/rewritten-0000.bin"].iter().zip(&before) {
        fs::write(world.directory.path().join(name), bytes).unwrap();
    }
    world.device.cancel = Cancel::new();
    until_there(&world, "round/judged-0001.bin");
    assert_ne!(fs::read(world.directory.path().join("round/judged-0000.bin")).unwrap(), before[0]);
}

#[test]
fn chunks_go_with_the_samples_that_they_were_made_of() {
    let world = World::new();
    many(&world, "many");
    until_there(&world, "round/judged-0001.bin");
    let store = &world.device.store;
    let one = BTreeSet::from([kept::samples(store).unwrap()[0].id()]);
    forget::wish(store, &one).unwrap();
    assert!(forget::carry_out(store).unwrap().rounds);
    for name in ["judged-0000.bin", "judged-0001.bin", "drawn.samples"] {
        assert!(!world.has(&format!("round/{name}")), "{name}");
    }
}

#[test]
fn chunks_that_a_kill_left_beside_their_pairs_go_with_the_next_visit() {
    let names = ["round/judged-0000.bin", "round/rewritten-0000.bin", "round/drawn.samples"];
    let world = World::new();
    world.tell(|told| told.is_away = true);
    assert!(world.device.visit().unwrap_err().is_transient());
    let left = |world: &World| names.iter().filter(|name| world.has(name)).count();
    let leave = |world: &World| {
        for name in names {
            world.device.store.write(name, b"of a person").unwrap();
        }
    };
    // Before the update was packed.
    world.device.store.remove("round/update.json").unwrap();
    leave(&world);
    assert!(world.device.visit().unwrap_err().is_transient());
    assert!(world.has("round/pairs.json"));
    assert_eq!(left(&world), 0);
    // And of a round that is given up.
    leave(&world);
    world.tell(|told| (told.is_away, told.refusal) = (false, Some(Refusal::StaleRound)));
    assert_eq!(world.visit(), Outcome::Refused(RoundId(1), Refusal::StaleRound));
    assert!(world.has("round/given-up.json"));
    assert_eq!(left(&world), 0);
}
