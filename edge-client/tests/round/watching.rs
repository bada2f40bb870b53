//! A person comes back in the middle of a round, and leaves again.

use std::{
    fs::{self, File},
    io::Write,
    thread,
    time::{Duration, Instant},
};

use commonweal_protocol::{Digest, RoundId};
use commonweal_runtime::Cancel;
use edge_client::{
    pipeline::Outcome,
    sensors::LinuxSensors,
    units::{Limit, Span},
    watch::{Heed, Watched, watched},
    when::{Broken, WhenPolicy},
};

use crate::world::*;

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
    let keyboard = system.path().join("dev/input/by-path/platform-i8042-serio-0-event-kbd");
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
        while !is_training() {
            thread::sleep(Duration::from_millis(2));
        }
        File::options().append(true).open(keyboard).unwrap().write_all(&[1; 24]).unwrap();
        Instant::now()
    });
    let watch = Watched { visit, stop: Cancel::new(), wishes: Vec::new(), heed: Some(&mut heed), memory_max: Limit::OFF };
    let ((ended, at), broken) = watched(watch, || (world.device.visit(), Instant::now()));
    let after = at.duration_since(touched.join().unwrap());
    eprintln!("the round's work ended {} ms after the touch, its checkpoint written", after.as_millis());
    ended.unwrap_err();
    assert!(matches!(broken.unwrap().0[..], [Broken::Idle { .. }]));
    assert!(world.has("round/training.safetensors"), "what was trained is kept at whatever step it was");

    world.device.cancel = Cancel::new();
    assert_eq!(world.visit(), Outcome::Delivered(RoundId(1)));
    let [with, without] = [&world, &undisturbed].map(|world| Digest::of(&world.told.lock().unwrap().offered));
    assert_eq!(with, without);
}
