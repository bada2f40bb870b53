//! Decides what the network runs on: what the loaded library offers, what a person asked for (`device.rs`), and whether
//! a package's graphs run there with the processor's results. Nothing is fallen back to that was not asked for.

use std::{fmt, path::Path};

use commonweal_adapter::Adapter;
use commonweal_package::Package;
use ort::memory::DeviceType;

use crate::{
    cancel::Cancel,
    conversation::TrainingRow,
    device::{Device, Devices, Placement},
    infer::InferError,
    library::Library,
    model::{Model, OpenError, OpenOptions},
    train::{TrainError, TrainOptions, Trainer},
};

/// Tokens of the rows that are tried on a device: a few runs of [`TRIED_PREFILL`] tokens, so that the cache is read back.
const TRIED_TOKENS: usize = 12;
const TRIED_PREFILL: usize = 5;
/// Mean difference of log-probabilities, in nats, up to which a device computes the same. Kernels that round
/// activations to 8 bits on one side and not on the other differ by some hundredths; a wrong cache by whole nats.
const DIFFERENCE_MAX: f64 = 0.25;

/// Something that the loaded library can run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// ONNX Runtime's name of the provider.
    pub provider: String,
    /// `CPU`, `GPU` or `NPU` where ONNX Runtime found a device for it; `None` for a provider that is built in and looks
    /// for its device only when a session is opened.
    pub kind: Option<&'static str>,
    /// Who made the device.
    pub vendor: Option<String>,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The device.
    pub device: Device,
    /// Why it and no other.
    pub why: String,
}

impl fmt::Display for Choice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "device {}: {}", self.device, self.why)
    }
}

