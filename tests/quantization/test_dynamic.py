from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_student import examples, tiny_model, torch_outputs

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ExportError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import histogram, save
from bertemd_deploy.quantization.dynamic import operators, quantize, quantize_weight
from bertemd_deploy.runtime import open_session, predict_logits

MODEL = tiny_model()


@pytest.fixture(scope="module", params=["portable", "fused"])
def source(request) -> tuple[onnx.ModelProto, bool]:
    if request.param == "portable":
        return portable_graph(MODEL, exporter="torchscript", opset=17), False
    return fuse(fusable_graph(MODEL, exporter="torchscript", opset=17), layers=2, heads=4, hidden=32, opset=17)[0], True


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("per_channel", [False, True])
def test_int8_stays_close_to_torch(source, per_channel: bool, tmp_path: Path) -> None:
    graph, fused = source
    save(quantize(graph, fused=fused, per_channel=per_channel), tmp_path / "q.onnx")
    part = examples(40)
    found = predict_logits(open_session(tmp_path / "q.onnx"), part, pad_id=0)
    expected = torch_outputs(MODEL, part)
    error = np.abs(found - expected).max()
    assert 0 < error < 0.15 * np.ptp(expected)


def test_only_matrices_become_int8_and_parameters_keep_their_values(source) -> None:
    graph, fused = source
    before, after = constants(graph), constants(quantize(graph, fused=fused, per_channel=True))
    small = {name: array for name, array in after.items() if array.dtype in (np.int8, np.uint8)}
    assert len(small) == len(operators(graph)) == 12
    assert {array.ndim for array in small.values()} == {2}
    kept = {array.tobytes() for array in after.values()}
    vectors = [name for name, array in before.items() if array.dtype == np.float32 and array.shape in {(32,), (64,)}]
    assert len(vectors) >= 15
    assert all(before[name].tobytes() in kept for name in vectors)
    large = [
        name for name, array in after.items() if array.dtype == np.float32 and array.ndim == 2 and array.size > 100
    ]
    assert large == []


def test_operators_of_both_forms(source) -> None:
    graph, fused = source
    result = quantize(graph, fused=fused)
    kinds = histogram(result)
    assert not any("DequantizeLinear" in kind or "EmbedLayerNormalization" in kind for kind in kinds)
    assert result.ir_version == 8
    assert next(entry.version for entry in result.opset_import if not entry.domain) == 17
    if fused:
        assert kinds["com.microsoft.DynamicQuantizeMatMul"] == 10
        adds = [node for node in result.graph.node if node.op_type == "Add"]
        assert [node.name.endswith("/mask") for node in adds] == [True, True]  # every bias went into its product
        assert kinds["com.microsoft.FastGelu"] == 2
        assert "com.microsoft.BiasGelu" not in kinds
    else:
        assert kinds["MatMulInteger"] == 10
        assert {node.domain for node in result.graph.node} == {""}
        onnx.checker.check_model(result, full_check=True)


def test_layer_norm_parameters_come_straight_from_float_constants(source) -> None:
    graph, fused = source
    result = quantize(graph, fused=fused)
    values = constants(result)
    norms = [node for node in result.graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 5
    for node in norms:
        assert [values[name].dtype for name in node.input[1:]] == [np.float32, np.float32]


def test_an_excluded_operator_stays_float_and_the_source_is_untouched(source, tmp_path: Path) -> None:
    graph, fused = source
    before = graph.SerializeToString()
    names = operators(graph)
    result = quantize(graph, fused=fused, excluded=[names[0], names[3]])
    assert graph.SerializeToString() == before
    assert operators(result) == [names[0], names[3]]
    save(result, tmp_path / "q.onnx")
    open_session(tmp_path / "q.onnx")


def test_unknown_or_total_exclusion_is_refused(source) -> None:
    graph, fused = source
    with pytest.raises(ExportError, match=r"no such node excluded; operators that can be quantized: .*MatMul"):
        quantize(graph, fused=fused, excluded=["no such node"])
    with pytest.raises(ExportError, match="every operator excluded"):
        quantize(graph, fused=fused, excluded=operators(graph))


def test_weight_codes_by_hand() -> None:
    weight = np.array([[1.27, 0.0, -0.254], [-0.635, 0.0, 0.127]], dtype=np.float32)
    codes, scale = quantize_weight(weight, per_channel=False)
    np.testing.assert_allclose(scale, 0.01, rtol=1e-6)
    np.testing.assert_array_equal(codes, [[127, 0, -25], [-64, 0, 13]])
    codes, scale = quantize_weight(weight, per_channel=True)
    np.testing.assert_allclose(scale, [0.01, 1, 0.002], rtol=1e-6)  # a column of zeros takes scale 1
    np.testing.assert_array_equal(codes, [[127, 0, -127], [-64, 0, 64]])
