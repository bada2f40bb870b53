//! Opens what a verb needs: settings, policy, package, model, guard, reviser, store.

use std::{
    fs::File,
    io::{BufReader, IsTerminal},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use commonweal_adapter::AdapterLayout;
use commonweal_package::Package;
use commonweal_protocol::BaseHash;
use commonweal_runtime::{
    Asking, Cancel, DeviceError, Devices, Library, MemoryError, Model, OpenOptions,
    memory::{self, Available, Shape},
};
use commonweal_safety::{Constitution, Guard, Reviser};

use super::{Shared, exit::BadInput, policy_file::PolicyFile};
use crate::{
    forms,
    keys::{self, KeyPlace},
    policy::Policy,
    rows::{self, Form, Parsed, RowError},
    sample::Sample,
    settings::{self, SettingsFile},
    store::{Store, StoreError},
};

/// Bad lines of one file that are named; a wrong file has nothing else.
const BAD_LINES_SHOWN: usize = 20;

/// The state directory and the settings in it.
pub(super) struct Place {
    pub(super) directory: PathBuf,
    pub(super) settings: SettingsFile,
    pub(super) key: KeyPlace,
}

impl Place {
    pub(super) fn find(shared: &Shared) -> Result<Self> {
        let directory = shared.dir.clone().unwrap_or_else(settings::default_directory);
        let settings = SettingsFile::read(&directory)?;
        let key = shared.store_key.clone().or_else(|| settings.store_key.clone());
        let key = key.unwrap_or_else(|| KeyPlace::File(directory.join(keys::FILE)));
        Ok(Self { directory, settings, key })
    }

    pub(super) fn store(&self) -> Result<Store> {
        Ok(Store::open_with(&self.directory, self.key.clone())?)
    }

    pub(super) fn look(&self) -> Result<Store> {
        Ok(Store::open_shared_with(&self.directory, self.key.clone())?)
    }

    /// The store to add to, also while a daemon works in it.
    pub(super) fn store_or_look(&self) -> Result<Store> {
        match Store::open_with(&self.directory, self.key.clone()) {
            Err(StoreError::Locked(_)) => self.look(),
            opened => Ok(opened?),
        }
    }

    pub(super) fn policy(&self, shared: &Shared) -> Result<Policy> {
        self.policy_file(shared).read()
    }

    pub(super) fn policy_file(&self, shared: &Shared) -> PolicyFile {
        PolicyFile::of(&self.directory, shared.policy.as_deref())
    }
}

/// How the memory that the package needs is asked for.
const ASKING: Asking = Asking {
    what: "opening the package",
    lower: "--context N with fewer tokens needs less, and so does a package of fewer bits",
};

/// The base, opened once, with guard and reviser over it.
pub(super) struct Stages {
    pub(super) model: Model,
    pub(super) guard: Guard,
    pub(super) reviser: Reviser,
}

impl Stages {
    pub(super) fn open(shared: &Shared, place: &Place, policy: &Policy, cancel: &Cancel) -> Result<Self> {
        let model = open_model(shared, place)?;
        let guard = Guard::from_package(&model, cancel).context("guard")?;
        Self::over(model, guard, policy, constitution(shared)?)
    }

    /// The guard under the thresholds of the device's owner, the reviser under their constitution.
    pub(super) fn over(
        model: Model,
        guard: Guard,
        policy: &Policy,
        constitution: Option<Constitution>,
    ) -> Result<Self> {
        let mut config = guard.config().clone();
        policy.set_thresholds(&mut config).context("guard")?;
        let guard = guard.with_thresholds(config).context("guard")?;
        let reviser = Reviser::from_package(&model).context("reviser")?;
        let reviser = match constitution {
            Some(constitution) => reviser.with_constitution(constitution),
            None => reviser,
        };
        Ok(Self { model, guard, reviser })
    }

    pub(super) fn base(&self) -> BaseHash {
        crate::pipeline::base_of(&self.model)
    }

    pub(super) fn layout(&self) -> Arc<AdapterLayout> {
        Arc::clone(self.model.layout())
    }
}

/// What a package is opened with: its hashes are verified, the memory that it needs was compared with what there is, and
/// no session is open.
pub(super) struct Opener {
    package: Package,
    context_max: Option<usize>,
    options: OpenOptions,
    library: Library,
    devices: Devices,
}

impl Opener {
    pub(super) fn find(shared: &Shared, place: &Place) -> Result<Self> {
        let package = open_package(shared, place)?;
        memory::set_budget(place.policy(shared)?.budget.memory.count());
        let context_max = shared.context.or(place.settings.context.map(NonZeroUsize::get));
        // Before a device is tried, since that opens the package already.
        let options = fitting(&package, context_max, memory::available_for_process())?;
        let library = load_library(shared, place)?;
        Ok(Self { package, context_max, options, library, devices: devices(shared, place) })
    }

    /// Asks again for the memory that trying a device needs: what there was at the start may be in use now.
    pub(super) fn ask_for_memory(&self) -> Result<(), MemoryError> {
        let fit = |shape: Shape<'_>| fit(&shape, self.context_max, memory::available_for_process());
        // A package that was verified has its weights; if they went away since, whoever opens them says so.
        Shape::of(&self.package).map_or(Ok(()), |shape| fit(shape).map(drop))
    }

    /// Whether a device is to be tried with the package before its sessions go there.
    pub(super) fn would_try(&self) -> Result<bool, DeviceError> {
        self.library.would_try(&self.devices)
    }

    /// Chooses the device that sessions are opened on.
    pub(super) fn choose(&mut self, cancel: &Cancel) -> Result<(), DeviceError> {
        let (library, choice) = self.library.choose_with(&self.devices, &self.package, cancel)?;
        tracing::info!("{choice}");
        self.library = library;
        Ok(())
    }

    pub(super) fn open(&self) -> Result<Model> {
        Ok(Model::open(&self.library, &self.package, self.options)?)
    }

    /// The stages with no session open: the first call that needs one opens it.
    pub(super) fn at_rest(&self, policy: &Policy, constitution: Option<Constitution>) -> Result<Stages> {
        let model = Model::at_rest(&self.library, &self.package, self.options, ASKING)?;
        let guard = Guard::at_rest(&model).context("guard")?;
        Stages::over(model, guard, policy, constitution)
    }
}

/// The package, verified.
pub(super) fn open_package(shared: &Shared, place: &Place) -> Result<Package> {
    let named = shared.package.clone().or_else(|| place.settings.package.clone());
    Ok(Package::open(settings::find_package(named)?)?)
}

/// The base alone.
pub(super) fn open_model(shared: &Shared, place: &Place) -> Result<Model> {
    let mut opener = Opener::find(shared, place)?;
    opener.choose(&Cancel::new())?;
    opener.open()
}

/// The owner's own constitution, if one is named.
pub(super) fn constitution(shared: &Shared) -> Result<Option<Constitution>> {
    let Some(path) = &shared.constitution else { return Ok(None) };
    let text = settings::read_named(path)?;
    Ok(Some(Constitution::from_toml(&text).with_context(|| path.display().to_string())?))
}

/// Options with which the package fits in the memory that is available.
fn fitting(
    package: &Package,
    context_max: Option<usize>,
    available: Option<Available>,
) -> Result<OpenOptions> {
    Ok(fit(&Shape::of(package)?, context_max, available)?)
}

fn fit(
    shape: &Shape<'_>,
    context_max: Option<usize>,
    available: Option<Available>,
) -> Result<OpenOptions, MemoryError> {
    let options = OpenOptions { context_max, ..OpenOptions::default() };
    shape.fit(ASKING.what, options, available, ASKING.lower)
}

/// The runtime library, with the provider that was named.
pub(super) fn load_library(shared: &Shared, place: &Place) -> Result<Library> {
    let library = shared.library.clone().or_else(|| place.settings.library.clone());
    let threads = shared.threads.and_then(NonZeroUsize::new).or(place.settings.threads);
    let library = Library::load_with(library.as_deref(), threads)?;
    if let Some(provider) = shared.provider.as_ref().or(place.settings.provider.as_ref()) {
        library.add_provider(provider)?;
    }
    Ok(library)
}

/// What the network shall run on.
pub(super) fn devices(shared: &Shared, place: &Place) -> Devices {
    shared.device.clone().or_else(|| place.settings.device.clone()).unwrap_or_default()
}

/// Threads that the network runs on.
pub(super) fn threads(shared: &Shared, place: &Place) -> usize {
    let chosen = shared.threads.and_then(NonZeroUsize::new).or(place.settings.threads);
    chosen.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get)
}

