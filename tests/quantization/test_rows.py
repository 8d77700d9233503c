from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_student import examples, tiny_model, torch_outputs

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ExportError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.invariance import bound_of, measure_invariance
from bertemd_deploy.onnx_edit import Editor, histogram, save
from bertemd_deploy.quantization.dynamic import operators, quantize
from bertemd_deploy.quantization.rows import quantize_rows
from bertemd_deploy.runtime import open_session, predict_logits

MODEL = tiny_model()
PART = examples(60)


def graph(fused: bool, *, opset: int = 17) -> onnx.ModelProto:
    if not fused:
        return portable_graph(MODEL, exporter="torchscript", opset=opset)
    made = fusable_graph(MODEL, exporter="torchscript", opset=opset)
    return fuse(made, layers=2, heads=4, hidden=32, opset=opset)[0]


@pytest.fixture(params=[False, True], ids=["portable", "fused"])
def fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def logits(model: onnx.ModelProto, path: Path, *, optimize: bool = True) -> np.ndarray:
    save(model, path)
    return predict_logits(open_session(path, optimize=optimize), PART, pad_id=0)


def test_padding_and_batch_mates_change_nothing(fused: bool, tmp_path: Path) -> None:
    def largest(model: onnx.ModelProto) -> float:
        save(model, tmp_path / "m.onnx")
        bound = bound_of("per-row")
        found = measure_invariance(
            tmp_path / "m.onnx", examples=PART, pad_id=0, kind="classification", max_length=40, bound=bound
        )
        assert found.max_abs_logit_difference is not None
        return found.max_abs_logit_difference

    assert largest(quantize_rows(graph(fused), fused=fused)) < 1e-4
    assert largest(quantize(graph(fused), fused=fused, per_channel=True)) > 1e-2


def test_it_is_closer_to_float_than_one_scale_per_tensor(fused: bool, tmp_path: Path) -> None:
    expected = torch_outputs(MODEL, PART)
    rows = np.abs(logits(quantize_rows(graph(fused), fused=fused), tmp_path / "r.onnx") - expected).mean()
    tensor = np.abs(
        logits(quantize(graph(fused), fused=fused, per_channel=True), tmp_path / "t.onnx") - expected
    ).mean()
    assert rows < tensor
    assert rows < 0.1  # of logits with a standard deviation of 4


@pytest.mark.parametrize("opset", [17, 18])
def test_onnx_runtime_computes_it_as_written(opset: int, fused: bool, tmp_path: Path) -> None:
    """Its optimizer must not take a row's scale for the tensor's."""
    made = quantize_rows(graph(fused, opset=opset), fused=fused)
    as_written = logits(made, tmp_path / "m.onnx", optimize=False)
    np.testing.assert_allclose(logits(made, tmp_path / "m.onnx"), as_written, atol=2e-2)
    assert (as_written.argmax(axis=1) == torch_outputs(MODEL, PART).argmax(axis=1)).mean() > 0.9


def test_one_row_by_hand(tmp_path: Path) -> None:
    """x = [1, -4, 0.5] has steps of 4/127: codes 160, 1 and 144; a row of zeros stays zero."""
    weight = np.array([[1.0, 0.5], [0.25, -1.0], [-0.5, 0.75]], dtype=np.float32)
    head = np.eye(2, dtype=np.float32)
    helper = onnx.helper
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "weight"], ["inner"], name="product"),
                helper.make_node("Tanh", ["inner"], ["squashed"]),
                helper.make_node("MatMul", ["squashed", "head"], ["logits"], name="head"),
            ],
            "one",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3])],
            [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 2])],
            [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(head, "head")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    save(quantize_rows(model, fused=False), tmp_path / "m.onnx")
    x = np.array([[1, -4, 0.5], [0, 0, 0], [100, 0, 0]], dtype=np.float32)
    codes = np.array([160, 1, 144]) - 128
    scale = np.abs(weight).max(axis=0) / 127
    wanted = codes @ np.rint(weight / scale) * scale * 4 / 127
    (found,) = open_session(tmp_path / "m.onnx").run(None, {"x": x})
    np.testing.assert_allclose(found, np.tanh([wanted, [0, 0], [100, 50]]), rtol=1e-4, atol=1e-6)


def test_each_activation_is_quantized_once(fused: bool) -> None:
    source = graph(fused)
    products = [node for node in source.graph.node if node.name in operators(source) and node.op_type != "Gather"]
    made = histogram(quantize_rows(source, fused=fused))
    assert made["QuantizeLinear"] == len({node.input[0] for node in products})
    assert made["com.microsoft.MatMulIntegerToFloat" if fused else "MatMulInteger"] == len(products)
    assert "DynamicQuantizeLinear" not in made


def test_seven_bits_and_excluded_operators(fused: bool) -> None:
    source = graph(fused)
    (name, *_) = [name for name in operators(source) if "Gather" not in name and "embedding" not in name]
    made = quantize_rows(source, fused=fused, reduce_range=True, excluded=[name])
    assert name in {node.name for node in made.graph.node if node.op_type in ("MatMul", "Gemm")}
    editor = Editor(made)
    kinds = ("MatMulInteger", "MatMulIntegerToFloat")
    codes = [editor.array(node.input[1]) for node in made.graph.node if node.op_type in kinds]
    assert codes
    assert max(int(np.abs(part.astype(np.int32)).max()) for part in codes) == 64
    with pytest.raises(ExportError, match="nothing excluded; operators that can be quantized"):
        quantize_rows(source, fused=fused, excluded=["nothing"])
