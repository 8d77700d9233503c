"""Batches: however many processes and parts share one, its rows are all taken once and counted as one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_student import examples

from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.batching import Batch, Batching
from bertemd_deploy.processes import Processes


def batching(**changes: Any) -> Batching:
    plain = {"batch_size": 8, "micro_batch_size": None, "seed": 7, "pad_id": 0}
    return Batching(**(plain | {"processes": Processes(), "device": torch.device("cpu")} | changes))


def data(rows: int = 17) -> DataSlice:
    return DataSlice(examples(rows), np.arange(rows, dtype=np.int64) % 2)


def shares(size: int, **changes: Any) -> list[list[Batch]]:
    """Return the first epoch's batches of every process."""
    return [list(batching(processes=Processes(rank, size), **changes).epoch(data(), 0, skip=0)) for rank in range(size)]


def rows_of(batch: Batch) -> list[int]:
    return [int(row) for part in batch.parts for row in part.rows]


@pytest.mark.parametrize("micro", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_row_is_one_process_s_and_what_is_counted_is_the_whole(size: int, micro: int | None) -> None:
    whole = list(batching().epoch(data(), 0, skip=0))
    assert sorted(len(rows_of(batch)) for batch in whole) == [1, 8, 8]
    for number, batches in enumerate(zip(*shares(size, micro_batch_size=micro), strict=True)):
        expected = whole[number]
        assert sorted(row for batch in batches for row in rows_of(batch)) == sorted(rows_of(expected))
        for batch in batches:
            assert batch.number == number
            assert (batch.tokens, batch.squares, batch.units) == (expected.tokens, expected.squares, expected.units)
            assert batch.split is batches[0].split
            assert all(0 < len(part.rows) <= (micro or 8) for part in batch.parts)
            assert len(batch.seeds) == len(batch.parts)
        assert batches[0].split is any(len(batch.parts) > 1 for batch in batches)
        assert sum(part.tokens for batch in batches for part in batch.parts) == expected.tokens
        assert sum(part.squares for batch in batches for part in batch.parts) == expected.squares


def test_a_process_may_have_no_row_of_the_last_batch() -> None:
    first, second = shares(2)
    assert sorted(len(rows_of(batch)) for batch in first) == [1, 4, 4]
    assert sorted(len(rows_of(batch)) for batch in second) == [0, 4, 4]


def test_parts_hold_the_rows_inputs_and_labels() -> None:
    given = data()
    lengths = given.examples.lengths
    (batch,) = (batching(micro_batch_size=3).batch(given, np.array(rows), number=5) for rows in [[4, 0, 9, 2, 11]])
    assert [part.rows.tolist() for part in batch.parts] == [[4, 0, 9], [2, 11]]
    assert batch.number == 5
    for part in batch.parts:
        arrays, labels = given.batch(part.rows, pad_id=0)
        assert part.inputs.keys() == arrays.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(part.inputs[name].numpy(), value)
        np.testing.assert_array_equal(part.labels.numpy(), labels)
        assert part.tokens == int(part.inputs["attention_mask"].sum()) == lengths[part.rows].sum()
        assert part.squares == int((lengths[part.rows] ** 2).sum())


def test_no_two_parts_draw_the_same_dropout() -> None:
    seeds = [
        seed
        for epoch in range(3)
        for rank in range(2)
        for batch in batching(processes=Processes(rank, 2), micro_batch_size=2).epoch(data(), epoch, skip=0)
        for seed in batch.seeds
    ]
    assert len(set(seeds)) == len(seeds) > 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    again = [seed for batch in batching(seed=8).epoch(data(), 0, skip=0) for seed in batch.seeds]
    assert not set(again) & {seed for batch in batching().epoch(data(), 0, skip=0) for seed in batch.seeds}


def test_an_epoch_continues_where_it_was_left() -> None:
    whole = list(batching().epoch(data(), 1, skip=0))
    rest = list(batching().epoch(data(), 1, skip=2))
    assert [batch.number for batch in whole] == [3, 4, 5]
    assert [batch.number for batch in rest] == [5]
    assert rows_of(rest[0]) == rows_of(whole[2])
    assert rest[0].seeds == whole[2].seeds


def test_units_are_tokens_with_a_label_where_tokens_are_labelled() -> None:
    part = examples(6)
    labels = np.where(np.arange(len(part.tokens)) % 3 == 0, 1, NOT_SCORED)
    given = DataSlice(part, labels.astype(np.int64), "token-classification")
    rows = np.array([5, 1, 3])
    expected = sum(int((labels[part.offsets[row] : part.offsets[row + 1]] == 1).sum()) for row in rows)
    assert batching().batch(given, rows, number=0).units == expected
    assert batching().batch(data(), rows, number=0).units == 3
    nothing = DataSlice(part, np.full(len(part.tokens), NOT_SCORED, dtype=np.int64), "token-classification")
    assert batching().batch(nothing, rows, number=0).units == 1  # a batch without a label has a loss of 0, not 0 / 0
