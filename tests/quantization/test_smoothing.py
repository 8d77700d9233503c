"""Smoothing: the same function, smaller ranges, less lost in int8; nothing touched where it would not pay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from integer_graphs import constants
from tiny_student import LABELS, OUTLIER, examples, outliers, tiny_model

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ExportError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import histogram, save
from bertemd_deploy.quantization import calibration, smoothing
from bertemd_deploy.quantization.calibration import spread
from bertemd_deploy.quantization.dynamic import operators, quantize
from bertemd_deploy.quantization.smoothing import EXAMPLES, LEAST_GAIN, TOKENS, Smoothed, _best, _scale, _Seen, smooth
from bertemd_deploy.runtime import open_session, predict_logits
from bertemd_deploy.tasks import Kind


@pytest.fixture(scope="module", params=[False, True], ids=["portable", "fused"])
def source(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, bool]:
    model = outliers()
    if not request.param:
        return portable_graph(model, exporter="torchscript", opset=17), False
    graph = fusable_graph(model, exporter="torchscript", opset=17)
    return fuse(graph, layers=2, heads=4, hidden=32, opset=17)[0], True


@pytest.fixture(scope="module")
def smoothed(source: tuple[onnx.ModelProto, bool]) -> tuple[onnx.ModelProto, list[Smoothed]]:
    return smooth(source[0], examples=examples(40, seed=3), pad_id=0)


def logits(graph: onnx.ModelProto, folder: Path) -> np.ndarray:
    save(graph, folder / "m.onnx")
    return predict_logits(open_session(folder / "m.onnx"), examples(60, seed=4), pad_id=0)


def test_the_function_stays_and_int8_gets_closer_to_it(source, smoothed, tmp_path: Path) -> None:
    (graph, fused), (result, found) = source, smoothed
    before = graph.SerializeToString()
    expected = logits(graph, tmp_path)
    np.testing.assert_allclose(logits(result, tmp_path), expected, atol=1e-4)
    errors = [
        np.square(logits(quantize(made, fused=fused, per_channel=True), tmp_path) - expected).mean()
        for made in (graph, result)
    ]
    assert errors[1] * 4 < errors[0]
    assert all(entry.after * LEAST_GAIN <= entry.before for entry in found)
    assert graph.SerializeToString() == before


def test_one_division_for_all_products_that_read_an_activation(source, smoothed) -> None:
    (graph, _), (result, found) = source, smoothed
    assert operators(result) == operators(graph)
    assert histogram(result).get("Mul", 0) - histogram(graph).get("Mul", 0) == len(found)
    added = {node.input[0]: node.output[0] for node in result.graph.node if node.name.endswith("/smooth")}
    assert sorted(added) == sorted(entry.tensor for entry in found)
    two = onnx.ModelProto()
    two.CopyFrom(graph)
    read = next(node for node in two.graph.node if node.name in operators(graph) and node.input[0] in added)
    two.graph.node.append(onnx.helper.make_node("MatMul", list(read.input), ["hidden"], name="other"))
    two.graph.node.append(onnx.helper.make_node("Relu", ["hidden"], ["other"]))  # else it would be taken for a head
    two.graph.output.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None))
    twice, again = smooth(two, examples=examples(40, seed=3), pad_id=0)
    assert len(again) == len(found)
    (made,) = [node.output[0] for node in twice.graph.node if node.op_type == "Mul" and node.input[0] == read.input[0]]
    readers = [node for node in twice.graph.node if made in node.input]
    assert [node.name for node in readers] == [read.name, "other"]
    assert readers[0].input[1] == readers[1].input[1]  # equal weights are one constant still


def test_the_large_feature_is_found_and_no_range_grows(source, smoothed) -> None:
    result, found = smoothed
    values = constants(result)
    factors = {node.input[0]: values[node.input[1]] for node in result.graph.node if node.name.endswith("/smooth")}
    behind_norm = [factor for tensor, factor in factors.items() if "LayerNorm" in tensor or "output_norm" in tensor]
    assert len(behind_norm) >= 2
    assert all(factor.argmin() == OUTLIER and factor.min() < 0.5 for factor in behind_norm)
    assert all(factor.max() == 1 and (factor == 1).mean() >= 0.5 for factor in factors.values())
    assert len(found) == len(factors)


def test_a_product_whose_weight_is_transposed(tmp_path: Path) -> None:
    """The pooler is a Gemm in this spelling; scaled along the wrong axis it would compute something else."""
    graph = portable_graph(outliers(), exporter="torchscript", opset=17)
    result, _ = smooth(graph, examples=examples(40, seed=3), pad_id=0)
    gemms = [node for node in result.graph.node if node.op_type == "Gemm" and node.name in operators(result)]
    transposed = [node for node in gemms if any(entry.name == "transB" and entry.i for entry in node.attribute)]
    assert transposed
    assert {node.input[0] for node in transposed} <= {
        name for node in result.graph.node if node.name.endswith("/smooth") for name in node.output
    }
    np.testing.assert_allclose(logits(result, tmp_path), logits(graph, tmp_path), atol=1e-4)


def test_what_does_not_pay_or_cannot_be_judged_stays() -> None:
    random = np.random.default_rng(0)
    even = _Seen()
    even.add(random.uniform(-1, 1, size=(512, 32)).astype(np.float32), most=512)
    weight = random.normal(size=(32, 16)).astype(np.float32)
    assert _best("even", even, weight) is None
    for values in (np.zeros((8, 32)), np.eye(1, 32) * 50):  # nothing there; a median of 0
        silent = _Seen()
        silent.add(values.astype(np.float32), most=512)
        assert _best("silent", silent, weight) is None
    large = _Seen()
    values = random.uniform(-1, 1, size=(512, 32)) * np.where(np.arange(32) == OUTLIER, 40, 1)
    large.add(values.astype(np.float32), most=512)
    chosen = _best("large", large, weight)
    assert chosen is not None
    assert chosen[0].after * 10 < chosen[0].before
    assert chosen[1].argmax() == OUTLIER


def test_scales_by_hand() -> None:
    activations = np.array([1, 1, 16, 4, 0.5], dtype=np.float32)
    ones = np.ones(5, dtype=np.float32)
    np.testing.assert_allclose(_scale(activations, ones, strength=0.5, middle=1), [1, 1, 4, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(_scale(activations, ones, strength=1, middle=1), [1, 1, 16, 4, 1], rtol=1e-6)
    unread = np.array([1, 1, 0, 4, 1], dtype=np.float32)  # no weight reads the third feature, the fourth is read most
    np.testing.assert_allclose(_scale(activations, unread, strength=0.5, middle=1), [1, 1, 16, 1, 1], rtol=1e-6)


def test_bounds_are_those_of_all_tokens_and_the_sample_is_spread() -> None:
    seen = _Seen()
    seen.add(np.array([[[1, 0], [5, 9], [2, -3]]], dtype=np.float32), most=2)
    seen.add(np.array([[7, 1]], dtype=np.float32), most=2)
    np.testing.assert_array_equal([seen.low, seen.high], [[0, -3], [7, 9]])
    np.testing.assert_array_equal(seen.tokens(), [[1, 0], [2, -3], [7, 1]])


def test_rows_and_tokens_are_taken_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches come longest first: few rows in the first one must not mean few tokens of the others."""
    taken: dict[str, list[int]] = {}

    def recorded(tensor: str, seen: _Seen, weight: np.ndarray) -> None:
        taken.setdefault(tensor, []).append(len(seen.tokens()))

    graph = portable_graph(tiny_model(), exporter="torchscript", opset=17)
    monkeypatch.setattr(smoothing, "_best", recorded)
    monkeypatch.setattr(calibration, "TOKENS_AT_ONCE", 128)
    part = examples(200, longest=60, seed=5)
    assert smooth(graph, examples=part, pad_id=0)[1] == []
    assert len(taken) == 10
    assert all(EXAMPLES <= counts[0] <= TOKENS + 64 for counts in taken.values())
    assert max(counts[0] for counts in taken.values()) >= 0.9 * TOKENS
    monkeypatch.setattr(smoothing, "observe", lambda *given, examples, **named: ran.append(examples))
    ran: list[Encoded] = []
    monkeypatch.setattr(_Seen, "tokens", lambda seen: [])
    smooth(graph, examples=part, pad_id=0)
    assert [len(found) for found in ran] == [EXAMPLES]
    assert (ran[0].lengths[0], ran[0].lengths[-1]) == (part.lengths[0], part.lengths[-1])


