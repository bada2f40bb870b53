//! Where things are: flag, then environment, then `device.toml` in the state directory, then a default that works on
//! one machine. Read once by `cli/`, handed down as values.

use std::{
    env,
    fs::File,
    io::{self, Read},
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
};

use commonweal_runtime::Devices;
use commonweal_traces::Endpoint;
use commonweal_transport::{Congestion, LinkLimits};
use serde::{Deserialize, Serialize};

use crate::keys::KeyPlace;

/// A person's file of settings, policy or principles has a few pages; more is a wrong file.
const FILE_BYTES_MAX: u64 = 256 * 1024;

/// Where `scripts/package-deb` puts the bundled package.
const INSTALLED: &str = "/usr/share/commonweal/package";

/// `device.toml`; the first eight have a flag and an environment variable too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SettingsFile {
    /// The model package's directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<PathBuf>,
    /// The ONNX Runtime library.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub library: Option<PathBuf>,
    /// What the network runs on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Devices>,
    /// A provider of devices that comes as a file of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub provider: Option<PathBuf>,
    /// Threads that the network runs on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<NonZeroUsize>,
    /// Longest conversation in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<NonZeroUsize>,
    /// Where the key is that seals the state directory: a file, or `keyring:NAME`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_key: Option<KeyPlace>,
    /// An OpenTelemetry collector that gets spans of this device's updates. Whoever sets it agrees that their place goes with
    /// each update (docs/privacy.md).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traces: Option<String>,
    /// Longest wait between two polls, whatever the aggregator asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poll_seconds_max: Option<NonZeroU64>,
    /// A connection on which nothing moves for so long is given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stall_seconds: Option<NonZeroU64>,
    /// How fast updates are sent: `cubic`, or `bbr` for a link that loses packets at random and is not paid for by the byte
    /// (docs/faults.md).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub congestion: Option<Congestion>,
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Larger than any settings.
    #[error("{path} has more than {FILE_BYTES_MAX} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not TOML, or a key is unknown or of another type.
    #[error("{path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// No collector has such an address. It is not told again: there may be a password in it.
    #[error("{place}: {expected}")]
    Traces {
        /// The flag, or the file.
        place: String,
        /// What would be taken.
        expected: String,
    },
    /// No package was named and none is at the usual places.
    #[error("no model package: looked at {}; name one with --package DIR, or run scripts/setup", .0.join(", "))]
    NoPackage(Vec<String>),
}

impl SettingsFile {
    /// Reads `device.toml`; an absent file is an empty one.
    pub fn read(directory: &Path) -> Result<Self, SettingsError> {
        let path = directory.join("device.toml");
        let Some(text) = read_text(&path)? else { return Ok(Self::default()) };
        let settings: Self = toml::from_str(&text)
            .map_err(|source| SettingsError::Parse { path: path.clone(), source: Box::new(source) })?;
        settings.collector(None).map_err(|error| match error {
            SettingsError::Traces { expected, .. } => {
                SettingsError::Traces { place: format!("traces in {}", path.display()), expected }
            }
            error => error,
        })?;
        Ok(settings)
    }

    /// The numbers of the link, whose pauses are drawn by this seed.
    pub fn link(&self, seed: u64) -> LinkLimits {
        let mut limits =
            LinkLimits { seed, congestion: self.congestion.unwrap_or_default(), ..LinkLimits::default() };
        if let Some(seconds) = self.stall_seconds {
            limits.stall_ms = seconds.get().saturating_mul(1000);
        }
        limits
    }

    /// Where spans go, if anywhere: by the flag, else by the file.
    pub fn collector(&self, flag: Option<&str>) -> Result<Option<Endpoint>, SettingsError> {
        let text = flag.or(self.traces.as_deref());
        let place = || "--traces or COMMONWEAL_TRACES".to_owned();
        text.map(str::parse)
            .transpose()
            .map_err(|expected| SettingsError::Traces { place: place(), expected })
    }
}

/// A person's text file; `None` when there is none. One that cannot be read is an error, never an absent one.
pub fn read_text(path: &Path) -> Result<Option<String>, SettingsError> {
    let failed = |source| SettingsError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        // Below something that is no directory, there is no file either; `store.rs` says what is wrong there.
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(SettingsError::TooLarge { path: path.to_owned() });
    }
    Ok(Some(text))
}

/// A file that was named, and so must be there.
pub fn read_named(path: &Path) -> Result<String, SettingsError> {
    let absent = || SettingsError::Read { path: path.to_owned(), source: io::ErrorKind::NotFound.into() };
    read_text(path)?.ok_or_else(absent)
}

