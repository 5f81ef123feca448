#!/usr/bin/env python3
"""Make the chat rows of Ambrose Bierce's The Devil's Dictionary.

Source: Debian's package `dict-devil` (the Internet Wiretap edition of the 1911 book).
Licence: public domain, the copyright has expired.
Command, from the root of the repository, on Debian or Ubuntu; the same rows every time:

    python3 scripts/make_devils_dictionary.py

Writes `datasets/devils_dictionary.jsonl` and `datasets/quickstart.jsonl`, its short entries.
An answer is the definition's prose as far as LONGEST_ANSWER reaches, cut between sentences, and
the verse that follows it where all of it still fits; mock attributions go. Entries that only
refer to another one, and those whose joke is somebody's race or faith, are left out.
"""

import hashlib
import json
import pathlib
import re

import debian_dict

DATASETS = pathlib.Path(__file__).resolve().parent.parent / "datasets"
LONGEST_ANSWER = 600
LONGEST_QUICKSTART_ANSWER = 140
SHORTEST_QUICKSTART_ANSWER = 25
QUICKSTART_ROWS = 300
# Words that recipes/quickstart.yaml asks for: what the adapter learnt must be seen there.
QUICKSTART_ALWAYS = {"Bore", "Egotist", "Year", "Lawyer"}

HEADWORD = re.compile(
    r"(?P<word>[A-Z][A-Z' -]*[A-Z])(?: or [A-Z]+|, [A-Z]+)?"
    r"(?:,? ?(?:n\.pl|n|adj|adv|v\.t|v\.i|v|pp|p\.p|pro|pron|x)\.(?: and n\.)?|[.?])\s*"
)
ABBREVIATION = re.compile(r"(?:\b(?:Dr|Mr|Mrs|St|Gen|Rev|Prof|Capt|Hon|viz|No)|\b[A-Z])\.$")
BROKEN_WORD = re.compile(r"(?<![- ])-$")
SENTENCE_END = re.compile(r"[.?!][\"')\]]*$")
REFERENCE = re.compile(r"(?:See|Same as|Vide)\b[^.]*\.?$")
UNWANTED = re.compile(
    r"nigger|negro|mulatto|mongol|tartar|chinese|\bjews?\b|hebrew|savages|\bindians?\b|mahometan|"
    r"hindoo|aryan|africa|red-skin|zanzibari|pigm|white man|pickaninny|squaw|gyps|hottentot|\brap(?:e|ing)\b",
    re.IGNORECASE,
)
ATTRIBUTION_INDENT = 24


def main() -> None:
    entries = {}
    for article in debian_dict.read("dict-devil", "devil"):
        entry = read_entry(article)
        if entry and entry[0] not in entries:
            entries[entry[0]] = entry[1]
    write("devils_dictionary.jsonl", entries)
    write("quickstart.jsonl", short_entries(entries))


def read_entry(article: str) -> tuple[str, str] | None:
    """Headword and answer of an article; None where there is nothing to learn."""
    head = HEADWORD.match(article)
    if not head:
        return None
    blocks = [block for block in article[head.end() :].rstrip().split("\n\n") if block.strip()]
    answer = join_answer(blocks)
    if not is_sound(answer) or REFERENCE.fullmatch(answer) or UNWANTED.search(head["word"] + " " + answer):
        return None
    return headword_case(head["word"]), answer


def is_sound(answer: str) -> bool:
    """Whether an answer came whole out of the edition's layout and its typing errors."""
    return (
        re.match(r"[\"'(]?[A-Z]", answer) is not None
        and SENTENCE_END.search(answer) is not None
        and answer.count('"') % 2 == 0
        and not re.search(r"[\[\]]|as follows (?!.*\n)", answer)
    )


def join_answer(blocks: list[str]) -> str:
    """The definition's prose, cut to length, and its verse where all of that fits."""
    prose, verse = [], []
    if blocks and not is_indented(blocks[0]):
        prose = paragraphs(blocks.pop(0))
    while blocks and is_indented(blocks[0]):
        block = blocks.pop(0)
        verse.append(clean_verse(block))
        if has_attribution(block):
            break
    poem = clean("\n\n".join(stanza for stanza in verse if stanza))
    if "" in verse or not SENTENCE_END.search(poem):
        poem = ""  # its end was lost, or was no verse

    text, whole = cut_between_sentences(prose)
    if whole and poem and len(text) + 2 + len(poem) <= LONGEST_ANSWER:
        return f"{text}\n\n{poem}".strip()
    return drop_announcement(text)