/// Why a device was not had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The library was built without it.
    #[error("the onnx runtime library {library} has no {}, it offers {offered}; {}", device.provider(), device.remedy())]
    Missing {
        /// What was asked for.
        device: Device,
        /// The loaded file.
        library: String,
        /// Providers that it has.
        offered: String,
    },
    /// The library has it, but the package's graph does not open there.
    #[error("the package does not open on device {}{}", placement.device, placement.alternative())]
    Open {
        /// What was asked for.
        placement: Placement,
        /// What the library said.
        #[source]
        source: Box<OpenError>,
    },
    /// The graph opens there and fails when it runs.
    #[error("the package does not run on device {device}")]
    Run {
        /// What was asked for.
        device: Device,
        /// What the library said.
        #[source]
        source: Box<InferError>,
    },
    /// The gradient graph fails there.
    #[error("the package does not train on device {device}")]
    Train {
        /// What was tried.
        device: Device,
        /// What the library said.
        #[source]
        source: Box<TrainError>,
    },
    /// It computes something else.
    #[error(
        "device {device} must give the processor's log-probabilities within {DIFFERENCE_MAX} nats, differs by {got:.2}"
    )]
    Differs {
        /// What was asked for.
        device: Device,
        /// Mean difference in nats.
        got: f64,
    },
    /// None of several devices works.
    #[error("no device of {devices} works: {reasons}")]
    None {
        /// What was asked for.
        devices: Devices,
        /// One reason a device.
        reasons: String,
    },
    /// A plugin does not load.
    #[error("{path} does not load as a provider of onnx runtime")]
    Plugin {
        /// The file.
        path: String,
        /// What the library said.
        #[source]
        source: ort::Error,
    },
    /// The library does not say what it has.
    #[error("the onnx runtime library does not say what it offers")]
    Offers(#[source] ort::Error),
    /// The handle was used before one was chosen.
    #[error("choosing a device was cancelled")]
    Cancelled,
    /// The processor itself fails on the package: nothing to compare with.
    #[error("the package does not run on the cpu, with which a device is compared")]
    Reference(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl Placement {
    fn alternative(self) -> String {
        match self {
            Self { may_leave_nodes: true, .. } => String::new(),
            Self { device, .. } => format!("; --device {device},cpu lets the cpu take what it lacks"),
        }
    }
}

impl Library {
    /// Loads a provider that comes as a file of its own (a plugin). Its devices are offered from then on.
    pub fn add_provider(&self, path: &Path) -> Result<(), DeviceError> {
        let shown = path.display().to_string();
        let name = path.file_stem().map_or_else(|| "provider".into(), |stem| stem.to_string_lossy());
        // The loader looks for what is not a path in other places.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        self.environment()
            .register_ep_library(name, &path)
            .map_err(|source| DeviceError::Plugin { path: shown, source })
    }

    /// Everything that sessions can be asked to run on.
    pub fn offers(&self) -> Result<Vec<Offer>, DeviceError> {
        let mut offers = Vec::new();
        for found in self.environment().devices() {
            let hardware = found.hardware_device();
            let kind = match hardware.ty() {
                DeviceType::GPU => "GPU",
                DeviceType::NPU => "NPU",
                _ => "CPU",
            };
            let provider = found.ep().map_err(DeviceError::Offers)?.to_owned();
            let vendor = hardware.vendor().ok().filter(|vendor| !vendor.is_empty()).map(str::to_owned);
            offers.push(Offer { provider, kind: Some(kind), vendor });
        }
        let built_in = [Device::Cpu, Device::TensorRt(0)].into_iter().chain(Device::AUTOMATIC);
        for device in built_in {
            let is_known = offers.iter().any(|offer| offer.provider == device.provider());
            if !is_known && device.is_built_in().map_err(DeviceError::Offers)? {
                offers.push(Offer { provider: device.provider().into(), kind: None, vendor: None });
            }
        }
        Ok(offers)
    }

    /// Chooses where sessions run, trying devices other than the processor with the package: the library that opens its
    /// sessions there, and why. A trial opens the package once there and once on the processor.
    pub fn choose(&self, devices: &Devices, package: &Package) -> Result<(Self, Choice), DeviceError> {
        self.choose_with(devices, package, &Cancel::new())
    }

    /// The same under a handle that ends it.
    pub fn choose_with(
        &self,
        devices: &Devices,
        package: &Package,
        cancel: &Cancel,
    ) -> Result<(Self, Choice), DeviceError> {
        let offers = self.offers()?;
        match devices {
            Devices::Auto => self.choose_automatically(&offers, package, cancel),
            Devices::InOrder(list) => {
                let (device, why) = self.choose_in_order(list, &offers, package, cancel)?;
                let may_leave_nodes = list.contains(&Device::Cpu);
                Ok((self.at(Placement { device, may_leave_nodes }), Choice { device, why }))
            }
        }
    }

    /// Whether choosing tries a device, and so opens the package.
    pub fn would_try(&self, devices: &Devices) -> Result<bool, DeviceError> {
        let offers = self.offers()?;
        let is_offered = |device: &Device| offers.iter().any(|offer| offer.provider == device.provider());
        let is_tried = |device: &Device| *device != Device::Cpu && is_offered(device);
        Ok(match devices {
            Devices::Auto => Device::AUTOMATIC.iter().any(is_tried),
            Devices::InOrder(list) => list.iter().take_while(|device| **device != Device::Cpu).any(is_tried),
        })
    }

    fn choose_automatically(
        &self,
        offers: &[Offer],
        package: &Package,
        cancel: &Cancel,
    ) -> Result<(Self, Choice), DeviceError> {
        let mut reasons = Vec::new();
        let is_offered = |device: &Device| offers.iter().any(|offer| offer.provider == device.provider());
        for device in Device::AUTOMATIC.into_iter().filter(is_offered) {
            // All of the inference graph must run there; of the gradient graph, the processor may take a part.
            let whole = Placement { device, may_leave_nodes: false };
            let placement = Placement { device, may_leave_nodes: true };
            let answers = self.try_answering(whole, package, cancel);
            match answers.and_then(|()| self.try_training(placement, package, cancel)) {
                Ok(()) => {
                    let why = reasons.is_empty().then(|| "the first that the library offers".to_owned());
                    let why = why.unwrap_or_else(|| reasons.join("; "));
                    return Ok((self.at(placement), Choice { device, why }));
                }
                // Whatever it failed with says nothing of the device.
                Err(_) if cancel.is_cancelled() => return Err(DeviceError::Cancelled),
                Err(error) => reasons.push(described(&error)),
            }
        }
        let why = match reasons.as_slice() {
            [] => {
                format!("the library {} offers only {}", self.path().display(), Device::Cpu.provider())
            }
            reasons => reasons.join("; "),
        };
        Ok((self.at(Placement::CPU), Choice { device: Device::Cpu, why }))
    }

    fn choose_in_order(
        &self,
        list: &[Device],
        offers: &[Offer],
        package: &Package,
        cancel: &Cancel,
    ) -> Result<(Device, String), DeviceError> {
        let may_leave_nodes = list.contains(&Device::Cpu);
        let mut errors = Vec::new();
        for &device in list {
            let tried = match device {
                Device::Cpu => Ok(()),
                device if !offers.iter().any(|offer| offer.provider == device.provider()) => {
                    Err(self.missing(device, offers))
                }
                device => self.try_answering(Placement { device, may_leave_nodes }, package, cancel),
            };
            match tried {
                Ok(()) if errors.is_empty() => return Ok((device, "asked for".into())),
                Ok(()) => return Ok((device, format!("asked for after {}", reasons(&errors)))),
                Err(_) if cancel.is_cancelled() => return Err(DeviceError::Cancelled),
                Err(error) => errors.push(error),
            }
        }
        match (errors.pop(), errors.is_empty()) {
            (Some(only), true) => Err(only),
            (last, _) => {
                errors.extend(last);
                Err(DeviceError::None { devices: Devices::InOrder(list.to_vec()), reasons: reasons(&errors) })
            }
        }
    }

    fn missing(&self, device: Device, offers: &[Offer]) -> DeviceError {
        let mut offered: Vec<&str> = offers.iter().map(|offer| offer.provider.as_str()).collect();
        offered.dedup();
        DeviceError::Missing {
            device,
            library: self.path().display().to_string(),
            offered: offered.join(", "),
        }
    }

    /// Compares log-probabilities with the processor's.
    fn try_answering(
        &self,
        placement: Placement,
        package: &Package,
        cancel: &Cancel,
    ) -> Result<(), DeviceError> {
        let device = placement.device;
        let there = Model::open_with(&self.at(placement), package, tried_options(), cancel)
            .map_err(|source| DeviceError::Open { placement, source: Box::new(source) })?;
        let got =
            scored(&there, cancel).map_err(|source| DeviceError::Run { device, source: Box::new(source) })?;
        drop(there);
        let here = Model::open_with(&self.at(Placement::CPU), package, tried_options(), cancel)
            .map_err(|error| DeviceError::Reference(Box::new(error)))?;
        let expected = scored(&here, cancel).map_err(|error| DeviceError::Reference(Box::new(error)))?;
        agree(device, &expected, &got)
    }

    /// Compares the loss of a step with the processor's.
    fn try_training(
        &self,
        placement: Placement,
        package: &Package,
        cancel: &Cancel,
    ) -> Result<(), DeviceError> {
        let device = placement.device;
        let opened = Model::open_with(&self.at(placement), package, tried_options(), cancel);
        let there = opened.map_err(|source| DeviceError::Open { placement, source: Box::new(source) })?;
        let failed = |source| DeviceError::Train { device, source: Box::new(source) };
        let got = trained(&there, cancel).map_err(failed)?;
        drop(there);
        let here = Model::open_with(&self.at(Placement::CPU), package, tried_options(), cancel)
            .map_err(|error| DeviceError::Reference(Box::new(error)))?;
        let expected = trained(&here, cancel).map_err(|error| DeviceError::Reference(Box::new(error)))?;
        agree(device, &[expected as f32], &[got as f32])
    }
}

/// Little memory, and several runs over one cache.
fn tried_options() -> OpenOptions {
    OpenOptions { prefill_tokens_max: TRIED_PREFILL, ..OpenOptions::default() }
}

fn tried_row(model: &Model) -> TrainingRow {
    let tokens = TRIED_TOKENS.min(model.context());
    let vocab_size = model.manifest().model.vocab_size;
    let ids = (0..tokens).map(|at| ((at * 7 + 3) % vocab_size) as u32).collect();
    TrainingRow { ids, weights: vec![1.0; tokens] }
}

fn scored(model: &Model, cancel: &Cancel) -> Result<Vec<f32>, InferError> {
    let base = model.prepare(None).map_err(|_| InferError::Foreign { what: "adapter", owner: "model" })?;
    let scores = model.score_rows(&base, &[tried_row(model)], cancel)?;
    Ok(scores.into_iter().flat_map(|score| score.token_logprobs).collect())
}

fn trained(model: &Model, cancel: &Cancel) -> Result<f64, TrainError> {
    let start = Adapter::init(model.layout().clone(), 0);
    let mut trainer = Trainer::new(model, start, TrainOptions::default())?;
    Ok(trainer.step(&[tried_row(model)], cancel)?.loss)
}

/// Mean difference of two lists of log-probabilities; one that is not a number never agrees.
fn agree(device: Device, expected: &[f32], got: &[f32]) -> Result<(), DeviceError> {
    let total: f64 = expected.iter().zip(got).map(|(a, b)| f64::from((a - b).abs())).sum();
    let mean = if expected.len() == got.len() { total / expected.len().max(1) as f64 } else { f64::NAN };
    if mean <= DIFFERENCE_MAX { Ok(()) } else { Err(DeviceError::Differs { device, got: mean }) }
}

fn reasons(errors: &[DeviceError]) -> String {
    errors.iter().map(described).collect::<Vec<_>>().join("; ")
}

/// An error with its causes, on one line.
fn described(error: &DeviceError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let line = error.to_string().replace('\n', " ");
        // Transparent errors repeat their cause.
        if !text.ends_with(&line) {
            text = format!("{text}: {line}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_close_and_finite_results_agree() {
        let expected = [-1.0, -2.0, -3.0];
        agree(Device::WebGpu, &expected, &[-1.1, -1.9, -3.2]).unwrap();
        for got in [&[-1.0, -2.0, -6.0][..], &[-1.0, f32::NAN, -3.0], &[-1.0, -2.0]] {
            let error = agree(Device::WebGpu, &expected, got).unwrap_err();
            assert!(matches!(error, DeviceError::Differs { device: Device::WebGpu, .. }), "{error}");
        }
    }
}
