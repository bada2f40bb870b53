//! Opens the guard and the reviser that a package brings with it. Devices and the aggregator begin here; whoever has
//! other files uses [`Guard::open`] and [`Reviser::open`].

use std::{fs::File, io, io::Read, path::PathBuf};

use commonweal_adapter::{
    Adapter,
    disk::{self, AdapterKind, ReadError},
};
use commonweal_package::{EncoderPackage, Hash, Package};
use commonweal_runtime::{
    Asking, Cancel, Classifier, ClassifyOptions, MemoryError, Model, OpenOptions,
    memory::{self, Shape, encoder_bytes},
};

use crate::{
    config::{ConfigError, GuardConfig, Kind},
    constitution::{Constitution, ConstitutionError},
    form::Start,
    guard::{Guard, GuardError},
    revise::{ReviseError, Reviser},
    words::{Words, WordsFileError},
};

/// The guard's configuration in a package.
const GUARD: &str = "guard.toml";
/// The constitution in a package.
const CONSTITUTION: &str = "constitution.toml";
/// The reviser's adapter in a package.
const REVISER: &str = "adapters/reviser.safetensors";
/// An adapter of rank 64 on all linears of a model of 8 billion parameters has 670 MB.
const ADAPTER_BYTES_MAX: u64 = 1 << 30;
/// Far more than `guard.toml` or `constitution.toml` may have; their parsers are stricter.
const TEXT_BYTES_MAX: u64 = 1 << 20;

