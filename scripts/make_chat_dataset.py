#!/usr/bin/env python3
"""Make a chat dataset of any size for the data benchmarks.

    python3 scripts/make_chat_dataset.py --rows 200000 --seed 1 --out FILE.jsonl

Every row is a conversation of one to four exchanges in OpenAI's `messages` form. The sentences
are those of `datasets/devils_dictionary.jsonl` with about a third of their words replaced by words
that follow a Zipf-Mandelbrot law over a large vocabulary, so that a text has the mix of frequent
and rare words of real text and hardly any sentence comes twice. Between them stand code, lists,
tables, numbers and other scripts. Lengths are log-normal, about 300 tokens a row.

The same seed gives the same rows, and fewer rows are a prefix of more. Rows are written as they
are made, so memory does not grow with them.
"""

import argparse
import collections
import json
import math
import pathlib
import random
import re

SOURCE = pathlib.Path(__file__).resolve().parent.parent / "datasets" / "devils_dictionary.jsonl"
WORDS = 250_000
# Zipf-Mandelbrot: the word of rank r has a frequency of 1 / (r + SHIFT).
SHIFT = 30
REPLACED = 0.3  # of a sentence's longer words
VARIANTS = 4  # of each sentence, which differ in the words that are replaced
# Characters of all turns of a row: the median, the spread (sigma of the logarithm), the limits.
MEDIAN_CHARACTERS, SPREAD, SHORTEST, LONGEST = 540, 0.85, 60, 24_000
EXCHANGES = (1, 1, 1, 1, 2, 2, 2, 3, 3, 4)
SYSTEM_SHARE, CODE_SHARE, LIST_SHARE, TABLE_SHARE, FOREIGN_SHARE = 0.3, 0.08, 0.1, 0.02, 0.04

PREFIXES = ("", "", "", "un", "re", "over", "pre", "non", "anti", "inter", "micro", "de", "sub", "multi")
SUFFIXES = ("", "s", "ed", "ing", "er", "ers", "ly", "ness", "able", "ation", "ism", "ist", "ize", "ful", "ward")
SYLLABLES = (
    "ba be bi bo ca co da de di do fa fe ga go ha he jo ka ke ki la le li lo lu ma me mi mo na ne ni no pa pe "
    "ra re ri ro sa se si so ta te ti to va ve vi wa wi ya zo al an ar el en er il in is on or us th st br cr"
).split()
ASK = (
    "What is meant by %s, and how does it differ from %s?", "Explain %s to someone who only knows %s.",
    "Can you help me with %s? I tried %s and it didn't work.", "Write a short note about %s and %s.",
    "How would you compare %s with %s?", "Summarise this in two sentences about %s (%s):",
    "Give me three reasons why %s matters for %s.", "I'm working on %s; what should I know about %s?",
    "Is %s the same as %s?", "Why does %s depend on %s?", "Please fix the grammar: \"%s are %s\".",
)
FOLLOW = (
    "Thanks! And what about %s?", "Could you expand on %s?", "OK, but does that hold for %s?",
    "Make it shorter, and mention %s.", "Now the same for %s, please.", "I don't understand %s. Try again?",
)
SYSTEM = (
    "You are a helpful assistant.", "You are an expert in %s. Answer briefly.", "Answer in the style of %s.",
    "You are a careful editor. Never invent facts about %s.", "Today is %s. You help people with their work.",
)
FOREIGN = (
    "Il faut cultiver notre jardin — c'est déjà ça, n'est-ce pas ?", "Übung macht den Meister; größer heißt nicht besser.",
    "¿Cómo se dice «mañana» en inglés? Así: tomorrow.", "Не всё то золото, что блестит.", "塞翁失馬，焉知非福。",
    "猿も木から落ちる。七転び八起き！", "가는 말이 고와야 오는 말이 곱다.", "الصبر مفتاح الفرج", "सत्यमेव जयते",
    "Žluťoučký kůň úpěl ďábelské ódy.", "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−L|<ε", "E = mc², π ≈ 3.14159, 25 °C → 77 °F",
    "👍 Great, see you at 10 🕙 — naïve café résumé 🙂", "👩‍💻🇫🇷 ½ × ¾ = ⅜ … “quoted” ‘text’",
)
CODE = (
    "```python\ndef {a}({b}, limit={n}):\n    total = 0\n    for {c} in range(limit):\n        if {b}[{c}] % {m} == 0:\n"
    "            total += {b}[{c}]  # {d}\n    return {{\"{a}\": total, \"{d}\": {n}.{m}}}\n```",
    "```rust\npub fn {a}({b}: &[u32]) -> Option<usize> {{\n    let mut {c} = {n};\n    for (index, value) in {b}.iter().enumerate() {{\n"
    "        if *value > {c} && index % {m} != 0 {{\n            {c} = *value;\n        }}\n    }}\n    {b}.get({c} as usize).map(|_| {m})\n}}\n```",
    "```sql\nSELECT {a}, COUNT(*) AS {b}_count\nFROM {c}\nWHERE {d} >= {n} AND {b} <> '{a}'\nGROUP BY {a}\nHAVING COUNT(*) > {m};\n```",
    "```json\n{{\n  \"{a}\": [{n}, {m}, null],\n  \"{b}\": {{\"{c}\": true, \"{d}\": \"{n}-{m}\"}}\n}}\n```",
    "```bash\n$ {a} --{b}={n} --{c} ./{d}/*.txt | sort -rn | head -{m} > /tmp/{a}.log\n```",
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, required=True)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--out", type=pathlib.Path, required=True)
    options = arguments.parse_args()
    writer = Writer(options.seed)
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with options.out.open("w", encoding="utf-8", newline="\n") as file:
        for _ in range(options.rows):
            file.write(encode({"messages": writer.conversation()}) + "\n")


