#!/usr/bin/env python3
"""Whether PEFT loads what lorafit writes: each kind of adapter, trained for some steps.

    pip install torch transformers==5.23.0 peft==0.21.2
    python scripts/peft_loads.py target/release/lorafit /tmp/peft_loads

For each kind: `lorafit train` on the quickstart, PEFT loads the adapter on the quickstart's base, and
its logits on a text are compared with those of the model that `lorafit merge` writes in f32. New
tokens: the base is resized first, as PEFT's users do. Exits with 1 where logits differ by more than
1e-3, or where the adapter changes nothing.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = {
    "lora": [],
    "rslora": ["adapter.use_rslora=true", "adapter.rank_pattern={q_proj: 4}", "adapter.alpha_pattern={down_proj: 7}"],
    "dora": ["adapter.use_dora=true"],
    "gaussian": ["adapter.init_lora_weights=gaussian"],
    "pissa": ["adapter.init_lora_weights=pissa"],
    "olora": ["adapter.init_lora_weights=olora"],
    "lora_fa": ["train.optimizer=lora_fa"],
    "lora_plus": ["train.loraplus_lr_ratio=8"],
    "vera": ["adapter.method=vera", "train.learning_rate=0.1"],
    "bias": ["adapter.bias=all"],
    "layers": ["adapter.layers_to_transform=[0, 3]", "adapter.exclude_modules=[v_proj]"],
    "saved": ["adapter.modules_to_save=[embed_tokens, lm_head]"],
    "ends": ["adapter.target_modules=[embed_tokens, lm_head, q_proj]"],
    "ends_dora": ["adapter.target_modules=[embed_tokens, lm_head, q_proj]", "adapter.use_dora=true"],
    "token_rows": ["adapter.trainable_token_indices=[3, 40]"],
    "new_tokens": ["adapter.new_tokens=[<tool>, </tool>]"],
}  # fmt: skip

BASE = "examples/quickstart-base"
TOLERANCE = 1e-3


def lorafit(binary, *arguments):
    done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lorafit {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def compare(binary, folder, kind, knobs):
    run = folder / kind
    settings = ["train.max_steps=6", "train.eval_steps=0", "sample.prompts=[]", f"output_dir={run}", *knobs]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    lorafit(binary, "train", "recipes/quickstart.yaml", "--quiet", *flags)
    lorafit(binary, "merge", run, "--quiet", "--dtype", "f32", "--out", run / "whole")
    tokenizer = AutoTokenizer.from_pretrained(run / "whole")
    text = "Define Year. A period of <tool>three hundred</tool> and sixty-five disappointments."
    ids = tokenizer(text, return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    plain = None if int(ids.max()) >= base.get_input_embeddings().num_embeddings else logits(base, ids)
    if len(tokenizer) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(tokenizer))
    adapted = logits(PeftModel.from_pretrained(base, run / "adapter").eval(), ids)
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "whole", dtype=torch.float32), ids)
    off = (adapted - merged[..., : adapted.shape[-1]]).abs().max().item()
    moved = float("nan") if plain is None else (adapted - plain).abs().max().item()
    good = off <= TOLERANCE and not moved <= 10 * TOLERANCE
    print(f"{kind:12} {'loads' if good else 'DIFFERS':8} off by {off:.1e}, moved by {moved:.1e}", flush=True)
    return good


def main():
    binary, folder = sys.argv[1], Path(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    kinds = sys.argv[3:] or KINDS
    results = [compare(binary, folder, kind, KINDS[kind]) for kind in kinds]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
