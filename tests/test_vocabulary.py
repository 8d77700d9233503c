"""Embedding rows are matched by token text, special tokens by role, and a stranger's vocabulary is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertemd_deploy.errors import ModelError
from bertemd_deploy.vocabulary import match_rows

BERT = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "good": 5, "bad": 6}


@given(st.permutations(list(BERT)))
def test_any_order_of_the_same_tokens_is_matched(tokens: list[str]) -> None:
    rows, matched = match_rows({token: at for at, token in enumerate(tokens)}, BERT, rows=len(tokens), where="small")
    assert rows.dtype == np.int64
    assert rows.tolist() == [BERT[token] for token in tokens]
    assert matched == len(BERT)


def test_special_tokens_are_matched_by_role_unless_the_checkpoint_has_them() -> None:
    teacher = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "good": 5}
    assert match_rows(teacher, BERT, rows=6, where="small")[0].tolist() == [2, 0, 3, 1, 4, 5]
    assert match_rows(teacher, BERT | {"<pad>": 9}, rows=6, where="small")[0].tolist() == [2, 9, 3, 1, 4, 5]
    back = match_rows(BERT, teacher | {"bad": 8}, rows=7, where="small")[0]
    assert back.tolist() == [1, 3, 0, 2, 4, 5, 8]


def test_ids_without_a_token_start_as_the_unknown_one() -> None:
    many = {f"word{at}": at + 7 for at in range(200)}
    teacher = BERT | many | {"new": 207}
    rows, matched = match_rows(teacher, BERT | many, rows=210, where="small")
    assert (matched, len(teacher)) == (207, 208)
    assert rows[207:].tolist() == [1, 1, 1]
    assert rows[:207].tolist() == list(range(207))
    nameless = {token: at for token, at in (BERT | many).items() if token != "[UNK]"}
    with pytest.raises(
        ModelError, match=r"small: 4 of the teacher's ids have no token in its tokenizer, and it has no unk"
    ):
        match_rows(teacher, nameless, rows=210, where="small")


def test_fewer_than_99_of_100_are_refused_with_the_first_examples() -> None:
    many = {f"word{at}": at for at in range(100)}
    assert (
        match_rows(many, {"[UNK]": 0} | {token: at for token, at in many.items() if at != 7}, rows=100, where="s")[1]
        == 99
    )
    fewer = {token: at for token, at in many.items() if at % 10}
    with pytest.raises(ModelError) as raised:
        match_rows(many, fewer, rows=100, where="small")
    assert str(raised.value) == (
        "small: its tokenizer has 90 of the teacher's 100 tokens (90.0%; at least 99% is needed); it lacks 'word0', 'word10', "
        "'word20', 'word30', 'word40', …. Start from teacher layers, or from a checkpoint that shares the teacher's vocabulary."
    )
