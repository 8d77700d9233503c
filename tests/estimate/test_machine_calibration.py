"""From times to tables, on times that follow known laws; and the measuring processes, whose times are not read."""

from __future__ import annotations

import math
import sys

import pytest

from bertemd_deploy.errors import BertemdError
from bertemd_deploy.estimate.calibration import Prober, calibrate, passing, reduce
from bertemd_deploy.estimate.cases import Case, plan
from bertemd_deploy.estimate.operators import TABLES
from bertemd_deploy.estimate.speeds import Calibration, Surface

CALL, WAKE = 0.02, 0.05
START = {"fp32_product": 0.002, "int8_product": 0.003}
PER_MAC = {"fp32_product": 2e-8, "int8_product": 6e-9, "stream": 2e-8, "wake": 2e-8}
PASS_START, PER_VALUE = 0.001, 2e-7
STALL = 4e-9  # ms a byte, beyond the fewest weights
STALLS = Surface(((1.0, ((3_211_776.0, STALL / 50), (16_058_880.0, STALL))),))  # 1 and 5 pairs of 328 x 1224 in float32


def values_ms(values: float) -> float:
    """A pass over values: linear, so that the points of its table are exact and only these are asked for."""
    return PASS_START + PER_VALUE * values


def one_ms(case: Case) -> float:
    """What one repeat of a case takes under the laws above."""
    if case.table in ("fp32_product", "int8_product", "stream", "wake"):
        start = START["int8_product" if case.table == "int8_product" else "fp32_product"]
        work = case.macs * PER_MAC[case.table]
        if case.width == 16 * 16:
            return 2 * start  # no work to speak of
        if case.table == "int8_product":
            narrow = case.feeds["x"]["shape"][1]
            work += PER_VALUE * case.size * (narrow + case.width // narrow)
        if case.table == "stream" and case.repeats > 1:
            work += STALL * case.weight_bytes
        elif case.table in ("fp32_product", "int8_product"):
            work += STALLS.at(case.weight_bytes * case.repeats, 1) * case.weight_bytes
        return 2 * start + work
    if case.table == "batched_product":
        return START["fp32_product"] + case.macs * 4e-8
    if case.table == "attention":
        return START["fp32_product"] + case.macs * 3e-8 + 3 * PER_VALUE * math.prod(case.feeds["x"]["shape"])
    return PASS_START if case.table == "view" else values_ms(case.size)


@pytest.fixture(scope="module")
def speeds():
    cases = plan()
    times = {case.name: CALL + case.repeats * one_ms(case) for case in cases}
    times["call"] = CALL
    times |= {case.name: times[case.name] + WAKE for case in cases if case.table == "wake"}
    return reduce(cases, times)


def test_every_table_is_made(speeds):
    assert set(speeds.tables) == set(TABLES)
    assert speeds.call_ms == pytest.approx(CALL + WAKE)


@pytest.mark.parametrize("table", ["gelu", "softmax", "layer_norm", "copy", "cast", "dynamic_quantize"])
def test_passes_over_values(speeds, table):
    surface = speeds.tables[table]
    for _, line in surface.lines:
        for size, value in line:
            assert value == pytest.approx(values_ms(size))
    assert surface.start == pytest.approx(values_ms(256 if table == "softmax" else 320))  # rows of 256 are one


def test_starts_of_products(speeds):
    assert speeds.product_start == pytest.approx(START)


def test_products_are_left_without_starts_and_quantization(speeds):
    """What remains per multiply-add is the law's, but for the start of a pass that is in the quantization's table."""
    for table in ("fp32_product", "int8_product"):
        for _, line in speeds.tables[table].lines:
            for rows, value in line:
                assert value == pytest.approx(PER_MAC[table], rel=0.02 if table == "fp32_product" else 0.15), (
                    table,
                    rows,
                )
    assert len(speeds.tables["fp32_product"].lines) == 4


def test_products_of_activations_and_attention(speeds):
    for _, line in speeds.tables["batched_product"].lines:
        assert [value for _, value in line[1:]] == pytest.approx([4e-8] * (len(line) - 1))
        assert 4e-8 <= line[0][1] < 6e-8  # mostly start: a tenth of what was measured is kept in any case
    for _, line in speeds.tables["attention"].lines:
        assert [value for _, value in line] == pytest.approx([3e-8] * len(line), rel=0.3)
        assert line[-1][1] == pytest.approx(3e-8, rel=0.02)


def test_stalls_begin_with_more_weights_than_the_fewest(speeds):
    for _, line in speeds.stall.lines:
        sizes = [size for size, _ in line]
        assert sizes == [float(copies * 2 * 328 * 1224 * 4) for copies in (1, 5, 10, 20)]
        assert line[0][1] == pytest.approx(STALL / 50)
        assert [value for _, value in line[1:]] == pytest.approx([STALL] * 3)


def test_noise_makes_no_time_negative():
    """Every case takes as long as an empty call: no table may hold 0 or less, and none is left out."""
    cases = plan()
    found = reduce(cases, {case.name: CALL for case in cases})
    everything = [*found.tables.values(), found.stall]
    assert all(value > 0 for surface in everything for _, line in surface.lines for _, value in line)
    assert found.call_ms == CALL
    assert found.stream_gb_s > 0


def test_passing_leaves_the_start_out():
    surface = Surface(((1.0, ((1.0, 0.5), (100.0, 3.0))),))
    assert passing(surface, 100, 1) == pytest.approx(2.5)
    assert passing(surface, 200, 1) == pytest.approx(5.5)
    assert passing(surface, 1, 1) == passing(surface, 0, 1) == 0.0


@pytest.mark.usefixtures("few_cases")
def test_a_calibration_of_this_machine():
    steps = []
    found = calibrate(threads=[1], rounds=2, done=lambda: steps.append(1))
    cases = plan()
    assert len(steps) == 2 * len(cases)
    assert list(found.speeds) == [1]
    assert set(found.speeds[1].tables) == set(TABLES)
    assert {name: len(values) for name, values in found.samples["1"].items()} == {case.name: 2 for case in cases}
    assert found.machine["rss_after_import_bytes"] > 10_000_000
    assert found.machine["onnxruntime"]
    assert Calibration.read(found.record(samples=True), where="here").speeds == found.speeds


@pytest.mark.usefixtures("few_cases")
def test_others_may_be_timed_in_the_same_process(tmp_path):
    import onnx

    from bertemd_deploy.estimate.cases import product

    case = product("fp32_product", 2, (24, 32))
    onnx.save_model(case.build(), str(tmp_path / "graph.onnx"))
    with Prober([1, 2]) as prober:
        assert prober.threads == [1, 2]
        for count in prober.threads:
            worker = prober.worker(count)
            worker.request("open", name="graph", path=str(tmp_path / "graph.onnx"), threads=count, optimize=True)
            turn = worker.request("time", name="graph", feeds=case.feeds, seconds=0.0)
            worker.request("close", name="graph")
            assert len(turn["samples_ms"]) == 3
            assert all(value > 0 for value in turn["samples_ms"])
        pids = [prober.worker(count).pid for count in prober.threads]
        folder = next(iter(prober._paths.values())).parent
        assert folder.is_dir()
    assert len(set(pids)) == 2
    assert not folder.exists()


def test_without_onnx(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BertemdError, match=r"'train' extra \(onnx is not installed\)"):
        Prober([1])
