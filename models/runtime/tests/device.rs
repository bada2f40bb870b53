//! Devices with the library that `scripts/setup` fetches, which has the processor alone.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

mod support;

use commonweal_runtime::{Device, DeviceError, Devices};

#[test]
fn auto_comes_to_the_processor_and_says_why() {
    let (library, choice) = support::library().choose(&Devices::Auto, &support::package()).unwrap();
    assert_eq!((choice.device, library.device()), (Device::Cpu, Device::Cpu));
    let told = choice.to_string();
    assert!(told.starts_with("device cpu: the library ") && told.contains("libonnxruntime"), "{told}");
    assert!(told.ends_with("offers only CPUExecutionProvider"), "{told}");
}

#[test]
fn a_missing_device_is_an_error_unless_another_was_asked_for() {
    let (library, package) = (support::library(), support::package());
    let error = library.choose(&"cuda:0".parse().unwrap(), &package).unwrap_err();
    let told = error.to_string();
    assert!(matches!(error, DeviceError::Missing { device: Device::Cuda(0), .. }), "{told}");
    for part in ["CUDAExecutionProvider", "offers CPUExecutionProvider", "onnxruntime-gpu", "--library"] {
        assert!(told.contains(part), "{part} in {told}");
    }
    let several = library.choose(&"tensorrt:0,webgpu".parse().unwrap(), &package).unwrap_err();
    let told = several.to_string();
    assert!(told.contains("TensorrtExecutionProvider") && told.contains("onnxruntime-ep-webgpu"), "{told}");

    let (library, choice) = library.choose(&"cuda:0,cpu".parse().unwrap(), &package).unwrap();
    assert_eq!((choice.device, library.device()), (Device::Cpu, Device::Cpu));
    assert!(choice.why.contains("CUDAExecutionProvider"), "{choice}");
}

#[test]
fn the_library_tells_what_it_offers() {
    let offers = support::library().offers().unwrap();
    let providers: Vec<&str> = offers.iter().map(|offer| offer.provider.as_str()).collect();
    assert_eq!(providers, ["CPUExecutionProvider"]);
    assert_eq!(offers[0].kind, Some("CPU"));
}

#[test]
fn a_file_that_is_no_provider_is_refused_by_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "not a library").unwrap();
    let error = support::library().add_provider(file.path()).unwrap_err();
    assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
    assert!(matches!(error, DeviceError::Plugin { .. }), "{error}");
}
