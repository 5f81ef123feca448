#!/usr/bin/env python3
"""Make chats of plain word definitions, on which the quickstart's base model is pretrained.

Source: Debian's package `dict-wn` (WordNet 3.0).
Licence: WordNet's own, free for any use with its notice, which is in datasets/README.md.
Command, from the root of the repository, on Debian or Ubuntu; the same rows every time:

    python3 scripts/make_wordnet_definitions.py

Writes `datasets/generated/wordnet_definitions.jsonl` and `…/wordnet_definitions_validation.jsonl`,
which are not in git. A word gets the first sense of its dominant part of speech, without examples.
Most rows are conversations of several words, filled up to the recipe's `max_seq_len`, so that
little of a batch is padding; some are of one word, as the model is used later.
"""

import collections
import hashlib
import json
import pathlib
import random
import re

import debian_dict

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "datasets" / "generated"
SEED = 0
WORDS = 30_000
# The most frequent words come up more than once an epoch, each time in another conversation.
COMMON_WORDS = 5_000
COMMON_TIMES = 3
VALIDATION_WORDS = 400
SINGLE_SHARE = 0.2  # of the rows
LONGEST_DEFINITION = 140
# What a pair takes in tokens of the quickstart's tokenizer, roughly: fixed by the chat template,
# and by the text. Rows are filled up to ROW_TOKENS of this estimate.
PAIR_TOKENS, CHARACTERS_PER_TOKEN = 13, 3.4
ROW_TOKENS = 248

SENSE = re.compile(r"^ {4}(?:(n|v|adj|adv) )?(\d+): ", re.MULTILINE)
UNWANTED = re.compile(
    r"offensive|slur|disparag|derogat|obscen|vulgar|slang|\bsex|genital|coit|copulat|penis|vagina|"
    r"prostitut|excre|feces|\brap(?:e|ist)\b|negro|\bjews?\b|erotic|lewd|masturbat|sodom|"
    r"\bgenus\b|family [A-Z]|\bfamily\b.*idae|[0-9]{4}|[^ -~]",
    re.IGNORECASE,
)


def main() -> None:
    definitions = {}
    for article in debian_dict.read("dict-wn", "wn"):
        word, _, senses = article.strip("\n").partition("\n")
        if re.fullmatch(r"[a-z]{2,12}", word) and word not in definitions:
            if definition := define(senses):
                definitions[word] = definition
    ranked = rank(definitions)[:WORDS]
    validation = held_out(ranked, definitions)
    training = [word for word in ranked if word not in validation]
    common = [word for word in training if word in set(ranked[:COMMON_WORDS])]

    draw = random.Random(SEED)
    write("wordnet_definitions.jsonl", training + common * (COMMON_TIMES - 1), definitions, draw)
    write("wordnet_definitions_validation.jsonl", sorted(validation), definitions, draw)


def define(senses: str) -> str | None:
    """The first sense of the part of speech with the most senses; None where that is unfit.

    A noun's count twice: they are what people ask for.
    """
    parts = collections.defaultdict(list)
    part = None
    places = list(SENSE.finditer(senses))
    for place, following in zip(places, places[1:] + [None]):
        part = place[1] or part
        parts[part].append(senses[place.end() : following.start() if following else None])
    if not parts:
        return None
    main = max(parts, key=lambda part: len(parts[part]) * (2 if part == "n" else 1))
    first = " ".join(parts[main][0].split())
    label = re.match(r"(?:\([^)]*\) *)*", first)[0]
    definition = tidy(first)
    return None if definition is None or UNWANTED.search(label + definition) else definition


def tidy(sense: str) -> str | None:
    """`(music) a short tune; "he hummed a catch" [syn: …]` → `A short tune.`"""
    text = re.split(r"\[(?:syn|ant|also)\b|[;:,]? ?\"", sense)[0]
    text = re.sub(r"^(?:\([^)]*\) *)+", "", text).strip(" ;:,")
    clauses = text.split("; ")
    text = clauses[0]
    for clause in clauses[1:]:
        if len(text) + 2 + len(clause) < LONGEST_DEFINITION // 2:
            text += "; " + clause
    text = text.replace("`", "'").rstrip(" ;:,.")
    if not 8 <= len(text) < LONGEST_DEFINITION or text.count("(") != text.count(")"):
        return None
    return text[0].upper() + text[1:] + "."


def rank(definitions: dict[str, str]) -> list[str]:
    """Words by how often the definitions use them, for want of a frequency list; short ones first."""
    uses = collections.Counter()
    for definition in definitions.values():
        uses.update(set(re.findall(r"[a-z]+", definition.lower())))
    return sorted(definitions, key=lambda word: (-uses[word], len(word), word))


def held_out(ranked: list[str], definitions: dict[str, str]) -> set[str]:
    """Words for validation: not common ones, and none that shares its definition with another."""
    shared = collections.Counter(definitions[word] for word in ranked)
    alone = [word for word in ranked[COMMON_WORDS:] if shared[definitions[word]] == 1]
    return set(sorted(alone, key=lambda word: hashlib.sha256(word.encode()).digest())[:VALIDATION_WORDS])


def write(name: str, words: list[str], definitions: dict[str, str], draw: random.Random) -> None:
    rows = conversations(words, definitions, draw)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / name
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            messages = []
            for word in row:
                messages.append({"role": "user", "content": prompt(word)})
                messages.append({"role": "assistant", "content": definitions[word]})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    print(f"{path}: {len(words)} definitions of {len(set(words))} words in {len(rows)} rows")


def conversations(words: list[str], definitions: dict[str, str], draw: random.Random) -> list[list[str]]:
    """The words in random order, in rows of one word or of as many as ROW_TOKENS holds."""
    words = words.copy()
    draw.shuffle(words)
    rows, row, size = [], [], 0.0
    for word in words:
        pair = PAIR_TOKENS + (len(prompt(word)) + len(definitions[word])) / CHARACTERS_PER_TOKEN
        if row and (size + pair > ROW_TOKENS or word in row):
            rows.append(row)
            while draw.random() < SINGLE_SHARE and len(rows[-1]) > 1:
                rows.append([rows[-1].pop()])
            row, size = [], 0.0
        row.append(word)
        size += pair
    rows.append(row)
    draw.shuffle(rows)
    return rows


def prompt(word: str) -> str:
    return f"Define {word.capitalize()}."


if __name__ == "__main__":
    main()
