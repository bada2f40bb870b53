//! Opens a package: reads the manifest (`manifest.rs`), verifies the hash of every file. The runtime and every
//! process that names a base begin here.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use commonweal_adapter::AdapterLayout;
use serde::{Deserialize, Serialize};

use crate::manifest::{Hash, MANIFEST, Manifest, ManifestError, OPTIONAL, PackageKind, REQUIRED, kind_of};

/// Longest manifest read. A real one is under 2 kB.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// A gradient graph of a package.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainGraph {
    /// Every adapted layer is trained; what a layer's products gave is kept for the backward.
    #[default]
    Full,
    /// The same gradients; whole layers are computed again in the backward: the least memory, for more time.
    Frugal,
    /// Only the adapters of the upper half of the layers are trained, and the backward ends there.
    Upper,
}

impl TrainGraph {
    /// The file's name.
    pub const fn file(self) -> &'static str {
        match self {
            Self::Full => "train.onnx",
            Self::Frugal => "train-frugal.onnx",
            Self::Upper => "train-upper.onnx",
        }
    }
}

/// A decoder's package whose every file has the hash that its manifest says.
#[derive(Clone, Debug)]
pub struct Package {
    directory: PathBuf,
    manifest: Manifest,
    layout: AdapterLayout,
}

/// Why a directory is not a sound package.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file that the package must have is not there.
    #[error("{} is missing from the package", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The manifest is not one that this program understands.
    #[error("{} is not a package", directory.display())]
    Manifest {
        /// The package's directory.
        directory: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// A file's bytes are not those that the package was made with.
    #[error("{} must have the hash {expected}, got {got}; the file was changed or damaged", path.display())]
    HashMismatch {
        /// The file.
        path: PathBuf,
        /// The manifest's hash.
        expected: Hash,
        /// The file's hash.
        got: Hash,
    },
    /// A file that would be used is in the directory but not in the manifest, so nothing vouches for it.
    #[error("{} is not listed in {MANIFEST}; attach it to the package or remove it", path.display())]
    Unlisted {
        /// The file.
        path: PathBuf,
    },
}

impl Package {
    /// Opens a package directory and verifies every file; reads each once from start to end.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let package = Self::open_base(directory)?;
        verify_files(&package.directory, &package.manifest.files, &OPTIONAL)?;
        Ok(package)
    }

    /// Opens a package and verifies only the files that every package has, so that an optional one can be attached
    /// in place of a damaged one.
    pub fn open_base(directory: impl Into<PathBuf>) -> Result<Self, OpenError> {
        let directory = directory.into();
        let text = read_manifest(&directory)?;
        let wrong = |source| OpenError::Manifest { directory: directory.clone(), source };
        let manifest = Manifest::parse(&text).map_err(wrong)?;
        let layout = manifest.layout().map_err(|error| wrong(error.into()))?;
        verify_files(&directory, &manifest.files, &REQUIRED)?;
        Ok(Self { directory, manifest, layout })
    }

    /// What the package says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The default adapter's tensors.
    pub fn layout(&self) -> &AdapterLayout {
        &self.layout
    }

    /// The hash that identifies the frozen base.
    pub fn base(&self) -> Hash {
        self.manifest.base
    }

    /// The package's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Path of a file that the manifest lists, such as `guard.toml`; nothing else in the directory is vouched for.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        self.manifest.files.contains_key(name).then(|| self.directory.join(name))
    }

    /// The inference graph.
    pub fn infer_graph(&self) -> PathBuf {
        self.directory.join("infer.onnx")
    }

    /// The inference graph without an adapter, in packages that have one.
    pub fn infer_base_graph(&self) -> Option<PathBuf> {
        self.optional("infer-base.onnx")
    }

    /// A gradient graph, in packages that have it; all have [`TrainGraph::Full`].
    pub fn train_graph(&self, graph: TrainGraph) -> Option<PathBuf> {
        self.optional(graph.file())
    }

    fn optional(&self, name: &str) -> Option<PathBuf> {
        self.manifest.files.contains_key(name).then(|| self.directory.join(name))
    }

    /// The frozen weights, external data of every graph.
    pub fn weights(&self) -> PathBuf {
        self.directory.join("weights.bin")
    }

    /// The tokenizer, in Hugging Face's form.
    pub fn tokenizer(&self) -> PathBuf {
        self.directory.join("tokenizer.json")
    }

    /// The chat template, in Jinja.
    pub fn chat_template(&self) -> PathBuf {
        self.directory.join("chat_template.jinja")
    }
}

/// Opens a plain file; a missing one and an unreadable one are told apart.
fn open_file(path: &Path) -> Result<File, OpenError> {
    let missing = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => OpenError::Missing { path: path.into() },
        _ => OpenError::Read { path: path.into(), source },
    };
    // A pipe or a device would block or never end.
    if !std::fs::metadata(path).map_err(missing)?.is_file() {
        return Err(OpenError::Read { path: path.into(), source: io::Error::other("not a plain file") });
    }
    File::open(path).map_err(missing)
}

/// What the package in a directory is made for, by its manifest alone.
pub fn package_kind(directory: &Path) -> Result<PackageKind, OpenError> {
    let wrong = |source| OpenError::Manifest { directory: directory.into(), source };
    match kind_of(&read_manifest(directory)?).map_err(wrong)? {
        None => Ok(PackageKind::Decoder),
        Some(kind) if kind == PackageKind::Encoder.to_string() => Ok(PackageKind::Encoder),
        Some(got) => Err(wrong(ManifestError::Kind { expected: PackageKind::Encoder, got })),
    }
}

/// The text of a package's manifest.
pub(crate) fn read_manifest(directory: &Path) -> Result<String, OpenError> {
    let path = &directory.join(MANIFEST);
    let read = |source| OpenError::Read { path: path.into(), source };
    let mut text = String::new();
    open_file(path)?.take(MANIFEST_BYTES_MAX + 1).read_to_string(&mut text).map_err(read)?;
    if text.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(read(io::Error::other(format!("longer than {MANIFEST_BYTES_MAX} bytes"))));
    }
    Ok(text)
}

/// Verifies each of these files that the manifest lists; one that lies there unlisted is refused.
pub(crate) fn verify_files(
    directory: &Path,
    files: &BTreeMap<String, Hash>,
    names: &[&str],
) -> Result<(), OpenError> {
    for &name in names {
        let path = directory.join(name);
        match files.get(name) {
            Some(&expected) => verify(path, expected)?,
            None if path.exists() => return Err(OpenError::Unlisted { path }),
            None => {}
        }
    }
    Ok(())
}

fn verify(path: PathBuf, expected: Hash) -> Result<(), OpenError> {
    let got = hash_file(&path)?;
    if got == expected { Ok(()) } else { Err(OpenError::HashMismatch { path, expected, got }) }
}

/// The BLAKE3 of a file, read in pieces.
pub(crate) fn hash_file(path: &Path) -> Result<Hash, OpenError> {
    let mut hasher = blake3::Hasher::new();
    let file = open_file(path)?;
    hasher.update_reader(file).map_err(|source| OpenError::Read { path: path.into(), source })?;
    Ok(Hash(*hasher.finalize().as_bytes()))
}
