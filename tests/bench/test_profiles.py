from __future__ import annotations

from typing import Any

import pytest

from bertemd_deploy.bench import profiles
from bertemd_deploy.bench.candidates import students
from bertemd_deploy.bench.profiles import profile
from bertemd_deploy.bench.setup import Setup
from bertemd_deploy.errors import MeasurementError, MemoryLimitError
from bertemd_deploy.settings import BenchSettings

SHORT = BenchSettings(paced_interval_ms=10.0, idle_seconds=0.03, batch_sizes=(8, 1))


@pytest.fixture
def graph(artifact):
    (found, _), _ = students(artifact, None)
    return found


@pytest.fixture(autouse=True)
def two_cold_starts(monkeypatch):
    monkeypatch.setattr(profiles, "COLD_STARTS", 2)


class Watched(Setup):
    """A setup that writes down what its workers are asked to open."""

    opened: list[dict[str, Any]]

    def model(self, candidate, *, threads, **options):
        fields = super().model(candidate, threads=threads, **options)
        self.opened.append(fields)
        return fields


def watched(monkeypatch, *arguments, **fields) -> Watched:
    monkeypatch.setattr(Watched, "opened", [], raising=False)
    return Watched(*arguments, **fields)


def test_profile_of_a_real_graph(artifact, graph):
    found = profile(graph, setup=Setup(artifact, SHORT), threads=1)
    assert found.logits.shape == (12, 2)
    assert found.logits[0] == pytest.approx([0.1, 2.0])
    assert set(found.cold_start_ms) == {"import", "load", "first", "process", "n"}
    assert min(found.cold_start_ms.values()) > 0
    parts = sum(found.cold_start_ms[part] for part in ("import", "load", "first"))
    assert found.cold_start_ms["process"] > 0.5 * parts  # each is a median of its own
    assert found.peak_rss_bytes >= found.rss_after_import_bytes > 0
    assert found.parameters == 26
    assert found.idle is None  # with one thread nothing can spin
    assert found.confinement is None


def test_memory_with_and_without_arena(artifact, graph):
    found = profile(graph, setup=Setup(artifact, SHORT), threads=1)
    assert set(found.memory) == {"arena", "no_arena", "requests"}
    assert found.memory["requests"] == 13 + 2
    assert found.memory["arena"]["peak_rss_bytes"] == found.peak_rss_bytes
    for part in (found.memory["arena"], found.memory["no_arena"]):
        assert 2**20 < part["final_rss_bytes"] <= part["peak_rss_bytes"]


@pytest.mark.parametrize("arena", [True, False])
def test_memory_the_other_way_is_left_out_where_not_asked_for(artifact, graph, monkeypatch, arena):
    settings = BenchSettings(arena=False, idle_seconds=0.0)
    setup = watched(monkeypatch, artifact, settings, arena=arena)
    found = profile(graph, setup=setup, threads=1)
    own, other = ("arena", "no_arena") if arena else ("no_arena", "arena")
    assert found.memory[own]["peak_rss_bytes"] == found.peak_rss_bytes
    assert found.memory[other] is None
    assert {fields["options"]["arena"] for fields in setup.opened} == {arena}


def test_idle_threads_are_watched_spinning_and_stopped(artifact, graph, monkeypatch):
    setup = watched(monkeypatch, artifact, SHORT)
    found = profile(graph, setup=setup, threads=2)
    assert set(found.idle) == {"interval_ms", "threads", "spinning", "stopped"}
    assert (found.idle["interval_ms"], found.idle["threads"]) == (10.0, 2)
    for part in (found.idle["spinning"], found.idle["stopped"]):
        assert part["cpu_seconds_per_second"] >= 0.0
    assert [fields["options"]["spinning"] for fields in setup.opened][-2:] == [True, False]


@pytest.mark.parametrize(("interval_ms", "used"), [(50.0, 50.0), (0.0, 100.0)])
def test_idle_threads_are_watched_for_the_time_asked(artifact, graph, monkeypatch, interval_ms, used):
    asked = []

    class Silent:
        confinement = None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def request(self, command, **fields):
            asked.append((command, fields))
            return {"idle_seconds": 2.0, "idle_cpu_seconds": 0.5}

    monkeypatch.setattr(Setup, "worker", lambda self, candidate, *, threads: Silent())
    settings = BenchSettings(paced_interval_ms=interval_ms, idle_seconds=1.0)
    found = profiles._idle(graph, setup=Setup(artifact, settings), threads=4)
    assert found == {
        "interval_ms": used,
        "threads": 4,
        "spinning": {"cpu_seconds_per_second": 0.25},
        "stopped": {"cpu_seconds_per_second": 0.25},
    }
    paced = [fields for command, fields in asked if command == "paced"]
    fields = {"interval_seconds": used / 1000, "count": 1000 / used, "batch": 1, "sequence": 12}
    assert paced == [fields, fields]


def test_idle_threads_are_not_watched_where_not_asked(artifact, graph):
    settings = BenchSettings(idle_seconds=0.0)
    assert profiles._idle(graph, setup=Setup(artifact, settings), threads=2) is None


class Confining(Setup):
    """A setup in which a model with the arena on or off does not fit."""

    tight = True

    def worker(self, candidate, *, threads):
        return Tight(super().worker(candidate, threads=threads), self)


class Tight:
    def __init__(self, worker, setup):
        self.worker, self.setup, self.confinement = worker, setup, {"memory": "cgroup"}

    def __enter__(self):
        self.worker.__enter__()
        return self

    def __exit__(self, *arguments):
        self.worker.__exit__(*arguments)

    def request(self, command, **fields):
        if fields.get("options", {}).get("arena") is self.setup.tight:
            raise MemoryLimitError("does not fit", limit_bytes=100, peak_bytes=99)
        return self.worker.request(command, **fields)


def test_a_model_that_does_not_fit_is_an_error_of_its_own(artifact, graph):
    with pytest.raises(MemoryLimitError):
        profile(graph, setup=Confining(artifact, SHORT), threads=1)


def test_a_model_that_fits_only_as_it_is_used_is_measured(artifact, graph):
    found = profile(graph, setup=Confining(artifact, SHORT, arena=False), threads=1)
    assert found.memory["arena"] is None
    assert found.memory["no_arena"]["peak_rss_bytes"] > 2**20
    assert found.confinement == {"memory": "cgroup"}


def test_a_worker_that_cannot_open_its_model_names_it(artifact, graph):
    graph.path.unlink()
    with pytest.raises(MeasurementError, match=r"bench, student onnxruntime fp32: .*there is no such graph"):
        profile(graph, setup=Setup(artifact, SHORT), threads=1)