/// Reads a file of samples; bad lines are named on stderr and left out.
pub(super) fn read_samples(path: &Path) -> Result<Parsed<Sample>> {
    read_rows(path, forms::sample_of)
}

/// Reads a file's rows with `parse`. A file without any good one is bad input.
pub(super) fn read_rows<T>(
    path: &Path,
    parse: impl Fn(serde_json::Value) -> Result<T, RowError>,
) -> Result<Parsed<T>> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| BadInput(format!("cannot open {shown}: {error}")))?;
    let parsed =
        rows::read(BufReader::new(file), Form::of(path), parse).with_context(|| shown.to_string())?;
    for bad in parsed.bad.iter().take(BAD_LINES_SHOWN) {
        tracing::warn!("{shown}: {bad}; left out");
    }
    if parsed.bad.len() > BAD_LINES_SHOWN {
        tracing::warn!("{shown}: {} more lines left out", parsed.bad.len() - BAD_LINES_SHOWN);
    }
    if parsed.good.is_empty() {
        return Err(
            BadInput(format!("{shown}: no usable row, {} lines were left out", parsed.bad.len())).into()
        );
    }
    Ok(parsed)
}

/// A bar on a terminal, nothing elsewhere.
pub(super) fn bar(what: &'static str, length: usize) -> indicatif::ProgressBar {
    if !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    let style = indicatif::ProgressStyle::with_template("{msg:10} [{bar:32}] {pos}/{len}  {eta}");
    let bar = indicatif::ProgressBar::new(length as u64);
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar
}

