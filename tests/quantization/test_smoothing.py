"""Smoothing: the same function, smaller ranges, less lost in int8; nothing touched where it would not pay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from integer_graphs import constants
from tiny_student import examples, tiny_model
from transformers import BertForSequenceClassification

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ExportError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import histogram, save
from bertemd_deploy.quantization.dynamic import operators, quantize
from bertemd_deploy.quantization.smoothing import LEAST_GAIN, Smoothed, _best, _scale, _Seen, smooth
from bertemd_deploy.runtime import open_session, predict_logits

FEATURE = 3


def outliers() -> BertForSequenceClassification:
    """Return a model in which one feature behind every LayerNorm is some twelve times as large as the rest."""
    model = tiny_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "LayerNorm" in name:
                weight[FEATURE] *= 12
    return model


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
    assert all(factor.argmin() == FEATURE and factor.min() < 0.5 for factor in behind_norm)
    assert all(factor.max() == 1 and (factor == 1).mean() >= 0.5 for factor in factors.values())
    assert len(found) == len(factors) < len({node.input[0] for node in source[0].graph.node})


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
    even = _Seen(512)
    even.add(random.uniform(-1, 1, size=(512, 32)).astype(np.float32))
    weight = random.normal(size=(32, 16)).astype(np.float32)
    assert _best("even", even, weight, per_channel=True) is None
    for values in (np.zeros((8, 32)), np.eye(1, 32) * 50):  # nothing there; a median of 0
        silent = _Seen(512)
        silent.add(values.astype(np.float32))
        assert _best("silent", silent, weight, per_channel=True) is None
    large = _Seen(512)
    large.add((random.uniform(-1, 1, size=(512, 32)) * np.where(np.arange(32) == FEATURE, 40, 1)).astype(np.float32))
    chosen = _best("large", large, weight, per_channel=True)
    assert chosen is not None
    assert chosen[0].after * 10 < chosen[0].before
    assert chosen[1].argmax() == FEATURE


def test_scales_by_hand() -> None:
    activations = np.array([1, 1, 16, 4, 0.5], dtype=np.float32)
    ones = np.ones(5, dtype=np.float32)
    np.testing.assert_allclose(_scale(activations, ones, strength=0.5, middle=1), [1, 1, 4, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(_scale(activations, ones, strength=1, middle=1), [1, 1, 16, 4, 1], rtol=1e-6)
    unread = np.array([1, 1, 0, 4, 1], dtype=np.float32)  # no weight reads the third feature, the fourth is read most
    np.testing.assert_allclose(_scale(activations, unread, strength=0.5, middle=1), [1, 1, 16, 1, 1], rtol=1e-6)


def test_bounds_are_those_of_all_tokens_and_the_sample_is_spread() -> None:
    seen = _Seen(2)
    seen.add(np.array([[[1, 0], [5, 9], [2, -3]]], dtype=np.float32))
    seen.add(np.array([[7, 1]], dtype=np.float32))
    np.testing.assert_array_equal([seen.low, seen.high], [[0, -3], [7, 9]])
    np.testing.assert_array_equal(seen.tokens(), [[1, 0], [2, -3], [7, 1]])


def test_an_activation_that_is_not_finite_is_named() -> None:
    model = outliers()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[0] = np.nan
    graph = portable_graph(model, exporter="torchscript", opset=17)
    with pytest.raises(ExportError, match=r"calibration: /layers\.0/\S+ is not finite on a train row of \d+ tokens"):
        smooth(graph, examples=examples(4), pad_id=0)