def test_numbers_evenly_spread() -> None:
    assert spread(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert spread(101, 3).tolist() == [0, 50, 100]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the sums that overflow
def test_errors_that_are_not_a_number_smooth_nothing() -> None:
    seen = _Seen()
    seen.add(np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32) * np.float32(1e20), most=64)
    assert _best("huge", seen, np.full((8, 4), 1e20, dtype=np.float32)) is None


def test_a_graph_without_products_is_refused() -> None:
    graph = portable_graph(tiny_model(), exporter="torchscript", opset=17)
    for node in graph.graph.node:
        if node.op_type in {"MatMul", "Gemm"}:
            node.domain = "elsewhere"
    with pytest.raises(ExportError, match="no product that can become int8"):
        smooth(graph, examples=examples(4), pad_id=0)


@pytest.mark.parametrize("kind", ["token-classification", "question-answering", "multilabel", "regression"])
def test_other_heads_compute_the_same(kind: Kind, tmp_path: Path) -> None:
    outputs = 2 if kind == "question-answering" else len(LABELS[kind]) or 1
    graph = portable_graph(outliers(kind=kind, outputs=outputs), exporter="torchscript", opset=17)
    result, found = smooth(graph, examples=examples(40, seed=3), pad_id=0)
    assert found
    assert operators(result) == operators(graph)
    np.testing.assert_allclose(logits(result, tmp_path), logits(graph, tmp_path), atol=1e-4)


def test_an_activation_that_is_not_finite_is_named() -> None:
    model = outliers()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[0] = np.nan
    graph = portable_graph(model, exporter="torchscript", opset=17)
    with pytest.raises(ExportError, match=r"calibration: /layers\.0/\S+ is not finite on a train row of \d+ tokens"):
        smooth(graph, examples=examples(4), pad_id=0)
