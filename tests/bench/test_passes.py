from __future__ import annotations

from typing import Any, ClassVar

import pytest

from bertemd_deploy.bench import passes, setup
from bertemd_deploy.bench.candidates import students
from bertemd_deploy.bench.limits import Limits
from bertemd_deploy.bench.passes import calls_per_round, requests_per_round, time_cells
from bertemd_deploy.bench.setup import Setup
from bertemd_deploy.bench.workload import Cell
from bertemd_deploy.errors import MeasurementError, MemoryLimitError
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


FP32, INT8 = "student onnxruntime fp32", "student onnxruntime int8"
METER = {"energy_source": "rapl:package-0", "least_joules": 1.0}


class FakeWorker:
    """Answers at once and writes down who was asked what, in order.

    Attributes:
        fails: (name, command, which of these commands) at which a worker meets its memory limit.
        joules: used in one turn, by name.
        meter: what opening says of the energy counter.
    """

    log: ClassVar[list[tuple[str, str, dict[str, Any]]]] = []
    fails: ClassVar[tuple[str, str, int] | None] = None
    joules: ClassVar[dict[str, float | None]] = {}
    meter: ClassVar[dict[str, Any]] = {"energy_source": None, "least_joules": None}

    def __init__(self, name: str, *, threads: int, limits: Limits | None) -> None:
        self.name, self.pid, self.limits = name, 1, limits

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def send(self, command, **fields):
        self.log.append((self.name, command, fields))
        made = sum((name, asked) == (self.name, command) for name, asked, _ in self.log)
        if self.fails == (self.name, command, made):
            raise MemoryLimitError("does not fit", limit_bytes=100, peak_bytes=99)

    def receive(self):
        return self.meter

    def request(self, command, **fields):
        self.send(command, **fields)
        if command == "warm":
            return {"calls": 2, "steady": False, "median_ms": 4.0 if self.name == FP32 else 1.0}
        samples = {"samples_ms": [1.0] * fields["count"]}
        if command == "paced":
            return samples
        return samples | {"cpu_seconds": 0.5, "energy_joules": self.joules.get(self.name)}


class FakeWatch:
    cpus = 2
    busy = 0.0

    def __init__(self, workers):
        pass

    def cpus_busy(self):
        return self.busy


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(setup, "Worker", FakeWorker)
    monkeypatch.setattr(passes, "OtherWork", FakeWatch)
    monkeypatch.setattr(passes, "SETTLE_SECONDS", 0.0)
    return FakeWorker.log


def run(artifact, *cells, paced=(), between=lambda: None, limits=None, **settings):
    found, _ = students(artifact, None)
    return time_cells(
        found,
        cells,
        setup=Setup(artifact, BenchSettings(rounds=6, seconds_per_cell=0.06, **settings), limits),
        paced=paced,
        done=lambda cell: None,
        between=between,
    )


def test_each_model_takes_one_turn_in_each_round_in_changing_order(artifact, log):
    (result,), _ = run(artifact, Cell(1, 8, 1))
    turns = [name for name, command, _ in log if command == "turn"]
    rounds = [tuple(turns[at : at + 2]) for at in range(0, 12, 2)]
    assert all(len(set(pair)) == 2 for pair in rounds)
    assert len(set(rounds)) == 2  # both orders occur
    assert [len(timing.rounds) for timing in result.alone.values()] == [6, 6]
    assert [len(timing.rounds[0]) for timing in result.alone.values()] == [3, 10]
    assert result.alone[FP32].cpu_seconds == 3.0
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
    (result,), _ = run(artifact, Cell(8, "replay", 1))
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
    (result,), _ = run(artifact, Cell(1, 8, threads))
    assert result.other_cpus_busy == busy
    assert result.disturbed is disturbed


def test_a_worker_that_cannot_open_its_model_names_it(artifact):
    (candidate, _), _ = students(artifact, None)
    candidate.path.unlink()
    with pytest.raises(MeasurementError, match=r"bench, student onnxruntime fp32: .*there is no such graph"):
        time_cells([candidate], [Cell(1, 8, 1)], setup=Setup(artifact, BenchSettings()), done=lambda cell: None)


def test_texts_are_timed_only_where_asked(artifact, log):
    (result,), _ = run(artifact, Cell(8, "replay", 1), end_to_end=False)
    assert result.whole is None
    assert not any(fields["texts"] for _, command, fields in log if command == "turn")