class Writer:
    """Makes up conversations from one stream of random numbers."""

    def __init__(self, seed: int) -> None:
        # Only `random` and `gauss` of these numbers are used: the fastest ones.
        self.numbers = random.Random(seed)
        self.random = self.numbers.random
        source = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
        texts = [message["content"] for row in source for message in row["messages"] if message["role"] == "assistant"]
        self.words = self.vocabulary(texts)
        self.sentences = [
            self.with_slots(sentence)
            for text in texts
            for sentence in re.split(r"(?<=[.!?;])\s+", text)
            for _ in range(VARIANTS)
        ]

    def pick(self, options):
        return options[int(self.random() * len(options))]

    def below(self, limit: int) -> int:
        return int(self.random() * limit)

    def word(self) -> str:
        return self.words[int(SHIFT * ((WORDS + SHIFT) / SHIFT) ** self.random()) - SHIFT]

    def vocabulary(self, texts: list) -> list:
        """The words of the texts, the most frequent first, then words derived from them and made-up names."""
        counts = collections.Counter(re.findall(r"[a-z]{3,}", " ".join(texts).lower()))
        stems = sorted(counts, key=lambda word: (-counts[word], word))
        words = dict.fromkeys(stems)
        while len(words) < WORDS:
            if self.random() < 0.6:
                word = self.pick(PREFIXES) + self.pick(stems) + self.pick(SUFFIXES)
            else:
                word = "".join(self.pick(SYLLABLES) for _ in range(2 + self.below(3))).capitalize()
            words[word] = None
        return list(words)

    def with_slots(self, sentence: str) -> tuple:
        """The sentence as a format string with places for other words, and how many these are."""
        slots = 0

        def other(match: re.Match) -> str:
            nonlocal slots
            if self.random() >= REPLACED:
                return match[0]
            slots += 1
            return "%s"

        return re.sub(r"\b[a-z]{4,}\b", other, sentence.replace("%", "%%")), slots

    def fill(self, template: str) -> str:
        return template % tuple([self.word() for _ in range(template.count("%s"))])

    def sentence(self) -> str:
        kind = self.random()
        if kind < FOREIGN_SHARE:
            return self.pick(FOREIGN)
        if kind < FOREIGN_SHARE * 2:
            return f"In {1800 + self.below(230)}, {self.word()} rose by {self.random() * 100:.1f}% to ${self.below(10**7):,}."
        template, slots = self.pick(self.sentences)
        return template % tuple([self.word() for _ in range(slots)])

    def code(self) -> str:
        names = {name: self.word().lower() for name in "abcd"}
        return self.pick(CODE).format(n=self.below(10_000), m=1 + self.below(97), **names)

    def bullets(self) -> str:
        mark = self.pick(("- ", "* ", "{}. "))
        return "\n".join(
            f"{mark.format(number)}**{self.word().capitalize()}**: {self.sentence()}"
            for number in range(1, 3 + self.below(4))
        )

    def table(self) -> str:
        rows = "\n".join(f"| {self.word()} | {self.below(1000)} | {self.random():.3f} |" for _ in range(2 + self.below(4)))
        return f"| {self.word()} | count | share |\n|---|---:|---:|\n{rows}"

    def text(self, characters: float) -> str:
        """Paragraphs of about so many characters."""
        blocks, length = [], 0
        while length < characters:
            kind = self.random()
            if kind < CODE_SHARE:
                block = self.code()
            elif kind < CODE_SHARE + LIST_SHARE:
                block = self.bullets()
            elif kind < CODE_SHARE + LIST_SHARE + TABLE_SHARE:
                block = self.table()
            else:
                block = self.paragraph(characters - length)
            blocks.append(block)
            length += len(block)
        return "\n\n".join(blocks)

    def paragraph(self, characters: float) -> str:
        sentences, length, most = [], 0, 1 + self.below(7)
        while length < characters and len(sentences) < most:
            sentences.append(self.sentence())
            length += len(sentences[-1])
        return " ".join(sentences)

    def conversation(self) -> list:
        characters = MEDIAN_CHARACTERS * math.exp(SPREAD * self.numbers.gauss(0.0, 1.0))
        characters = min(max(characters, SHORTEST), LONGEST)
        exchanges = self.pick(EXCHANGES)
        messages = []
        if self.random() < SYSTEM_SHARE:
            messages.append({"role": "system", "content": self.fill(self.pick(SYSTEM))})
        for number in range(exchanges):
            ask = self.fill(self.pick(FOLLOW if number else ASK))
            if self.random() < 0.25:
                ask += "\n\n" + self.text(characters / exchanges * 0.4)
            answer = self.text(characters / exchanges * (0.5 + self.random()))
            messages.append({"role": "user", "content": ask})
            messages.append({"role": "assistant", "content": answer})
        return messages


if __name__ == "__main__":
    main()
