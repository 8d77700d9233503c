from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from bertemd_deploy.artifact import GRAPH_PRECISION, GRAPHS
from bertemd_deploy.bench import record
from bertemd_deploy.bench.candidates import Candidate
from bertemd_deploy.bench.limits import Limits
from bertemd_deploy.bench.passes import CellResult, Timing
from bertemd_deploy.bench.profiles import Profile
from bertemd_deploy.bench.record import Found, artifact_excerpt, device_entry, measurements, model_entries
from bertemd_deploy.bench.workload import Cell
from bertemd_deploy.errors import MeasurementError, MemoryLimitError

TEACHER, STUDENT = "teacher onnxruntime fp32", "student onnxruntime int8"


def candidate(model, graph, *, backend="onnxruntime", parameters=None):
    return Candidate(model, backend, graph, GRAPH_PRECISION[graph or "fp32"], Path(), 1, None, None, parameters, (0,))


def profile(logits, **changes):
    fields = {
        "cold_start_ms": {"import": 1.0, "load": 2.0, "first": 3.0, "process": 9.0, "n": 3},
        "peak_rss_bytes": 7,
        "rss_after_import_bytes": 5,
        "parameters": None,
        "memory": None,
        "idle": None,
        "confinement": None,
    }
    return Profile(np.asarray(logits, dtype=np.float32), **fields | changes)


def timing(scale, energy=None):
    return Timing({"calls": 9}, [[scale, scale], [scale, scale], [scale, scale]], 0.6, energy)


def found_of(artifact, *, failures=None, energy=None, paced=None, whole=None, disturbed=False):
    right = np.eye(2, dtype=np.float32)[artifact.evaluation().labels]
    result = CellResult(
        Cell(1, "replay", 2),
        {TEACHER: timing(8.0), STUDENT: timing(2.0, energy)},
        whole,
        paced,
        "rapl:package-0",
        0.1,
        disturbed,
    )
    return Found(
        {TEACHER: profile(right, parameters=50), STUDENT: profile(right)},
        {TEACHER: {"accuracy": 1.0}, STUDENT: {"accuracy": 0.9}},
        failures or {},
        [result],
    )


def stated(artifact, found, *, baseline=TEACHER):
    candidates = [candidate("teacher", "fp32"), candidate("student", "int8", parameters=26)]
    entries = model_entries(candidates, found, part=artifact.evaluation())
    return entries, measurements(entries, found, baseline=baseline, interval_ms=20.0, seed=0)


def test_one_entry_per_model_and_one_measurement_per_cell_and_model(artifact):
    entries, parts = stated(artifact, found_of(artifact))
    assert [(entry["name"], entry["failed"]) for entry in entries] == [(TEACHER, None), (STUDENT, None)]
    assert [entry["agreement_with_teacher"] for entry in entries] == [None, 1.0]
    assert [entry["parameters"] for entry in entries] == [50, None]
    assert [part["model"] for part in parts] == ["teacher", "student"]
    assert parts[0]["speedup_vs_teacher"] is None
    assert parts[1]["speedup_vs_teacher"] == {"p50": 4.0, "ci95": [4.0, 4.0], "claimed": True}
    assert parts[1]["latency_ms"]["p50_ci95"] == [2.0, 2.0]
    assert parts[1]["cpu_seconds_per_inference"] == pytest.approx(0.1)
    assert (parts[1]["paced_ms"], parts[1]["end_to_end_ms"], parts[1]["disturbed"]) == (None, None, False)
    assert parts[1]["throughput_per_s"] == 500.0


def test_nothing_is_claimed_of_a_disturbed_cell(artifact):
    _, parts = stated(artifact, found_of(artifact, disturbed=True))
    assert parts[1]["speedup_vs_teacher"]["claimed"] is False
    assert [part["disturbed"] for part in parts] == [True, True]


def test_energy_of_one_call_and_where_it_was_read(artifact):
    _, parts = stated(artifact, found_of(artifact, energy=3.0))
    energies = [part["energy_joules_per_inference"] for part in parts]
    assert energies == [None, {"value": 0.5, "source": "rapl:package-0"}]


def test_paced_requests_have_percentiles_and_no_intervals(artifact):
    _, parts = stated(artifact, found_of(artifact, paced={TEACHER: [9.0, 9.0], STUDENT: [3.0, 5.0, 4.0]}))
    assert parts[1]["paced_ms"] == {
        "interval_ms": 20.0,
        "p50": 4.0,
        "p90": pytest.approx(4.8),
        "p95": pytest.approx(4.9),
        "n": 3,
        "samples": [3.0, 5.0, 4.0],
    }


