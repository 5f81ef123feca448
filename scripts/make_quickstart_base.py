#!/usr/bin/env python3
"""Make the tokenizer and the configuration of the quickstart's base model.

    python3 -m pip install tokenizers==0.23.3
    python3 scripts/make_wordnet_definitions.py
    python3 scripts/make_quickstart_base.py
    lorafit train recipes/quickstart-base.yaml        # the weights

Writes everything in `examples/quickstart-base/` but the weights: a byte-level BPE trained on the
WordNet definitions and on The Devil's Dictionary, and a Llama of under 4 million parameters. The
same files every time.
"""

import json
import os
import pathlib

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one order of counting, one result
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "quickstart-base"
DEFINITIONS = ROOT / "datasets" / "generated" / "wordnet_definitions.jsonl"
CORPUS = [DEFINITIONS, ROOT / "datasets" / "devils_dictionary.jsonl"]

END_OF_TEXT, START, END, PAD = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
# ChatML as SmolLM2 has it, without its default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": SPECIAL.index(END),
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "pad_token_id": SPECIAL.index(PAD),
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 2048,
}
MOST_PARAMETERS = 4_000_000


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    (FOLDER / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json("config.json", CONFIG)
    write_json("tokenizer_config.json", tokenizer_config())
    write_json(
        "generation_config.json",
        {"eos_token_id": SPECIAL.index(END), "pad_token_id": SPECIAL.index(PAD)},
    )

    parameters = count_parameters()
    if parameters >= MOST_PARAMETERS:
        raise SystemExit(f"{parameters} parameters are more than {MOST_PARAMETERS}")
    print(f"{FOLDER}: {parameters} parameters, {2 * parameters / 2**20:.2f} MiB in bf16")
    for path in CORPUS + [DEFINITIONS.with_stem(DEFINITIONS.stem + "_validation")]:
        report_lengths(path, tokenizer)


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE with SmolLM2's splitting: digits one by one, then GPT-2's pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def training_texts():
    """What the chat template shows the model between special tokens, so that roles are one token."""
    for path in CORPUS:
        for conversation in conversations(path):
            for message in conversation:
                yield message["role"] + "\n"
                yield message["content"]


def conversations(path: pathlib.Path):
    if not path.exists():
        raise SystemExit(f"{path} is missing: run scripts/make_wordnet_definitions.py first")
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["messages"]


def tokenizer_config() -> dict:
    return {
        "added_tokens_decoder": {
            str(index): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for index, token in enumerate(SPECIAL)
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def count_parameters() -> int:
    hidden, layers, vocabulary = CONFIG["hidden_size"], CONFIG["num_hidden_layers"], CONFIG["vocab_size"]
    queries = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    attention = 2 * hidden * queries + 2 * hidden * keys
    mlp = 3 * hidden * CONFIG["intermediate_size"]
    return vocabulary * hidden + layers * (attention + mlp + 2 * hidden) + hidden


def report_lengths(path: pathlib.Path, tokenizer: Tokenizer) -> None:
    lengths = sorted(len(tokenizer.encode(render(conversation)).ids) for conversation in conversations(path))
    above = sum(length > 256 for length in lengths)
    print(
        f"{path.relative_to(ROOT)}: {len(lengths)} rows, {sum(lengths)} tokens, "
        f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}, {above} longer than 256"
    )


def render(conversation: list[dict]) -> str:
    """What CHAT_TEMPLATE makes of a conversation."""
    return "".join(f"{START}{message['role']}\n{message['content']}{END}\n" for message in conversation)


def write_json(name: str, value: dict) -> None:
    (FOLDER / name).write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
