"""Bytes by component: they add up to the file, land where the weights are used, and no constant is stored twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_lookup import write_lookup
from tiny_student import tiny_model

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ExportError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.quantization.calibration import Range
from bertemd_deploy.quantization.dynamic import quantize
from bertemd_deploy.quantization.half import to_half
from bertemd_deploy.quantization.static import activations, quantize_static
from bertemd_deploy.sizes import COMPONENTS, component_sizes, stored_twice

LAYER = 4 * 32 * 32 + 2 * 32 * 64  # weights of an encoder layer's matrices
VECTORS = 9 * 32 + 64  # of its biases and norms


def portable(kind: str = "classification") -> onnx.ModelProto:
    return portable_graph(tiny_model(kind=kind), exporter="torchscript", opset=17)


def fused() -> onnx.ModelProto:
    graph = fusable_graph(tiny_model(), exporter="torchscript", opset=17)
    return fuse(graph, layers=2, heads=4, hidden=32, opset=17)[0]


def static(graph: onnx.ModelProto, *, fused: bool, bits: int = 8) -> onnx.ModelProto:
    ranges = {name: Range(-1.0, 1.0 + at) for at, name in enumerate(activations(graph))}
    return quantize_static(graph, ranges=ranges, fused=fused, embedding_bits=bits)


FORMS: dict[str, Callable[[], onnx.ModelProto]] = {
    "fp32": portable,
    "fused": fused,
    "int8": lambda: quantize(portable(), fused=False, per_channel=True),
    "int4 table": lambda: quantize(portable(), fused=False, embedding_bits=4),
    "fused int8": lambda: quantize(fused(), fused=True),
    "unsigned int4 table": lambda: quantize(fused(), fused=True, weight_type="uint8", embedding_bits=4),
    "static int4 table": lambda: static(portable(), fused=False, bits=4),
    "static": lambda: static(portable(), fused=False),
    "fused static": lambda: static(fused(), fused=True),
    "fp16": lambda: to_half(portable(), device="gpu"),
}
# Bytes of the weights themselves in each part: words, positions, segments and a norm; two layers; pooler and classifier.
EMBEDDING = {"fp32": 4 * (166 + 2) * 32, "int8": 164 * 32 + 8 * 32, "fp16": 2 * 166 * 32 + 8 * 32}
ENCODER = {"fp32": 8 * (LAYER + VECTORS), "int8": 2 * (LAYER + 4 * VECTORS), "fp16": 4 * LAYER + 4 * VECTORS}
HEAD = {"fp32": 4 * (32 * 32 + 32 + 64 + 2), "int8": 32 * 32 + 4 * (32 + 64 + 2), "fp16": 2 * (32 * 32 + 32 + 64 + 2)}


@pytest.mark.parametrize("form", FORMS)
def test_components_add_up_and_hold_their_weights(form: str, tmp_path: Path) -> None:
    model = FORMS[form]()
    save(model, tmp_path / "model.onnx")
    sizes = component_sizes(tmp_path / "model.onnx")
    assert sizes == component_sizes(model)
    assert tuple(sizes) == COMPONENTS
    assert sum(sizes.values()) == (tmp_path / "model.onnx").stat().st_size
    precision = {"fp32": "fp32", "fused": "fp32", "fp16": "fp16"}.get(form, "int8")
    packed = 50 * 32 if "int4" in form else 0
    for part, weights in (("embedding", EMBEDDING), ("encoder", ENCODER), ("head", HEAD)):
        expected = weights[precision] - (packed if part == "embedding" else 0)
        assert expected <= sizes[part] < expected + 0.25 * weights["fp32"]
    assert stored_twice(model) == []
    assert stored_twice(tmp_path / "model.onnx") == []


def test_the_head_for_tokens_is_its_last_product() -> None:
    sizes = component_sizes(portable("token-classification"))
    assert 4 * (32 * 2 + 2) < sizes["head"] < 4 * (32 * 2 + 2) + 100


def test_weights_stored_twice_are_named() -> None:
    model = quantize(portable(), fused=False)
    (table,) = (tensor for tensor in model.graph.initializer if list(tensor.dims) == [100, 32])
    before = component_sizes(model)
    copy = model.graph.initializer.add()
    copy.CopyFrom(table)
    copy.name = "again"
    assert stored_twice(model) == [(table.name, "again")]
    assert component_sizes(model)["metadata"] > before["metadata"] + 3200  # nothing reads it


def test_constants_of_several_parts_count_for_the_first() -> None:
    """Two norms share a scale; the weight of the head is dequantized from constants alone."""
    ones, weight = numpy_helper.from_array(np.ones(300, np.float32), "ones"), np.ones((300, 300), np.int8)
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    nodes = [
        helper.make_node("LayerNormalization", ["x", "ones"], ["first"], axis=-1),
        helper.make_node("LayerNormalization", ["first", "ones"], ["second"], axis=-1),
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["real"]),
        helper.make_node("MatMul", ["second", "real"], ["logits"]),
    ]
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 300])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 300])
    graph = helper.make_graph(nodes, "g", [shape], [output], [ones, numpy_helper.from_array(weight, "weight"), scale])
    sizes = component_sizes(helper.make_model(graph))
    assert sizes["encoder"] == 0
    assert 1200 < sizes["embedding"] < 1230
    assert 90_000 < sizes["head"] < 90_050


def test_other_graphs_are_refused(tmp_path: Path) -> None:
    write_lookup(tmp_path / "lookup.onnx", {"logits": np.eye(3)})
    with pytest.raises(ExportError, match=r"lookup.onnx: has no LayerNormalization, so it is no BERT"):
        component_sizes(tmp_path / "lookup.onnx")
    onnx.save_model(portable(), tmp_path / "model.onnx", save_as_external_data=True, size_threshold=1000)
    with pytest.raises(ExportError, match=r"model.onnx: keeps \S+ and \d+ more weights in other files"):
        component_sizes(tmp_path / "model.onnx")
