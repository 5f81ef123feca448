//! From a device name to a burn device, and values back from one.

use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::str::FromStr;

use burn::tensor::{DType, Device, Tensor};

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

/// A device that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The binary lacks the backend.
    #[error(
        "this lorafit was built without {0}; build it with `cargo build --release --features {0}`, or use --device cpu"
    )]
    NotBuilt(DeviceKind),
    /// No such device.
    #[error("no {spec} device was found: {found}; use --device cpu, or see `lorafit devices`")]
    NotFound {
        /// What was asked for.
        spec: DeviceSpec,
        /// What there is instead.
        found: String,
    },
}

/// A device that this binary can use.
#[derive(Debug, Clone)]
pub struct Available {
    /// How to ask for it.
    pub spec: DeviceSpec,
    /// What it calls itself.
    pub name: String,
    /// Whether it computes on the processor after all (Mesa's lavapipe, say).
    pub software: bool,
    /// For tensors.
    pub device: Device,
}

/// The kinds of GPU that are compiled in, best first.
pub fn gpu_kinds() -> Vec<DeviceKind> {
    let kinds = [
        (cfg!(feature = "cuda"), DeviceKind::Cuda),
        (cfg!(feature = "metal"), DeviceKind::Metal),
        (cfg!(feature = "vulkan"), DeviceKind::Vulkan),
        (cfg!(feature = "webgpu"), DeviceKind::WebGpu),
    ];
    let built = kinds.into_iter().filter(|(built, _)| *built);
    built.map(|(_, kind)| kind).collect()
}

/// The devices of one kind on this machine, the best first.
pub fn available(kind: DeviceKind) -> Vec<Available> {
    match kind {
        DeviceKind::Auto => gpu_kinds().into_iter().flat_map(available).collect(),
        DeviceKind::Cpu => vec![Available {
            spec: DeviceSpec { kind, index: None },
            name: format!("{} threads", rayon::current_num_threads()),
            software: true,
            device: Device::flex(),
        }],
        gpu => without_panic(|| gpus(gpu)),
    }
}

/// The GPUs that one driver offers.
fn gpus(kind: DeviceKind) -> Vec<Available> {
    let devices: Vec<Device> = match kind {
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec(),
        #[cfg(feature = "metal")]
        DeviceKind::Metal => Device::enumerate(burn::tensor::DeviceType::Metal).into_vec(),
        #[cfg(feature = "vulkan")]
        DeviceKind::Vulkan => Device::enumerate(burn::tensor::DeviceType::Vulkan).into_vec(),
        // `Device::webgpu` is the browser's; natively WGSL runs through the automatic choice.
        #[cfg(feature = "webgpu")]
        DeviceKind::WebGpu => Device::enumerate(burn::tensor::DeviceType::Wgpu).into_vec(),
        _ => Vec::new(),
    };
    let numbered = devices.into_iter().enumerate();
    numbered
        .map(|(i, device)| {
            let (name, software) = describe(&device);
            Available {
                spec: DeviceSpec {
                    kind,
                    index: Some(i),
                },
                name,
                software,
                device,
            }
        })
        .collect()
}

/// What a probe finds; nothing where it panics, as burn does where a driver's library is missing.
/// The panic is not shown: no device of that kind is an answer, not a fault.
fn without_panic<T>(probe: impl FnOnce() -> Vec<T>) -> Vec<T> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let found = panic::catch_unwind(AssertUnwindSafe(probe));
    panic::set_hook(hook);
    found.unwrap_or_default()
}

/// What a GPU calls itself, and whether it is none.
fn describe(device: &Device) -> (String, bool) {
    #[cfg(any(
        feature = "cuda",
        feature = "metal",
        feature = "vulkan",
        feature = "webgpu"
    ))]
    if let Some(identity) = device.identity() {
        return (identity.name, identity.physical.is_none());
    }
    (format!("{device:?}"), false)
}

/// What WebGPU finds, software renderers included, for tests and benches of the GPU's kernels.
///
/// # Errors
/// Why there is none.
pub fn webgpu() -> Result<Available, String> {
    if let Some(found) = available(DeviceKind::WebGpu).into_iter().next() {
        return Ok(found);
    }
    #[cfg(feature = "webgpu")]
    {
        // Not listed everywhere. Opening a device that is not there panics in cubecl.
        let mut found = without_panic(|| {
            let device = Device::wgpu(burn::tensor::DeviceKind::Cpu);
            let one = Tensor::<1>::from_floats([1.0], &device);
            vec![(to_vec(one.add_scalar(1.0)), device)]
        });
        if let Some((two, device)) = found.pop() {
            let spec = DeviceSpec {
                kind: DeviceKind::WebGpu,
                index: None,
            };
            let name = "the software renderer".to_string();
            return match two == [2.0] {
                true => Ok(Available {
                    spec,
                    name,
                    software: true,
                    device,
                }),
                false => Err(format!("{name} adds 1 and 1 to {two:?}")),
            };
        }
    }
    Err("WebGPU finds no adapter, not even a software renderer".to_string())
}

