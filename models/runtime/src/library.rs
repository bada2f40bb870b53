//! Loads ONNX Runtime, once per process, and holds its environment: the one thread pool that all sessions share.
//! `model.rs` opens sessions in it. Never downloads anything, and never lets the library contact anyone: telemetry
//! is switched off before the library's first instruction runs.

use std::{
    env, fmt,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
};

use ort::{
    LoadDynamicError,
    environment::{Environment, GlobalThreadPoolOptions},
    logging::LogLevel,
};

use crate::device::{Device, Placement};

/// The variable that names the library when no explicit path is given.
pub const PATH_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Read by Microsoft's builds (1.29 and later) when they are loaded; anything else, `with_telemetry(false)` included,
/// comes too late for them.
const TELEMETRY_VARIABLE: &str = "ORT_DISABLE_TELEMETRY";

/// Where `scripts/fetch-runtime` puts the library, below the workspace.
const FETCHED: &str = "target/runtime";

/// Where a package of the system's puts the library.
const INSTALLED: &str = "/usr/lib/commonweal";

/// The loaded library and its environment. Cheap to clone; lives until the process ends.
#[derive(Clone)]
pub struct Library {
    environment: Environment,
    path: PathBuf,
    threads: NonZeroUsize,
    placement: Placement,
}

/// Why the library could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// No library lies in any of the places.
    #[error(
        "onnx runtime library not found, looked at {}; run scripts/setup, or set {PATH_VARIABLE}",
        Listed(tried)
    )]
    Missing {
        /// Every path that was looked at, in order.
        tried: Vec<PathBuf>,
    },
    /// A file lies there, but it does not load as ONNX Runtime.
    #[error("{} does not load as the onnx runtime library; run scripts/setup, or set {PATH_VARIABLE}", path.display())]
    NotLoadable {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        #[source]
        source: LoadDynamicError,
    },
    /// The library is older than the interface this crate was built for.
    #[error(
        "onnx runtime library {} must be version 1.{needed} or newer, got {got}; run scripts/setup",
        path.display()
    )]
    TooOld {
        /// The file.
        path: PathBuf,
        /// The oldest accepted minor version.
        needed: u32,
        /// The version the library reports.
        got: String,
    },
    /// This process runs another library already.
    #[error("onnx runtime library is already loaded from {}, cannot load {}", loaded.display(), wanted.display())]
    AlreadyLoaded {
        /// The library in use.
        loaded: PathBuf,
        /// The library asked for.
        wanted: PathBuf,
    },
    /// This process runs its one thread pool already.
    #[error("thread pool already has {loaded} threads, cannot give it {wanted}")]
    ThreadsFixed {
        /// Threads in use.
        loaded: NonZeroUsize,
        /// Threads asked for.
        wanted: NonZeroUsize,
    },
    /// The library refused to start.
    #[error("onnx runtime environment does not start")]
    Start(#[source] ort::Error),
}

struct Listed<'a>(&'a [PathBuf]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, path) in self.0.iter().enumerate() {
            write!(formatter, "{}{}", if index == 0 { "" } else { ", " }, path.display())?;
        }
        Ok(())
    }
}

/// ONNX Runtime allows one environment in the life of a process, so the first one stays.
static LOADED: Mutex<Option<Library>> = Mutex::new(None);

impl Library {
    /// Loads the library with as many threads as the machine runs at once. A second call returns the same library.
    ///
    /// The file is, in this order: `explicit`; the one that `ORT_DYLIB_PATH` names; `target/runtime/` of the
    /// workspace that the executable or the current directory lies in; beside the executable; `/usr/lib/commonweal/`. A path
    /// that was named and does not load is an error: nothing else is tried in its stead.
    pub fn load(explicit: Option<&Path>) -> Result<Self, LibraryError> {
        Self::load_with(explicit, None)
    }

    /// Like [`Library::load`], with a number of threads. All sessions share this one pool, so that two of them do
    /// not spin against each other; the first load of the process decides.
    pub fn load_with(explicit: Option<&Path>, threads: Option<NonZeroUsize>) -> Result<Self, LibraryError> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = &*loaded {
            return library.again(explicit, threads);
        }
        let path = locate(explicit)?;
        let threads = threads.or_else(|| thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
        let library = Self::start(path, threads)?;
        tracing::debug!(path = %library.path.display(), threads, "onnx runtime loaded");
        Ok(loaded.insert(library).clone())
    }

    fn again(&self, explicit: Option<&Path>, threads: Option<NonZeroUsize>) -> Result<Self, LibraryError> {
        if let Some(wanted) = explicit
            && canonical(wanted) != canonical(&self.path)
        {
            return Err(LibraryError::AlreadyLoaded {
                loaded: self.path.clone(),
                wanted: wanted.to_path_buf(),
            });
        }
        match threads {
            Some(wanted) if wanted != self.threads => {
                Err(LibraryError::ThreadsFixed { loaded: self.threads, wanted })
            }
            _ => Ok(self.clone()),
        }
    }

