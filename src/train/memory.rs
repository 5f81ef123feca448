//! Memory in use right now.

use burn::tensor::Device;

use crate::kernels::is_cpu;

/// Bytes in use: the process's resident set on a CPU, the device's pool on a GPU; `None` where
/// neither is known.
pub fn in_use(device: &Device) -> Option<u64> {
    if is_cpu(device) {
        resident()
    } else {
        device
            .clone()
            .inner()
            .memory_pool_usage()
            .map(|usage| usage.bytes_in_use)
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
