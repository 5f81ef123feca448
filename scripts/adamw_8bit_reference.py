"""AdamW with moments in 8 bits, written from the paper (arXiv 2110.02861) in numpy, and bitsandbytes' code
books and codes beside it: tests/golden/optimizer/adamw_8bit.safetensors.

    pip install bitsandbytes==0.50.2 torch numpy safetensors
    python scripts/adamw_8bit_reference.py tests/golden/optimizer

Per block of 256: moments = code book[codes] * absmax; m, v and w as torch's AdamW has them, in f32, from
the unrounded new moments; new absmax = largest |m| (v) of the block; codes = the nearest of m / absmax (v / absmax).
Prints how many codes bitsandbytes' own `quantize_blockwise` rounds otherwise, and fails if any does by more
than f32 tells apart. It is given f64, for which it searches the nearest code, as its CUDA kernels do; for f32
its CPU kernel looks a nearby one up in a table.
"""

import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.numpy import save_file

BLOCK = 256
N = 17 * BLOCK + 77
STEPS = 6
RATE, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.999, 1e-8, 0.1

f32 = np.float32
BOOKS = {sign: bnb.create_dynamic_map(signed=sign == "signed").numpy() for sign in ("signed", "unsigned")}


def quantise(x, book):
    codes, scales = [], []
    middles = ((book[:-1] + book[1:]) / f32(2)).astype(f32)
    for block in np.split(x, range(BLOCK, len(x), BLOCK)):
        absmax = np.abs(block).max()
        scaled = block * (f32(1) / absmax)
        codes.append(np.searchsorted(middles, scaled, side="left").astype(np.uint8))
        scales.append(absmax)
    return np.concatenate(codes), np.array(scales, f32)


def dequantise(codes, scales, book):
    return book[codes] * np.repeat(scales, BLOCK)[: len(codes)]


def main(out):
    random = np.random.default_rng(8)
    w = (random.standard_normal(N) * 0.3).astype(f32)
    # Gradients of very different size within a block, and a block of zeros.
    size = 10.0 ** random.uniform(-6, 0, N)
    gradients = (random.standard_normal((STEPS, N)) * size).astype(f32)
    gradients[:, BLOCK : 2 * BLOCK] = 0
    file = {"weights": w.copy(), "gradients": gradients}
    m, v = np.zeros(N, f32), np.zeros(N, f32)
    after = []
    for step in range(1, STEPS + 1):
        g = gradients[step - 1]
        m = m * f32(BETA1) + g * f32(1 - BETA1)
        v = v * f32(BETA2) + g * g * f32(1 - BETA2)
        root = f32(np.sqrt(1 - BETA2**step))
        w = w * f32(1 - RATE * DECAY) - m / (np.sqrt(v) / root + f32(EPS)) * f32(RATE / (1 - BETA1**step))
        after.append(w.copy())
        for moment, sign, name in ((m, "signed", "first"), (v, "unsigned", "second")):
            with np.errstate(divide="ignore", invalid="ignore"):
                codes, scales = quantise(moment, BOOKS[sign])
            codes[BLOCK : 2 * BLOCK] = 127 if sign == "signed" else 0
            theirs, _ = torch.ops.bitsandbytes.quantize_blockwise(
                torch.from_numpy(moment).double(), torch.from_numpy(BOOKS[sign]), BLOCK
            )
            theirs, exact = theirs.numpy(), moment / np.maximum(np.repeat(scales, BLOCK)[:N], 1e-30)
            off = np.abs(BOOKS[sign][theirs] - exact) - np.abs(BOOKS[sign][codes] - exact)
            off[BLOCK : 2 * BLOCK] = 0  # codes of a block of zeros mean nothing
            print(f"step {step} {name}: {(off != 0).sum()} of {N} codes differ from bitsandbytes', by up to {np.abs(off).max():.1e}")
            assert np.abs(off).max() < 1e-7
            file[f"{name}_codes"], file[f"{name}_absmax"] = codes, scales
            dequantised = dequantise(codes, scales, BOOKS[sign])
            m, v = (dequantised, v) if name == "first" else (m, dequantised)
    for sign, book in BOOKS.items():
        file[f"{sign}_codebook"] = book
    file["weights_after"] = np.stack(after)
    out.mkdir(parents=True, exist_ok=True)
    save_file(file, out / "adamw_8bit.safetensors")


main(Path(sys.argv[1]))
