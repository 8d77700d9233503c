"""Dynamic int8: activations U8 per tensor, measured at each call; weights S8, symmetric. Graph in, graph out, torch-free.

    matrix products   q = round(x / s_x) + z_x (uint8), W = s_w W_q (int8);  x W ~ s_x s_w (q - z_x) W_q, added in int32
    embedding tables  rows in 8 or 4 bits with scales of their own, looked up then multiplied (see `tables`)

The portable form is DynamicQuantizeLinear, MatMulInteger, Cast, Mul; the fused form one DynamicQuantizeMatMul with its
bias. A Gelu behind a fused product becomes its tanh form, at most 5e-4 from the exact one: a tenth of an int8 step of what
it puts out, in four fifths of the time. Only two-dimensional weights become int8: biases, LayerNorm parameters, the
segment table (2 rows) and the task's head stay float32, and so does what runs between the products.

ONNX Runtime's own quantize_dynamic is not used: it gives a whole embedding table one scale, rounds the LayerNorm
parameters of a fused embedding too, and leaves each bias outside its product.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from bertemd_deploy.errors import ExportError
from bertemd_deploy.onnx_edit import MICROSOFT, Editor, attribute, declare_microsoft, tidy
from bertemd_deploy.quantization.tables import write_lookup
from bertemd_deploy.quantization.unsigned import unsigned

WeightType = Literal["int8", "uint8"]
ACTIVATION_TYPE = "uint8"
WEIGHT_TYPE: WeightType = "int8"
REDUCE_RANGE = False  # full 8-bit weights: exact with VNNI, AMX or Arm; older x86 saturates at extremes
_BEHIND_HEAD = {"Add", "Gather"}
SMALLEST_TABLE = 16  # rows; a shorter table (segments) is not worth a second lookup


def operators(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes of `model` that can be quantized, in graph order."""
    editor = Editor(model)
    return [node.name for node in model.graph.node if weight_of(editor, node) is not None]


def quantize(
    model: onnx.ModelProto,
    *,
    fused: bool,
    per_channel: bool = False,
    excluded: Collection[str] = (),
    weight_type: WeightType = WEIGHT_TYPE,
    reduce_range: bool = REDUCE_RANGE,
    embedding_bits: int = 8,
) -> onnx.ModelProto:
    """Return the int8 form of an fp32 graph.

    Args:
        model: portable or fused fp32 graph, tidied; it is left as it is.
        fused: write ONNX Runtime's fused product rather than standard operators.
        per_channel: one scale per output column of a matrix rather than one per matrix.
        excluded: names of nodes that stay fp32.
        weight_type: "uint8" holds the same weights 128 higher, with a zero point: x86 without VNNI multiplies them exactly,
            in a slower kernel (see `unsigned`).
        reduce_range: weights in 7 bits, [-64, 64]: no two products of them with activations overflow the 16 bits in which
            x86 without VNNI adds them (see `emulation`).
        embedding_bits: 8, or 4 for the table of words (see `tables`).

    Raises:
        ExportError: `excluded` names a node that cannot be quantized, nothing is left to quantize, or the table of words
            does not come in so few bits.
    """
    quantized_inputs: dict[str, list[str]] = {}

    def product(editor: Editor, node: onnx.NodeProto, weights: list[str], *, bias: str, output: str) -> None:
        if fused:
            inputs = [node.input[0], *weights, *(["", bias] if bias else [])]
            editor.emit("DynamicQuantizeMatMul", inputs, name=node.name, outputs=[output], domain=MICROSOFT)
        else:
            _integer_product(editor, node, weights, bias=bias, output=output, cache=quantized_inputs)

    result = rewrite_products(
        model,
        product,
        fused=fused,
        per_channel=per_channel,
        excluded=excluded,
        reduce_range=reduce_range,
        embedding_bits=embedding_bits,
    )
    _check(result)
    return unsigned(result) if weight_type == "uint8" else result


class Product(Protocol):
    """Writes one matrix product with int8 weights."""

    def __call__(self, editor: Editor, node: onnx.NodeProto, weights: list[str], *, bias: str, output: str) -> None:
        """Emit what replaces a product.

        Args:
            editor: where to.
            node: the float product; its first input is the activation.
            weights: constants: int8 codes (K, N), and their scale, () or (N,).
            bias: the constant (N,) to add, or "".
            output: name of the sum.
        """


def rewrite_products(
    model: onnx.ModelProto,
    product: Product,
    *,
    fused: bool,
    per_channel: bool,
    excluded: Collection[str],
    reduce_range: bool = False,
    embedding_bits: int = 8,
) -> onnx.ModelProto:
    """Return a graph whose embedding tables are int8 and whose products are what `product` writes.

    Args:
        model: as for `quantize`, and so are `per_channel` and `excluded`.
        product: writes each product.
        fused: hand each product the bias that is added behind it, and write the Gelu behind it as a FastGelu.
        per_channel: one scale per output column.
        excluded: names of nodes that stay fp32.
        reduce_range: weights in 7 bits.
        embedding_bits: as for `quantize`.

    Raises:
        ExportError: as `quantize`.
    """
    names = operators(model)
    unknown = sorted(set(excluded) - set(names))
    if unknown or not set(names) - set(excluded):
        raise ExportError(
            f"int8: {', '.join(unknown) or 'every operator'} excluded; "
            f"operators that can be quantized: {', '.join(names) or 'none'}."
        )
    result = onnx.ModelProto()
    result.CopyFrom(model)
    editor = Editor(result)
    if fused:
        declare_microsoft(result)
    absorbed: set[str] = set()

    def replace(node: onnx.NodeProto) -> bool:
        if node.output[0] in absorbed:
            return True
        weight = None if node.name in excluded else weight_of(editor, node)
        if weight is None:
            return False
        if node.op_type == "Gather":
            write_lookup(editor, node, weight, bits=embedding_bits)
            return True
        bias, output = _bias_of(editor, node, absorb=fused)
        gelu = _gelu_of(editor, node) if fused else None
        if gelu is not None:
            bias, output = gelu.input[1], editor.fresh(f"{node.name}/biased")
        codes, scale = quantize_weight(weight, per_channel=per_channel, largest_code=64 if reduce_range else 127)
        weights = [editor.constant(codes, f"{node.name}/int8"), editor.constant(scale, f"{node.name}/scale")]
        product(editor, node, weights, bias=bias, output=output)
        if gelu is not None:
            editor.emit("FastGelu", [output], name=gelu.name, outputs=list(gelu.output), domain=MICROSOFT)
            output = gelu.output[0]
        absorbed.add(output)
        return True

    editor.rewrite(replace)
    tidy(result, opset=next(entry.version for entry in result.opset_import if not entry.domain))
    return result