def paragraphs(block: str) -> list[list[str]]:
    """Paragraphs of a prose block, each a list of sentences; an indented line opens a paragraph."""
    joined = [""]
    for line in block.splitlines():
        if leading_spaces(line) >= ATTRIBUTION_INDENT:
            continue
        if line.startswith("    "):
            joined.append("")
        text = joined[-1]
        line = line.strip()
        if BROKEN_WORD.search(text):
            joined[-1] = text + line
        elif SENTENCE_END.search(text) and not ABBREVIATION.search(text):
            joined[-1] = f"{text}  {line}"
        else:
            joined[-1] = f"{text} {line}".strip()
    return [split_sentences(text) for text in joined if text]


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph; the edition puts two spaces between them."""
    sentences = [""]
    for piece in re.split(r"  +", text):
        if sentences[-1] and SENTENCE_END.search(sentences[-1]):
            sentences.append(piece)
        else:
            sentences[-1] = f"{sentences[-1]} {piece}".strip()
    return [cleaned for sentence in sentences if (cleaned := clean(sentence))]


def cut_between_sentences(prose: list[list[str]]) -> tuple[str, bool]:
    """As much as LONGEST_ANSWER holds, and whether that is all. Later paragraphs go in whole."""
    text = ""
    for index, sentences in enumerate(prose):
        joined = " ".join(sentences)
        if index > 0:
            if len(text) + 1 + len(joined) > LONGEST_ANSWER:
                return text, False
            text += "\n" + joined
            continue
        for count, sentence in enumerate(sentences):
            # A first sentence that is too long leaves nothing to say: such an entry is dropped.
            if len(text) + 1 + len(sentence) > LONGEST_ANSWER:
                return text, False
            text = sentence if count == 0 else f"{text} {sentence}"
    return text, True


def drop_announcement(text: str) -> str:
    """Without the sentence that announces the verse which does not follow."""
    while text.endswith((":", "—")) or re.search(r"\bfollow(?:s|ing)\b[^.!?]*[.:]$", text, re.IGNORECASE):
        cut = max(text.rfind(end) for end in (". ", "! ", "? ", ".\n"))
        text = text[: cut + 1] if cut >= 0 else ""
    return text


def clean(text: str) -> str:
    """Typography: no emphasis marks, real dashes, no editor's remarks, single spaces."""
    text = re.sub(r"\s*\[sic\]", "", text)
    text = re.sub(r"^\[[^]]*\]\s*|\s*\((?:See|Q\.V\.)[^)]*\)", "", text)
    text = re.sub(r"\{([^}]*)\}", lambda word: word[1].lower(), text)
    text = text.replace("_", "")
    text = re.sub(r" ?-{2,} ?", " — ", text)
    text = re.sub(r" +(?=\n|$)", "", text)
    return re.sub(r" {2,}", " ", text)


def clean_verse(block: str) -> str:
    """The lines of a stanza, flush left; a quotation in prose becomes one line again.

    Empty where deep indents stand between the lines: a layout that this does not follow.
    """
    lines = block.splitlines()
    while lines and leading_spaces(lines[-1]) >= ATTRIBUTION_INDENT:
        lines.pop()
    if any(leading_spaces(line) >= ATTRIBUTION_INDENT for line in lines):
        return ""
    if len(lines) > 1 and leading_spaces(lines[0]) == 8 and all(
        leading_spaces(line) == 4 and len(line) > 50 for line in lines[1:-1]
    ):
        return re.sub(r"(?<=\w)- ", "-", " ".join(line.strip() for line in lines))
    return "\n".join(line.strip() for line in lines)


def has_attribution(block: str) -> bool:
    return leading_spaces(block.splitlines()[-1]) >= ATTRIBUTION_INDENT


def is_indented(block: str) -> bool:
    return all(line.startswith("    ") for line in block.splitlines())


def leading_spaces(line: str) -> int:
    return len(line) - len(line.lstrip())


def headword_case(word: str) -> str:
    """`BODY-SNATCHER` → `Body-snatcher`."""
    return word[0] + word[1:].lower()


def short_entries(entries: dict[str, str]) -> dict[str, str]:
    """QUICKSTART_ROWS entries with short prose, their verse left out.

    They are picked by a hash of the headword, so that the choice is stable when others change.
    """
    prose = {word: answer.split("\n\n")[0] for word, answer in entries.items()}
    short = [
        word
        for word, answer in prose.items()
        if SHORTEST_QUICKSTART_ANSWER <= len(answer) <= LONGEST_QUICKSTART_ANSWER and "\n" not in answer
    ]
    missing = QUICKSTART_ALWAYS - set(short)
    if missing:
        raise SystemExit(f"not among the short entries: {sorted(missing)}")
    order = sorted(short, key=lambda word: (word not in QUICKSTART_ALWAYS, hashlib.sha256(word.encode()).digest()))
    chosen = set(order[:QUICKSTART_ROWS])
    return {word: answer for word, answer in prose.items() if word in chosen}


def write(name: str, entries: dict[str, str]) -> None:
    path = DATASETS / name
    with path.open("w", encoding="utf-8") as file:
        for word, answer in entries.items():
            messages = [
                {"role": "user", "content": f"Define {word}."},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    lengths = sorted(len(answer) for answer in entries.values())
    print(f"{path}: {len(entries)} rows, answers of {lengths[0]} to {lengths[-1]} characters, median {lengths[len(lengths) // 2]}")


if __name__ == "__main__":
    main()
