"""Small graphs with the dimensions batch and sequence, written for a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_operators(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Mapping[str, Sequence[str | int]],
    constants: Mapping[str, np.ndarray],
    output: str = "y",
    kind: int = TensorProto.FLOAT,
) -> Path:
    """Write a graph whose inputs have the given dimensions, whole numbers for the model's usual three, else floats."""
    usual = ("input_ids", "attention_mask", "token_type_ids")
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64 if name in usual else TensorProto.FLOAT, list(shape))
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(output, kind, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), str(path))
    return path


def write_product(path: Path, *, named: bool = True) -> Path:
    """Write y = Softmax(x W), x (batch, sequence, 8) and W (8, 6)."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="project" if named else ""),
        helper.make_node("Softmax", ["p"], ["y"], name="weigh" if named else "", axis=-1),
    ]
    weight = np.ones((8, 6), dtype=np.float32)
    return write_operators(path, nodes, inputs={"x": ["batch", "sequence", 8]}, constants={"w": weight})
