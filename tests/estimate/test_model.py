from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_operators import write_product
from tiny_speeds import CALL, PER_MAC_MS, STALL, START, make_calibration, make_speeds

from bertemd_deploy.estimate import model
from bertemd_deploy.estimate.model import ACCURACY, breakdown, estimate, interval, part_ms, waiting
from bertemd_deploy.estimate.operators import OperatorCost, Part
from bertemd_deploy.estimate.speeds import LIMITS, Calibration

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "estimate.json"


def cost(*parts: Part) -> OperatorCost:
    return OperatorCost("it", "It", "other", 0, 0, 0, 0, parts)


def test_a_product_by_hand():
    part = Part("int8_product", 10, 100, macs=5000, weight_bytes=2_000_000)
    found = part_ms(part, make_speeds(), weights=2_000_000)
    assert found == {
        "int8_product": pytest.approx(5000 * PER_MAC_MS["int8_product"]),
        "memory": pytest.approx(2_000_000 * STALL),
        "overhead": START,
    }


def test_few_weights_hardly_stall():
    part = Part("fp32_product", 10, 100, macs=5000, weight_bytes=1000)
    assert part_ms(part, make_speeds(), weights=1000)["memory"] == pytest.approx(1000 * STALL / 50)


def test_a_pass_over_values_by_hand():
    found = part_ms(Part("gelu", 1001, 320), make_speeds(), weights=0)
    assert found == {"elementwise": pytest.approx(0.001), "overhead": pytest.approx(START)}
    inner = part_ms(Part("gelu", 1001, 320, inner=True), make_speeds(), weights=0)
    assert inner == {"elementwise": pytest.approx(0.001), "overhead": 0.0}


def test_attention_counts_as_fp32_and_starts_once():
    found = part_ms(Part("attention", 100, 64, count=2, macs=200), make_speeds(), weights=0)
    assert found == {"fp32_product": pytest.approx(200 * PER_MAC_MS["attention"]), "overhead": START}


def test_parts_add_up_to_the_call():
    operators = [
        cost(Part("fp32_product", 1, 100, macs=1000, weight_bytes=400), Part("dynamic_quantize", 1001, inner=True)),
        cost(Part("view", 1)),
        cost(Part("int8_product", 1, 100, macs=1000, weight_bytes=100)),
    ]
    found = breakdown(operators, make_speeds())
    assert tuple(found) == LIMITS
    assert found["overhead"] == pytest.approx(CALL + 3 * START)
    assert found["elementwise"] == pytest.approx(0.001)
    assert found["fp32_product"] == pytest.approx(1000 * PER_MAC_MS["fp32_product"])
    assert found["memory"] == pytest.approx(500 * STALL / 50)  # by the weights of the whole graph


def test_the_interval_of_this_machine_is_what_estimates_kept_to():
    found = interval({"fp32_product": 2.0, "overhead": 1.0}, make_calibration())
    assert (found.p50_ms, found.low_ms, found.high_ms) == (3.0, 3.0 / ACCURACY.most, 3.0 * ACCURACY.most)


def test_the_interval_of_another_device_is_wider_where_less_is_known():
    spread = {"fp32_product": (0.5, 2.0), "overhead": (1.0, 3.0)}
    scaled = Calibration(make_calibration().speeds, {}, spread=spread)
    found = interval({"fp32_product": 2.0, "overhead": 1.0, "memory": 1.0}, scaled)
    assert found.p50_ms == 4.0
    assert found.low_ms == pytest.approx((1.0 + 1.0 + 1.0) / ACCURACY.most)
    assert found.high_ms == pytest.approx((4.0 + 3.0 + 1.0) * ACCURACY.most)


def test_a_share_of_a_cpu_stretches_time():
    parts = {"overhead": 1.0}
    assert waiting(parts, threads=1, share=None) == parts
    assert waiting(parts, threads=1, share=2.0) == parts
    assert waiting(parts, threads=1, share=0.5) == {"overhead": 2.0}
    assert waiting(parts, threads=4, share=2.0) == {"overhead": 2.0}


def test_an_estimate_of_a_graph_by_hand(tmp_path):
    path = write_product(tmp_path / "product.onnx")
    found = estimate(path, batch=2, sequence=5, threads=1, calibration=make_calibration())
    product = 480 * PER_MAC_MS["fp32_product"] + 192 * STALL / 50 + START
    softmax = make_speeds().tables["softmax"].at(60, 6)
    assert found.p50_ms == pytest.approx(CALL + product + softmax)
    assert found.low_ms < found.p50_ms < found.high_ms
    assert sum(found.parts.values()) == pytest.approx(found.p50_ms)


def test_longer_inputs_and_larger_batches_never_take_less(tmp_path):
    path = write_product(tmp_path / "product.onnx")
    calibration = make_calibration()
    times = [
        estimate(path, batch=batch, sequence=sequence, threads=1, calibration=calibration).p50_ms
        for batch, sequence in ((1, 1), (1, 64), (1, 512), (8, 512), (64, 512))
    ]
    assert times == sorted(times)
    assert len(set(times)) == len(times)
    two = estimate(path, batch=64, sequence=512, threads=2, calibration=calibration).p50_ms
    four = estimate(path, batch=64, sequence=512, threads=4, calibration=calibration).p50_ms
    assert four < two < times[-1]


def test_the_stated_accuracy_is_that_of_the_committed_record():
    record = json.loads(RESULTS.read_text(encoding="utf-8"))["error"]
    stated = ACCURACY.record()
    assert stated["n"] == record["n"]
    for key in ("median", "worst", "p95_ratio"):
        assert stated[key] == pytest.approx(record[key], abs=0.005), key
    assert record["median"] < 0.15
    assert record["worst"] < 0.35
    assert model.ACCURACY.most > 1
