"""Tables of what a tokenizer does to characters: applied by hand, they give the words that the tokenizer gives."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_words import write_tokenizer
from tokenizers import Tokenizer, normalizers

from bertemd_deploy.errors import ExportError
from bertemd_deploy.tokenizer_tables import (
    MARK,
    RESERVED,
    Characters,
    escaped,
    one_of,
    read_characters,
    read_template,
    tokenizer_fault,
)

TEXTS = (
    "",
    " \t\n ",
    "Café NAÏVE, señor!",
    "cafe\u0301 \u1ebf \u01d5",
    "\uac00\u4f60\u597d\u30d1",
    "no\u00a0break zero\u200bwidth soft\u00adhyphen \x07bell \x1c",
    "\u0130stanbul \u03a3\u0399\u03a3 stra\u00dfe \u2028 \u0085",
    "\u201cq\u201d \u2019s $5 ~ ` | \u00bd \ufb01",
    "\U0001f600 \U00020000 \ue000",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def read(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


@pytest.fixture(scope="module")
def characters(read: Tokenizer, path: Path) -> Characters:
    return read_characters(read, where=path)


@pytest.fixture
def stored(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def word_reader(table: Characters) -> Callable[[str], list[str]]:
    """Return the function that applies the tables to a text."""
    normal = dict.fromkeys(table.dropped, "") | dict.fromkeys(table.blank, " ") | table.replaced
    normal |= {letter: f" {letter} " for letter in table.alone}
    placed = dict.fromkeys(table.spacing, " ") | {letter: f" {letter} " for letter in table.parting}

    def words(text: str) -> list[str]:
        text = "".join(normal.get(letter, letter) for letter in text)
        return [word for word in "".join(placed.get(letter, letter) for letter in text).split(" ") if word]

    return words


def test_the_tables_hold_what_bert_does(characters: Characters) -> None:
    assert {"\x07", "\u200b"} <= set(characters.dropped)
    assert {MARK, "\t", "\u00a0"} <= set(characters.blank)
    assert "\u4f60" in characters.alone
    assert (characters.replaced["É"], characters.replaced["\u1ebf"]) == ("e", "e")
    assert {"!", "$", "\u2019"} <= set(characters.parting)
    assert not {"a", "7", " "} & {*characters.dropped, *characters.alone, *characters.replaced, *characters.parting}


@pytest.mark.parametrize(
    "settings",
    [{}, {"lowercase": False}, {"strip_accents": False}, {"clean_text": False}, {"handle_chinese_chars": False}],
)
def test_words_are_the_tokenizers_own(settings: dict[str, bool], path: Path) -> None:
    read = Tokenizer.from_file(str(path))
    read.normalizer = normalizers.BertNormalizer(**settings)
    words = word_reader(read_characters(read, where=path))
    generator = random.Random(0)
    points = [*range(1, 0x3000), *range(0xA000, 0xB000), *range(0xF900, 0xFFFE), *range(0x1F000, 0x20100)]
    mixed = ["".join(chr(generator.choice(points)) for _ in range(30)) for _ in range(300)]
    for text in (*TEXTS, *mixed):
        parts = read.pre_tokenizer.pre_tokenize_str(read.normalizer.normalize_str(text))
        assert words(text) == [part for part, _ in parts], ascii(text)


def test_noncharacters_must_be_free(path: Path) -> None:
    read = Tokenizer.from_file(str(path))
    read.normalizer = normalizers.Replace(RESERVED[0], "x")
    with pytest.raises(ExportError, match="makes words of Unicode's noncharacters"):
        read_characters(read, where=path)


def test_templates(read: Tokenizer, stored: dict[str, Any], path: Path) -> None:
    single = read_template(read, stored["model"], pairs=False, where=path)
    assert (single.before, single.between, single.behind, single.pairs) == ([(2, 0)], [], [(3, 0)], False)
    both = read_template(read, stored["model"], pairs=True, where=path)
    assert (both.before, both.between, both.behind, both.segments) == ([(2, 0)], [(3, 0)], [(3, 1)], (0, 1))


def test_a_vocabulary_without_words_has_no_template(read: Tokenizer, path: Path) -> None:
    with pytest.raises(ExportError, match="no token of its vocabulary is a whole word"):
        read_template(read, {"vocab": {"##ly": 23}}, pairs=False, where=path)


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda stored: stored.update({name: value})


def _many(stored: dict[str, Any]) -> None:
    stored["added_tokens"] = stored["added_tokens"] * 7


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "model": (_set("model", {"type": "BPE"}), "its model is BPE, not WordPiece"),
    "normalizer": (_set("normalizer", None), "its normalizer is none, not BertNormalizer"),
    "pre_tokenizer": (_set("pre_tokenizer", {"type": "Whitespace"}), "its pre_tokenizer is Whitespace, not"),
    "post_processor": (_set("post_processor", {"type": "ByteLevel"}), "its post_processor is ByteLevel, not"),
    "single word": (lambda stored: stored["added_tokens"][0].update(single_word=True), "as a whole word only"),
    "foreign": (
        lambda stored: stored["added_tokens"][0].update(content="[NEW]"),
        "'\\[NEW\\]' is not in the vocabulary",
    ),
    "blank": (lambda stored: stored["model"]["vocab"].update({"a b": 99}), "holds 'a b', with a blank"),
    "many": (_many, "it has 35 added tokens, more than 31"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_refused(name: str, stored: dict[str, Any]) -> None:
    spoil, message = FAULTS[name]
    assert tokenizer_fault(stored) is None
    spoil(stored)
    fault = tokenizer_fault(stored)
    assert fault is not None
    assert message.replace("\\", "") in fault


def test_expressions() -> None:
    assert one_of("cabx") == r"[\x{61}-\x{63}\x{78}-\x{78}]"
    assert escaped("[S") == r"\x{5B}\x{53}"