def test_from_text_to_decision_is_told_apart(artifact):
    _, parts = stated(artifact, found_of(artifact, whole={TEACHER: timing(9.0), STUDENT: timing(3.0)}))
    assert [part["end_to_end_ms"]["p50"] for part in parts] == [9.0, 3.0]


def test_a_model_that_failed_keeps_what_is_known_and_has_no_measurements(artifact):
    error = MemoryLimitError("does not fit", limit_bytes=100, peak_bytes=None)
    found = found_of(artifact, failures={STUDENT: error})
    del found.profiles[STUDENT], found.metrics[STUDENT]
    entries, parts = stated(artifact, found)
    assert entries[1]["failed"] == {"reason": "out of memory", "limit_bytes": 100, "peak_bytes": None}
    assert {entries[1][key] for key in record.MEASURED} == {None}
    assert entries[1]["parameters"] == 26
    assert [part["model"] for part in parts] == ["teacher"]


def test_without_a_baseline_there_are_no_speedups(artifact):
    _, parts = stated(artifact, found_of(artifact), baseline=None)
    assert [part["speedup_vs_teacher"] for part in parts] == [None, None]


def test_teachers_in_two_backends_are_compared_and_share_their_parameters(artifact):
    part = artifact.evaluation()
    right = np.eye(2, dtype=np.float32)[part.labels]
    pair = [candidate("teacher", None, backend="pytorch"), candidate("teacher", "fp32")]
    names = [one.name for one in pair]
    metrics = {name: {"accuracy": 1.0} for name in names}
    profiles = {names[0]: profile(right, parameters=50), names[1]: profile(right + 0.001)}
    entries = model_entries(pair, Found(profiles, metrics, {}, []), part=part)
    assert [entry["parameters"] for entry in entries] == [50, 50]
    assert [entry["agreement_with_teacher"] for entry in entries] == [None, 1.0]
    profiles[names[1]] = profile(right + 0.1)
    with pytest.raises(MeasurementError, match=r"differs from PyTorch by 1\.0e-01"):
        model_entries(pair, Found(profiles, metrics, {}, []), part=part)


def test_an_exported_teacher_that_is_another_function_is_refused():
    logits = np.zeros((4, 2), dtype=np.float32)
    record._check_teacher_graph(logits, logits + 0.009)
    for other in (logits + 0.02, logits * math.nan):
        with pytest.raises(MeasurementError, match="the teacher's ONNX graph differs from PyTorch by"):
            record._check_teacher_graph(logits, other)


@pytest.mark.parametrize(
    ("teacher", "graphs", "chosen"),
    [
        (True, GRAPHS, ["teacher", "fused", "fused-int8"]),
        (False, ("fp32", "int8"), ["fp32", "int8"]),
        (True, ("fp32", "int8", "fused"), ["teacher", "fp32", "int8"]),
        (True, ("fp32", "fused-int8"), ["teacher", "fp32", "fused-int8"]),
        (True, ("fused-int8",), ["teacher", "fused-int8"]),
        (True, ("fp32", "fused"), ["teacher", "fused"]),
        (False, ("int8",), ["int8"]),
    ],
)
def test_the_int8_graph_is_compared_with_the_one_it_came_from(teacher, graphs, chosen):
    candidates = [candidate("teacher", "fp32")] * teacher + [candidate("student", graph) for graph in graphs]
    found = record._steps(candidates)
    named = ["teacher" if candidates[at].model == "teacher" else candidates[at].graph for at in found.values()]
    assert named == chosen


def test_excerpt_counts_long_lists_and_keeps_the_rest(artifact):
    excerpt = artifact_excerpt(artifact)
    assert excerpt["quantization"] == {"mode": "dynamic", "excluded": {"count": 20}, "trials": [{"drop": 0.0}]}
    assert excerpt["labels"] == ["negative", "positive"]
    assert excerpt["student"]["layers"] == 1
    assert excerpt["teacher"] is None


def test_this_machine_is_the_device_unless_it_stands_in_for_another():
    found = Found({}, {}, {}, [])
    here = device_entry(None, limits=None, found=found)
    assert here["kind"] == "measured"
    assert "confinement" not in here
    confined = {STUDENT: profile(np.zeros((1, 2)), confinement={"cpus": None, "cpu_share": "cgroup", "memory": None})}
    there = device_entry(None, limits=Limits(cpu_share=0.5), found=Found(confined, {}, {}, []))
    assert there["kind"] == "constrained"
    assert there["confinement"]["cpu_share"] == "cgroup"
    assert there["limited_to"] == {"cpus": None, "cpu_share": 0.5, "memory_bytes": None}
    assert (there["cores"], there["memory_bytes"]) == (here["cores"], here["memory_bytes"])
    assert there["host"] == {key: here[key] for key in ("name", "cores", "threads", "memory_bytes")}
