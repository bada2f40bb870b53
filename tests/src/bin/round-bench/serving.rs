//! The aggregator of the benchmark: `modelless.rs` of the tests, whose rounds are timed by the events it tells.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use aggregator::{
    config::Config,
    events::{Event, Events, Figures},
    round::Policy,
};
use anyhow::Result;
use commonweal_protocol::RoundId;
use commonweal_runtime::memory;
use commonweal_tests::{
    child::tell,
    modelless::{self, Modelless},
};
use commonweal_transport::ServeLimits;

use super::{Arguments, Times, Told};

/// Serves until the standard input ends, which the devices' process closes when all rounds are over.
pub(super) fn serve(arguments: &Arguments, path: &Path) -> Result<()> {
    let events = watch(arguments.rounds_in_all());
    let aggregator = Modelless::open(path, arguments.adapter_mb, config(arguments), events)?;
    aggregator.serve(0, ServeLimits::default(), |aggregator, address| {
        tell(&Told::Invitations(aggregator.invite(arguments.devices, address)?));
        Ok(())
    })
}

/// The defaults, but for what needs a model, and for how soon devices come back: a second or two by default.
fn config(arguments: &Arguments) -> Config {
    let mut config = modelless::config(Policy {
        goal: arguments.devices,
        quorum: arguments.devices,
        over_selection: 1.0,
        last: Some(RoundId(arguments.rounds_in_all())),
        ..Policy::default()
    });
    (config.receive.reconnect_after_ms, config.receive.reconnect_spread_ms) = (10, 10);
    config.receive.requests_per_second = 1_000.0;
    config
}

/// Makes a round's times of its events, and tells them as each round ends.
fn watch(rounds: u64) -> Events {
    struct Marks {
        /// When the release before became the head.
        released: Instant,
        opened: Instant,
        closed: Instant,
        merged: Instant,
    }
    let now = Instant::now();
    let marks = Mutex::new(Marks { released: now, opened: now, closed: now, merged: now });
    Events::to(move |event| {
        let mut marks = marks.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match event {
            Event::RoundOpened { .. } => marks.opened = now,
            Event::RoundClosed { .. } => marks.closed = now,
            Event::Stage { figures: Figures::Merge(_), .. } => marks.merged = now,
            Event::Published { round: Some(round), .. } => {
                let times = Times {
                    whole: (now - marks.released).as_secs_f64(),
                    gather: (marks.opened - marks.released).as_secs_f64(),
                    receive: (marks.closed - marks.opened).as_secs_f64(),
                    merge: (marks.merged - marks.closed).as_secs_f64(),
                    publish: (now - marks.merged).as_secs_f64(),
                };
                marks.released = now;
                tell(&Told::Round(times));
                if round.0 == rounds {
                    tell(&Told::Peak(memory().map(|memory| memory.resident_bytes_max as f64 / 1e6)));
                }
            }
            Event::Refused { .. } | Event::Rejected { .. } | Event::Retrying { .. } => {
                tracing::warn!("{}", event.sentence());
            }
            _ => {}
        }
    })
}