def test_the_cells_named_are_paced_after_their_turns(artifact, log):
    cells = [Cell(1, 8, 1), Cell(1, "replay", 1)]
    results, _ = run(artifact, *cells, paced=cells[1:], paced_interval_ms=20.0, paced_requests=3)
    assert results[0].paced_ms is None
    assert results[1].paced_ms == {FP32: [1.0] * 3, INT8: [1.0] * 3}
    asked = [(name, fields) for name, command, fields in log if command == "paced"]
    fields = {"interval_seconds": 0.02, "batch": 1, "sequence": "replay", "count": 3}
    assert asked == [(FP32, fields), (INT8, fields)]
    assert [command for _, command, _ in log][-2:] == ["paced", "paced"]


def test_something_else_may_be_done_between_turns(artifact, log):
    seen = []
    run(artifact, Cell(1, 8, 1), between=lambda: seen.append(log[-1][1]))
    assert seen == ["turn"] * 12


def test_limits_and_options_reach_every_worker(artifact, log, monkeypatch):
    limits = Limits(memory_bytes=2**30)
    given = []
    monkeypatch.setattr(FakeWorker, "__init__", lambda self, name, *, threads, limits: given.append((name, limits)))
    monkeypatch.setattr(FakeWorker, "name", FP32, raising=False)
    monkeypatch.setattr(FakeWorker, "pid", 1, raising=False)
    run(artifact, Cell(1, 8, 1), limits=limits)
    assert given == [(FP32, limits), (INT8, limits)]
    options = [fields["options"] for _, command, fields in log if command == "open"]
    assert options == [{"spinning": False, "arena": True}] * 2


# ---- energy


@pytest.mark.parametrize(
    ("joules", "expected"),
    [(0.5, 3.0), (0.1, None), (None, None), (0.0, None)],
    ids=["enough", "below the counter's steps", "unreadable", "nothing"],
)
def test_energy_is_that_of_all_turns_where_it_is_enough(artifact, log, monkeypatch, joules, expected):
    monkeypatch.setattr(FakeWorker, "meter", METER)
    monkeypatch.setattr(FakeWorker, "joules", {FP32: joules, INT8: 2.0})
    (result,), _ = run(artifact, Cell(1, 8, 1))
    assert result.energy_source == "rapl:package-0"
    assert result.alone[FP32].energy_joules == (None if expected is None else pytest.approx(expected))
    assert result.alone[INT8].energy_joules == 12.0


def test_without_a_counter_there_is_no_energy(artifact, log):
    (result,), _ = run(artifact, Cell(1, 8, 1))
    assert result.energy_source is None
    assert result.alone[FP32].energy_joules is None


# ---- models that do not fit


@pytest.mark.parametrize("command", ["open", "warm", "turn", "paced"])
def test_a_model_that_does_not_fit_is_left_out_and_the_others_go_on(artifact, log, monkeypatch, command):
    monkeypatch.setattr(FakeWorker, "fails", (FP32, command, 1))
    cells = [Cell(1, 8, 1), Cell(1, 16, 1)]
    results, failed = run(artifact, *cells, paced=cells)
    assert {name: error.peak_bytes for name, error in failed.items()} == {FP32: 99}
    assert [result.cell for result in results] == cells
    assert [set(result.alone) for result in results] == [{INT8}] * 2
    assert [len(result.alone[INT8].rounds) for result in results] == [6, 6]
    assert [set(result.paced_ms) for result in results] == [{INT8}] * 2


def test_what_was_measured_before_a_model_failed_is_kept(artifact, log, monkeypatch):
    monkeypatch.setattr(FakeWorker, "fails", (INT8, "warm", 2))
    results, failed = run(artifact, Cell(1, 8, 1), Cell(1, 16, 1))
    assert set(failed) == {INT8}
    assert [set(result.alone) for result in results] == [{FP32, INT8}, {FP32}]


def test_where_nothing_fits_there_are_no_results(artifact, log, monkeypatch):
    found, _ = students(artifact, ("fp32",))
    monkeypatch.setattr(FakeWorker, "fails", (FP32, "turn", 3))
    done = []
    cells = [Cell(1, 8, 1), Cell(1, 16, 1)]
    results, failed = time_cells(found, cells, setup=Setup(artifact, BenchSettings()), done=done.append)
    assert (results, set(failed), done) == ([], {FP32}, cells)


def test_no_models_give_no_results(artifact, log):
    cells = [Cell(1, 8, 1)]
    assert time_cells([], cells, setup=Setup(artifact, BenchSettings()), done=lambda cell: None) == ([], {})
