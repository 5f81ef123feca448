#!/usr/bin/env python3
"""Make a folder with the tokenizer of SmolLM2 (49,152 tokens) for the data benchmarks.

    python3 scripts/make_bench_tokenizer.py --out FOLDER        # needs requirements-bench.txt

The Hugging Face hub is not needed: the tokenizer is read from the GGUF file that
`scripts/get_smollm2_gguf.sh` gets. Writes tokenizer.json, tokenizer_config.json,
generation_config.json and, as chat_template.jinja, `scripts/chatml_generation.jinja`.
"""

import argparse
import json
import pathlib
import subprocess

import gguf

SCRIPTS = pathlib.Path(__file__).resolve().parent
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# SmolLM2's own is the end-of-turn token, which is a label too.
PADDING = "<|endoftext|>"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=pathlib.Path, required=True)
    out = arguments.parse_args().out
    script = subprocess.run(
        ["bash", SCRIPTS / "get_smollm2_gguf.sh"], check=True, stdout=subprocess.PIPE, text=True
    )
    fields = gguf.GGUFReader(script.stdout.strip()).fields

    def field(name: str):
        return fields["tokenizer.ggml." + name].contents()

    if field("pre") != "smollm":
        raise SystemExit(f"error: pre-tokenizer {field('pre')!r}, expected 'smollm'")
    tokens = field("tokens")
    end = tokens[field("eos_token_id")]
    out.mkdir(parents=True, exist_ok=True)
    write(out / "tokenizer.json", tokenizer(tokens, field("token_type"), field("merges")))
    write(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": PADDING,
        "bos_token": None, "unk_token": None, "clean_up_tokenization_spaces": False, "model_max_length": 8192,
    })
    write(out / "generation_config.json", {"eos_token_id": field("eos_token_id")})
    (out / "chat_template.jinja").write_bytes((SCRIPTS / "chatml_generation.jinja").read_bytes())


def tokenizer(tokens: list, types: list, merges: list) -> dict:
    """tokenizer.json of a byte-level BPE that splits digits."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {
            "id": id, "content": tokens[id], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == CONTROL,
        }
        for id, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def write(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
