"""Cut-down tokenizers: any text whose pieces stay becomes the same pieces, and what every file says of ids is renumbered."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_family import write_family_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bertemd_deploy.errors import ModelError
from bertemd_deploy.tokenizer_subset import (
    is_placeholder,
    needed_tokens,
    renumber_config,
    subset,
    token_ids,
    unknown_token,
)

WHERE = Path("model/tokenizer.json")
LETTERS = "abc"
SPELLED = ("[UNK]", *LETTERS, *(f"##{letter}" for letter in LETTERS))
WORDS = st.text(LETTERS, min_size=1, max_size=8)
PIECES = st.text(LETTERS, min_size=2, max_size=4)


def content(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())


def cut(whole: dict[str, Any], staying: set[str]) -> Tokenizer:
    """Return the tokenizer with the needed tokens and `staying`."""
    ids = token_ids(whole, WHERE)
    kept = sorted(staying | needed_tokens(whole, ids, []), key=ids.__getitem__)
    new = {token: at for at, token in enumerate(kept)}
    return Tokenizer.from_str(json.dumps(subset(whole, new, where=WHERE)))


def word_piece(vocabulary: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({token: at for at, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.booleans(), PIECES), min_size=1, max_size=25, unique=True),
    words=st.lists(WORDS, min_size=1, max_size=5),
    data=st.data(),
)
def test_word_piece_keeps_every_text_whose_pieces_stay(
    pieces: list[tuple[bool, str]], words: list[str], data: st.DataObject
) -> None:
    vocabulary = [*SPELLED, *(f"##{piece}" if inner else piece for inner, piece in pieces)]
    whole = word_piece(vocabulary)
    expected = whole.encode(" ".join(words)).tokens
    others = data.draw(st.sets(st.sampled_from(vocabulary)))
    assert cut(content(whole), {*expected} | others).encode(" ".join(words)).tokens == expected
    unlike = cut(content(whole), others)
    for word in words:  # pieces may be gone, characters are not
        found = unlike.encode(word).tokens
        assert "[UNK]" not in found
        assert "".join(piece.removeprefix("##") for piece in found) == word


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.dictionaries(PIECES, st.integers(-6, -1), min_size=1, max_size=25),
    text=st.text("abcd", min_size=1, max_size=20),
    data=st.data(),
)
def test_unigram_keeps_every_text_whose_pieces_stay(pieces: dict[str, int], text: str, data: st.DataObject) -> None:
    """Equal scores, so ties, are common here; "d" has no piece and is unknown."""
    scores = {"<unk>": 0.0, **dict.fromkeys(LETTERS, -4.0), **{piece: float(score) for piece, score in pieces.items()}}
    whole = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    encoded = whole.encode(text)
    others = data.draw(st.sets(st.sampled_from(sorted(scores))))
    expected = {scored for scored in encoded.tokens if scored in scores}
    small = cut(content(whole), expected | others).encode(text)
    assert small.tokens == encoded.tokens
    assert small.offsets == encoded.offsets


def test_a_dropped_piece_is_spelled_out_and_others_stay_as_they_are() -> None:
    whole = word_piece([*SPELLED, "abc", "ab", "##bc", "##ca"])
    assert whole.encode("abcca abca").tokens == ["abc", "##ca", "abc", "##a"]
    small = cut(content(whole), {"##ca", "##bc"})
    assert small.encode("abcca abca").tokens == ["a", "##bc", "##ca", "a", "##bc", "##a"]
    assert small.get_vocab_size() == len(SPELLED) + 2


def test_an_unknown_word_may_become_known() -> None:
    """Why texts with unknown words are compared rather than counted: "ab" led astray, without it "##cd" is reached."""
    whole = word_piece([*SPELLED, "ab", "##bcd"])
    assert whole.encode("abcd").tokens == ["[UNK]"]
    assert cut(content(whole), {"##bcd"}).encode("abcd").tokens == ["a", "##bcd"]


@pytest.mark.parametrize("family", ["bert", "mpnet", "deberta-v2"])
def test_ids_of_processors_padding_and_added_tokens_are_renumbered(family: str, tmp_path: Path) -> None:
    write_family_tokenizer(tmp_path, family)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    before = Tokenizer.from_str(json.dumps(whole))
    ids = token_ids(whole, WHERE)
    words = [token for token in ids if token.lstrip("▁") in ("bad", "film", "it")]
    after = cut(whole, set(words))
    assert len(words) == 3
    assert after.get_vocab_size() < before.get_vocab_size() - 5
    for texts in (("bad film",), ("bad film", "it film")):
        old, new = before.encode(*texts), after.encode(*texts)
        assert new.tokens == old.tokens
        assert new.type_ids == old.type_ids
        assert new.attention_mask == old.attention_mask
        assert [after.id_to_token(at) for at in new.ids] == old.tokens
        assert max(new.ids) < after.get_vocab_size()
    assert sorted(after.get_vocab().values()) == list(range(after.get_vocab_size()))
    assert unknown_token(content(after)) == unknown_token(whole)


def test_a_processor_of_either_old_kind_and_inside_a_sequence() -> None:
    for processor in (
        processors.BertProcessing(("c", 3), ("b", 2)),
        processors.Sequence([processors.ByteLevel(), processors.RobertaProcessing(("c", 3), ("b", 2))]),
    ):
        whole = word_piece(["[UNK]", "abc", "b", "c", "ab", "ca"])
        whole.post_processor = processor
        encoding = cut(content(whole), {"ca"}).encode("ca")
        assert (encoding.tokens, encoding.ids) == (["b", "ca", "c"], [1, 3, 2])


def test_characters_and_tokens_named_by_any_file_are_needed() -> None:
    vocabulary = [
        "[UNK]",
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[X]",
        "[Y]",
        *string.ascii_lowercase,
        "##a",
        "##ab",
        "ab",
        "中",
    ]
    whole = word_piece(vocabulary)
    whole.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    ids = token_ids(content(whole), WHERE)
    configs = [{"mask_token": {"content": "[MASK]"}, "eos_token": None, "unk_token": "[UNK]"}, {"pad_token_id": 1}]
    needed = needed_tokens(content(whole), ids, configs)
    assert needed == {"[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, "##a", "中"}


def test_unigram_needs_its_bytes_and_its_least_likely_piece() -> None:
    pieces = [("<unk>", 0.0), ("<0x0A>", 0.0), ("a", -1.0), ("ab", -2.0), ("least", -9.0), ("▁", -3.0)]
    whole = content(Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True)))
    assert needed_tokens(whole, token_ids(whole, WHERE), []) == {"<unk>", "<0x0A>", "a", "least", "▁"}


def test_reserved_names_are_told_from_words() -> None:
    assert [name for name in ("[unused0]", "<unused_12>", "unused", "[unusual1]") if is_placeholder(name)] == [
        "[unused0]",
        "<unused_12>",
    ]


def test_configs_that_list_tokens_by_id_are_renumbered() -> None:
    config = {"added_tokens_decoder": {"7": {"content": "[CLS]"}, "9": {"content": "gone"}}, "do_lower_case": True}
    assert renumber_config(config, {"[CLS]": 1}) == {
        "added_tokens_decoder": {"1": {"content": "[CLS]"}},
        "do_lower_case": True,
    }
    assert renumber_config({"cls_token": "[CLS]"}, {"[CLS]": 1}) == {"cls_token": "[CLS]"}


def test_byte_pairs_and_damage_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"model/tokenizer.json: a BPE tokenizer; .* each needs others\). Set export.voc"
    ):
        token_ids(content(Tokenizer(models.BPE())), WHERE)
    with pytest.raises(ModelError, match="a damaged tokenizer"):
        token_ids({"model": 3}, WHERE)
    with pytest.raises(ModelError, match="its vocabulary is damaged"):
        token_ids({"model": {"type": "WordPiece", "vocab": {"a": "first"}}}, WHERE)


def test_processors_and_numberings_that_are_not_known_are_refused() -> None:
    whole = content(word_piece([*SPELLED, "ab"]))
    new = {token: at for at, token in enumerate(SPELLED)}
    with pytest.raises(ModelError, match=r"a post-processor of the kind 'Odd'.* known: BertProcessing"):
        subset(whole | {"post_processor": {"type": "Odd"}}, new, where=WHERE)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = whole | {"added_tokens": [{"id": 9, "content": "<x>", "special": True} | flags]}
    with pytest.raises(
        ModelError, match=r"numbers 1 tokens otherwise \(<x>\); added tokens should have the highest ids"
    ):
        subset(added, new | {"<x>": 40}, where=WHERE)
    with pytest.raises(ModelError, match="not a tokenizer any more"):
        subset(whole | {"normalizer": {"type": "Odd"}}, new, where=WHERE)
