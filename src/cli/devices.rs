//! `lorafit devices`: what this build can use on this machine.

use super::args::Output;
use super::print::{print, say};
use crate::device::{self, DeviceKind};

/// Lists the devices, and the kinds that this build lacks.
///
/// # Errors
/// Standard output cannot be written.
pub fn run(output: &Output) -> anyhow::Result<()> {
    let built = device::gpu_kinds();
    let devices = [DeviceKind::Cpu].into_iter().chain(built.iter().copied());
    for available in devices.flat_map(device::available) {
        let (spec, name) = (available.spec.to_string(), available.name);
        let software = available.software && available.spec.kind != DeviceKind::Cpu;
        if output.json {
            let line = serde_json::json!({
                "event": "device", "device": spec, "name": name, "software_gpu": software,
            });
            print(&format!("{line}\n"))?;
        } else {
            let note = match software {
                true => " (software, slower than cpu)",
                false => "",
            };
            print(&format!("{spec:<10} {name}{note}\n"))?;
        }
    }
    let all = [
        DeviceKind::Cuda,
        DeviceKind::Metal,
        DeviceKind::Vulkan,
        DeviceKind::WebGpu,
    ];
    let missing: Vec<String> = (all.into_iter())
        .filter(|kind| !built.contains(kind))
        .map(|kind| kind.to_string())
        .collect();
    if !missing.is_empty() && !output.json && !output.quiet {
        say(&format!(
            "\nthis build has no {}; build lorafit from its source with `cargo build --release --features NAME`",
            missing.join(", ")
        ));
    }
    Ok(())
}
