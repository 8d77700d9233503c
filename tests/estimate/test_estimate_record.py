from __future__ import annotations

import json
import re

import pytest
from tiny_artifact import write_artifact, write_graph_teacher
from tiny_speeds import make_calibration, make_device

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench import candidates
from bertemd_deploy.bench.workload import Cell
from bertemd_deploy.budget import Budget, check_budget
from bertemd_deploy.errors import ArtifactError, MeasurementError, RecipeError
from bertemd_deploy.estimate import record as module
from bertemd_deploy.estimate.cells import Lengths, speedup
from bertemd_deploy.estimate.model import ACCURACY, estimate
from bertemd_deploy.estimate.record import estimate_record
from bertemd_deploy.estimate.scaling import scale
from bertemd_deploy.estimate.speeds import LIMITS
from bertemd_deploy.report import report
from bertemd_deploy.settings import BenchSettings

HERE = make_device(name="local", clock_mhz=3000.0)
SETTINGS = BenchSettings(sequence_lengths=(4, "max"), batch_sizes=(1, 2), threads=(1, "all"))
METRICS = {
    "teacher": {"accuracy": 1.0, "f1": 1.0},
    "fp32": {"accuracy": 0.9, "f1": 0.8},
    "int8": {"accuracy": 0.8, "f1": 0.7},
}


@pytest.fixture
def artifact_folder(tmp_path):
    return write_artifact(tmp_path / "artifact", metrics=METRICS)


@pytest.fixture
def no_torch(monkeypatch):
    """Make the teacher's folder serve its ready graph."""
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        candidates.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )


def make_record(folder, *, teacher=None, settings=SETTINGS, calibration=None, **facts):
    return estimate_record(
        folder,
        teacher=teacher,
        settings=settings,
        device=make_device(**facts),
        here=HERE,
        calibration=calibration or make_calibration(),
    )


@pytest.mark.usefixtures("no_torch")
def test_record_of_teacher_and_student(artifact_folder, tmp_path):
    found = make_record(artifact_folder, teacher=write_graph_teacher(tmp_path / "teacher"))
    json.dumps(found, allow_nan=False)
    assert found["schema_version"] == 1
    device = found["device"]
    assert (device["name"], device["kind"], device["target"]) == ("board", "estimated", "arm64-dotprod")
    assert (device["cores"], device["threads"], device["memory_bytes"]) == (4, 4, 2**32)
    assert device["sources"] == [{"fact": "cores", "url": "https://example.org/board"}]
    assert found["baseline"] == "teacher onnxruntime fp32"
    names = [entry["name"] for entry in found["models"]]
    assert names == ["teacher onnxruntime fp32", "student onnxruntime fp32", "student onnxruntime int8"]
    assert [entry["metrics"] for entry in found["models"]] == list(METRICS.values())
    cells = {(one["batch"], one["sequence"], one["threads"]) for one in found["measurements"]}
    assert cells == {(batch, length, threads) for batch in (1, 2) for length in (4, 12, "replay") for threads in (1, 4)}
    assert len(found["measurements"]) == 3 * len(cells)
    assert (found["churn"], found["noise"], found["conditions"]) == (None, None, None)


@pytest.mark.usefixtures("no_torch")
def test_nothing_in_it_looks_measured(artifact_folder, tmp_path):
    found = make_record(artifact_folder, teacher=write_graph_teacher(tmp_path / "teacher"))
    for entry in found["models"]:
        for key in (
            "peak_rss_bytes",
            "cold_start_ms",
            "rss_after_import_bytes",
            "idle",
            "memory",
            "agreement_with_teacher",
        ):
            assert entry[key] is None, key
        memory = entry["memory_estimate_bytes"]
        assert 40_000_000 < memory["low"] < memory["value"] < memory["high"]
        assert "measured on another machine" in entry["memory_estimate_bytes"]["how"]
    for one in found["measurements"]:
        latency, times = one["latency_ms"], one["estimate_ms"]
        assert latency["p50"] == times["p50"] == pytest.approx(sum(times["parts"].values()), abs=1e-3)
        assert latency["samples"] == []
        assert all(value is None for key, value in latency.items() if key not in ("p50", "samples"))
        assert 0 < times["low"] < times["p50"] < times["high"]
        for key in ("end_to_end_ms", "cpu_seconds_per_inference", "energy_joules_per_inference", "paced_ms", "n"):
            assert one[key] is None, key
        gain = one["speedup_vs_teacher"]
        if one["model"] == "teacher":
            assert gain is None
        else:
            assert gain["claimed"] is False
            assert gain["ci95"][0] < gain["p50"] < gain["ci95"][1]


