//! The model package on disk: what it says about itself (`model.rs`, `manifest.rs`; `encoder.rs` for a classifier), how
//! it is written (`staging.rs`, `write.rs`, used by the compiler) and how it is opened and verified (`open.rs`, used by
//! the runtime).

mod attention;
mod gemma;
mod model;
mod rounding;
mod cache;
mod manifest;
mod encoder;
mod staging;
mod write;
mod open;

pub use attention::{Attention, Bias, Window};
pub use cache::CacheForm;
pub use encoder::{
    ENCODER_OPTIONAL, ENCODER_REQUIRED, EncoderArchitecture, EncoderConfig, EncoderError, EncoderManifest,
    EncoderPackage, LABELS_MAX, Probabilities,
};
pub use gemma::Gemma;
pub use manifest::{
    AdapterDefaults, FORMAT, Hash, HashError, MANIFEST, Manifest, ManifestError, OPTIONAL, PackageKind,
    REQUIRED, layout,
};
pub use model::{
    Accuracy, Architecture, Bits, BitsError, DIMENSION_MAX, LAYERS_MAX, ModelConfig, ModelError,
    Quantization, RopeScaling, Tokens,
};
pub use open::{OpenError, Package, TrainGraph, package_kind};
pub use rounding::Rounding;
pub use staging::{Staging, StagingError};
pub use write::{EncoderFacts, Facts, PackageWriter, WriteError, attach};
