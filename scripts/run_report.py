#!/usr/bin/env python3
"""A run as Markdown: loss curve, validation losses, samples before and after.

    python3 scripts/run_report.py runs/smollm2-135m > report.md

Reads metrics.jsonl of a lorafit run and nothing else; the standard library is enough.
"""

import json
import pathlib
import sys

BARS = "▁▂▃▄▅▆▇█"


def curve(losses: list[float], buckets: int = 60) -> str:
    """Means of equal stretches, drawn from the lowest to the highest of them."""
    size = max(1, len(losses) // buckets)
    means = [sum(losses[i : i + size]) / len(losses[i : i + size]) for i in range(0, len(losses), size)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((x - low) * scale)] for x in means) + f"  ({high:.2f} to {low:.2f})"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    lines = (pathlib.Path(sys.argv[1]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    kind = lambda name: [event for event in events if event["event"] == name]
    start, steps, evals, samples = kind("start")[0], kind("step"), kind("eval"), kind("sample")
    losses = [step["loss"] for step in steps]
    tokens = sum(step["tokens"] for step in steps)
    seconds = sum(step["seconds"] for step in steps)
    memory = max(step["memory_bytes"] or 0 for step in steps) / 2**30
    print(f"{len(steps)} steps on {start['device']}: {tokens:,} tokens in {seconds / 60:.1f} minutes,")
    print(f"{start['trainable_parameters']:,} of {start['parameters']:,} parameters trained, at most {memory:.2f} GiB in use.\n")
    print(f"Training loss, step 1 to {len(steps)}:\n\n    {curve(losses)}\n")
    print("| steps | mean training loss |\n|---|---|")
    for i in range(0, len(losses), 20):
        part = losses[i : i + 20]
        print(f"| {i + 1} to {i + len(part)} | {sum(part) / len(part):.4f} |")
    if evals:
        print("\n| step | validation loss |\n|---|---|")
        for event in evals:
            print(f"| {event['step']} | {event['loss']:.4f} |")
    if samples:
        first, last = samples[0]["step"], samples[-1]["step"]
        print(f"\n| prompt | step {first} | step {last} |\n|---|---|---|")
        text = lambda step, prompt: next(
            s["text"].replace("\n", " ").replace("|", "\\|")
            for s in samples
            if s["step"] == step and s["prompt"] == prompt
        )
        for sample in samples:
            if sample["step"] == first:
                prompt = sample["prompt"]
                print(f"| {prompt} | {text(first, prompt)} | {text(last, prompt)} |")


main()
