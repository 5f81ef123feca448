//! `lorafit devices`: what this build can use on this machine.

use serde_json::{Value, json};

use super::args::Output;
use super::print::{print, say};
use super::render::bytes;
use crate::device::{self, Available, DeviceKind};
use crate::memory::room;

/// Lists the devices, and the kinds that this build lacks.
///
/// # Errors
/// Standard output cannot be written.
pub fn run(output: &Output) -> anyhow::Result<()> {
    let built = device::gpu_kinds();
    let devices = [DeviceKind::Cpu].into_iter().chain(built.iter().copied());
    for available in devices.flat_map(device::available) {
        let text = match output.json {
            true => event(&available).to_string(),
            false => line(&available),
        };
        print(&format!("{text}\n"))?;
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
    let unbuilt = device::unbuilt_gpus(|path| std::path::Path::new(path).exists());
    for (what, feature) in unbuilt {
        if !output.json && !output.quiet {
            say(&format!(
                "this machine has {what} that this build cannot use: build it with --features {feature}"
            ));
        }
    }
    Ok(())
}

/// A device for scripts.
fn event(available: &Available) -> Value {
    let abilities = device::abilities(available);
    json!({
        "event": "device",
        "device": available.spec.to_string(),
        "name": available.name,
        "software_gpu": is_software_gpu(available),
        "memory_bytes": room::of(&available.device),
        "driver": abilities.driver,
        "f16": abilities.f16,
        "bf16": abilities.bf16,
        "matrix_units": abilities.matrix_units,
    })
}

/// A device for people.
fn line(available: &Available) -> String {
    let abilities = device::abilities(available);
    let software = match is_software_gpu(available) {
        true => " (software, slower than cpu)",
        false => "",
    };
    let memory = match room::of(&available.device) {
        Some(room) if available.spec.kind == DeviceKind::Cpu => format!("{} free", bytes(room)),
        Some(room) => bytes(room),
        None => "memory not known, see --vram".to_string(),
    };
    let can = [
        (abilities.f16, "f16"),
        (abilities.bf16, "bf16"),
        (abilities.matrix_units == Some(true), "matrix units"),
    ];
    let can = can.iter().filter(|(has, _)| *has).map(|(_, name)| *name);
    let mut facts = vec![memory];
    facts.extend(can.map(str::to_string));
    facts.extend(abilities.driver.map(|driver| format!("driver {driver}")));
    let spec = available.spec.to_string();
    format!(
        "{spec:<10} {}{software}  {}",
        available.name,
        facts.join(", ")
    )
}

fn is_software_gpu(available: &Available) -> bool {
    available.software && available.spec.kind != DeviceKind::Cpu
}
