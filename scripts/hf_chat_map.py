#!/usr/bin/env python3
"""Tokenise a chat dataset as Hugging Face users do, for comparison with `benches/data.rs`.

    python3 scripts/hf_chat_map.py --data FILE.jsonl --model FOLDER [--batched]   # needs requirements-bench.txt

`datasets.map` applies the chat template, tokenises, and makes labels of the assistant mask; a row
is truncated on the right to `--max-seq-len` tokens. Nothing is cached from one run to the next.
Prints one JSON object: counts, seconds, peak memory of all processes together, and a sha256 of
the rows in order, each as the number of its tokens, its ids and its labels (32 bits each,
little-endian).
"""

import argparse
import hashlib
import json
import os
import pathlib
import resource
import tempfile
import threading
import time

IGNORE_INDEX = -100
SAMPLE_SECONDS = 0.25


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="hf_chat_map_", dir=options.cache_dir) as cache:
        # Before the import: the libraries read these then.
        os.environ.update(HF_HOME=cache, HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
        with PeakMemory() as memory:
            result = run(options, cache)
            result["peak_pss_bytes"], result["peak_rss_bytes"] = memory.peak_pss, memory.peak_rss
    print(json.dumps(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL file with a `messages` column")
    parser.add_argument("--model", required=True, help="folder with tokenizer.json")
    parser.add_argument("--template", type=pathlib.Path, help="chat template in place of the model's")
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--batched", action="store_true", help="map batches of 1,000 rows")
    parser.add_argument("--limit", type=int, help="take the first rows only")
    parser.add_argument("--cache-dir", help="where the temporary cache is made")
    return parser.parse_args()


def run(options: argparse.Namespace, cache: str) -> dict:
    import datasets
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    if options.template:
        tokenizer.chat_template = options.template.read_text(encoding="utf-8")
    started = time.perf_counter()
    split = f"train[:{options.limit}]" if options.limit else "train"
    rows = datasets.load_dataset("json", data_files=options.data, split=split, cache_dir=cache)
    loaded, loaded_cpu = time.perf_counter(), cpu_seconds()
    mapped = rows.map(
        encode_batch if options.batched else encode_row,
        batched=options.batched,
        num_proc=options.num_proc,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_length": options.max_seq_len},
    )
    ended, ended_cpu = time.perf_counter(), cpu_seconds()
    counts = counts_and_hash(mapped)
    return {
        **counts,
        "batched": options.batched,
        "num_proc": options.num_proc,
        "seconds": round(ended - loaded, 3),
        # Far below `num_proc` times the seconds, other programs had the cores.
        "cpu_seconds": round(ended_cpu - loaded_cpu, 3),
        "seconds_total": round(ended - started, 3),
        "tokens_per_second": round(counts["tokens"] / (ended - loaded)),
        "tokens_per_second_total": round(counts["tokens"] / (ended - started)),
        "versions": {"transformers": transformers.__version__, "datasets": datasets.__version__},
    }


def cpu_seconds() -> float:
    """Of this process and those of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def encode_row(row: dict, tokenizer, max_length: int) -> dict:
    encoded = apply(row["messages"], tokenizer, max_length)
    return {
        "input_ids": encoded["input_ids"],
        "labels": labels(encoded["input_ids"], encoded["assistant_masks"]),
    }


def encode_batch(rows: dict, tokenizer, max_length: int) -> dict:
    encoded = apply(rows["messages"], tokenizer, max_length)
    return {
        "input_ids": encoded["input_ids"],
        "labels": [labels(ids, mask) for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"])],
    }


def apply(messages: list, tokenizer, max_length: int) -> dict:
    return tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        truncation=True,
        max_length=max_length,
    )


def labels(ids: list, mask: list) -> list:
    return [token if trained else IGNORE_INDEX for token, trained in zip(ids, mask)]


def counts_and_hash(mapped) -> dict:
    import numpy

    digest = hashlib.sha256()
    tokens = trained = without_labels = 0
    for batch in mapped.with_format("arrow").iter(batch_size=1000):
        columns = []
        for name in ("input_ids", "labels"):
            column = batch[name].combine_chunks()
            columns.append(column.flatten().to_numpy().astype("<i4"))
        lengths = column.value_lengths().to_numpy()
        ends = numpy.cumsum(lengths)
        for start, end in zip(ends - lengths, ends):
            ids, labels = (column[start:end] for column in columns)
            digest.update(int(end - start).to_bytes(4, "little") + ids.tobytes() + labels.tobytes())
            count = int((labels != IGNORE_INDEX).sum())
            trained += count
            without_labels += count == 0
        tokens += int(lengths.sum())
    return {
        "rows": len(mapped), "tokens": tokens, "trained_tokens": trained,
        "rows_without_labels": without_labels, "sha256": digest.hexdigest(),
    }


class PeakMemory:
    """Samples the memory of this process and all below it while the `with` block runs (Linux).

    The proportional set size (PSS) counts what processes share once, the resident set size (RSS)
    counts it in each. Both hold the pages of mapped files.
    """

    def __enter__(self) -> "PeakMemory":
        self.peak_pss = self.peak_rss = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.stop.is_set():
            sums = {"Pss:": 0, "Rss:": 0}
            for process in family(os.getpid()):
                try:
                    lines = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                except OSError:  # it has ended
                    continue
                for line in lines[1:]:
                    name, value = line.split()[:2]
                    if name in sums:
                        sums[name] += int(value) * 1024
            self.peak_pss = max(self.peak_pss, sums["Pss:"])
            self.peak_rss = max(self.peak_rss, sums["Rss:"])
            self.stop.wait(SAMPLE_SECONDS)


def family(root: int) -> list:
    """The process and all its descendants."""
    processes = [root]
    for process in processes:
        for children in pathlib.Path(f"/proc/{process}/task").glob("*/children"):
            try:
                processes.extend(int(child) for child in children.read_text().split())
            except OSError:
                continue
    return processes


if __name__ == "__main__":
    main()