/// A handle that Ctrl-C and SIGTERM use. A second one ends the process at once, with the code of a signal: whoever sends
/// it wants no orderly end.
pub(super) fn stop_on_signal(runtime: &tokio::runtime::Handle) -> Cancel {
    let cancel = Cancel::new();
    let stopped = cancel.clone();
    runtime.spawn(async move {
        signal().await;
        stopped.cancel();
        std::process::exit(signal().await);
    });
    cancel
}

/// Waits for Ctrl-C or SIGTERM; gives the exit code of a process that it ends.
async fn signal() -> i32 {
    let terminated = async {
        #[cfg(unix)]
        if let Ok(mut signal) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            signal.recv().await;
            return;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => 128 + 2,
        () = terminated => 128 + 15,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use commonweal_runtime::memory::Bound;

    #[test]
    fn a_package_that_does_not_fit_is_refused_and_little_room_makes_small_caches() {
        let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/reference/package");
        assert!(package.exists(), "{} is missing: run scripts/setup first", package.display());
        let package = Package::open(package).unwrap();
        let with = |bytes| fitting(&package, None, Some(Available { bytes, bound: Bound::Machine }));
        let refused = with(50_000_000).unwrap_err().to_string();
        assert!(refused.contains("the machine has 50 MB left") && refused.contains("--context"), "{refused}");
        assert!(with(200_000_000).unwrap().cache_bytes_max < 100_000_000);
        assert_eq!(with(1 << 40).unwrap().cache_bytes_max, OpenOptions::default().cache_bytes_max);
    }
}
