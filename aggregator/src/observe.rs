//! What an operator can see of a running aggregator: counts of what happened, and how things stand.
//!
//! `count.rs` and `recent.rs` hear every event of `events.rs`; `standing.rs`, `lists.rs` and `trials.rs` look at the
//! stores when somebody asks; `expose.rs` writes counts and standing in the OpenMetrics text form. `admin` serves it.
//! Nothing here changes anything, and every set of labels is bounded: no device, token or reason in the operator's
//! words becomes one.

mod count;
mod recent;
mod standing;
mod lists;
mod trials;
mod expose;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::desk::DeskError;
use crate::publish::PublishError;
use crate::receive::enroll::Registry;
use crate::receive::{Parts, Receiver};
use crate::store::StoreError;

pub use count::Counts;
pub use lists::DeviceRow;
pub use recent::{Recent, Told};
pub use standing::{DeviceCounts, RoundStanding, Standing, StoreStanding};
pub use trials::{TrialStanding, Trials};

/// Media type of [`Observer::metrics`].
pub const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why it cannot be said how things stand.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The round's state.
    #[error(transparent)]
    Desk(#[from] DeskError),
    /// The releases.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

/// Connections that are open, whenever it is called.
pub type Connections = Arc<dyn Fn() -> usize + Send + Sync>;

/// What is looked at.
pub struct View {
    /// Settings, stores, releases, round.
    pub parts: Parts,
    /// Knows which devices were heard of.
    pub receiver: Arc<Receiver>,
    /// What was counted.
    pub counts: Arc<Counts>,
    /// What happened last.
    pub recent: Arc<Recent>,
    /// Open connections.
    pub connections: Connections,
    /// Whether the server ends.
    pub stopping: Arc<AtomicBool>,
    /// The state directory.
    pub directory: PathBuf,
}

/// See the module. All calls block on the disk.
pub struct Observer {
    view: View,
    registry: Registry,
    started_ms: u64,
}

impl std::fmt::Debug for View {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("View").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Observer").field("view", &self.view).finish_non_exhaustive()
    }
}

impl Observer {
    /// Looks at a running aggregator.
    pub fn new(view: View) -> Self {
        let registry = Registry::new(view.parts.storage.coord.clone());
        let started_ms = view.parts.clock.unix_ms();
        Self { view, registry, started_ms }
    }

    /// Why devices would not be served now, each reason a clause; empty when they are.
    pub fn obstacles(&self) -> Vec<String> {
        let mut obstacles = Vec::new();
        if self.view.stopping.load(Ordering::SeqCst) {
            obstacles.push("the aggregator stops".to_owned());
        }
        match self.view.parts.publisher.head() {
            Ok(Some(_)) => {}
            Ok(None) => obstacles.push("there is no release".to_owned()),
            Err(error) => obstacles.push(format!("store: {}", crate::receive::chain(&error))),
        }
        let reserve = self.view.parts.config.receive.reserve_bytes;
        match self.free_bytes() {
            Ok(free) if free.is_none_or(|free| free > reserve) => {}
            Ok(free) => obstacles.push(format!(
                "disk: expected more than {reserve} free bytes (receive.reserve_bytes), got {}",
                free.unwrap_or_default()
            )),
            Err(error) => obstacles.push(format!("disk: {}", crate::receive::chain(&error))),
        }
        obstacles
    }

    /// Free bytes for unfinished uploads and for what is kept, the lesser of both; none if no end is known of either.
    fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        let parts = &self.view.parts;
        let subject = |error| StoreError::not_done("measure", "partials", error);
        let (here, kept) = (parts.partials.free_bytes().map_err(subject)?, parts.storage.blob.free_bytes()?);
        Ok([here, kept].into_iter().flatten().min())
    }

    /// How things stand.
    pub fn standing(&self) -> Result<Standing, ObserveError> {
        standing::look(self)
    }

    /// Everything that is counted and measured, as [`METRICS_TYPE`].
    pub fn metrics(&self) -> Result<String, ObserveError> {
        self.view.counts.take_up(self.view.parts.storage.coord.as_ref())?;
        Ok(expose::expose(&self.view.counts, &self.standing()?))
    }

    /// What happened after this number.
    pub fn recent(&self, after: u64) -> Vec<Told> {
        self.view.recent.after(after)
    }
}
