//! From a device name to a burn device.

use std::fmt;
use std::str::FromStr;

/// A device as it is named on the command line: `auto`, `cpu`, `vulkan`, `cuda:1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSpec {
    /// The kind of device.
    pub kind: DeviceKind,
    /// Which of several, counted from 0; `None` leaves it to the driver.
    pub index: Option<usize>,
}

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// The best that this build and this machine have.
    Auto,
    /// The processor; always there.
    Cpu,
    /// A GPU through Vulkan.
    Vulkan,
    /// An Apple GPU through Metal.
    Metal,
    /// A GPU through WebGPU, on whatever the machine offers.
    WebGpu,
    /// An NVIDIA GPU through CUDA.
    Cuda,
}

/// Every kind and its name on the command line.
const KINDS: &[(&str, DeviceKind)] = &[
    ("auto", DeviceKind::Auto),
    ("cpu", DeviceKind::Cpu),
    ("vulkan", DeviceKind::Vulkan),
    ("metal", DeviceKind::Metal),
    ("webgpu", DeviceKind::WebGpu),
    ("cuda", DeviceKind::Cuda),
];

/// A device name that means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceSpecError {
    /// The name is none of the kinds.
    #[error("`{0}` is no device; expected auto, cpu, vulkan, metal, webgpu or cuda")]
    Kind(String),
    /// The index is not a number, or the kind takes none.
    #[error(
        "`{0}` has no such index; expected a number from 0 to 255 after vulkan, metal, webgpu or cuda, as in cuda:0"
    )]
    Index(String),
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = KINDS.iter().find(|(_, kind)| kind == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(f)?;
        match self.index {
            Some(index) => write!(f, ":{index}"),
            None => Ok(()),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = DeviceSpecError;

    fn from_str(text: &str) -> Result<Self, DeviceSpecError> {
        let (name, index) = match text.split_once(':') {
            Some((name, index)) => (name, Some(index)),
            None => (text, None),
        };
        let (_, kind) = KINDS
            .iter()
            .find(|(known, _)| *known == name)
            .ok_or_else(|| DeviceSpecError::Kind(text.into()))?;
        let numbered = !matches!(kind, DeviceKind::Auto | DeviceKind::Cpu);
        let index = match index.map(str::parse::<u8>) {
            None => None,
            Some(Ok(index)) if numbered => Some(index.into()),
            Some(_) => return Err(DeviceSpecError::Index(text.into())),
        };
        Ok(DeviceSpec { kind: *kind, index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for name in ["auto", "cpu", "vulkan", "metal:0", "webgpu:1", "cuda:7"] {
            assert_eq!(name.parse::<DeviceSpec>().unwrap().to_string(), name);
        }
        for name in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1"] {
            assert!(name.parse::<DeviceSpec>().is_err(), "{name}");
        }
    }
}
