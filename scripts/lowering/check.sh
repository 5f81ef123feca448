#!/usr/bin/env bash
# Compiles every GPU kernel for cards that are not here: with NVRTC for NVIDIA's architectures, and as
# SPIR-V checked by spirv-val. Needs Python 3 with pip, and spirv-val (Debian: spirv-tools).
#
#     bash scripts/lowering/check.sh [DIR]      (DIR keeps what was lowered)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# lorafit's own target folder, so that what both need is compiled once.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$(realpath "$here/../..")/target}
folder=$(realpath -m "${1:-$CARGO_TARGET_DIR/lowered}")
venv=$CARGO_TARGET_DIR/nvrtc

cargo run --release --quiet --manifest-path "$here/Cargo.toml" -- "$folder"
if [[ ! -x $venv/bin/python ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet "nvidia-cuda-nvrtc==13.*" "nvidia-cuda-runtime==13.*" "nvidia-cuda-cccl==13.*" "nvidia-cuda-crt==13.*"
fi
wrong=0
"$venv/bin/python" "$here/nvrtc.py" "$folder" || wrong=1
for module in "$folder"/*.spv; do
    if said=$(spirv-val --target-env vulkan1.3 "$module" 2>&1); then
        echo "$(basename "$module") is valid"
    elif [[ $said == *"capability operand: 5116"* ]]; then
        echo "$(basename "$module") was not checked: this spirv-val does not know SPV_KHR_bfloat16"
    else
        echo "$(basename "$module") is NOT valid: $said"
        wrong=1
    fi
done
exit $wrong
