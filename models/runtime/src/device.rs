//! What the network can run on: the names that a person writes, and how a session is placed there. `choose.rs` decides
//! which of them it is, `library.rs` loads what offers them, `model.rs` opens its sessions through
//! `Library::session`.

use std::{fmt, str::FromStr};

use ort::{
    ep::{self, ExecutionProvider, ExecutionProviderDispatch},
    memory::DeviceType,
    session::{Session, builder::SessionBuilder},
};
use serde::{Deserialize, Serialize};

use crate::library::Library;

/// Devices that a list may name: each is tried in turn, so more of them are a mistake.
const LISTED_MAX: usize = 8;

/// Where the network runs. Written as `cpu`, `cuda:0`, `tensorrt:0`, `directml:0`, `coreml`, `webgpu`, `openvino` or
/// `openvino:CPU`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The processor, by ONNX Runtime's own kernels.
    Cpu,
    /// An NVIDIA card by CUDA.
    Cuda(u16),
    /// An NVIDIA card by TensorRT; what TensorRT does not know runs by CUDA.
    TensorRt(u16),
    /// A Windows graphics adapter.
    DirectMl(u16),
    /// Apple's neural engine and graphics.
    CoreMl,
    /// Any graphics adapter, through Vulkan, Metal or Direct3D 12.
    WebGpu,
    /// Intel's runtime, on the unit that it prefers or on a named one.
    OpenVino(Option<Unit>),
}

/// A part of an Intel machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// The processor.
    Cpu,
    /// The graphics unit.
    Gpu,
    /// The neural unit.
    Npu,
}

/// What a person wants the network to run on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Devices {
    /// The first device that is there and gives the processor's results, else the processor.
    #[default]
    Auto,
    /// The first of these that works. Whoever names one gets that one or an error; whoever names `cpu` after it has
    /// asked for the fall-back.
    InOrder(Vec<Device>),
}

/// Text that names no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseDeviceError {
    /// No such device.
    #[error(
        "device must be auto, cpu, cuda:N, tensorrt:N, directml:N, coreml, webgpu or openvino[:CPU|GPU|NPU], \
         or a list such as cuda:0,cpu; got {got:?}"
    )]
    Unknown {
        /// What was written.
        got: String,
    },
    /// `auto` stands alone.
    #[error("device auto already means a list and cannot stand in one, got {got:?}")]
    AutoListed {
        /// What was written.
        got: String,
    },
    /// The list is too long.
    #[error("a list of devices must have at most {LISTED_MAX}, got {got}")]
    TooMany {
        /// Number of devices.
        got: usize,
    },
}

impl Device {
    /// What `auto` tries, in this order, as far as the library offers it. `TensorRT` is not among them: it compiles for
    /// minutes at every new shape.
    pub const AUTOMATIC: [Self; 5] =
        [Self::Cuda(0), Self::DirectMl(0), Self::CoreMl, Self::WebGpu, Self::OpenVino(None)];

