//! Watches while a visit runs, and ends it when its time is over: the person came back, or another rule of the owner's
//! broke, or the owner wants something else.
//!
//! Beside `pipeline.rs`, on a thread of its own; `when.rs` has the rules and `sensors.rs` the readings. A look every 25 ms
//! and an operator of the network, which is what a cancelled handle waits for at most (50 ms on a phone), stay within the
//! 100 ms in which the cores are the person's again: a sensor that takes its time is asked on another thread. One thread may go on: a training's checkpoint is written, and a pass of
//! the optimizer over a session that was being opened ends. `bench --only stop` measures all of them.

use std::{
    fmt,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, Scope, ScopedJoinHandle},
    time::Duration,
};

use commonweal_runtime::{Cancel, memory};

use crate::{
    sensors::Sensors,
    units::{Bytes, Limit},
    when::{self, Broken, Readings, WhenPolicy, Why},
};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(25);

/// The owner's rules, and what they are held against.
pub struct Heed {
    /// `[when]` in the policy.
    pub rules: WhenPolicy,
    /// The device.
    pub sensors: Box<dyn Sensors>,
}

impl Heed {
    /// Why the device must wait now, or stop. While it works, the answer comes at once.
    pub fn why_not(&mut self, is_working: bool) -> Why {
        let readings = if is_working { self.sensors.glance() } else { self.sensors.read() };
        when::why_not(&self.rules, &readings, is_working)
    }

    /// What the sensors say.
    pub fn readings(&mut self) -> Readings {
        self.sensors.read()
    }
}

impl fmt::Debug for Heed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heed").field("rules", &self.rules).finish_non_exhaustive()
    }
}

/// What may end a visit before its time.
#[derive(Debug)]
pub struct Watched<'v> {
    /// The visit's handle, which is cancelled then.
    pub visit: Cancel,
    /// The process's.
    pub stop: Cancel,
    /// Files that say that the owner wants something else.
    pub wishes: Vec<PathBuf>,
    /// The rules, if they are heeded.
    pub heed: Option<&'v mut Heed>,
    /// What this process may hold of memory.
    pub memory_max: Limit,
}

/// The process holds more than it may. What it will need is compared before; this is for what was reckoned too low.
fn over_budget(memory_max: Limit) -> Option<Why> {
    let Limit(Some(max)) = memory_max else { return None };
    let held = Bytes::of(memory::held().filter(|&held| held > max.count())?);
    Some(Why(vec![Broken::Budget { held, max }]))
}

/// Does some work while it is watched. With it comes the rule that ended it, if one did.
pub fn watched<T>(watched: Watched<'_>, work: impl FnOnce() -> T) -> (T, Option<Why>) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = watch(scope, watched, &over);
        let ends = Ends { over: &over, watcher: watcher.thread().clone() };
        let done = work();
        drop(ends);
        let broken = watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (done, broken)
    })
}

/// Ends the watching when the work is over, also by a panic.
struct Ends<'w> {
    over: &'w AtomicBool,
    watcher: thread::Thread,
}

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.watcher.unpark();
    }
}

fn watch<'scope>(
    scope: &'scope Scope<'scope, '_>,
    mut watched: Watched<'scope>,
    over: &'scope AtomicBool,
) -> ScopedJoinHandle<'scope, Option<Why>> {
    scope.spawn(move || {
        while !over.load(Ordering::Acquire) {
            if watched.stop.is_cancelled() || watched.wishes.iter().any(|wish| wish.exists()) {
                watched.visit.cancel();
                return None;
            }
            let rules = watched.heed.as_mut().map(|heed| heed.why_not(true)).filter(|why| !why.is_nothing());
            let broken = rules.or_else(|| over_budget(watched.memory_max));
            if broken.is_some() {
                watched.visit.cancel();
                return broken;
            }
            thread::park_timeout(LOOK);
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    struct Told(Arc<Mutex<Readings>>);

    impl Sensors for Told {
        fn read(&mut self) -> Readings {
            *self.0.lock().unwrap()
        }
    }

    fn until_cancelled(visit: &Cancel) {
        while !visit.is_cancelled() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_visit_ends_with_the_process_a_wish_or_a_rule_and_is_told_which() {
        let directory = tempfile::tempdir().unwrap();
        let wish = directory.path().join("paused");
        let readings = Arc::new(Mutex::new(Readings { power: Some(true), ..Readings::default() }));
        let mut heed = Heed { rules: WhenPolicy::default(), sensors: Box::new(Told(Arc::clone(&readings))) };
        let stop = Cancel::new();
        let mut run = |work: &dyn Fn(&Cancel)| {
            let visit = Cancel::new();
            let wishes = vec![directory.path().join("another"), wish.clone()];
            let what = Watched {
                visit: visit.clone(),
                stop: stop.clone(),
                wishes,
                heed: Some(&mut heed),
                memory_max: Limit::OFF,
            };
            watched(what, || work(&visit)).1
        };
        assert_eq!(run(&|visit| assert!(!visit.is_cancelled())), None);
        let broken = run(&|visit| {
            readings.lock().unwrap().power = Some(false);
            until_cancelled(visit);
        });
        assert_eq!(broken.unwrap().to_string(), "it runs on its battery");
        readings.lock().unwrap().power = Some(true);
        let wished = run(&|visit| {
            std::fs::write(&wish, b"").unwrap();
            until_cancelled(visit);
        });
        assert_eq!(wished, None);
        std::fs::remove_file(&wish).unwrap();
        let stopped = run(&|visit| {
            stop.cancel();
            until_cancelled(visit);
        });
        assert_eq!(stopped, None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_that_holds_more_than_its_budget_ends_its_visit() {
        let work = |memory_max, is_ended: bool| {
            let visit = Cancel::new();
            let stop = Cancel::new();
            let what = Watched { visit: visit.clone(), stop, wishes: Vec::new(), heed: None, memory_max };
            watched(what, || {
                if is_ended {
                    until_cancelled(&visit);
                }
            })
            .1
        };
        assert_eq!(work(Limit::of(1 << 50), false), None);
        let broken = work(Limit::of(1_000_000), true).unwrap();
        assert!(matches!(broken.0[..], [Broken::Budget { .. }]));
        assert!(broken.to_string().contains("1MB are its budget"), "{broken}");
    }

    #[test]
    #[should_panic(expected = "a stage's bug")]
    fn a_panic_ends_the_watching_too() {
        let what = Watched {
            visit: Cancel::new(),
            stop: Cancel::new(),
            wishes: Vec::new(),
            heed: None,
            memory_max: Limit::OFF,
        };
        let stage = |is_broken: bool| assert!(!is_broken, "a stage's bug");
        watched(what, || stage(true));
    }
}
