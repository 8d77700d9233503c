"""What a BERT tokenizer does to text, as tables: to every character of Unicode, and where its special tokens go.

Nothing of this is read off the description in `tokenizer.json` but whether it is of a kind whose characters go their ways one
by one; what becomes of each is asked of the tokenizer itself, all 1,112,063 of them, in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bertemd_deploy.errors import ExportError

MARK = "\n"  # between texts; as a character of a text it is a blank
RESERVED = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # Unicode's noncharacters; a text's own are all read as the last one
_CHUNK = 256  # code points asked about at once; most such blocks are all of one kind


@dataclass(frozen=True)
class Characters:
    """What becomes of single characters; one that is in none of these stays as it is.

    Attributes:
        dropped, blank, alone: left out by the normalizer, made a blank, set between blanks.
        replaced: what else the normalizer makes of a character.
        parting: after normalizing, set between blanks by the pre-tokenizer.
        spacing: after normalizing, a blank to the pre-tokenizer.
    """

    dropped: list[str]
    blank: list[str]
    alone: list[str]
    replaced: dict[str, str]
    parting: list[str]
    spacing: list[str]


@dataclass(frozen=True)
class Template:
    """Special tokens as (id, segment) before the first text, behind it, and behind the second; segments of the texts."""

    before: list[tuple[int, int]]
    between: list[tuple[int, int]]
    behind: list[tuple[int, int]]
    segments: tuple[int, int]
    pairs: bool


def tokenizer_fault(stored: dict[str, Any]) -> str | None:
    """Return what of a tokenizer's description has no place in the graph, or None."""
    kinds = {
        name: (stored.get(name) or {}).get("type")
        for name in ("model", "normalizer", "pre_tokenizer", "post_processor")
    }
    wanted = {
        "model": ("WordPiece",),
        "normalizer": ("BertNormalizer",),
        "pre_tokenizer": ("BertPreTokenizer",),
        "post_processor": ("TemplateProcessing", "BertProcessing", "RobertaProcessing"),
    }
    for name, allowed in wanted.items():
        if kinds[name] not in allowed:
            return f"its {name} is {kinds[name] or 'none'}, not {' or '.join(allowed)}"
    model, added = stored["model"], stored.get("added_tokens", [])
    if odd := [token["content"] for token in added if token["single_word"]]:
        return f"its added token {odd[0]!r} is looked for as a whole word only"
    if foreign := [token["content"] for token in added if token["content"] not in model["vocab"]]:
        return f"its added token {foreign[0]!r} is not in the vocabulary"
    reserved = re.compile(f"[{RESERVED[0]}-{RESERVED[-1]}{MARK} \t]")
    if clash := [token for token in model["vocab"] if reserved.search(token)]:
        return f"its vocabulary holds {clash[0]!r}, with a blank or a reserved character"
    if len(added) >= len(RESERVED):
        return f"it has {len(added)} added tokens, more than {len(RESERVED) - 1}"
    return None


def read_characters(read: Tokenizer, *, where: Path) -> Characters:
    """Ask a tokenizer that `tokenizer_fault` has nothing against what it makes of every character.

    Args:
        read: the tokenizer.
        where: its file, for messages.

    Raises:
        ExportError: reserved characters become something, or differ in what becomes of them.
    """
    found = Characters([], [], [], {}, [], [])
    seen: set[str] = set()
    for chunk in _code_points():
        outcome = _normalised(read, chunk)
        for character, text in zip(chunk, outcome, strict=True) if outcome is not chunk else ():
            if not text:
                found.dropped.append(character)
            elif text == " " or character == MARK:
                found.blank.append(character)
            elif text == f" {character} ":
                found.alone.append(character)
            elif text != character:
                found.replaced[character] = text
        letters = [letter for letter in dict.fromkeys("".join(outcome)) if letter not in seen and letter != MARK]
        seen.update(letters)
        for letter, place in zip(letters, _placed(read, letters), strict=True):
            if place == " ":
                found.spacing.append(letter)
            elif place != letter:
                found.parting.append(letter)
    changed = (found.blank, found.alone, found.replaced, found.parting, found.spacing)
    dropped = set(RESERVED) & set(found.dropped)
    if len(dropped) not in (0, len(RESERVED)) or any(set(RESERVED).intersection(group) for group in changed):
        raise ExportError(f"{where}: it makes words of Unicode's noncharacters. Leave the tokenizer out of the graph.")
    if _placed(read, [MARK]) != [" "]:
        raise ExportError(f"{where}: a line's end is not a blank to it. Leave the tokenizer out of the graph.")
    return found


