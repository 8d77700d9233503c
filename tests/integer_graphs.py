"""One int8 product in every form that a graph may have it, for the tests of what CPUs make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

FORMS = ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "qdq", "qdq signed")
ZERO = 3  # the activation's zero point
SCALE = np.float32(0.5)


def form(kind: str, weight: np.ndarray, *, per_channel: bool = False, bias: bool = True) -> onnx.ModelProto:
    """Return a graph whose node "product" multiplies codes (M, K) with an int8 weight (K, N).

    Takes "a": uint8 codes, or the floats that are quantized to them. Gives "c": int32 sums, or floats that are the sums
    times 0.5 in a form with scales (the weight's is 1), plus a bias of 1, 2, ... where the form has one.
    """
    inner, width = weight.shape
    whole = kind == "MatMulInteger"
    codes_in = whole or kind == "MatMulIntegerToFloat"
    signed = kind == "qdq signed"
    zero = np.array(ZERO - 128, dtype=np.int8) if signed else np.array(ZERO, dtype=np.uint8)
    scales = np.ones(width if per_channel else (), dtype=np.float32)
    tensors = {
        "w": weight,
        "za": zero,
        "sa": np.array(SCALE),
        "sw": scales,
        "zw": np.zeros(scales.shape, dtype=np.int8),
        "bias": np.arange(1, width + 1, dtype=np.float32),
    }
    make = helper.make_node
    added = ["", "bias"] if bias else []
    nodes = {
        "MatMulInteger": [make("MatMulInteger", ["a", "w", "za"], ["c"], name="product")],
        "DynamicQuantizeMatMul": [
            make("DynamicQuantizeMatMul", ["a", "w", "sw", *added], ["c"], name="product", domain="com.microsoft")
        ],
        "MatMulIntegerToFloat": [
            make(
                "MatMulIntegerToFloat",
                ["a", "w", "sa", "sw", "za", *added],
                ["c"],
                name="product",
                domain="com.microsoft",
            )
        ],
        "qdq": [
            make("QuantizeLinear", ["a", "sa", "za"], ["q"], name="quantize"),
            make("DequantizeLinear", ["q", "sa", "za"], ["d"], name="restore"),
            make("DequantizeLinear", ["w", "sw", "zw"], ["dw"], name="weight", axis=1),
            make("MatMul", ["d", "dw"], ["c"], name="product"),
        ],
    }[kind.removesuffix(" signed")]
    used = {name for node in nodes for name in node.input}
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8 if codes_in else TensorProto.FLOAT, ["m", inner])]
    outputs = [helper.make_tensor_value_info("c", TensorProto.INT32 if whole else TensorProto.FLOAT, ["m", width])]
    held = [numpy_helper.from_array(array, name) for name, array in tensors.items() if name in used]
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "one product", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=domains, ir_version=8)


def run(model: onnx.ModelProto, kind: str, codes: np.ndarray, folder: Path) -> np.ndarray:
    """Return what a graph of `form`, or one made of it, gives for uint8 `codes`: its int32 sums, (M, N) int64.

    A form that quantizes by itself is given two rows more, of codes 0 and 255, so that its range is the whole of them.
    """
    (folder / "form.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(folder / "form.onnx"), providers=["CPUExecutionProvider"])
    if session.get_inputs()[0].type == "tensor(uint8)":
        values: np.ndarray = codes
    else:
        spanning = np.full((2, codes.shape[1]), [[0], [255]], dtype=np.uint8)
        values = (np.concatenate([spanning, codes]).astype(np.float32) - ZERO) * SCALE
    (found,) = session.run(["c"], {"a": values})
    if found.dtype == np.int32:
        return found.astype(np.int64)
    found = found[-len(codes) :]
    width = found.shape[1]
    bias = np.arange(1, width + 1) if "bias" in {tensor.name for tensor in model.graph.initializer} else 0
    return np.rint((found.astype(np.float64) - bias) / SCALE).astype(np.int64)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return a graph's constants by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def codes_of(model: onnx.ModelProto, kind: type) -> list[bytes]:
    """Return a graph's matrices of a type, unsigned ones moved down by 128, as int64 bytes."""
    found = [array for array in constants(model).values() if array.dtype == kind and array.ndim == 2]
    return [(array.astype(np.int64) - (128 if kind is np.uint8 else 0)).tobytes() for array in found]
