#!/usr/bin/env python3
"""The peer on real rows of many lengths: padded LoRA training steps with transformers and PEFT.

    pip install torch transformers==5.23.0 peft==0.21.2 gguf
    bash scripts/get_smollm2_gguf.sh
    python scripts/peft_ragged.py --dtype f32 --batch 8 --steps 8
    lorafit train recipes/smollm2-135m.yaml --set base.model=examples/downloads/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --set data.packing=true --set train.max_steps=8 --set train.eval_steps=0 --set sample.prompts=[]

Rows are shuffled and padded to the longest of their batch, as TRL's SFTTrainer does by default; the
assistant's turns train. Prints one JSON line: trained tokens a second (those with a label; the median
of the steps after the first), the share of padding, and the peak resident memory. lorafit's
metrics.jsonl has the same figures for each step. Compare ratios on one machine, in turn.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="examples/downloads/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--data", default="datasets/devils_dictionary.jsonl")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    return parser.parse_args()


def rows(tokenizer, path, longest):
    """Token ids and labels of each conversation; -100 where the user speaks."""
    for line in pathlib.Path(path).read_text().splitlines():
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        yield whole[:longest], labels[:longest]


def padded(batch, pad):
    longest = max(len(ids) for ids, _ in batch)
    fill = lambda values, value: torch.tensor([v + [value] * (longest - len(v)) for v in values])
    ids = fill([ids for ids, _ in batch], pad)
    mask = fill([[1] * len(ids) for ids, _ in batch], 0)
    return ids, mask, fill([labels for _, labels in batch], -100)


def main():
    a = arguments()
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    path = pathlib.Path(a.model)
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if where else path
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    data = list(rows(tokenizer, a.data, a.max_len))
    random.Random(0).shuffle(data)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where)
    config = LoraConfig(r=a.rank, lora_alpha=2 * a.rank, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=2e-4)
    rates, padding, tokens = [], 0, 0
    for step in range(a.steps):
        batch = data[step * a.batch : (step + 1) * a.batch]
        ids, mask, labels = padded(batch, tokenizer.pad_token_id or 0)
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.append((labels[:, 1:] != -100).sum().item() / (time.perf_counter() - start))
        padding, tokens = padding + (mask == 0).sum().item(), tokens + mask.numel()
    print(json.dumps({
        "peer": "transformers+peft", "torch": torch.__version__, "dtype": a.dtype, "batch": a.batch,
        "trained_tokens_per_second": round(statistics.median(rates[1:]), 1),
        "padding": round(padding / tokens, 3),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