/// Why a package's guard or reviser cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The package does not have the file.
    #[error("package {} has no {name}", package.display())]
    Missing {
        /// The package's directory.
        package: PathBuf,
        /// The file that is absent from its manifest.
        name: String,
    },
    /// The file cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is no adapter.
    #[error("{name} is not an adapter")]
    Adapter {
        /// The file.
        name: String,
        /// What is wrong with it.
        #[source]
        source: ReadError,
    },
    /// The adapter is for something else.
    #[error("{name} must be a {expected} adapter for base {base}, is a {got} adapter for {got_base}")]
    Foreign {
        /// The file.
        name: String,
        /// What it should be for.
        expected: AdapterKind,
        /// The package's base.
        base: Hash,
        /// What it is for.
        got: AdapterKind,
        /// The base that it was trained on.
        got_base: Hash,
    },
    /// The guard's own package does not open.
    #[error("guard's package {} does not open", path.display())]
    Package {
        /// The package's directory.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<commonweal_package::OpenError>,
    },
    /// The guard's own package cannot be run.
    #[error("guard's package {} cannot be run", path.display())]
    Run {
        /// The package's directory.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<commonweal_runtime::OpenError>,
    },
    /// The guard's own package does not fit in memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// `guard.toml` cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// `constitution.toml` cannot be used.
    #[error(transparent)]
    Constitution(#[from] ConstitutionError),
    /// The guard does not fit the model.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The reviser does not fit the model.
    #[error(transparent)]
    Reviser(#[from] ReviseError),
}

impl Guard {
    /// The guard that the model's package brings: `guard.toml`, and what it names: a package of the guard's own, an
    /// adapter, or both, and words from this package.
    pub fn from_package(model: &Model, cancel: &Cancel) -> Result<Self, OpenError> {
        Self::of_package(model, Start::Now(cancel))
    }

    /// The same with no session opened and nothing run: the first judgement does that, after memory was asked for. What
    /// is wrong with the files is told here all the same. [`Guard::close`] puts it to rest again.
    pub fn at_rest(model: &Model) -> Result<Self, OpenError> {
        Self::of_package(model, Start::AtRest)
    }

    fn of_package(model: &Model, start: Start<'_>) -> Result<Self, OpenError> {
        let config = GuardConfig::from_toml(&text(model, GUARD)?)?;
        let words = config.open_words(model.package()).map_err(GuardError::Words)?;
        if let (Kind::Classifier, Some(path)) = (config.kind, &config.package) {
            return Ok(Self::of_classifier(open_classifier(model, path, start)?, config, words)?);
        }
        let own = config.package.as_deref().map(|path| open_own(model, path, start)).transpose()?;
        let model = own.as_ref().unwrap_or(model);
        let adapter =
            config.adapter.as_deref().map(|name| adapter(model, name, AdapterKind::Guard)).transpose()?;
        Ok(Self::over(model, config, adapter.as_ref(), words, start)?)
    }
}

impl GuardConfig {
    /// The words that the configuration names, from the package that has it.
    pub(crate) fn open_words(&self, package: &Package) -> Result<Option<Words>, WordsFileError> {
        self.words.as_ref().map(|words| Words::of_package(package, &words.file)).transpose()
    }
}

impl Reviser {
    /// The reviser that the model's package brings: `constitution.toml`, or the default constitution where there is
    /// none, and `adapters/reviser.safetensors`, or the base alone.
    pub fn from_package(model: &Model) -> Result<Self, OpenError> {
        let constitution = match model.package().file(CONSTITUTION) {
            Some(_) => Constitution::from_toml(&text(model, CONSTITUTION)?)?,
            None => Constitution::default(),
        };
        let adapter = match model.package().file(REVISER) {
            Some(_) => Some(adapter(model, REVISER, AdapterKind::Reviser)?),
            None => None,
        };
        Ok(Self::open(model, constitution, adapter.as_ref())?)
    }
}

/// How the memory that the guard's own package needs is asked for.
const ASKING: Asking = Asking {
    what: "opening the guard's own package, beside the base,",
    lower: "a guard of fewer bits or layers needs less, and a guard that is an adapter over the base next to none",
};

/// The guard's own model, on what the base runs on.
fn open_own(base: &Model, path: &str, start: Start<'_>) -> Result<Model, OpenError> {
    let path = base.package().directory().join(path);
    let open = Package::open(&path).map_err(Box::new);
    let package = open.map_err(|source| OpenError::Package { path: path.clone(), source })?;
    let options = OpenOptions::default();
    let model = match start {
        Start::AtRest => Model::at_rest(base.library(), &package, options, ASKING),
        Start::Now(cancel) => {
            let read = |source| OpenError::Read { path: package.weights(), source };
            let shape = Shape::of(&package).map_err(read)?;
            let options = shape.fit(ASKING.what, options, memory::available_for_process(), ASKING.lower)?;
            Model::open_with(base.library(), &package, options, cancel)
        }
    };
    model.map_err(|source| OpenError::Run { path, source: Box::new(source) })
}

/// The guard's own classifier, likewise.
fn open_classifier(base: &Model, path: &str, start: Start<'_>) -> Result<Classifier, OpenError> {
    let path = base.package().directory().join(path);
    let open = EncoderPackage::open(&path).map_err(Box::new);
    let package = open.map_err(|source| OpenError::Package { path: path.clone(), source })?;
    let options = ClassifyOptions::default();
    let classifier = match start {
        Start::AtRest => Classifier::at_rest(base.library(), &package, options, ASKING),
        Start::Now(_) => {
            let weights = std::fs::metadata(package.weights());
            let weights = weights.map_err(|source| OpenError::Read { path: package.weights(), source })?;
            let needed = encoder_bytes(&package.manifest().encoder, weights.len(), &options);
            memory::check(ASKING.what, needed, memory::available_for_process(), ASKING.lower)?;
            Classifier::open(base.library(), &package, options)
        }
    };
    classifier.map_err(|source| OpenError::Run { path, source: Box::new(source) })
}

fn bytes(model: &Model, name: &str, bytes_max: u64) -> Result<Vec<u8>, OpenError> {
    let package = model.package();
    let missing = || OpenError::Missing { package: package.directory().into(), name: name.to_owned() };
    let path = package.file(name).ok_or_else(missing)?;
    let read = |path: &PathBuf| {
        let mut bytes = Vec::new();
        File::open(path)?.take(bytes_max + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > bytes_max {
            return Err(io::Error::other(format!("file has more than {bytes_max} bytes")));
        }
        Ok(bytes)
    };
    read(&path).map_err(|source| OpenError::Read { path, source })
}

fn text(model: &Model, name: &str) -> Result<String, OpenError> {
    let invalid = |error: std::string::FromUtf8Error| OpenError::Read {
        path: name.into(),
        source: io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()),
    };
    String::from_utf8(bytes(model, name, TEXT_BYTES_MAX)?).map_err(invalid)
}

fn adapter(model: &Model, name: &str, expected: AdapterKind) -> Result<Adapter, OpenError> {
    let read = disk::read(&bytes(model, name, ADAPTER_BYTES_MAX)?);
    let (adapter, facts) = read.map_err(|source| OpenError::Adapter { name: name.to_owned(), source })?;
    let (base, got_base) = (model.manifest().base, Hash(facts.base));
    if facts.kind != expected || got_base != base {
        let name = name.to_owned();
        return Err(OpenError::Foreign { name, expected, base, got: facts.kind, got_base });
    }
    Ok(adapter)
}
