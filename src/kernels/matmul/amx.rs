//! Tiles of 32 × 32 elements in matrix registers (Intel AMX, Sapphire Rapids and later): four of 16 × 16
//! sums, two of each factor.
//!
//! The instructions are written out, as Rust has no stable names for them; and the kernel has to be
//! asked first for leave to use the registers, whose contents it saves only then (Intel, "Architecture
//! Instruction Set Extensions Programming Reference", chapter 3; Linux, arch/x86/xstate.rst).

use std::arch::asm;
use std::sync::LazyLock;

use super::{Line, Unit, WORDS};

/// Pairs of terms (AMX-BF16).
pub(super) struct Amx;

/// Whether the processor has the registers and the system lets this process use them.
pub(super) fn is_available() -> bool {
    static IS_AVAILABLE: LazyLock<bool> = LazyLock::new(|| has_instructions() && is_permitted());
    *IS_AVAILABLE
}

fn has_instructions() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    let highest = std::arch::x86_64::__cpuid(0).eax;
    highest >= 7 && {
        let found = std::arch::x86_64::__cpuid_count(7, 0).edx;
        found & BF16 != 0 && found & TILE != 0
    }
}

/// Asks for the registers: `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`, for all threads.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that touches no memory; an old kernel refuses it as unknown.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Elsewhere it is not known how to ask.
#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// `TILECFG`: palette 1, eight registers of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config([u8; 64]);

static CONFIG: Config = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut register = 0;
    while register < 8 {
        bytes[16 + 2 * register] = 64;
        bytes[48 + register] = 16;
        register += 1;
    }
    Config(bytes)
};

impl Unit for Amx {
    const HEIGHT: usize = 32;
    const VECTORS: usize = 2;
    /// A panel of so many takes 40 KiB.
    const DEEPEST: usize = 320;
    const STEP: usize = WORDS;
    /// Step by step, 16 rows of a line and 16 more: all that a tile takes lies in one stream.
    const STRIDES: [usize; 2] = [1, 32];

    fn tile_lines(words: usize) -> usize {
        32 * (words / WORDS)
    }

    unsafe fn begin() {
        // SAFETY: the processor has the registers, by contract.
        unsafe { asm!("ldtilecfg [{}]", in(reg) CONFIG.0.as_ptr(), options(nostack, readonly)) };
    }

    unsafe fn end() {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    unsafe fn tile(
        lhs: *const Line,
        rhs: *const Line,
        words: usize,
        (tile, stride): (*mut f32, usize),
        sets: bool,
    ) {
        // SAFETY: 16 words are 32 lines of either factor; the
        // caller has `words` of them there, a multiple of 16, and the tile.
        unsafe {
            asm!(
                "test {sets}, {sets}",
                "jz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{top} + {stride} * 1]",
                "tileloadd tmm1, [{top} + {stride} * 1 + 64]",
                "tileloadd tmm2, [{bottom} + {stride} * 1]",
                "tileloadd tmm3, [{bottom} + {stride} * 1 + 64]",
                "3:",
                "tileloadd tmm6, [{rhs} + {rhs_stride} * 1]",
                "tileloadd tmm4, [{lhs} + {line} * 1]",
                "tileloadd tmm7, [{rhs} + {rhs_stride} * 1 + 64]",
                "tileloadd tmm5, [{lhs} + {line} * 1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "prefetchw [{next}]",
                "prefetchw [{next} + 64]",
                "add {next}, {stride}",
                "prefetchw [{next}]",
                "prefetchw [{next} + 64]",
                "add {next}, {stride}",
                "add {rhs}, 2048",
                "add {lhs}, 2048",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{top} + {stride} * 1], tmm0",
                "tilestored [{top} + {stride} * 1 + 64], tmm1",
                "tilestored [{bottom} + {stride} * 1], tmm2",
                "tilestored [{bottom} + {stride} * 1 + 64], tmm3",
                sets = in(reg) u64::from(sets),
                top = in(reg) tile,
                bottom = in(reg) tile.wrapping_add(16 * stride),
                stride = in(reg) 4 * stride,
                next = inout(reg) tile.wrapping_add(32 * stride) => _,
                rhs = inout(reg) rhs => _,
                rhs_stride = in(reg) 128usize,
                lhs = inout(reg) lhs => _,
                line = in(reg) 64usize,
                steps = inout(reg) words / WORDS => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