    /// ONNX Runtime's name of what runs there.
    pub fn provider(self) -> &'static str {
        match self {
            Self::Cpu => ep::CPU::NAME,
            Self::Cuda(_) => ep::CUDA::NAME,
            Self::TensorRt(_) => ep::TensorRT::NAME,
            Self::DirectMl(_) => ep::DirectML::NAME,
            Self::CoreMl => ep::CoreML::NAME,
            Self::WebGpu => ep::WebGPU::NAME,
            Self::OpenVino(_) => ep::OpenVINO::NAME,
        }
    }

    /// Whether the loaded library was built with it. Of a graphics card this says nothing.
    pub(crate) fn is_built_in(self) -> Result<bool, ort::Error> {
        match self {
            Self::Cpu => ep::CPU::is_available(),
            Self::Cuda(_) => ep::CUDA::is_available(),
            Self::TensorRt(_) => ep::TensorRT::is_available(),
            Self::DirectMl(_) => ep::DirectML::is_available(),
            Self::CoreMl => ep::CoreML::is_available(),
            Self::WebGpu => ep::WebGPU::is_available(),
            Self::OpenVino(_) => ep::OpenVINO::is_available(),
        }
    }

    /// Which file brings it: what to do where the loaded library does not offer it.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Cpu => "any onnx runtime library has it",
            Self::Cuda(_) | Self::TensorRt(_) => {
                "name the libonnxruntime of the Python package onnxruntime-gpu with --library, its \
                 libonnxruntime_providers files beside it"
            }
            Self::DirectMl(_) => {
                "name the onnxruntime.dll of the Python package onnxruntime-directml with --library"
            }
            Self::CoreMl => {
                "name the libonnxruntime of the Python package onnxruntime for macOS with --library"
            }
            Self::WebGpu => {
                "name the libonnxruntime of the Python package onnxruntime-webgpu with --library, or the file of \
                 onnxruntime-ep-webgpu with --provider"
            }
            Self::OpenVino(_) => {
                "name the libonnxruntime of the Python package onnxruntime-openvino with --library, or the file \
                 of onnxruntime-ep-openvino with --provider"
            }
        }
    }

    /// The provider as the library's own part, in the order in which it takes nodes.
    fn built_in(self) -> Vec<ExecutionProviderDispatch> {
        let card = i32::from;
        let providers = match self {
            Self::Cpu => vec![],
            Self::Cuda(index) => vec![ep::CUDA::default().with_device_id(card(index)).build()],
            Self::TensorRt(index) => vec![
                ep::TensorRT::default().with_device_id(card(index)).build(),
                ep::CUDA::default().with_device_id(card(index)).build(),
            ],
            Self::DirectMl(index) => vec![ep::DirectML::default().with_device_id(card(index)).build()],
            Self::CoreMl => vec![ep::CoreML::default().build()],
            Self::WebGpu => vec![ep::WebGPU::default().build()],
            Self::OpenVino(None) => vec![ep::OpenVINO::default().build()],
            Self::OpenVino(Some(unit)) => {
                vec![ep::OpenVINO::default().with_device_type(unit.name()).build()]
            }
        };
        providers.into_iter().map(ExecutionProviderDispatch::error_on_failure).collect()
    }

    /// Which of a plugin's devices is meant.
    fn index(self) -> usize {
        match self {
            Self::Cuda(index) | Self::TensorRt(index) | Self::DirectMl(index) => usize::from(index),
            Self::Cpu | Self::CoreMl | Self::WebGpu | Self::OpenVino(_) => 0,
        }
    }

    fn is_of_kind(self, kind: DeviceType) -> bool {
        match self {
            Self::OpenVino(Some(Unit::Cpu)) => kind == DeviceType::CPU,
            Self::OpenVino(Some(Unit::Gpu)) => kind == DeviceType::GPU,
            Self::OpenVino(Some(Unit::Npu)) => kind == DeviceType::NPU,
            _ => true,
        }
    }
}

impl Unit {
    const ALL: [Self; 3] = [Self::Cpu, Self::Gpu, Self::Npu];

    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Gpu => "GPU",
            Self::Npu => "NPU",
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => formatter.write_str("cpu"),
            Self::Cuda(index) => write!(formatter, "cuda:{index}"),
            Self::TensorRt(index) => write!(formatter, "tensorrt:{index}"),
            Self::DirectMl(index) => write!(formatter, "directml:{index}"),
            Self::CoreMl => formatter.write_str("coreml"),
            Self::WebGpu => formatter.write_str("webgpu"),
            Self::OpenVino(None) => formatter.write_str("openvino"),
            Self::OpenVino(Some(unit)) => write!(formatter, "openvino:{}", unit.name()),
        }
    }
}

impl FromStr for Device {
    type Err = ParseDeviceError;

    /// A card without a number is the first.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || ParseDeviceError::Unknown { got: text.to_owned() };
        let (name, rest) = match text.split_once(':') {
            Some((name, rest)) => (name, Some(rest)),
            None => (text, None),
        };
        let index = || {
            // Digits only: `parse` would take a sign.
            let digits = rest.unwrap_or("0");
            let all = digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|_| all).ok_or_else(unknown)
        };
        match (name, rest) {
            ("cpu", None) => Ok(Self::Cpu),
            ("coreml", None) => Ok(Self::CoreMl),
            ("webgpu", None) => Ok(Self::WebGpu),
            ("openvino", None) => Ok(Self::OpenVino(None)),
            ("openvino", Some(rest)) => {
                let unit = Unit::ALL.into_iter().find(|unit| unit.name().eq_ignore_ascii_case(rest));
                Ok(Self::OpenVino(Some(unit.ok_or_else(unknown)?)))
            }
            ("cuda", _) => Ok(Self::Cuda(index()?)),
            ("tensorrt", _) => Ok(Self::TensorRt(index()?)),
            ("directml", _) => Ok(Self::DirectMl(index()?)),
            _ => Err(unknown()),
        }
    }
}

