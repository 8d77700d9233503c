"""Static int8: activations U8 per tensor with ranges known beforehand; weights S8, symmetric. Graph in, graph out, torch-free.

    q = clip(round(x / s_x) + z_x, 0, 255),  W = s_w W_q;    x W ~ s_x s_w (q - z_x) W_q, added in int32

s_x and z_x are constants (`calibration`, or learnt in training: `aware`), so a row's result does not depend on its batch
mates or padding. The portable form is QDQ: QuantizeLinear and DequantizeLinear before a product, DequantizeLinear behind its
int8 weights, which engines read as one integer product; ONNX Runtime makes a MatMulIntegerToFloat of each at load. The fused
form writes that operator itself, with its bias.

Biases stay float32, added after the int32 sum, which rounds nothing. With int32 biases ONNX Runtime would make QGemms, which
want two dimensions, and so a Reshape on either side; that measured the same. Products of two activations (Q K^T, P V) stay
float: keys carry the mask's bias, which 8 bits cannot hold, and in int8 they measured no faster. Embedding tables, LayerNorm
and the head are as in `dynamic`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx

from bertemd_deploy.errors import ExportError
from bertemd_deploy.onnx_edit import MICROSOFT, Editor
from bertemd_deploy.quantization.calibration import Range
from bertemd_deploy.quantization.dynamic import operators, rewrite_products

_INTEGER_PRODUCT = "MatMulIntegerToFloat"


def activations(model: onnx.ModelProto, *, excluded: Collection[str] = ()) -> list[str]:
    """Return the tensors of an fp32 graph whose range `quantize_static` needs: what its products take in, in graph order."""
    chosen = set(operators(model)) - set(excluded)
    found = (node.input[0] for node in model.graph.node if node.name in chosen and node.op_type != "Gather")
    return list(dict.fromkeys(found))


def quantize_static(
    model: onnx.ModelProto,
    *,
    ranges: Mapping[str, Range],
    fused: bool = False,
    per_channel: bool = False,
    excluded: Collection[str] = (),
    reduce_range: bool = False,
    embedding_bits: int = 8,
) -> onnx.ModelProto:
    """Return the static int8 form of an fp32 graph.

    Args:
        model: portable or fused fp32 graph, tidied; it is left as it is.
        ranges: of every tensor in `activations(model, excluded=excluded)`, and of any others.
        fused: write ONNX Runtime's own operator instead of QDQ pairs.
        per_channel: one scale per output column of a matrix rather than one per matrix.
        excluded: names of nodes that stay fp32.
        reduce_range: weights in 7 bits, [-64, 64]: no two products of them with activations overflow the 16 bits in which
            x86 without VNNI adds them.
        embedding_bits: 8, or 4 for the table of words (see `tables`).

    Raises:
        ExportError: a range is missing, or as `dynamic.quantize`.
    """
    wanted = activations(model, excluded=excluded)
    if missing := [name for name in wanted if name not in ranges]:
        raise ExportError(
            f"static int8: no range for {', '.join(missing)}. Calibrate all of the {len(wanted)} activations that go into "
            "the products, on this very graph."
        )
    codes: dict[str, list[str]] = {}  # activation: its codes, scale and zero point
    restored: dict[str, str] = {}  # activation: its codes read as real numbers

    def quantized(editor: Editor, source: str, name: str) -> list[str]:
        if source not in codes:
            scale, zero = ranges[source].parameters
            constants = [editor.constant(scale, f"{name}/input_scale"), editor.constant(zero, f"{name}/input_zero")]
            (made,) = editor.emit("QuantizeLinear", [source, *constants], name=f"{name}/quantize")
            codes[source] = [made, *constants]
        return codes[source]

    def integer_product(editor: Editor, node: onnx.NodeProto, weights: list[str], *, bias: str, output: str) -> None:
        made, scale, zero = quantized(editor, node.input[0], node.name)
        inputs = [made, weights[0], scale, weights[1], zero, *(["", bias] if bias else [])]
        editor.emit(_INTEGER_PRODUCT, inputs, name=node.name, outputs=[output], domain=MICROSOFT)

    def restored_product(editor: Editor, node: onnx.NodeProto, weights: list[str], *, bias: str, output: str) -> None:
        source, name = node.input[0], node.name
        inputs = quantized(editor, source, name)
        if source not in restored:
            (restored[source],) = editor.emit("DequantizeLinear", inputs, name=f"{name}/restore")
        scale = editor.array(weights[1])
        assert scale is not None
        zero = editor.constant(np.zeros(scale.shape, dtype=np.int8), f"{name}/zero")
        axis: dict[str, Any] = {"axis": 1} if scale.ndim else {}
        (weight,) = editor.emit("DequantizeLinear", [*weights, zero], name=f"{name}/weight", **axis)
        (product,) = editor.emit("MatMul", [restored[source], weight], name=name, outputs=1 if bias else [output])
        if bias:
            # With an Add ONNX Runtime would first make a two-dimensional product a Gemm again, and that a float one.
            addition = "Sum" if node.op_type == "Gemm" else "Add"
            editor.emit(addition, [product, bias], name=f"{name}/bias", outputs=[output])

    result = rewrite_products(
        model,
        integer_product if fused else restored_product,
        fused=fused,
        per_channel=per_channel,
        excluded=excluded,
        reduce_range=reduce_range,
        embedding_bits=embedding_bits,
    )
    _check(result)
    return result


def _check(model: onnx.ModelProto) -> None:
    """Assert what this module promises: uint8 activations, int8 weights with a zero point of 0, no integer bias."""
    editor = Editor(model)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            codes, zero = (editor.array(node.input[at]) for at in (0, 2))
            assert zero is not None
            assert zero.dtype == (np.uint8 if codes is None else np.int8)
            assert codes is None or (codes.dtype == np.int8 and not zero.any())
        elif node.op_type == _INTEGER_PRODUCT:
            kinds = [array.dtype for name in node.input if name and (array := editor.array(name)) is not None]
            assert kinds[:4] == [np.int8, np.float32, np.float32, np.uint8]
            assert all(kind == np.float32 for kind in kinds[4:])
