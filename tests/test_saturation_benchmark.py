"""The benchmark that runs graphs on emulated CPUs: its worker, and what it says of this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from bertemd_deploy.targets import products_saturate

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def saturation(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import saturation

    return saturation


def test_this_machine_is_read_through_the_worker(saturation) -> None:
    found = saturation.ask([sys.executable, str(BENCHMARKS / "saturation_worker.py")])
    assert found["int8_products"] == ("saturating" if products_saturate() else "exact")
    assert found["unsigned_products_exact"]
    assert 0 < found["sums_changed_by_saturation"] <= found["sums"] == 7 * 50
    assert set(found["versions"]) == {"onnxruntime", "numpy", "python"}


@pytest.mark.skipif(products_saturate(), reason="the record is of a machine with exact products")
def test_a_record_of_this_machine_alone(saturation, capsys: pytest.CaptureFixture[str]) -> None:
    worker = [sys.executable, str(BENCHMARKS / "saturation_worker.py")]
    record = saturation.measure({"native": worker}, options=argparse.Namespace(artifact=None))
    saturation.print_table(record)
    (model,) = record["models"]
    assert set(record["runners"]) == {"native"}
    for name, entry in model["graphs"].items():
        assert entry["runners"]["native"]["bit_identical"]
        assert (entry["weight_pairs_that_can_saturate"] > 0) == saturation.can_saturate(name)
    assert "int8 products exact" in capsys.readouterr().out


def test_differences_are_counted(saturation) -> None:
    found, expected = np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([[0.5, 1.0], [0.0, 1.0]])
    assert saturation.difference(found, expected) == {
        "bit_identical": False,
        "max_abs_logit_difference": 2.0,
        "decision_agreement": 0.5,
    }