impl FromStr for Devices {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names: Vec<&str> = text.split(',').map(str::trim).collect();
        match names.as_slice() {
            ["auto"] => Ok(Self::Auto),
            names if names.contains(&"auto") => Err(ParseDeviceError::AutoListed { got: text.to_owned() }),
            names if names.len() > LISTED_MAX => Err(ParseDeviceError::TooMany { got: names.len() }),
            names => Ok(Self::InOrder(names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?)),
        }
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::InOrder(devices) => {
                let names: Vec<String> = devices.iter().map(Device::to_string).collect();
                formatter.write_str(&names.join(","))
            }
        }
    }
}

impl TryFrom<String> for Devices {
    type Error = ParseDeviceError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Devices> for String {
    fn from(devices: Devices) -> Self {
        devices.to_string()
    }
}

impl Library {
    /// Options of a session on this library's device. The device is always named to ONNX Runtime: left to itself it
    /// chooses one (`ort` asks for the most efficient), and an empty list of devices is silently the processor.
    pub(crate) fn session(&self) -> Result<SessionBuilder, ort::Error> {
        let builder = Session::builder(self.environment())?;
        let placement = self.placement();
        let device = placement.device;
        let builder = if placement.may_leave_nodes || device == Device::Cpu {
            builder
        } else {
            builder.with_config_entry("session.disable_cpu_ep_fallback", "1")?
        };
        if device != Device::Cpu && device.is_built_in()? {
            return Ok(builder.with_execution_providers(device.built_in())?);
        }
        let mut found = self.environment().devices().filter(|found| {
            found.ep().is_ok_and(|name| name == device.provider())
                && device.is_of_kind(found.hardware_device().ty())
        });
        match found.nth(device.index()) {
            Some(found) => Ok(builder.with_devices([found], None)?),
            None => Err(ort::Error::new(format!("the loaded library has no device {device}"))),
        }
    }
}

/// Where a library's sessions run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// Whether nodes that the device does not know may run on the processor.
    pub may_leave_nodes: bool,
}

impl Placement {
    pub(crate) const CPU: Self = Self { device: Device::Cpu, may_leave_nodes: false };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written_back() {
        for name in [
            "cpu",
            "cuda:0",
            "cuda:3",
            "tensorrt:1",
            "directml:0",
            "coreml",
            "webgpu",
            "openvino",
            "openvino:NPU",
        ] {
            assert_eq!(name.parse::<Device>().unwrap().to_string(), name);
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert_eq!("openvino:gpu".parse(), Ok(Device::OpenVino(Some(Unit::Gpu))));
    }

    #[test]
    fn other_names_are_refused_with_the_list_of_good_ones() {
        for name in
            ["", "gpu", "cuda:", "cuda:x", "cuda:+1", "cuda:-1", "cuda:70000", "cpu:0", "openvino:", "CPU"]
        {
            let error = name.parse::<Device>().unwrap_err();
            assert_eq!(error, ParseDeviceError::Unknown { got: name.into() });
            assert!(error.to_string().contains("openvino[:CPU|GPU|NPU]"), "{error}");
        }
    }

    #[test]
    fn a_list_is_an_order_and_auto_stands_alone() {
        let order = Devices::InOrder(vec![Device::Cuda(1), Device::WebGpu, Device::Cpu]);
        assert_eq!("cuda:1, webgpu,cpu".parse(), Ok(order.clone()));
        assert_eq!(order.to_string(), "cuda:1,webgpu,cpu");
        assert_eq!("auto".parse(), Ok(Devices::Auto));
        let listed = "cuda:0,auto".parse::<Devices>().unwrap_err();
        assert_eq!(listed, ParseDeviceError::AutoListed { got: "cuda:0,auto".into() });
        assert_eq!(["cpu"; 9].join(",").parse::<Devices>(), Err(ParseDeviceError::TooMany { got: 9 }));
        assert!("cuda:0,,cpu".parse::<Devices>().is_err());
    }
}