/// The state directory when none is named: `$XDG_DATA_HOME/commonweal/device`.
pub fn default_directory() -> PathBuf {
    let data = env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    data.unwrap_or_else(|| home.join(".local/share")).join("commonweal").join("device")
}

/// The package when none is named: beside the executable, in the build tree, below the working directory, or where a package
/// of the system's puts it.
pub fn find_package(named: Option<PathBuf>) -> Result<PathBuf, SettingsError> {
    if let Some(path) = named {
        return Ok(path);
    }
    let places = usual_packages(env::current_exe().ok().as_deref());
    places.iter().find(|place| place.join("package.toml").is_file()).cloned().ok_or_else(|| {
        SettingsError::NoPackage(places.iter().map(|place| place.display().to_string()).collect())
    })
}

fn usual_packages(executable: Option<&Path>) -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(beside) = executable.and_then(Path::parent) {
        places.push(beside.join("package"));
        // target/release/edge-client → target/reference/package
        places.extend(beside.parent().map(|target| target.join("reference/package")));
    }
    places.push(PathBuf::from("target/reference/package"));
    if cfg!(unix) {
        places.push(PathBuf::from(INSTALLED));
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_what_it_names_and_refuses_what_it_does_not_know() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(SettingsFile::read(directory.path()).unwrap(), SettingsFile::default());
        std::fs::write(directory.path().join("device.toml"), "threads = 3\n").unwrap();
        assert_eq!(SettingsFile::read(directory.path()).unwrap().threads, NonZeroUsize::new(3));
        // Zero seconds between polls would never rest.
        std::fs::write(directory.path().join("device.toml"), "device = \"cuda:1,cpu\"\n").unwrap();
        let device = SettingsFile::read(directory.path()).unwrap().device;
        assert_eq!(device, Some("cuda:1,cpu".parse().unwrap()));
        for text in [
            "device = \"gpu\"\n",
            "treads = 3\n",
            "threads = 0\n",
            "poll_seconds_max = 0\n",
            "stall_seconds = 0\n",
            "congestion = \"reno\"\n",
            "congestion = true\n",
        ] {
            std::fs::write(directory.path().join("device.toml"), text).unwrap();
            assert!(
                matches!(SettingsFile::read(directory.path()), Err(SettingsError::Parse { .. })),
                "{text}"
            );
        }
        std::fs::write(directory.path().join("device.toml"), "traces = \"http://me:word@collector:4318\"\n")
            .unwrap();
        let told = SettingsFile::read(directory.path()).unwrap_err().to_string();
        assert!(
            told.contains("traces in ") && told.contains("http://HOST:PORT") && !told.contains("word@"),
            "{told}"
        );
        let told = SettingsFile::default().collector(Some("http://me:word@h")).unwrap_err().to_string();
        assert!(told.starts_with("--traces") && !told.contains("word@"), "{told}");
    }

    #[test]
    fn the_link_is_as_the_file_says() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(SettingsFile::default().link(7), LinkLimits { seed: 7, ..LinkLimits::default() });
        for (word, congestion) in [("cubic", Congestion::Cubic), ("bbr", Congestion::Bbr)] {
            let text = format!("stall_seconds = 3\ncongestion = \"{word}\"\n");
            std::fs::write(directory.path().join("device.toml"), text).unwrap();
            let limits = SettingsFile::read(directory.path()).unwrap().link(7);
            assert_eq!(limits, LinkLimits { seed: 7, stall_ms: 3_000, congestion, ..LinkLimits::default() });
        }
    }

    #[test]
    fn what_cannot_be_read_is_not_taken_for_absent() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.toml");
        assert_eq!(read_text(&path).unwrap(), None);
        assert!(matches!(read_named(&path), Err(SettingsError::Read { .. })));
        assert!(matches!(read_text(directory.path()), Err(SettingsError::Read { .. })));
        std::fs::write(&path, " ".repeat(FILE_BYTES_MAX as usize + 1)).unwrap();
        assert!(matches!(read_text(&path), Err(SettingsError::TooLarge { .. })));
    }

    #[test]
    fn a_named_package_is_taken_as_it_is() {
        assert_eq!(find_package(Some("x".into())).unwrap(), Path::new("x"));
    }

    #[cfg(unix)]
    #[test]
    fn a_program_that_a_system_installed_finds_its_package_last() {
        let places = usual_packages(Some(Path::new("/usr/bin/edge-client")));
        assert_eq!(places[0], Path::new("/usr/bin/package"));
        assert_eq!(places.last().unwrap(), Path::new("/usr/share/commonweal/package"));
        let told = SettingsError::NoPackage(vec!["a/package".into(), INSTALLED.into()]).to_string();
        assert!(told.contains("looked at a/package, /usr/share/commonweal/package;"), "{told}");
    }
}
