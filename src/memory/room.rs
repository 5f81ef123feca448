//! How much memory a device has.

use std::fs;
use std::path::Path;

use burn::tensor::Device;

use crate::kernels::is_cpu;
use crate::train::heap;

/// Bytes that a device has for a run; `None` where nothing tells.
///
/// Of a CPU it is what is available now and what the process holds already (Linux's
/// `/proc/meminfo` and the limit of its control group). Of a GPU it is all that it has: what its driver
/// says, or on Linux what the system knows of an AMD card. WebGPU tells nothing.
pub fn of(device: &Device) -> Option<u64> {
    match is_cpu(device) {
        true => available().map(|free| free + heap::in_use().unwrap_or(0)),
        false => of_gpu(device),
    }
}

/// Main memory that can be had without swapping, within the limit of the control group.
fn available() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let free = kib(&meminfo, "MemAvailable:")?;
    let group = Path::new("/sys/fs/cgroup");
    let number = |name: &str| {
        fs::read_to_string(group.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let left = match (number("memory.max"), number("memory.current")) {
        (Some(most), Some(used)) => {
            // Files that are cached count as used, and are given up first.
            let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            let cached = stat
                .lines()
                .find_map(|line| line.strip_prefix("inactive_file "));
            let cached: u64 = cached.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
            most_left(most, used, cached)
        }
        _ => u64::MAX,
    };
    Some(free.min(left))
}

fn most_left(most: u64, used: u64, cached: u64) -> u64 {
    most.saturating_sub(used.saturating_sub(cached))
}

/// The value of a line of `/proc/meminfo`, in bytes.
fn kib(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(any(
    feature = "cuda",
    feature = "metal",
    feature = "vulkan",
    feature = "webgpu"
))]
fn of_gpu(device: &Device) -> Option<u64> {
    use burn::backend::DispatchDevice;

    let device = device.clone().inner();
    let told = match device.as_dispatch() {
        DispatchDevice::Cube(cube) => cube.client().properties().memory.max_memory(),
        _ => None,
    };
    told.or_else(|| {
        let address = device.identity()?.physical?.pci_address?;
        let card = Path::new("/sys/bus/pci/devices").join(address.to_string());
        let total = fs::read_to_string(card.join("mem_info_vram_total")).ok()?;
        total.trim().parse().ok()
    })
}

#[cfg(not(any(
    feature = "cuda",
    feature = "metal",
    feature = "vulkan",
    feature = "webgpu"
)))]
fn of_gpu(_: &Device) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24612345 kB\nMemAvailable:   12345678 kB\nSwapTotal: 0 kB\n";
        assert_eq!(kib(text, "MemAvailable:"), Some(12_345_678 * 1024));
        assert_eq!(kib(text, "MemFree:"), None);
    }

    #[test]
    fn cached_files_leave_room_in_a_control_group() {
        assert_eq!(most_left(100, 90, 30), 40);
        assert_eq!(most_left(100, 120, 0), 0);
    }
}
