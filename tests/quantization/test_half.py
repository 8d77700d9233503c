"""Half precision: what stays in float32, numbers close to torch's at every length, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from tiny_student import examples, tiny_model, torch_outputs

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ExportError, RecipeError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import attribute, save, tidy
from bertemd_deploy.quantization.dynamic import quantize
from bertemd_deploy.quantization.half import IN_FLOAT32, MASKED, to_half
from bertemd_deploy.runtime import open_session, predict_logits
from bertemd_deploy.sizes import component_sizes


def graph_of(model: torch.nn.Module, form: str) -> onnx.ModelProto:
    if form == "portable":
        return portable_graph(model, exporter="torchscript", opset=17)
    return fuse(fusable_graph(model, exporter="torchscript", opset=17), layers=2, heads=4, hidden=32, opset=17)[0]


@pytest.mark.parametrize(
    ("form", "kind"),
    [("portable", "classification"), ("fused", "classification"), ("portable", "question-answering")],
)
def test_numbers_are_close_to_torch_at_every_length(form: str, kind: str, tmp_path: Path) -> None:
    """Rows of one batch have 3 to 60 tokens, so that the mask's bias is there; none may turn it into NaN."""
    model = tiny_model(kind=kind)
    save(to_half(graph_of(model, form), device="gpu"), tmp_path / "half.onnx")
    part = examples(30, longest=60)
    found = predict_logits(open_session(tmp_path / "half.onnx"), part, pad_id=0)
    expected = torch_outputs(model, part)
    assert np.isfinite(found).all()
    assert 0 < np.abs(found - expected).max() < 0.01 * np.ptp(expected)


@pytest.mark.parametrize("form", ["portable", "fused"])
def test_norms_and_softmax_keep_float32_and_the_rest_is_half(form: str) -> None:
    graph = graph_of(tiny_model(), form)
    before = graph.SerializeToString()
    half = to_half(graph, device="gpu")
    assert graph.SerializeToString() == before
    constants = {tensor.name: tensor for tensor in half.graph.initializer}
    kept = [node for node in half.graph.node if node.op_type in IN_FLOAT32]
    assert len(kept) == (7 if form == "portable" else 5)  # five norms, two Softmax where attention is spelled out
    float32 = {name for node in kept for name in node.input if name in constants}
    assert float32 == {name for name, tensor in constants.items() if tensor.data_type == TensorProto.FLOAT}
    weights = component_sizes(half)["encoder"] / component_sizes(graph)["encoder"]
    assert 0.5 < weights < 0.6
    types = {value.name: value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)}
    assert types == {
        "input_ids": TensorProto.INT64,
        "attention_mask": TensorProto.INT64,
        "token_type_ids": TensorProto.INT64,
        "logits": TensorProto.FLOAT,
    }
    filters = [attribute(node, "mask_filter_value", MASKED) for node in half.graph.node]
    lowest = min(numpy_helper.to_array(tensor).min() for tensor in constants.values() if tensor.data_type == 10)
    assert min(*filters, lowest) == MASKED


def test_parameters_shared_with_other_operators(tmp_path: Path) -> None:
    """A fresh model's biases are all the same zeros, and so are its norms'."""
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.zero_()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1)
    save(to_half(graph_of(model, "portable"), device="gpu"), tmp_path / "half.onnx")
    part = examples(10)
    found = predict_logits(open_session(tmp_path / "half.onnx"), part, pad_id=0)
    np.testing.assert_allclose(found, torch_outputs(model, part), atol=0.05)


def test_a_cpu_is_refused_unless_forced() -> None:
    graph = graph_of(tiny_model(), "portable")
    with pytest.raises(RecipeError, match=r"a CPU, which has no float16 kernels .* slower than the fp32 graph"):
        to_half(graph, device="cpu")
    assert to_half(graph, device="cpu", force=True) == to_half(graph, device="gpu")


def test_weights_beyond_the_range_and_int8_are_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = 7e4
    with pytest.raises(ExportError, match=r"fp16: \S+ holds 7e\+04, float16 up to 65504"):
        to_half(graph_of(model, "portable"), device="gpu")
    graph = graph_of(tiny_model(), "portable")
    tidy(graph, opset=17)
    with pytest.raises(ExportError, match=r"is int8 already. Convert the fp32 graph"):
        to_half(quantize(graph, fused=False), device="gpu")
