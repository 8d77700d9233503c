"""Static int8: what the graph is made of, what ONNX Runtime runs of it, and rows that do not depend on each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from tiny_student import examples, tiny_model, torch_outputs

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ExportError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import histogram, save
from bertemd_deploy.quantization.calibration import Range, collect
from bertemd_deploy.quantization.dynamic import operators, quantize
from bertemd_deploy.quantization.static import activations, quantize_static
from bertemd_deploy.runtime import open_session, predict_logits, run_session
from bertemd_deploy.tasks import Kind

MODEL = tiny_model()
Source = tuple[onnx.ModelProto, bool, dict[str, Range]]


def graph_of(model: object, *, fused: bool, first_row: bool = True) -> onnx.ModelProto:
    if not fused:
        return portable_graph(model, exporter="torchscript", opset=17)
    fusable = fusable_graph(model, exporter="torchscript", opset=17)
    return fuse(fusable, layers=2, heads=4, hidden=32, opset=17, first_row=first_row)[0]


def ranges_of(graph: onnx.ModelProto) -> dict[str, Range]:
    seen = collect(graph, activations(graph), examples=examples(120, seed=7), pad_id=0, count=120)
    return seen.ranges("minmax")


@pytest.fixture(scope="module", params=[False, True], ids=["portable", "fused"])
def source(request: pytest.FixtureRequest) -> Source:
    graph = graph_of(MODEL, fused=request.param)
    return graph, request.param, ranges_of(graph)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def optimized(path: Path) -> dict[str, int]:
    """Return the operators that ONNX Runtime makes of a graph at load."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return histogram(onnx.load_model(options.optimized_model_filepath))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("reduce_range", [False, True])
def test_static_int8_is_as_close_to_torch_as_dynamic(
    source: Source, per_channel: bool, reduce_range: bool, tmp_path: Path
) -> None:
    graph, fused, ranges = source
    part = examples(80)
    expected = torch_outputs(MODEL, part)
    errors = []
    for made in (
        quantize(graph, fused=fused, per_channel=per_channel),
        quantize_static(graph, ranges=ranges, fused=fused, per_channel=per_channel, reduce_range=reduce_range),
    ):
        save(made, tmp_path / "q.onnx")
        found = predict_logits(open_session(tmp_path / "q.onnx"), part, pad_id=0)
        errors.append(np.sqrt(np.square(found - expected).mean()))
    assert 0 < errors[1] < (3 if reduce_range else 1.5) * errors[0]


@pytest.mark.parametrize("per_channel", [False, True])
def test_onnx_runtime_runs_every_product_in_integers(source: Source, per_channel: bool, tmp_path: Path) -> None:
    graph, fused, ranges = source
    path = tmp_path / "q.onnx"
    save(quantize_static(graph, ranges=ranges, fused=fused, per_channel=per_channel), path)
    kinds = optimized(path)
    assert kinds["com.microsoft.MatMulIntegerToFloat"] == 10
    assert kinds["QuantizeLinear"] == 10
    assert "DequantizeLinear" not in kinds
    assert kinds["Gemm"] == 1  # the head
    attention = kinds.get("MatMul", 0) + kinds.get("com.microsoft.FusedMatMul", 0)
    assert attention == (0 if fused else 4)


def test_operators_of_both_forms(source: Source) -> None:
    graph, fused, ranges = source
    result = quantize_static(graph, ranges=ranges, fused=fused)
    kinds = histogram(result)
    assert result.ir_version == 8
    assert next(entry.version for entry in result.opset_import if not entry.domain) == 17
    assert kinds["QuantizeLinear"] == len(activations(graph)) == 10
    if fused:
        assert kinds["com.microsoft.MatMulIntegerToFloat"] == 10
        assert "DequantizeLinear" not in kinds
    else:
        assert kinds["DequantizeLinear"] == 20  # of every activation and every weight
        assert {node.domain for node in result.graph.node} == {""}
        onnx.checker.check_model(result, full_check=True)


def test_codes_scales_and_zero_points(source: Source) -> None:
    graph, fused, ranges = source
    result = quantize_static(graph, ranges=ranges, fused=fused, per_channel=True)
    values = constants(result)
    before = constants(graph)
    for node in result.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = ranges[node.input[0]].parameters
            assert (values[node.input[1]], values[node.input[2]]) == (scale, zero)
            assert values[node.input[2]].dtype == np.uint8
        elif node.op_type == "DequantizeLinear" and node.input[0] in values:
            assert values[node.input[0]].dtype == values[node.input[2]].dtype == np.int8
            assert not values[node.input[2]].any()
    weights = [array for array in values.values() if array.dtype == np.int8 and array.ndim == 2]
    assert len(weights) == len(operators(graph)) == 12
    floats = {array.tobytes() for array in values.values() if array.dtype == np.float32}
    vectors = [array for array in before.values() if array.dtype == np.float32 and array.ndim == 1 and array.size >= 32]
    assert len(vectors) >= 15
    assert all(array.tobytes() in floats for array in vectors)  # biases and LayerNorm as they were


