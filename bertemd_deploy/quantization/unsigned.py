"""Int8 weights as unsigned ones: every code and its zero point move up by 128, which leaves every product as it is.

    (q - z_x) W_q = (q - z_x) (U_q - 128),  U_q = W_q + 128 (uint8)

x86 without VNNI multiplies uint8 activations and int8 weights in 16 bits, where a sum of two products can saturate; for
unsigned weights ONNX Runtime has another kernel there, which widens to 16 bits first and adds in 32 (`vpmaddwd`). It is
exact everywhere, and slower than the other where both are exact. Graph in, graph out, torch-free: dynamic and static forms,
portable and fused.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray

from bertemd_deploy.onnx_edit import Editor, tidy

SHIFT = 128
# Where an operator with an int8 weight has it, and the weight's zero point.
WEIGHT_INPUTS = {
    "MatMulInteger": (1, 3),
    "DynamicQuantizeMatMul": (1, 3),
    "MatMulIntegerToFloat": (1, 5),
    "DequantizeLinear": (0, 2),  # of the weight, in front of a float product
}


def unsigned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with the int8 weights of its products as uint8; `model` is left as it is.

    Tables that are looked up rather than multiplied stay as they are.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    editor = Editor(result)
    moved: dict[str, str] = {}
    for node, at, zero_at in signed_weights(editor):
        codes = editor.array(node.input[at])
        assert codes is not None
        zero = weight_zero(editor, node, zero_at)
        name = node.input[at]
        if name not in moved:
            moved[name] = editor.constant(shifted(codes), f"{name}/unsigned")
        node.input.extend([""] * (zero_at + 1 - len(node.input)))
        node.input[at] = moved[name]
        node.input[zero_at] = editor.constant(shifted(zero), f"{node.name}/weight_zero")
    tidy(result, opset=next(entry.version for entry in result.opset_import if not entry.domain))
    return result


def signed_weights(editor: Editor) -> Iterator[tuple[onnx.NodeProto, int, int]]:
    """Yield the nodes that hold the int8 weight of a product, with the places of the weight and its zero point."""
    for node in editor.model.graph.node:
        if node.op_type not in WEIGHT_INPUTS:
            continue
        at, zero_at = WEIGHT_INPUTS[node.op_type]
        codes = editor.array(node.input[at])
        if codes is None or codes.dtype != np.int8 or codes.ndim != 2:
            continue
        if node.op_type != "DequantizeLinear" or multiplied(editor, node):
            yield node, at, zero_at


def multiplied(editor: Editor, node: onnx.NodeProto) -> bool:
    """Return whether what `node` gives is the right factor of matrix products and nothing else."""
    following = editor.consumers.get(node.output[0], [])
    return bool(following) and all(
        after.op_type in {"MatMul", "Gemm"} and after.input[1] == node.output[0] for after in following
    )


def weight_zero(editor: Editor, node: onnx.NodeProto, at: int) -> NDArray[np.int8]:
    """Return the zero point of a node's int8 weight, () or (N,) int8; 0 where it has none."""
    if at < len(node.input) and node.input[at]:
        found = editor.array(node.input[at])
        assert found is not None
        return found.astype(np.int8)
    return np.zeros((), dtype=np.int8)


def shifted(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return int8 codes moved up by `SHIFT`, as uint8."""
    return (codes.astype(np.int16) + SHIFT).astype(np.uint8)
