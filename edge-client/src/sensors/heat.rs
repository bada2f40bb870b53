//! How hot the machine is: its thermal zones, and what its processors say of themselves. Of `sensors.rs`.
//!
//! An AMD desktop has no zone for its processor, and many laptops have one for their case alone. What else `hwmon` has is not
//! asked: disks, networks and graphics have limits of their own.

use std::path::{Path, PathBuf};

use super::{entries, is_number, text};

/// Sensors that say more than this, or less than nothing, are not connected to anything.
const HEAT_C_MAX: f64 = 150.0;
/// Drivers of processors' own sensors; those of small boards are named after a zone, such as `cpu_thermal`.
const PROCESSORS: [&str; 5] = ["coretemp", "k10temp", "k8temp", "zenpower", "via_cputemp"];

/// The hottest of all, in degrees; of a system's `/sys/class`.
pub(super) fn hottest_c(class: &Path) -> Option<f64> {
    let zones = entries(&class.join("thermal"), |name| name.starts_with("thermal_zone"));
    let zones = zones.iter().map(|zone| zone.join("temp"));
    let processors = entries(&class.join("hwmon"), |_| true).into_iter().filter(|chip| is_processor(chip));
    let inputs = zones.chain(processors.flat_map(|chip| inputs(&chip)));
    inputs.filter_map(|path| degrees(&path)).max_by(f64::total_cmp)
}

fn is_processor(chip: &Path) -> bool {
    let is_named = |name: String| {
        PROCESSORS.contains(&name.as_str()) || (name.starts_with("cpu") && name.contains("thermal"))
    };
    text(&chip.join("name")).is_some_and(is_named)
}

/// A chip's sensors. AMD's `Tctl` is what the fans go by: where it is not the heat itself, which is `Tdie` then, it is up to
/// 27 degrees above it.
fn inputs(chip: &Path) -> Vec<PathBuf> {
    let label = |input: &PathBuf| {
        let name = input.file_name()?.to_str()?.replace("_input", "_label");
        text(&input.with_file_name(name))
    };
    let mut inputs = entries(chip, |name| {
        name.strip_prefix("temp").and_then(|name| name.strip_suffix("_input")).is_some_and(is_number)
    });
    if inputs.iter().any(|input| label(input).is_some_and(|label| label == "Tdie")) {
        inputs.retain(|input| label(input).is_none_or(|label| label != "Tctl"));
    }
    inputs
}

/// Of the kernel's thousandths.
fn degrees(path: &Path) -> Option<f64> {
    let degrees = text(path)?.parse::<f64>().ok()? / 1000.0;
    (0.0..=HEAT_C_MAX).contains(&degrees).then_some(degrees)
}
