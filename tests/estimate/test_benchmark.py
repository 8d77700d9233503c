"""The benchmark of the estimates' accuracy: its record says what it should. No timings are judged."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "estimate.py"


@pytest.fixture(scope="module")
def benchmark():
    """Load the script under a name of its own: the package has an `estimate` too."""
    specification = importlib.util.spec_from_file_location("estimate_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(specification)
    sys.modules["estimate_benchmark"] = module
    specification.loader.exec_module(module)
    return module


def cell(error: float, **changes) -> dict:
    given = {"student": "4L-312", "graph": "fp32", "batch": 1, "sequence": 16, "threads": 1}
    return given | {"measured_ms": 2.0, "estimated_ms": 2 * (1 + error), "error": error} | changes


def test_errors_by_hand(benchmark):
    found = benchmark.summary([cell(error) for error in (0.1, -0.5, 0.3)])
    assert (found["median"], found["worst"], found["n"]) == (0.3, 0.5, 3)
    assert math.log(1.3) < math.log(found["p95_ratio"]) < math.log(2.0)  # a half is as far off as a double
    assert benchmark.summary([cell(-0.2)])["p95_ratio"] == pytest.approx(1.25)


def test_the_table_names_groups_and_the_worst(benchmark, capsys):
    cells = [cell(0.1), cell(-0.4, graph="int8", batch=8, sequence=512, threads=2)]
    benchmark.print_table({"cells": cells})
    lines = capsys.readouterr().out.splitlines()
    groups = ("all", "student 4L-312", "graph fp32", "graph int8", "threads 2", "batch 8", "tokens 512")
    assert all(any(line.startswith(group) for line in lines) for group in groups)
    first = lines[lines.index("worst cells: measured, estimated, ms") + 1]
    assert first.startswith("4L-312 int8, batch 8, 512 tokens, 2 threads")
    assert first.endswith("-40.0%")


@pytest.mark.usefixtures("few_cases")
def test_a_small_run(benchmark, tmp_path, monkeypatch):
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"vocab_size": 30, "max_position_embeddings": 32}
    monkeypatch.setattr(benchmark, "STUDENTS", {"tiny": shape})
    monkeypatch.setattr(benchmark, "CELLS", [(1, 4), (2, 8)])
    monkeypatch.setattr(benchmark, "VOCABULARY", 30)
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    paths = benchmark.build(tmp_path, students=["tiny"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths.values())
    written = {path: path.stat().st_mtime_ns for path in paths.values()}
    benchmark.build(tmp_path, students=["tiny"])
    assert {path: path.stat().st_mtime_ns for path in paths.values()} == written  # those that are there are taken
    record = benchmark.measure(paths, threads=[1], rounds=2)
    json.dumps(record, allow_nan=False)
    assert len(record["cells"]) == record["error"]["n"] == 4 * 2
    for one in record["cells"]:
        assert [len(turn) for turn in one["samples_ms"]] == [3, 3]
        assert one["estimated_ms"] == pytest.approx(sum(one["parts_ms"].values()), abs=1e-3)
        assert one["error"] == pytest.approx(one["estimated_ms"] / one["measured_ms"] - 1)
    assert set(record["calibration"]["samples_ms"]) == {"1"}
    assert record["settings"] == {"rounds": 2, "threads": [1], "seconds": 0.0}