def test_its_times_are_the_models(artifact_folder):
    found = make_record(artifact_folder)
    scaled = scale(make_calibration(), here=HERE, device=make_device())
    path = Artifact.load(artifact_folder).graph("int8")[1]
    for one in found["measurements"]:
        if one["graph"] == "int8" and one["sequence"] != "replay":
            expected = estimate(
                path, batch=one["batch"], sequence=one["sequence"], threads=one["threads"], calibration=scaled
            )
            assert one["latency_ms"]["p50"] == pytest.approx(expected.p50_ms)
            assert one["estimate_ms"]["high"] == pytest.approx(expected.high_ms)
            assert one["throughput_per_s"] == pytest.approx(1000 * one["batch"] / expected.p50_ms)
    assert found["baseline"] is None
    assert all(one["speedup_vs_teacher"] is None for one in found["measurements"])


def test_the_replay_is_the_median_request(artifact_folder):
    loaded = Artifact.load(artifact_folder)
    lengths = Lengths(loaded, seed=0)
    assert lengths.of(Cell(1, 7, 1)) == [7]
    singles = lengths.of(Cell(1, "replay", 1))
    assert sorted(singles) == sorted(loaded.evaluation().examples.lengths.tolist())
    pairs = lengths.of(Cell(2, "replay", 1))
    assert pairs == [max(singles[at : at + 2]) for at in range(0, len(singles), 2)]
    found = make_record(artifact_folder)
    (replay,) = (
        one
        for one in found["measurements"]
        if (one["graph"], one["batch"], one["sequence"], one["threads"]) == ("int8", 1, "replay", 1)
    )
    scaled = scale(make_calibration(), here=HERE, device=make_device())
    middle = sorted(singles)[(len(singles) - 1) // 2]
    expected = estimate(loaded.graph("int8")[1], batch=1, sequence=middle, threads=1, calibration=scaled)
    assert replay["latency_ms"]["p50"] == pytest.approx(expected.p50_ms)


def test_how_it_was_made_is_said(artifact_folder):
    found = make_record(artifact_folder)["estimate"]
    assert found["scaled_by"].keys() == set(LIMITS)
    assert found["error"] == ACCURACY.record()
    assert found["calibration"]["machine"]["device"] == "board"
    for words in ("estimates, not measurements", "board: 1500 MHz", "10 GB/s", f"{ACCURACY.worst:.0%} at worst"):
        assert words in found["words"]
    unknown = make_record(artifact_folder, bandwidth_gb_s=None)["estimate"]["words"]
    assert "its own speed is not known" in unknown


@pytest.mark.usefixtures("no_torch")
def test_the_report_reads_it(artifact_folder, tmp_path):
    found = make_record(artifact_folder, teacher=write_graph_teacher(tmp_path / "teacher"))
    (tmp_path / "record.json").write_text(json.dumps(found))
    report([tmp_path / "record.json"], out=tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "stimate" in page
    assert "board" in page


def test_threads_that_this_machine_tells_nothing_about_are_left_out(artifact_folder):
    found = make_record(artifact_folder, calibration=make_calibration(threads=(1,)))
    assert {one["threads"] for one in found["measurements"]} == {1}
    assert any("4 threads asked for" in line for line in found["notes"])
    with pytest.raises(MeasurementError, match="4 threads asked for"):
        make_record(artifact_folder, calibration=make_calibration(threads=(1,)), settings=BenchSettings(threads=(4,)))


def test_graphs_that_the_device_would_not_compute_are_left_out(tmp_path):
    requires = {"target": "arm64", "isa": {"int8": ["asimd"]}}
    folder = write_artifact(tmp_path / "artifact", requires=requires, metrics=METRICS)
    found = make_record(folder, isa=("avx2",))
    assert [entry["graph"] for entry in found["models"]] == ["fp32"]
    assert any(line.startswith("graph int8 left out: on board") for line in found["notes"])
    settings = BenchSettings(graphs=("int8",), threads=(1,))
    with pytest.raises(MeasurementError, match=r"board: no graph of .* is for it. graph int8 left out"):
        make_record(folder, isa=("avx2",), settings=settings)


def test_float16_is_not_estimated(tmp_path, artifact_folder):
    (artifact_folder / "onnx" / "model.onnx").rename(artifact_folder / "onnx" / "model_fp16.onnx")
    from tiny_artifact import write_manifest

    write_manifest(artifact_folder)
    found = make_record(artifact_folder)
    assert [entry["graph"] for entry in found["models"]] == ["int8"]
    assert "graph fp16 left out: only fp32 and int8 are estimated, it is fp16" in found["notes"]
    assert found["models"][0]["metrics"] is None
    assert found["measurements"][0]["metric"] is None


@pytest.mark.usefixtures("no_torch")
def test_a_model_too_large_for_the_device_fails_as_a_measured_one(artifact_folder, tmp_path):
    found = make_record(artifact_folder, teacher=write_graph_teacher(tmp_path / "teacher"), memory_limit_bytes=2**20)
    assert any("MiB are needed, and board has 1 MiB; no times for it" in line for line in found["notes"])
    assert (found["measurements"], found["baseline"]) == ([], None)
    for entry in found["models"]:
        assert entry["failed"] == {
            "reason": "out of memory",
            "limit_bytes": 2**20,
            "peak_bytes": entry["memory_estimate_bytes"]["value"],
        }
        assert entry["metrics"] is None
    lines = check_budget(found, Budget(max_p95_ms=1e6, max_rss_mb=1e6))
    assert [line.passed for line in lines] == [None, None]
    assert lines[0].words == "not measured, out of memory, allowed 1,000,000 ms."
    (tmp_path / "record.json").write_text(json.dumps(found))
    report([tmp_path / "record.json"], out=tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text("utf-8")
    assert re.search(r"not measured, out of memory; it does not fit in 1.05\s?MB \(estimated to need 50\s?MB\)\.", page)


@pytest.mark.usefixtures("no_torch")
def test_what_fits_beside_what_does_not_is_estimated(artifact_folder, tmp_path, monkeypatch):
    needed = {"teacher": 101 * 2**20, "student": 80 * 2**20}
    monkeypatch.setattr(module, "_memory", lambda candidate, *_: needed[candidate.model])
    teacher = write_graph_teacher(tmp_path / "teacher")
    found = make_record(artifact_folder, teacher=teacher, memory_limit_bytes=100 * 2**20)
    assert [entry["failed"] is None for entry in found["models"]] == [False, True, True]
    assert found["baseline"] is None
    assert {one["model"] for one in found["measurements"]} == {"student"}
    assert [line for line in found["notes"] if "needed" in line] == [
        "teacher onnxruntime fp32: about 101 MiB are needed, and board has 100 MiB; no times for it",
        "student onnxruntime fp32: up to 108 MiB may be needed, and board has 100 MiB",
        "student onnxruntime int8: up to 108 MiB may be needed, and board has 100 MiB",
    ]


def test_memory_is_held_to_its_upper_end(artifact_folder):
    found = make_record(artifact_folder)
    assert not any("needed" in line for line in found["notes"])
    (entry,) = (entry for entry in found["models"] if entry["graph"] == "int8")
    memory = entry["memory_estimate_bytes"]
    middle = (memory["value"] + memory["high"]) / 2e6
    (line,) = check_budget(found, Budget(max_rss_mb=middle))
    assert (line.passed, line.found) == (False, memory["high"] / 1e6)
    assert line.words.startswith("estimate ")


def test_errors_before_anything_is_calibrated(artifact_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "calibrate", lambda **_: pytest.fail("calibrated"))
    with pytest.raises(ArtifactError, match="there is no such folder"):
        estimate_record(tmp_path / "none", teacher=None, settings=SETTINGS, device=make_device(), here=HERE)
    with pytest.raises(RecipeError, match="without clock_mhz"):
        estimate_record(artifact_folder, teacher=None, settings=SETTINGS, device=make_device(clock_mhz=None), here=HERE)


def test_this_machine_is_calibrated_where_no_tables_are_given(artifact_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "calibrate", lambda **options: asked.append(options) or make_calibration())
    found = estimate_record(artifact_folder, teacher=None, settings=SETTINGS, device=make_device(), here=HERE)
    assert len(found["measurements"]) == 24
    assert asked[0]["threads"][0] == 1


def test_a_speedup_by_hand():
    """4 ms of fp32 over 1 ms of int8 and 1 ms of starts; each limit's spread is the same for both models."""
    teacher = dict.fromkeys(LIMITS, 0.0) | {"fp32_product": 4.0}
    student = dict.fromkeys(LIMITS, 0.0) | {"int8_product": 1.0, "overhead": 1.0}
    here = make_calibration()
    either = (1 + ACCURACY.median) ** 2
    assert speedup(teacher, student, here) == {
        "p50": 2.0,
        "ci95": [pytest.approx(2.0 / either), pytest.approx(2.0 * either)],
        "claimed": False,
    }
    scaled = scale(here, here=HERE, device=make_device())
    low, high = speedup(teacher, student, scaled)["ci95"]
    spread = scaled.spread
    slow = spread["int8_product"][1] + spread["overhead"][1]
    assert low == pytest.approx(4 * spread["fp32_product"][0] / slow / either)
    same = dict(teacher)
    assert speedup(teacher, same, scaled)["ci95"] == [pytest.approx(1 / either), pytest.approx(either)]
    assert high > 2
