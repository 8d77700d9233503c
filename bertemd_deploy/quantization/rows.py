"""Dynamic int8 with a scale for every row of activations: a token's result depends on nothing else that is in the call.

    a_r = max_k |x_rk|,  q = round(127 x / a_r) + 128 (uint8),  W = s_w W_q (int8)
    x W ~ a_r / 127 s_w (q - 128) W_q, added in int32

A scale for the whole tensor (`dynamic`) is stretched by the largest activation of any token in the batch, padding included;
here batch mates and padding change nothing, and a token without outliers keeps finer steps. What is known beforehand, 1/127
and 128, is constant; what is not, a_r, is multiplied in float after the int32 sum. Graph in, graph out, torch-free.

The portable form is QuantizeLinear, MatMulInteger, Cast, Mul, Mul; the fused form has ONNX Runtime's MatMulIntegerToFloat
for the three in the middle. a_r comes last: ONNX Runtime takes a product with two scales for one with a scale per tensor.
Tables, LayerNorm, the Gelu and the head are as in `dynamic`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx

from bertemd_deploy.onnx_edit import MICROSOFT, Editor
from bertemd_deploy.quantization.dynamic import rewrite_products

CODES, ZERO = 127, 128  # either way of the zero point
_SMALLEST = np.finfo(np.float32).tiny  # instead of the largest of a row of zeros
_AXES_AS_INPUT = 18  # operator set from which ReduceMax takes its axes so


def quantize_rows(
    model: onnx.ModelProto,
    *,
    fused: bool,
    per_channel: bool = True,
    excluded: Collection[str] = (),
    reduce_range: bool = False,
    embedding_bits: int = 8,
) -> onnx.ModelProto:
    """Return the int8 form of an fp32 graph whose activations have a scale for each row.

    Args:
        model: portable or fused fp32 graph, tidied; it is left as it is.
        fused: write ONNX Runtime's fused product rather than standard operators.
        per_channel: one scale per output column of a matrix rather than one per matrix.
        excluded: names of nodes that stay fp32.
        reduce_range: weights in 7 bits, [-64, 64].
        embedding_bits: 8, or 4 for the table of words (see `tables`).

    Raises:
        ExportError: `excluded` names a node that cannot be quantized, nothing is left to quantize, or the table of words
            does not come in so few bits.
    """
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    rows: dict[str, tuple[str, str]] = {}

    def product(editor: Editor, node: onnx.NodeProto, weights: list[str], *, bias: str, output: str) -> None:
        source, name = node.input[0], node.name
        if source not in rows:
            rows[source] = _codes(editor, source, name=name, opset=opset)
        codes, largest = rows[source]
        step, zero = _constants(editor)
        weight, scale = weights
        if fused:
            inputs = [codes, weight, step, scale, zero]
            (unscaled,) = editor.emit("MatMulIntegerToFloat", inputs, name=name, domain=MICROSOFT)
        else:
            (total,) = editor.emit("MatMulInteger", [codes, weight, zero], name=name)
            (real,) = editor.emit("Cast", [total], name=f"{name}/cast", to=onnx.TensorProto.FLOAT)
            array = editor.array(scale)
            assert array is not None
            steps = editor.constant((array / CODES).astype(np.float32), f"{name}/step")
            (unscaled,) = editor.emit("Mul", [real, steps], name=f"{name}/rescale")
        (product,) = editor.emit("Mul", [unscaled, largest], name=f"{name}/rows", outputs=1 if bias else [output])
        if bias:
            editor.emit("Add", [product, bias], name=f"{name}/bias", outputs=[output])

    return rewrite_products(
        model,
        product,
        fused=fused,
        per_channel=per_channel,
        excluded=excluded,
        reduce_range=reduce_range,
        embedding_bits=embedding_bits,
    )


def _codes(editor: Editor, source: str, *, name: str, opset: int) -> tuple[str, str]:
    """Emit the codes of an activation (…, K) and the largest magnitude of each of its rows, (…, 1)."""
    step, zero = _constants(editor)
    (magnitudes,) = editor.emit("Abs", [source], name=f"{name}/abs")
    axes = [editor.constant(np.array([-1]), "last_axis")] if opset >= _AXES_AS_INPUT else []
    attributes: dict[str, Any] = {} if axes else {"axes": [-1]}
    (highest,) = editor.emit("ReduceMax", [magnitudes, *axes], name=f"{name}/highest", keepdims=1, **attributes)
    (largest,) = editor.emit("Max", [highest, editor.constant(_SMALLEST, "smallest")], name=f"{name}/largest")
    (inverse,) = editor.emit("Reciprocal", [largest], name=f"{name}/inverse")
    (unit,) = editor.emit("Mul", [source, inverse], name=f"{name}/unit")  # a third faster than to divide
    (codes,) = editor.emit("QuantizeLinear", [unit, step, zero], name=f"{name}/quantize")
    return codes, largest


def _constants(editor: Editor) -> tuple[str, str]:
    """Return the names of the step 1/127 and the zero point; equal constants are shared when the graph is tidied."""
    return editor.constant(np.float32(1 / CODES), "step"), editor.constant(np.uint8(ZERO), "zero")