def quantize_weight(
    weight: NDArray[np.float32], *, per_channel: bool, largest_code: int = 127
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 codes (K, N) of up to `largest_code` either way and their scale, () or (N,), of a float weight (K, N)."""
    largest = np.abs(weight).max(axis=0) if per_channel else np.abs(weight).max()
    scale = np.asarray(np.where(largest > 0, largest / largest_code, 1), dtype=np.float32)
    return _codes(weight, scale), scale


def _codes(values: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.int8]:
    codes: NDArray[np.int8] = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
    return codes


def weight_of(editor: Editor, node: onnx.NodeProto) -> NDArray[np.float32] | None:
    """Return the float weight that quantizing `node` would replace, (K, N) or (rows, H), or None."""
    if node.domain or node.op_type not in {"MatMul", "Gemm", "Gather"}:
        return None
    array = editor.array(node.input[0 if node.op_type == "Gather" else 1])
    if array is None or array.ndim != 2 or array.dtype != np.float32:
        return None
    if node.op_type == "Gather":
        return array if attribute(node, "axis", 0) == 0 and len(array) >= SMALLEST_TABLE else None
    if _is_head(editor, node):
        return None  # a few thousand weights, and the logits come straight from it
    if node.op_type == "Gemm":
        plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(
            node, "transA", 0
        )
        if not plain:
            return None
        return np.ascontiguousarray(array.T) if attribute(node, "transB", 0) else array
    return array


def _is_head(editor: Editor, node: onnx.NodeProto) -> bool:
    """Return whether a product gives the graph's outputs, but for a bias and the split into starts and ends."""
    outputs = {value.name for value in editor.model.graph.output}
    while not outputs.intersection(node.output):
        following = [after for name in node.output for after in editor.consumers.get(name, [])]
        if not following or any(after.op_type not in _BEHIND_HEAD for after in following):
            return False
        node = following[0]
    return True


def _bias_of(editor: Editor, node: onnx.NodeProto, *, absorb: bool) -> tuple[str, str]:
    """Return a product's constant bias ("" for none) and the output that holds product plus bias.

    A Gemm carries its bias; that of a MatMul is the Add after it, looked for where `absorb` is set.
    """
    if node.op_type == "Gemm":
        return (node.input[2] if len(node.input) > 2 else ""), node.output[0]
    following = editor.consumers.get(node.output[0], [])
    if absorb and len(following) == 1 and following[0].op_type == "Add":
        for name in following[0].input:
            array = editor.array(name)
            if array is not None and array.ndim == 1:
                return name, following[0].output[0]
    return "", node.output[0]


def _gelu_of(editor: Editor, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the BiasGelu that alone reads a product, or None."""
    following = editor.consumers.get(node.output[0], [])
    return following[0] if len(following) == 1 and following[0].op_type == "BiasGelu" else None


def _integer_product(
    editor: Editor,
    node: onnx.NodeProto,
    weights: list[str],
    *,
    bias: str,
    output: str,
    cache: dict[str, list[str]],
) -> None:
    source, name = node.input[0], node.name
    if source not in cache:
        cache[source] = editor.emit("DynamicQuantizeLinear", [source], name=f"{name}/quantize", outputs=3)
    codes, scale, zero_point = cache[source]
    (total,) = editor.emit("MatMulInteger", [codes, weights[0], zero_point], name=name)
    (real,) = editor.emit("Cast", [total], name=f"{name}/cast", to=onnx.TensorProto.FLOAT)
    (scales,) = editor.emit("Mul", [scale, weights[1]], name=f"{name}/scales")
    (product,) = editor.emit("Mul", [real, scales], name=f"{name}/rescale", outputs=1 if bias else [output])
    if bias:
        editor.emit("Add", [product, bias], name=f"{name}/bias", outputs=[output])


def _check(model: onnx.ModelProto) -> None:
    """Assert what this module promises: int8 for matrices only, and float parameters untouched."""
    kinds = {tensor.name: (tensor.data_type, len(tensor.dims)) for tensor in model.graph.initializer}
    small = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    assert all(dimensions == 2 for kind, dimensions in kinds.values() if kind in small)
    assert not any(node.op_type in {"DequantizeLinear", "QEmbedLayerNormalization"} for node in model.graph.node)
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            assert all(kinds[name] == (onnx.TensorProto.FLOAT, 1) for name in node.input[1:])