def test_seven_bits_where_asked_for(source: Source) -> None:
    graph, fused, ranges = source
    tables = {name for name in operators(graph) if "mbedding" in name}
    for reduce_range, largest in ((False, 127), (True, 64)):
        result = quantize_static(graph, ranges=ranges, fused=fused, excluded=tables, reduce_range=reduce_range)
        codes = [array for array in constants(result).values() if array.dtype == np.int8 and array.ndim == 2]
        assert len(codes) == 10
        assert {int(np.abs(array.astype(int)).max()) for array in codes} == {largest}


def alone_and_together(path: Path, part: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the logits of rows run alone, in one padded batch, and alone with padding behind them."""
    session = open_session(path)
    singles = [part.batch([row], pad_id=0) for row in range(len(part))]
    longer = [part.batch([row], pad_id=0, length=48) for row in range(len(part))]
    together = run_session(session, part.batch(np.arange(len(part)), pad_id=0, length=40))
    return (
        np.concatenate([run_session(session, inputs) for inputs in singles]),
        together,
        np.concatenate([run_session(session, inputs) for inputs in longer]),
    )


def test_a_row_does_not_depend_on_its_batch_mates_or_padding(source: Source, tmp_path: Path) -> None:
    """Up to the last bits of float sums (softmax, LayerNorm), which are two thousand times less than one int8 step costs.

    A sum that falls within its last bits of the middle between two codes may still take the other one; rows where that
    happens are a fraction and are held to what one code is worth.
    """
    graph, fused, ranges = source
    part = examples(60, seed=11)
    save(quantize_static(graph, ranges=ranges, fused=fused), tmp_path / "static.onnx")
    save(quantize(graph, fused=fused), tmp_path / "dynamic.onnx")
    alone, *others = alone_and_together(tmp_path / "static.onnx", part)
    for found in others:
        apart = np.abs(found - alone).max(axis=1)
        assert (apart < 1e-5).mean() >= 0.9
        assert apart.max() < 0.05
        np.testing.assert_array_equal(found.argmax(axis=1), alone.argmax(axis=1))
    alone, together, _ = alone_and_together(tmp_path / "dynamic.onnx", part)
    assert (np.abs(together - alone).max(axis=1) < 1e-5).mean() < 0.5  # a scale per call: here rows do depend


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
@pytest.mark.parametrize("fused", [False, True])
def test_heads_over_tokens(kind: Kind, fused: bool, tmp_path: Path) -> None:
    model = tiny_model(outputs=5 if kind == "token-classification" else 2, kind=kind)
    graph = graph_of(model, fused=fused, first_row=False)
    save(quantize_static(graph, ranges=ranges_of(graph), fused=fused, per_channel=True), tmp_path / "q.onnx")
    part = examples(20)
    found, expected = predict_logits(open_session(tmp_path / "q.onnx"), part, pad_id=0), torch_outputs(model, part)
    error = np.sqrt(np.square(found - expected).mean())
    assert 0 < error < 0.1 * expected.std()
    assert optimized(tmp_path / "q.onnx")["com.microsoft.MatMulIntegerToFloat"] == 8


def test_an_excluded_operator_stays_float_and_the_source_is_untouched(source: Source, tmp_path: Path) -> None:
    graph, fused, ranges = source
    before = graph.SerializeToString()
    names = operators(graph)
    result = quantize_static(graph, ranges=ranges, fused=fused, excluded=[names[0], names[3]])
    assert graph.SerializeToString() == before
    assert operators(result) == [names[0], names[3]]
    save(result, tmp_path / "q.onnx")
    open_session(tmp_path / "q.onnx")
    needed = activations(graph, excluded=[names[0], names[3]])
    assert len(needed) == 9
    quantize_static(graph, ranges={name: ranges[name] for name in needed}, fused=fused, excluded=[names[3]])


def test_missing_ranges_and_unknown_exclusions_are_refused(source: Source) -> None:
    graph, fused, ranges = source
    first, *rest = activations(graph)
    with pytest.raises(ExportError) as caught:
        quantize_static(graph, ranges={name: ranges[name] for name in rest}, fused=fused)
    assert str(caught.value).startswith(f"static int8: no range for {first}. Calibrate all of the 10 activations")
    with pytest.raises(ExportError, match="no such node excluded; operators that can be quantized"):
        quantize_static(graph, ranges=ranges, fused=fused, excluded=["no such node"])
    with pytest.raises(ExportError, match="every operator excluded"):
        quantize_static(graph, ranges=ranges, fused=fused, excluded=operators(graph))
