//! Memory in use right now.

use burn::tensor::Device;

use super::heap;
use crate::kernels::is_cpu;

/// Bytes in use: the heap's on a CPU, or the process's resident set where the heap is not counted; the
/// device's pool on a GPU; `None` where none of them is known.
pub fn in_use(device: &Device) -> Option<u64> {
    if is_cpu(device) {
        heap::in_use().or_else(resident)
    } else {
        let usage = device.clone().inner().memory_pool_usage();
        usage.map(|usage| usage.bytes_in_use)
    }
}

/// The most bytes in use so far: as [`in_use`], but of a GPU's pool what it has reserved, which does not
/// shrink in a run.
pub fn peak(device: &Device) -> Option<u64> {
    if is_cpu(device) {
        heap::peak().or_else(peak_resident)
    } else {
        let usage = device.clone().inner().memory_pool_usage();
        usage.map(|usage| usage.bytes_reserved)
    }
}

/// The process's resident set in bytes (Linux's `/proc/self/status`).
fn resident() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// The largest resident set so far, in bytes.
pub fn peak_resident() -> Option<u64> {
    status_bytes("VmHWM:")
}

fn status_bytes(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(key))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
