from __future__ import annotations

import numpy as np
import pytest
from tiny_artifact import MAX_LENGTH, TEXTS, WORDS, write_artifact
from tokenizers import Tokenizer

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.workload import MEMORY_ROWS, Cell, Workload, paced_cells, plan_cells
from bertemd_deploy.errors import ArtifactError, MeasurementError
from bertemd_deploy.settings import BenchSettings


def test_default_grid_collapses_lengths_and_threads_that_coincide():
    cells, notes = plan_cells(BenchSettings(), max_length=128, cpus=1, most_threads=1)
    assert notes == []
    assert [cell.sequence for cell in cells if cell.batch == 1] == [16, 32, 64, 128, "replay"]
    assert {cell.threads for cell in cells} == {1}
    assert len(cells) == 10


def test_cells_of_one_thread_count_stand_together():
    cells, _ = plan_cells(BenchSettings(), max_length=64, cpus=4, most_threads=8)
    threads = [cell.threads for cell in cells]
    assert threads == sorted(threads)
    assert set(threads) == {1, 4}


def test_what_cannot_be_measured_is_noted():
    settings = BenchSettings(sequence_lengths=(16, 64, "max"), threads=(1, 4, 16), replay=False, batch_sizes=(1,))
    cells, notes = plan_cells(settings, max_length=40, cpus=2, most_threads=4)
    assert cells == [Cell(1, 16, 1), Cell(1, 40, 1), Cell(1, 16, 4), Cell(1, 40, 4)]
    assert notes == [
        "sequence lengths [64] left out: the artifact's longest input is 40 tokens",
        "threads [16] left out: this process may use 4 CPUs",
    ]


def test_an_empty_grid_is_an_error():
    settings = BenchSettings(sequence_lengths=(64,), replay=False)
    with pytest.raises(
        MeasurementError, match=r"nothing is left to measure \(sequence lengths \[64\] left out"
    ) as error:
        plan_cells(settings, max_length=32, cpus=2, most_threads=2)
    assert 'bench.sequence_lengths=["max"]' in str(error.value)


def test_single_examples_at_the_length_nearest_32_and_the_replay_are_paced():
    cells, _ = plan_cells(BenchSettings(), max_length=128, cpus=4, most_threads=8)
    assert paced_cells(cells) == [Cell(1, 32, 4), Cell(1, "replay", 4)]


@pytest.mark.parametrize(
    ("cells", "chosen"),
    [
        ([Cell(1, 24, 2), Cell(1, 40, 2), Cell(8, 32, 2)], [Cell(1, 24, 2)]),
        ([Cell(1, 16, 1), Cell(1, 128, 1)], [Cell(1, 16, 1)]),
        ([Cell(1, "replay", 1)], [Cell(1, "replay", 1)]),
        ([Cell(8, 32, 2), Cell(8, "replay", 2)], []),
        ([], []),
    ],
    ids=["the shorter of two", "the nearest", "replay alone", "batches alone", "nothing"],
)
def test_paced_cells(cells, chosen):
    assert paced_cells(cells) == chosen


def test_synthetic_inputs_hold_no_special_tokens(artifact):
    inputs = Workload.load(artifact, seed=0).synthetic(batch=8, sequence=MAX_LENGTH)
    assert {name: array.shape for name, array in inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (8, MAX_LENGTH)
    )
    assert inputs["input_ids"].min() >= 4
    assert len(np.unique(inputs["input_ids"])) > 3
    assert inputs["attention_mask"].all()


def test_every_worker_draws_the_same_inputs(artifact):
    one, other = Workload.load(artifact, seed=3), Workload.load(artifact, seed=3)
    np.testing.assert_array_equal(
        one.synthetic(batch=2, sequence=5)["input_ids"], other.synthetic(batch=2, sequence=5)["input_ids"]
    )
    np.testing.assert_array_equal(
        one.request_rows(batch=2, start=1, count=3), other.request_rows(batch=2, start=1, count=3)
    )
    different = Workload.load(artifact, seed=4)
    assert not np.array_equal(
        one.request_rows(batch=12, start=0, count=1), different.request_rows(batch=12, start=0, count=1)
    )


def test_replay_goes_through_all_rows_before_it_repeats(artifact):
    workload = Workload.load(artifact, seed=0)
    rows = np.concatenate(workload.request_rows(batch=1, start=0, count=len(TEXTS)))
    assert sorted(rows) == list(range(len(TEXTS)))
    again = workload.request_rows(batch=1, start=len(TEXTS), count=1)
    np.testing.assert_array_equal(again[0], rows[:1])


def test_requests_are_padded_to_their_own_longest_row(artifact):
    workload = Workload.load(artifact, seed=0)
    rows = workload.request_rows(batch=3, start=0, count=4)
    for group, inputs in zip(rows, workload.requests(batch=3, start=0, count=4), strict=True):
        lengths = workload.evaluation.examples.lengths[group]
        assert inputs["input_ids"].shape == (3, lengths.max())
        np.testing.assert_array_equal(inputs["attention_mask"].sum(axis=1), lengths)


def test_memory_requests_hold_the_longest_row(tmp_path):
    workload = Workload.load(Artifact.load(write_artifact(tmp_path)), seed=0)
    longest = workload.evaluation.examples.lengths.max()
    for batch in (1, 8):
        groups = workload.memory_requests(batch=batch)
        assert max(group["input_ids"].shape[1] for group in groups) == longest
        assert sum(len(group["input_ids"]) for group in groups) == min(MEMORY_ROWS, len(TEXTS)) + 1


def test_a_slice_of_special_tokens_only_is_refused(artifact_folder):
    path = str(artifact_folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_special_tokens(list(WORDS))
    tokenizer.save(path)
    artifact = Artifact.load(artifact_folder)
    with pytest.raises(ArtifactError, match="holds no ordinary token"):
        Workload.load(artifact, seed=0)