    fn start(path: PathBuf, threads: NonZeroUsize) -> Result<Self, LibraryError> {
        forbid_telemetry();
        let builder = ort::init_from(&path).map_err(|source| match source {
            LoadDynamicError::BadVersion { version_str, .. } => {
                LibraryError::TooOld { path: path.clone(), needed: ort::MINOR_VERSION, got: version_str }
            }
            source => LibraryError::NotLoadable { path: path.clone(), source },
        })?;
        let pool = GlobalThreadPoolOptions::default()
            .with_intra_threads(threads.get())
            .and_then(|pool| pool.with_inter_threads(1))
            .and_then(|pool| pool.with_spin_control(true))
            .map_err(LibraryError::Start)?;
        let environment = builder
            .with_name("commonweal")
            .with_telemetry(false)
            .with_global_thread_pool(pool)
            .build()
            .map_err(LibraryError::Start)?;
        environment.set_log_level(LogLevel::Warning);
        Ok(Self { environment, path, threads, placement: Placement::CPU })
    }

    /// The file that was loaded.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Threads of the pool that all sessions share.
    pub fn threads(&self) -> NonZeroUsize {
        self.threads
    }

    /// What its sessions run on; the processor, unless [`Library::choose`] found another.
    pub fn device(&self) -> Device {
        self.placement.device
    }

    pub(crate) fn placement(&self) -> Placement {
        self.placement
    }

    /// The same library with its sessions elsewhere.
    pub(crate) fn at(&self, placement: Placement) -> Self {
        Self { placement, ..self.clone() }
    }

    pub(crate) fn environment(&self) -> &Environment {
        &self.environment
    }
}

impl fmt::Debug for Library {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Library")
            .field("path", &self.path)
            .field("threads", &self.threads)
            .field("placement", &self.placement)
            .finish_non_exhaustive()
    }
}

/// Switches the library's telemetry off for this process. A program calls it first thing in `main`: later, another
/// thread may read the environment at that moment, and not every C library can bear that. [`Library::load`] makes up for
/// a program that did not.
pub fn forbid_telemetry() {
    if env::var_os(TELEMETRY_VARIABLE).is_some_and(|value| value == "1") {
        return;
    }
    #[expect(
        unsafe_code,
        reason = "the library reads this variable when it is loaded and takes no other setting"
    )]
    // SAFETY: Rust's own readers of the environment take the same lock as `set_var`. Foreign code that reads it at the
    // same time (`getenv` of a C library, as in resolving a name) does not; there is none while `main` has no other
    // thread, which is where our programs call this, and nothing is written a second time. Whoever only loads the
    // library must not run such code beside the first load. ONNX Runtime itself is not loaded before.
    unsafe {
        env::set_var(TELEMETRY_VARIABLE, "1");
    }
}

fn locate(explicit: Option<&Path>) -> Result<PathBuf, LibraryError> {
    let named = explicit.map(Path::to_path_buf);
    let named =
        named.or_else(|| env::var_os(PATH_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from));
    let tried = match named {
        Some(path) => vec![path],
        None => usual_places(env::current_exe().ok().as_deref(), env::current_dir().ok().as_deref()),
    };
    // Absolute, since the loader resolves relative paths against the executable and search paths.
    match tried.iter().find(|path| path.is_file()) {
        Some(path) => Ok(canonical(path)),
        None => Err(LibraryError::Missing { tried }),
    }
}

/// The places to look at, in order, for an executable and a current directory.
fn usual_places(executable: Option<&Path>, current: Option<&Path>) -> Vec<PathBuf> {
    let file = format!("{}onnxruntime{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    let workspace = |start: &Path| {
        start.ancestors().find(|folder| folder.join("Cargo.lock").is_file()).map(Path::to_path_buf)
    };
    let folder = executable.and_then(Path::parent);
    let mut places: Vec<PathBuf> = [folder, current]
        .into_iter()
        .flatten()
        .filter_map(workspace)
        .map(|root| root.join(FETCHED).join(&file))
        .collect();
    places.dedup();
    places.extend(folder.map(|folder| folder.join(&file)));
    if cfg!(unix) {
        places.push(Path::new(INSTALLED).join(&file));
    }
    places
}

fn canonical(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_library_that_is_absent_is_an_error_that_says_what_to_do() {
        let error = locate(Some(Path::new("/nowhere/libonnxruntime.so"))).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/nowhere/libonnxruntime.so"), "{text}");
        assert!(text.contains("scripts/setup") && text.contains(PATH_VARIABLE), "{text}");
    }

    #[test]
    fn looks_in_the_workspace_before_beside_the_executable_and_where_a_system_installs_it_last() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("Cargo.lock"), "").unwrap();
        let folder = root.path().join("target/release");
        std::fs::create_dir_all(&folder).unwrap();
        let file = format!("{}onnxruntime{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
        let places = usual_places(Some(&folder.join("edge-client")), Some(root.path()));
        let mut expected = vec![root.path().join(FETCHED).join(&file), folder.join(&file)];
        if cfg!(unix) {
            expected.push(Path::new("/usr/lib/commonweal").join(&file));
        }
        assert_eq!(places, expected);
    }
}
