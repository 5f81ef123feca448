#!/usr/bin/env python3
"""Compiles lowered kernels with NVRTC and prints a table: registers, spills, shared memory, mma.

    pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt
    python nvrtc.py DIR [--markdown]

`DIR` holds `NAME.sm_ARCH.cu` (see src/main.rs) and `tensor_cores.txt`, the names of the kernels that
should use tensor cores. NVRTC's own log says what ptxas found. Exits with 1 where a kernel does not
compile, spills, or lacks mma instructions that it should have.
"""

import ctypes
import re
import sys
import sysconfig
from pathlib import Path

ROOT = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"


class Nvrtc:
    def __init__(self):
        self.lib = ctypes.CDLL(str(ROOT / "lib" / "libnvrtc.so.13"))

    def text(self, program, what):
        size = ctypes.c_size_t()
        getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.lib, f"nvrtcGet{what}")(program, buffer)
        return buffer.value.decode(errors="replace")

    def compile(self, source, architecture):
        """PTX and the log of ptxas, or what the compiler says."""
        program = ctypes.c_void_p()
        self.lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
        options = [
            f"--gpu-architecture={architecture}",
            f"--include-path={ROOT / 'include'}",
            f"--include-path={ROOT / 'include' / 'cccl'}",
            "--ptxas-options=-v",
        ]
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        failed = self.lib.nvrtcCompileProgram(program, len(options), array)
        log = self.text(program, "ProgramLog")
        if failed:
            raise RuntimeError(log.splitlines()[0] if log else failed)
        ptx = self.text(program, "PTX")
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        return ptx, log


def number(pattern, log):
    found = [int(match) for match in re.findall(pattern, log)]
    return max(found, default=0)


def row(nvrtc, path, on_tensor_cores):
    name, architecture = re.fullmatch(r"(.*)\.(sm_\d+)", path.stem).groups()
    # The runtime asks for the architecture's own features from Hopper on.
    exact = architecture + ("a" if int(architecture[3:]) >= 90 else "")
    source = path.read_text()
    ptx, log = nvrtc.compile(source, exact)
    mma = len(re.findall(r"\b(?:wmma\.mma|mma\.sync|wgmma)", ptx))
    spills = number(r"(\d+) bytes spill stores", log) + number(r"(\d+) bytes spill loads", log)
    faults = []
    if spills:
        faults.append("spills")
    if name in on_tensor_cores and not mma:
        faults.append("no mma")
    cells = [name, architecture, number(r"Used (\d+) registers", log), spills, number(r"shared memory: (\d+) bytes", source), mma]
    return cells, faults


def main():
    folder = Path(sys.argv[1])
    on_tensor_cores = set((folder / "tensor_cores.txt").read_text().split())
    nvrtc, wrong = Nvrtc(), 0
    print("| kernel | architecture | registers | spilled bytes | shared bytes | mma |")
    print("|---|---|---|---|---|---|")
    for path in sorted(folder.glob("*.sm_*.cu")):
        try:
            cells, faults = row(nvrtc, path, on_tensor_cores)
        except RuntimeError as error:
            cells, faults = [path.stem, "", "", "", "", ""], [f"does not compile: {error}"]
        wrong += bool(faults)
        print("| " + " | ".join(map(str, cells)) + " |" + "".join(f" <- {fault}" for fault in faults), flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
