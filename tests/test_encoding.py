from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from bertemd_deploy.encoding import Encoded, TextEncoder, decoded, length_batches
from bertemd_deploy.errors import DataError, ModelError

ROWS = Encoded(
    np.array([2, 7, 3, 2, 3, 2, 8, 9, 3], dtype=np.int32),
    np.array([0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=np.int8),
    np.array([0, 3, 5, 9], dtype=np.int64),
)


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer) -> Path:
    tiny_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_lengths():
    assert len(ROWS) == 3
    assert ROWS.lengths.tolist() == [3, 2, 4]


def test_batch_pads_to_its_own_longest_row():
    batch = ROWS.batch([1, 0], pad_id=0)
    assert batch["input_ids"].tolist() == [[2, 3, 0], [2, 7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


def test_batch_to_a_given_length_with_another_padding():
    batch = ROWS.batch(np.array([2]), pad_id=5, length=6)
    assert batch["input_ids"].tolist() == [[2, 8, 9, 3, 5, 5]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0]]


def test_select_takes_rows_in_the_given_order():
    chosen = ROWS.select([2, 1])
    assert chosen.tokens.tolist() == [2, 8, 9, 3, 2, 3]
    assert chosen.types.tolist() == [0, 0, 1, 1, 0, 0]
    assert chosen.offsets.tolist() == [0, 4, 6]
    assert (chosen.tokens.dtype, chosen.types.dtype, chosen.offsets.dtype) == (np.int32, np.int8, np.int64)


def test_select_nothing():
    nothing = ROWS.select([])
    assert len(nothing) == 0
    assert nothing.offsets.tolist() == [0]


def test_length_batches_sort_by_length_and_keep_ties_in_order():
    batches = list(length_batches(np.array([5, 2, 5, 1, 2]), batch_size=2))
    assert [batch.tolist() for batch in batches] == [[3, 1], [4, 0], [2]]


def test_encode_adds_special_tokens_lowercases_and_splits(folder: Path):
    encoder = TextEncoder.load(folder, max_length=16)
    vocabulary = encoder.vocabulary()
    encoded = encoder.encode(["Good films!", "zzz"])
    expected = [["[CLS]", "good", "film", "##s", "!", "[SEP]"], ["[CLS]", "[UNK]", "[SEP]"]]
    assert encoded.tokens.tolist() == [vocabulary[token] for row in expected for token in row]
    assert encoded.lengths.tolist() == [6, 3]
    assert encoder.pad_id == vocabulary["[PAD]"]


def test_encode_pairs_into_two_segments(folder: Path):
    encoded = TextEncoder.load(folder, max_length=16).encode(["good film"], ["bad"])
    assert encoded.types.tolist() == [0, 0, 0, 0, 1, 1]


def test_encode_cuts_at_the_maximum_length(folder: Path):
    encoder = TextEncoder.load(folder, max_length=5)
    separator = encoder.vocabulary()["[SEP]"]
    encoded = encoder.encode(["good " * 50, "good"])
    assert encoded.lengths.tolist() == [5, 3]
    assert encoded.tokens[4] == separator
    pairs = encoder.encode(["good " * 50], ["bad"])
    assert pairs.lengths.tolist() == [5]
    assert pairs.types.tolist() == [0, 0, 0, 1, 1]


def test_encode_nothing(folder: Path):
    assert len(TextEncoder.load(folder, max_length=5).encode([])) == 0


def test_encode_pairs_of_another_count(folder: Path):
    with pytest.raises(ValueError, match="shorter"):
        TextEncoder.load(folder, max_length=5).encode(["a", "b"], ["c"])


def test_folder_without_tokenizer(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json\. Save the tokenizer there with AutoTokenizer"):
        TextEncoder.load(tmp_path, max_length=8)


def test_damaged_tokenizer(folder: Path):
    (folder / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a readable tokenizer \("):
        TextEncoder.load(folder, max_length=8)


def test_vocabulary_without_padding(folder: Path):
    content = (folder / "tokenizer.json").read_text().replace("[PAD]", "[HOLE]")
    (folder / "tokenizer.json").write_text(content)
    assert "[HOLE]" in json.loads(content)["model"]["vocab"]
    with pytest.raises(ModelError, match=r"neither \[PAD\] nor <pad>; batches cannot be padded"):
        TextEncoder.load(folder, max_length=8)


def test_padding_of_another_family(folder: Path):
    content = (folder / "tokenizer.json").read_text().replace("[PAD]", "<pad>")
    (folder / "tokenizer.json").write_text(content)
    assert TextEncoder.load(folder, max_length=8).pad_id == 0


# ---- words and windows


def test_words_keep_their_numbers_at_their_first_piece(folder: Path):
    encoder = TextEncoder.load(folder, max_length=16)
    encoded, words = encoder.encode_words([["Good", "films", "!"], ["a."]])
    vocabulary = encoder.vocabulary()
    expected = [["[CLS]", "good", "film", "##s", "!", "[SEP]"], ["[CLS]", "a", ".", "[SEP]"]]
    assert encoded.tokens.tolist() == [vocabulary[token] for row in expected for token in row]
    assert words.tolist() == [-1, 0, 1, -1, 2, -1, -1, 0, -1, -1]
    assert words.dtype == np.int32


def test_words_are_cut_at_the_maximum_length_and_dropped_ones_have_no_token(folder: Path):
    encoder = TextEncoder.load(folder, max_length=5)
    encoded, words = encoder.encode_words([["good"] * 9, ["\u200b", "bad"], []])
    assert encoded.lengths.tolist() == [5, 3, 2]
    assert words.tolist() == [-1, 0, 1, 2, -1, -1, 1, -1, -1, -1]


def test_words_of_a_byte_level_tokenizer_begin_with_a_blank(tmp_path: Path):
    """As in running text, where all words but the first do; without it "films" here and there would differ."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<s>", "</s>", "<pad>", "Ġ", "a", "b", "Ġa", "Ġb"]
    ids = {token: at for at, token in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, [("Ġ", "a"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = TextEncoder.load(tmp_path, max_length=8)
    encoded, words = encoder.encode_words([["a", "b"]])
    assert encoded.tokens.tolist() == [0, ids["Ġa"], ids["Ġb"], 1]
    assert words.tolist() == [-1, 0, 1, -1]
    assert encoder.encode(["a b"]).tokens.tolist() == [0, ids["a"], ids["Ġb"], 1]


@pytest.mark.parametrize(("length", "overlap"), [(64, 0), (9, 0), (9, 2), (9, 128), (6, 1), (5, 3)])
def test_windows_cover_the_context_once_or_with_the_given_overlap(folder: Path, length: int, overlap: int):
    encoder = TextEncoder.load(folder, max_length=length)
    contexts = ["the good film was a bad song today ! we saw it", "fine"]
    encoded, example, spans = encoder.encode_windows(["sad", "bad"], contexts, overlap=overlap)
    assert (encoded.lengths <= length).all()
    separator = encoder.vocabulary()["[SEP]"]
    for number, context in enumerate(contexts):
        whole = encoder.encode([context]).tokens if length == 64 else None
        rows = np.flatnonzero(example == number)
        covered: list[int] = []
        for row in rows:
            piece = slice(encoded.offsets[row], encoded.offsets[row + 1])
            tokens, types, places = encoded.tokens[piece], encoded.types[piece], spans[piece]
            assert tokens[1] == encoder.vocabulary()[["sad", "bad"][number]]
            assert tokens[-1] == separator
            inside = places[:, 0] >= 0
            assert types[inside].tolist() == [1] * int(inside.sum())
            starts = places[inside, 0].tolist()
            room = length - 4
            shared = len(set(starts) & set(covered))
            assert shared == (min(overlap, room // 2) if covered else 0)
            covered += [start for start in starts if start not in covered]
            for first, behind in places[inside]:
                assert context[first:behind].strip() == context[first:behind] != ""
            if whole is not None:
                assert tokens[inside].tolist() == whole[1:-1].tolist()
        text = "".join(context[at] for at in covered)
        assert text == "".join(word[0] for word in context.split())
    assert example.tolist() == sorted(example.tolist())
    assert spans.dtype == example.dtype == np.int32


def test_a_question_that_fills_its_row_is_refused(folder: Path):
    encoder = TextEncoder.load(folder, max_length=8)
    with pytest.raises(
        DataError, match=r"question q7: it fills 9 of 8 tokens and leaves no room.*raise data\.max_length"
    ):
        encoder.encode_windows(["sad", "good " * 6], ["a", "a"], overlap=2, names=["q6", "q7"])
    with pytest.raises(DataError, match="question 2: it fills 8 of 8"):
        encoder.encode_windows(["sad", "good " * 5], ["a", "a"], overlap=2)


def test_what_to_do_about_a_long_question_is_the_callers_word(folder: Path):
    with pytest.raises(DataError, match=r"leaves no room for its context\. Shorten it\.$"):
        TextEncoder.load(folder, max_length=8).encode_windows(["good " * 5], ["a"], overlap=2, remedy="Shorten it.")


def test_a_text_that_is_not_unicode_is_named(folder: Path):
    encoder = TextEncoder.load(folder, max_length=8)
    message = r"text 2 is not valid Unicode \(lone surrogate U\+DCE9 at character 4\)\. Read or convert it as UTF-8"
    good, torn = ["good", "fine"], ["good", "caf\udce9"]
    for call in (
        lambda: encoder.encode(torn),
        lambda: encoder.encode(good, torn),
        lambda: encoder.encode_words([["good"], ["ca", "f\udce9"]]),
        lambda: encoder.encode_windows(torn, good, overlap=2),
        lambda: encoder.encode_windows(good, torn, overlap=2),
    ):
        with pytest.raises(DataError, match=message):
            call()


def test_an_empty_context_is_one_row_without_spans(folder: Path):
    encoded, example, spans = TextEncoder.load(folder, max_length=8).encode_windows(["sad"], [""], overlap=2)
    assert encoded.lengths.tolist() == [4]
    assert example.tolist() == [0]
    assert (spans == -1).all()


def test_texts_of_another_count_than_questions(folder: Path):
    with pytest.raises(ValueError, match="shorter"):
        TextEncoder.load(folder, max_length=8).encode_windows(["a", "b"], ["c"], overlap=0)


def test_rows_are_read_back_from_their_tokens(folder: Path):
    encoder = TextEncoder.load(folder, max_length=16)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert decoded(tokenizer, encoder.encode(["Good  film", "the song"])) == (["good film", "the song"], None)
    assert decoded(tokenizer, encoder.encode(["Good film", ""], ["bad", "sad song"])) == (
        ["good film", ""],
        ["bad", "sad song"],
    )
    assert decoded(tokenizer, encoder.encode([])) == ([], None)


def test_segments_of_one_type_are_told_apart_by_what_stands_between_them(folder: Path):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B:0 [SEP]:0", special_tokens=ends
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = TextEncoder.load(folder, max_length=16).encode(["good film", "the"], ["bad", "sad song"])
    assert not rows.types.any()
    assert decoded(tokenizer, rows) == (["good film", "the"], ["bad", "sad song"])
    assert decoded(tokenizer, TextEncoder.load(folder, max_length=16).encode(["good film"])) == (["good film"], None)