def _code_points() -> Iterator[list[str]]:
    for start in range(1, 0x110000, _CHUNK):  # NUL ends a text
        chunk = [chr(at) for at in range(start, min(start + _CHUNK, 0x110000)) if not 0xD800 <= at < 0xE000]
        if chunk:
            yield chunk


def _normalised(read: Tokenizer, chunk: list[str]) -> list[str]:
    """Return what the normalizer makes of each character."""
    whole = read.normalizer.normalize_str("".join(chunk))
    for same in (chunk, [""] * len(chunk), [f" {letter} " for letter in chunk]):
        if whole == "".join(same):
            return same
    # Between bars, which it leaves alone.
    apart = "|".join(" " if letter == "|" else letter for letter in chunk)
    normal = read.normalizer.normalize_str(apart).split("|")
    return ["|" if letter == "|" else text for letter, text in zip(chunk, normal, strict=True)]


def _placed(read: Tokenizer, letters: list[str]) -> list[str]:
    """Return each letter as the pre-tokenizer places it: a blank, between blanks, or as it is."""
    whole = "".join(letters)
    if [part for part, _ in read.pre_tokenizer.pre_tokenize_str(whole)] == [whole]:
        return letters
    parts = iter([part for part, _ in read.pre_tokenizer.pre_tokenize_str(" ".join(f"a{one}a" for one in letters))])
    found = []
    for letter in letters:
        part = next(parts)
        if part == f"a{letter}a":
            found.append(letter)
        elif next(parts) == letter:
            next(parts)
            found.append(f" {letter} ")
        else:
            found.append(" ")
    return found


def read_template(read: Tokenizer, model: dict[str, Any], *, pairs: bool, where: Path) -> Template:
    """Read off an encoded example where special tokens go.

    Args:
        read: the tokenizer.
        model: its model's description.
        pairs: of two texts rather than one.
        where: its file, for messages.

    Raises:
        ExportError: no token of the vocabulary is a text of its own.
    """
    for word in model["vocab"]:
        encoding = read.encode(word, word) if pairs else read.encode(word)
        texts = [at for at, part in enumerate(encoding.sequence_ids) if part is not None]
        if len(texts) == 1 + pairs and encoding.ids[texts[0]] == model["vocab"][word]:
            tokens = list(zip(encoding.ids, encoding.type_ids, strict=True))
            first, last = texts[0], texts[-1]
            between = tokens[first + 1 : last]
            return Template(tokens[:first], between, tokens[last + 1 :], (tokens[first][1], tokens[last][1]), pairs)
    raise ExportError(f"{where}: no token of its vocabulary is a whole word. Leave the tokenizer out of the graph.")


def one_of(characters: Iterable[str]) -> str:
    """Return a regular expression for one of some characters, by ranges of code points."""
    points = np.array(sorted(map(ord, characters)), dtype=np.int64)
    breaks = np.flatnonzero(np.diff(points) > 1)
    bounds: NDArray[np.int64] = np.stack([points[np.r_[0, breaks + 1]], points[np.r_[breaks, len(points) - 1]]], axis=1)
    return "[" + "".join(f"\\x{{{low:X}}}-\\x{{{high:X}}}" for low, high in bounds.tolist()) + "]"


def escaped(text: str) -> str:
    """Return a regular expression for a text."""
    return "".join(f"\\x{{{ord(letter):X}}}" for letter in text)