/// Opens a device; `auto` takes the first GPU that is one, else the CPU.
///
/// # Errors
/// The kind is not compiled in, or the machine has no such device.
pub fn open(spec: DeviceSpec) -> Result<Available, DeviceError> {
    if spec.kind == DeviceKind::Auto {
        let mut gpus = available(DeviceKind::Auto).into_iter();
        return Ok(match gpus.find(|gpu| !gpu.software) {
            Some(gpu) => gpu,
            None => available(DeviceKind::Cpu).remove(0),
        });
    }
    if spec.kind != DeviceKind::Cpu && !gpu_kinds().contains(&spec.kind) {
        return Err(DeviceError::NotBuilt(spec.kind));
    }
    let devices = available(spec.kind);
    let index = spec.index.unwrap_or(0);
    let found = match devices.len() {
        0 => "the machine or its driver offers none".to_string(),
        n => format!("there are {n}, counted from 0"),
    };
    let device = devices.into_iter().nth(index);
    device.ok_or(DeviceError::NotFound { spec, found })
}

/// What a device's kernels may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Abilities {
    /// Whether it stores and computes in IEEE half precision.
    pub f16: bool,
    /// Whether it does in bfloat16.
    pub bf16: bool,
    /// Whether it has units that multiply matrices; `None` where nothing tells.
    pub matrix_units: Option<bool>,
    /// The driver, where the system tells it.
    pub driver: Option<String>,
}

/// What a device's kernels may use; opens it.
pub fn abilities(available: &Available) -> Abilities {
    let device = &available.device;
    if available.spec.kind == DeviceKind::Cpu {
        return Abilities {
            f16: true,
            bf16: true,
            matrix_units: Some(crate::kernels::has_bf16_products()),
            driver: None,
        };
    }
    without_panic(|| {
        vec![Abilities {
            f16: device.supports_dtype(DType::F16),
            bf16: device.supports_dtype(DType::BF16),
            matrix_units: matrix_units(device),
            driver: driver(device),
        }]
    })
    .pop()
    .unwrap_or_default()
}

#[cfg(any(
    feature = "cuda",
    feature = "metal",
    feature = "vulkan",
    feature = "webgpu"
))]
fn matrix_units(device: &Device) -> Option<bool> {
    match device.as_dispatch() {
        burn::backend::DispatchDevice::Cube(cube) => {
            let client = cube.client();
            let features = &client.properties().features.matmul;
            Some(!features.cmma.is_empty() || !features.mma.is_empty())
        }
        _ => None,
    }
}

#[cfg(not(any(
    feature = "cuda",
    feature = "metal",
    feature = "vulkan",
    feature = "webgpu"
)))]
fn matrix_units(_: &Device) -> Option<bool> {
    None
}

/// The driver of a card, as Linux knows it.
#[cfg(any(
    feature = "cuda",
    feature = "metal",
    feature = "vulkan",
    feature = "webgpu"
))]
fn driver(device: &Device) -> Option<String> {
    let address = device.identity()?.physical?.pci_address?;
    let link = format!("/sys/bus/pci/devices/{address}/driver");
    let name = std::fs::read_link(link).ok()?;
    let name = name.file_name()?.to_string_lossy().into_owned();
    let version = std::fs::read_to_string(format!("/sys/module/{name}/version"));
    Some(match version {
        Ok(version) => format!("{name} {}", version.trim()),
        Err(_) => name,
    })
}

#[cfg(not(any(
    feature = "cuda",
    feature = "metal",
    feature = "vulkan",
    feature = "webgpu"
)))]
fn driver(_: &Device) -> Option<String> {
    None
}

/// GPUs that the machine seems to have and this build has no backend for: what shows it, and the cargo
/// feature that would do.
pub fn unbuilt_gpus(exists: impl Fn(&str) -> bool) -> Vec<(&'static str, &'static str)> {
    let built = gpu_kinds();
    let any = |kinds: &[DeviceKind]| kinds.iter().any(|kind| built.contains(kind));
    let mut found = Vec::new();
    let general = [DeviceKind::Vulkan, DeviceKind::WebGpu];
    if exists("/proc/driver/nvidia") && !any(&general) && !any(&[DeviceKind::Cuda]) {
        found.push(("an NVIDIA driver", "vulkan (or cuda)"));
    } else if exists("/dev/kfd") && !any(&general) {
        found.push(("an AMD GPU", "vulkan"));
    } else if exists("/dev/dri/renderD128") && !any(&general) {
        found.push(("a GPU", "vulkan"));
    }
    if cfg!(target_os = "macos") && !any(&[DeviceKind::Metal, DeviceKind::WebGpu]) {
        found.push(("an Apple GPU", "metal"));
    }
    found
}

/// The values of a tensor.
pub fn to_vec(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("tensors are f32")
}

/// The value of a tensor with one element.
pub fn scalar(tensor: Tensor<1>) -> f64 {
    f64::from(to_vec(tensor)[0])
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

    #[test]
    fn a_gpu_without_a_backend_is_told_with_its_feature() {
        let found = unbuilt_gpus(|path| path == "/dev/kfd");
        let has_one = cfg!(any(feature = "vulkan", feature = "webgpu"));
        let amd = found.contains(&("an AMD GPU", "vulkan"));
        assert_eq!(amd, !has_one);
        if !cfg!(target_os = "macos") {
            assert!(unbuilt_gpus(|_| false).is_empty());
        }
    }

    #[test]
    fn a_driver_that_panics_offers_nothing() {
        let found: Vec<u8> = without_panic(|| panic!("no libcuda.so"));
        assert!(found.is_empty());
        assert_eq!(without_panic(|| vec![1]), [1]);
    }
}
