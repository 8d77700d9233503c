"""Unsigned weights: the same products in every int8 form, tables left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from integer_graphs import FORMS, codes_of, constants, form, run
from tiny_student import examples, tiny_model

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.quantization.dynamic import quantize
from bertemd_deploy.quantization.unsigned import unsigned
from bertemd_deploy.runtime import open_session, predict_logits


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_products_stay_as_they_are(kind: str, per_channel: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.integers(-60, 61, size=(9, 5)).astype(np.int8)  # of 7 bits: exact on every CPU
    codes = random.integers(0, 256, size=(4, 9)).astype(np.uint8)
    model = form(kind, weight, per_channel=per_channel)
    before = model.SerializeToString()
    made = unsigned(model)
    assert model.SerializeToString() == before
    assert codes_of(made, np.uint8) == [weight.astype(np.int64).tobytes()]
    assert codes_of(made, np.int8) == []
    np.testing.assert_array_equal(run(made, kind, codes, tmp_path), run(model, kind, codes, tmp_path))


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_keeps_its_logits_and_its_tables(fused: bool, tmp_path: Path) -> None:
    model = tiny_model()
    if fused:
        fusable = fusable_graph(model, exporter="torchscript", opset=17)
        graph = fuse(fusable, layers=2, heads=4, hidden=32, opset=17)[0]
    else:
        graph = portable_graph(model, exporter="torchscript", opset=17)
    signed = quantize(graph, fused=fused, per_channel=True, reduce_range=True)
    kinds = {name: array.dtype for name, array in constants(signed).items() if array.ndim == 2}
    made = unsigned(signed)
    after = {name: array.dtype for name, array in constants(made).items() if array.ndim == 2}
    assert sorted(map(str, kinds.values())).count("int8") == 12
    assert sorted(map(str, after.values())).count("uint8") == 10  # all but the tables of words and of positions
    assert sorted(map(str, after.values())).count("int8") == 2
    part = examples(20)
    logits = []
    for graph in (signed, made):
        save(graph, tmp_path / "q.onnx")
        logits.append(predict_logits(open_session(tmp_path / "q.onnx"), part, pad_id=0))
    np.testing.assert_array_equal(*logits)


def test_a_weight_that_two_products_share_moves_once(tmp_path: Path) -> None:
    weight = np.full((4, 4), -7, dtype=np.int8)
    model = form("MatMulInteger", weight)
    second = onnx.NodeProto()
    second.CopyFrom(model.graph.node[0])
    second.name, second.output[0] = "second", "d"
    model.graph.node.append(second)
    model.graph.output.append(onnx.helper.make_tensor_value_info("d", onnx.TensorProto.INT32, None))
    made = unsigned(model)
    assert codes_of(made, np.uint8) == [weight.astype(np.int64).tobytes()]
    assert len({node.input[1] for node in made.graph.node}) == 1
