from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bertemd_deploy.encoding import Encoded, TextEncoder, length_batches
from bertemd_deploy.errors import ModelError

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
