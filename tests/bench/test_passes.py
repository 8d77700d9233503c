from __future__ import annotations

from typing import Any

import pytest

from bertemd_deploy.bench import passes
from bertemd_deploy.bench.candidates import students
from bertemd_deploy.bench.passes import calls_per_round, profile, requests_per_round, time_cells
from bertemd_deploy.bench.workload import Cell
from bertemd_deploy.errors import MeasurementError
from bertemd_deploy.settings import BenchSettings


@pytest.mark.parametrize(("median_ms", "count"), [(0.5, 200), (50.0, 3), (100.0, 3), (100.1, 1), (1e-6, 2000)])
def test_calls_fill_the_turn(median_ms, count):
    assert calls_per_round(median_ms, seconds=0.1) == count


@pytest.mark.parametrize(
    ("medians_ms", "batch", "count"),
    [([2.0, 10.0, 1.0], 1, 10), ([900.0, 1.0], 1, 4), ([900.0, 1.0], 8, 2), ([1e-6], 1, 2000)],
)
def test_requests_go_by_the_slowest_model(medians_ms, batch, count):
    assert requests_per_round(medians_ms, batch=batch, seconds=0.1) == count


class FakeWorker:
    """Answers at once and writes down who was asked what, in order."""

    log: list[tuple[str, str, dict[str, Any]]]

    def __init__(self, name: str, *, threads: int) -> None:
        self.name, self.pid = name, 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def send(self, command, **fields):
        self.log.append((self.name, command, fields))

    def receive(self):
        return {}

    def request(self, command, **fields):
        self.send(command, **fields)
        if command == "warm":
            return {"calls": 2, "steady": False, "median_ms": 4.0 if "fp32" in self.name else 1.0}
        return {"samples_ms": [1.0] * fields["count"], "cpu_seconds": 0.5}


class FakeWatch:
    cpus = 2
    busy = 0.0

    def __init__(self, workers):
        pass

    def cpus_busy(self):
        return self.busy


@pytest.fixture
def log(monkeypatch):
    FakeWorker.log = []
    monkeypatch.setattr(passes, "Worker", FakeWorker)
    monkeypatch.setattr(passes, "OtherWork", FakeWatch)
    monkeypatch.setattr(passes, "SETTLE_SECONDS", 0.0)
    return FakeWorker.log


def run(artifact, *cells, **settings):
    found, _ = students(artifact, None)
    return time_cells(
        found,
        cells,
        artifact=artifact,
        settings=BenchSettings(rounds=6, seconds_per_cell=0.06, **settings),
        done=lambda cell: None,
    )


def test_each_model_takes_one_turn_in_each_round_in_changing_order(artifact, log):
    (result,) = run(artifact, Cell(1, 8, 1))
    turns = [name for name, command, _ in log if command == "turn"]
    rounds = [tuple(turns[at : at + 2]) for at in range(0, 12, 2)]
    assert all(len(set(pair)) == 2 for pair in rounds)
    assert len(set(rounds)) == 2  # both orders occur
    assert [len(timing.rounds) for timing in result.alone] == [6, 6]
    assert [len(timing.rounds[0]) for timing in result.alone] == [3, 10]
    assert result.alone[0].cpu_seconds == 3.0
    assert result.whole is None
    assert [fields["most_seconds"] for _, command, fields in log if command == "turn"] == pytest.approx([0.04] * 12)


def test_order_is_drawn_from_the_seed(artifact, log):
    def turns(seed):
        log.clear()
        run(artifact, Cell(1, 8, 1), seed=seed)
        return [name for name, command, _ in log if command == "turn"]

    assert turns(0) == turns(0)
    assert turns(0) != turns(1)


def test_replay_gives_all_models_the_same_requests_alone_and_from_text(artifact, log):
    (result,) = run(artifact, Cell(8, "replay", 1))
    turns = [fields for _, command, fields in log if command == "turn"]
    requests = {(fields["texts"], fields["start"], fields["count"]) for fields in turns}
    assert requests == {(texts, 2 * number, 2) for texts in (False, True) for number in range(6)}
    assert len(turns) == 2 * 2 * 6
    assert len(result.whole) == 2
    assert {fields["most_seconds"] for fields in turns} == {None}


@pytest.mark.parametrize(
    ("threads", "busy", "disturbed"), [(1, 0.9, False), (1, 1.3, True), (2, 0.1, False), (2, 0.3, True)]
)
def test_other_programs_disturb_where_they_take_cpus_the_cell_needs(
    artifact, log, monkeypatch, threads, busy, disturbed
):
    monkeypatch.setattr(FakeWatch, "busy", busy)
    (result,) = run(artifact, Cell(1, 8, threads))
    assert result.other_cpus_busy == busy
    assert result.disturbed is disturbed


def test_profile_of_a_real_graph(artifact, monkeypatch):
    monkeypatch.setattr(passes, "COLD_STARTS", 2)
    (candidate, _), _ = students(artifact, None)
    found = profile(candidate, artifact=artifact, settings=BenchSettings(), threads=1)
    assert found.logits.shape == (12, 2)
    assert found.logits[0] == pytest.approx([0.1, 2.0])
    assert set(found.cold_start_ms) == {"import", "load", "first", "n"}
    assert min(found.cold_start_ms.values()) > 0
    assert found.peak_rss_bytes >= found.rss_after_import_bytes > 0
    assert found.parameters == 26


def test_a_worker_that_cannot_open_its_model_names_it(artifact):
    (candidate, _), _ = students(artifact, None)
    candidate.path.unlink()
    with pytest.raises(MeasurementError, match=r"bench, student onnxruntime fp32: .*there is no such graph"):
        time_cells([candidate], [Cell(1, 8, 1)], artifact=artifact, settings=BenchSettings(), done=lambda cell: None)
