//! Writes packages, all or nothing ([`PackageWriter`], over `staging.rs`). [`attach`] adds a guard, a reviser or a
//! notice to a finished package.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use crate::cache::CacheForm;
use crate::encoder::{ENCODER_OPTIONAL, ENCODER_REQUIRED, EncoderConfig, EncoderManifest};
use crate::manifest::{
    AdapterDefaults, FORMAT, Hash, MANIFEST, Manifest, ManifestError, OPTIONAL, PackageKind, REQUIRED,
};
use crate::model::{ModelConfig, Quantization, Tokens};
use crate::open::{OpenError, Package, hash_file};
use crate::rounding::Rounding;
use crate::staging::{Staging, StagingError, replace};

/// What the manifest says beyond hashes.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// SPDX expression of the model's licence, where it is known.
    pub licence: Option<String>,
    /// Dimensions and constants.
    pub model: ModelConfig,
    /// How the frozen weights are stored.
    pub quantization: Quantization,
    /// How the codes of the weights were chosen.
    pub rounding: Rounding,
    /// How keys and values are kept.
    pub cache: CacheForm,
    /// The adapter that training starts with by default.
    pub adapter: AdapterDefaults,
    /// Special tokens.
    pub tokens: Tokens,
}

/// What an encoder's manifest says beyond hashes.
#[derive(Clone, Debug, PartialEq)]
pub struct EncoderFacts {
    /// SPDX expression of the model's licence, where it is known.
    pub licence: Option<String>,
    /// Dimensions, labels and limits.
    pub encoder: EncoderConfig,
    /// How the weights are stored.
    pub quantization: Quantization,
}

/// Why a package was not written. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The target is taken, or the disk refuses.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// A name that no package has.
    #[error("{name:?} is not a file that can be put into a package")]
    Name {
        /// The name.
        name: String,
    },
    /// The facts or the set of files are impossible.
    #[error("the package would not be sound")]
    Manifest(#[from] ManifestError),
    /// The manifest cannot be put into TOML.
    #[error("{MANIFEST} cannot be written")]
    Toml(#[from] toml::ser::Error),
    /// A file of the package cannot be read back.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// A package in the making. Dropping it unfinished removes everything that it wrote.
#[derive(Debug)]
pub struct PackageWriter {
    staging: Staging,
    kind: PackageKind,
    files: Vec<String>,
}

impl PackageWriter {
    /// Begins a decoder's package at `out`, which must be free or an empty directory; missing parents are made.
    pub fn create(out: &Path) -> Result<Self, WriteError> {
        Self::create_kind(PackageKind::Decoder, out)
    }

    /// Begins a package of either kind.
    pub fn create_kind(kind: PackageKind, out: &Path) -> Result<Self, WriteError> {
        Ok(Self { staging: Staging::create(out)?, kind, files: Vec::new() })
    }

    /// Writes one file of the package: `fill` gets it open, and its final path for messages.
    pub fn write<E: From<WriteError> + From<StagingError>>(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut File, &Path) -> Result<(), E>,
    ) -> Result<(), E> {
        let (required, optional): (&[&str], &[&str]) = match self.kind {
            PackageKind::Decoder => (&REQUIRED, &OPTIONAL),
            PackageKind::Encoder => (&ENCODER_REQUIRED, &ENCODER_OPTIONAL),
        };
        if !required.contains(&name) && !optional.contains(&name) {
            return Err(WriteError::Name { name: name.into() }.into());
        }
        self.staging.write(name, fill)?;
        self.files.push(name.into());
        Ok(())
    }

    /// Writes one file of the package from memory.
    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        self.write(name, |file, path| {
            std::io::Write::write_all(file, bytes)
                .map_err(|source| StagingError::Write { path: path.into(), source }.into())
        })
    }

    /// Hashes the files, writes a decoder's manifest and gives the directory its name.
    pub fn finish(self, facts: Facts) -> Result<Manifest, WriteError> {
        let files = self.hashes()?;
        let Facts { licence, model, quantization, rounding, cache, adapter, tokens } = facts;
        let base = Hash([0; 32]);
        let format = FORMAT;
        let mut manifest =
            Manifest { format, licence, base, model, quantization, rounding, cache, adapter, tokens, files };
        manifest.base = manifest.identify();
        manifest.check()?;
        self.staging.write_bytes(MANIFEST, toml::to_string(&manifest)?.as_bytes())?;
        self.staging.publish()?;
        Ok(manifest)
    }

    /// Hashes the files, writes an encoder's manifest and gives the directory its name.
    pub fn finish_encoder(self, facts: EncoderFacts) -> Result<EncoderManifest, WriteError> {
        let (format, kind, base, files) = (FORMAT, PackageKind::Encoder, Hash([0; 32]), self.hashes()?);
        let EncoderFacts { licence, encoder, quantization } = facts;
        let mut manifest = EncoderManifest { format, kind, licence, base, encoder, quantization, files };
        manifest.base = manifest.identify();
        manifest.check()?;
        self.staging.write_bytes(MANIFEST, toml::to_string(&manifest)?.as_bytes())?;
        self.staging.publish()?;
        Ok(manifest)
    }

    fn hashes(&self) -> Result<BTreeMap<String, Hash>, WriteError> {
        let hash = |name: &String| Ok((name.clone(), hash_file(&self.staging.path().join(name))?));
        self.files.iter().map(hash).collect()
    }
}

/// Adds files (name in the package, bytes) to a finished package, or replaces them, and lists them in its manifest.
/// Only the optional files can be attached: the frozen base stays what it is. Each file and then the manifest appear
/// whole or not at all; after a crash in between, opening the package names the file, and
/// [`Package::open_base`] opens it so that the file can be attached again.
pub fn attach(package: &Package, files: &[(&str, &[u8])]) -> Result<Manifest, WriteError> {
    if let Some((name, _)) = files.iter().find(|(name, _)| !OPTIONAL.contains(name)) {
        return Err(WriteError::Name { name: (*name).into() });
    }
    let write = |name: &str, bytes: &[u8]| {
        let path = package.directory().join(name);
        replace(&path, bytes).map_err(|source| StagingError::Write { path, source })
    };
    let mut manifest = package.manifest().clone();
    for (name, bytes) in files {
        write(name, bytes)?;
        manifest.files.insert((*name).into(), Hash(*blake3::hash(bytes).as_bytes()));
    }
    manifest.check()?;
    write(MANIFEST, toml::to_string(&manifest)?.as_bytes())?;
    Ok(manifest)
}
