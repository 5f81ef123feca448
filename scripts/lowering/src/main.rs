//! Writes every GPU kernel of lorafit as CUDA C++ for each architecture and as Vulkan's SPIR-V.
//!
//!     cargo run --release -- DIR
//!
//! `DIR/NAME.sm_80.cu` and so on go to NVRTC (`nvrtc.py`), `DIR/NAME.spv` to `spirv-val`
//! (`check.sh` does all of it). No card and no driver is needed: devices are described by hand, with
//! what the runtimes report for such cards.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cubecl::prelude::*;
use cubecl_common::device::{DeviceId, ServiceId};
use cubecl_common::profile::TimingMethod;
use cubecl_core::{VulkanCompilationOptions, WgpuCompilationOptions};
use cubecl_cpp::register_supported_types;
use cubecl_cpp::shared::{CompilationOptions, CppCompiler, CppSupportedFeatures};
use cubecl_cpp::target::Cuda;
use cubecl_environment::stream::StreamId;
use cubecl_ir::features::{MmaConfig, Plane};
use cubecl_ir::types::matrix::MatrixLayout;
use cubecl_ir::{
    ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties,
    MemoryDeviceProperties, MmaProperties, TargetProperties,
};
use cubecl_runtime::compiler::Compiler;
use cubecl_runtime::server::Handle;
use cubecl_spirv::SpirvCompiler;
use lorafit::kernels::lowering::{Target, samples};

const ARCHITECTURES: [u32; 5] = [80, 86, 89, 90, 120];

fn main() {
    let Some(folder) = std::env::args().nth(1).map(PathBuf::from) else {
        eprintln!("usage: lowering DIR");
        std::process::exit(2);
    };
    fs::create_dir_all(&folder).expect("the folder can be made");
    for architecture in ARCHITECTURES {
        for sample in samples(&target(architecture)) {
            cuda(&folder, &sample.name, &*sample.kernel, architecture);
        }
    }
    let on_tensor_cores = samples(&target(80)).into_iter().filter(|sample| sample.on_tensor_cores);
    let names: Vec<String> = on_tensor_cores.map(|sample| sample.name).collect();
    fs::write(folder.join("tensor_cores.txt"), names.join("\n")).expect("the file can be written");
    for sample in samples(&target(80)) {
        spirv(&folder, &sample.name, &*sample.kernel);
    }
}

/// A kernel as it is defined; unchecked, as lorafit launches all of them.
fn definition(kernel: &dyn CubeKernel) -> cubecl_core::prelude::KernelDefinition {
    let mut definition = cubecl_core::define_kernel(kernel).expect("the kernel can be defined");
    definition.settings.execution_mode = ExecutionMode::Unchecked;
    definition
}

fn cuda(folder: &Path, name: &str, kernel: &dyn CubeKernel, architecture: u32) {
    let options = CompilationOptions {
        warp_size: 32,
        amd_wmma: None,
        supports_features: CppSupportedFeatures {
            fast_math: true,
            dp4a: true,
            grid_constants: true,
            fast_tanh: true,
            clusters: architecture >= 90,
            elect_sync: architecture >= 90,
        },
    };
    let lowered = CppCompiler::<Cuda>::default().compile(definition(kernel), &options);
    let lowered = lowered.unwrap_or_else(|error| panic!("{name}: {error:?}"));
    let path = folder.join(format!("{name}.sm_{architecture}.cu"));
    // Asked for at launch, so that NVRTC does not see it.
    let shared = lowered.shared_memory_size;
    let source = format!("// shared memory: {shared} bytes\n{}", lowered.source);
    fs::write(path, source).expect("the file can be written");
}

/// With explicit workgroup memory, as real cards have it.
fn spirv(folder: &Path, name: &str, kernel: &dyn CubeKernel) {
    let options = WgpuCompilationOptions {
        supports_u64: true,
        supports_vulkan_compiler: true,
        supports_msl_compiler: false,
        vulkan: VulkanCompilationOptions {
            supports_fp_fast_math: true,
            supports_explicit_smem: true,
            supports_uniform_standard_layout: true,
            max_spirv_version: (1, 6),
            max_vector_size: 4,
            push_constant_size: 128,
            ..Default::default()
        },
    };
    let lowered = SpirvCompiler.compile(definition(kernel), &options);
    let lowered = lowered.unwrap_or_else(|error| panic!("{name}: {error:?}"));
    let words = lowered.assembled_module.iter();
    let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    fs::write(folder.join(format!("{name}.spv")), bytes).expect("the file can be written");
}

fn target(architecture: u32) -> Target {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: 99 * 1024,
        max_cube_count: (i32::MAX as u32, 65_535, 65_535),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(28),
        num_cpu_cores: None,
        last_level_cache_size: None,
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        max_vector_size: VectorSize::MAX,
        cube_mma_reserved_shared_memory: 0,
    };
    let identity = DeviceIdentity {
        name: "described by hand".into(),
        fingerprint: format!("ptx_sm{architecture}"),
        physical: None,
    };
    let mut properties = DeviceProperties::new(
        Default::default(),
        MemoryDeviceProperties::new(8 << 30, 512),
        hardware,
        TimingMethod::Device,
        identity,
    );
    register_supported_types(&mut properties);
    properties.features.plane.insert(Plane::Ops);
    properties.features.plane.insert(Plane::Sync);
    properties.features.plane.insert(Plane::NonUniformControlFlow);
    properties.features.alignment = true;
    properties.features.memory_reinterpret = true;
    properties.features.copy_async = true;
    for kind in [FloatKind::F16, FloatKind::BF16] {
        let element = ElemType::Float(kind);
        properties.features.matmul.cmma.insert(MmaConfig {
            a_type: element,
            b_type: element,
            cd_type: ElemType::Float(FloatKind::F32),
            m: 16,
            n: 16,
            k: 16,
        });
    }
    let mma = MmaProperties {
        register_size_bits: 32,
        const_plane_size: 32,
        register_layout_a: MatrixLayout::RowMajor,
        register_layout_b: MatrixLayout::ColMajor,
        register_layout_acc: MatrixLayout::RowMajor,
        register_duplication_a: 1,
        register_duplication_b: 1,
        register_duplication_acc: 1,
        contiguous_elements: ContiguousElements::new(
            cubecl_cpp::cuda::mma::manual::contiguous_elements_cuda,
        ),
    };
    Target {
        properties: Arc::new(properties),
        target: Arc::new(TargetProperties { mma }),
        buffer,
    }
}

/// A buffer of some f32 elements on no device.
fn buffer(elements: usize) -> BufferArg {
    let service = ServiceId::of::<()>(DeviceId::new(0, 0));
    let handle = Handle::new(service, StreamId::current(), (elements * 4) as u64);
    // SAFETY: nothing is launched.
    unsafe { BufferArg::from_raw_parts(handle, elements) }
}
