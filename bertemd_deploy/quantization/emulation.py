"""An int8 graph as x86 CPUs without VNNI compute it, as a graph that computes the same on every CPU. Torch-free.

    exact        c[m, n] = sum_k a[m, k] w[k, n],                                   a uint8, w int8, added in 32 bits
    saturating   c[m, n] = sum_i clip(a[m, 2i] w[2i, n] + a[m, 2i+1] w[2i+1, n], -2^15, 2^15 - 1)

and minus z_a sum_k w[k, n] in both, which is added in 32 bits. Source: ONNX Runtime's kernels for AVX2 and for AVX-512
without VNNI (mlas/lib/x86_64/QgemmU8X8KernelAvx2.S, QgemmU8X8KernelAvx512Core.S): `vpmaddubsw` adds two neighbours of the
inner dimension with saturation, `vpmaddwd` with ones adds two such sums in 32 bits. They pack the inner dimension in groups
of four from multiples of four on, padded with zeros, so the pairs are (0, 1), (2, 3), ... and the groups change nothing.

Codes reach 255, so a pair of weights can saturate only where its positive parts, or its negative ones, sum to more than 128:
255 x 128 = 32640 fits, 255 x 129 does not. Two weights of 7 bits, |w| <= 64, never do; unsigned weights go through another
kernel (`unsigned`). Signed activations are no way out: ONNX Runtime makes them unsigned on x86.

Every product gets unsigned weights, exact on every CPU; for the pairs of weights that can saturate, found beforehand,
clip(p) - p is worked out for every row and added. Real weights have few such pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bertemd_deploy.errors import ExportError
from bertemd_deploy.onnx_edit import Editor, tidy
from bertemd_deploy.quantization.unsigned import SHIFT, WEIGHT_INPUTS, shifted, signed_weights, weight_zero

LOWEST, HIGHEST = -(2**15), 2**15 - 1  # what a sum of two products is clipped to
LARGEST_CODE = 255
PAIRS, SATURATED = "pairs:", "saturated:"  # outputs that count, in front of a product's name
_UNREAD = {"QLinearMatMul", "QGemm", "QAttention", "ConvInteger", "QLinearConv", "QOrderedMatMul"}
_PAIRS_AT_ONCE = 2048  # weight pairs worked out together; each takes 4 bytes for every row of the batch, a few times


def saturating(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that computes, on every CPU, what those with saturating products make of an int8 graph.

    Raises:
        ExportError: an int8 product of a form that is not known here.
    """
    return emulate(model)[0]


def emulate(model: onnx.ModelProto, *, counted: bool = False) -> tuple[onnx.ModelProto, list[str]]:
    """Return the saturating graph and the names of its int8 products.

    Args:
        model: int8 graph, dynamic or static, portable or fused; it is left as it is.
        counted: add two int64 outputs for each product: `PAIRS` and its name, how many pairs a run summed, rows x half the
            inner dimension x columns; `SATURATED` and its name, how many of them did not fit.

    Raises:
        ExportError: as `saturating`.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    editor = Editor(result)
    holders = {node.output[0]: (node, at, zero_at) for node, at, zero_at in signed_weights(editor)}
    made: dict[str, list[str]] = {}
    names: list[str] = []

    def replace(node: onnx.NodeProto) -> bool:
        holder = holders.get(node.input[1] if node.op_type in {"MatMul", "Gemm"} else node.output[0])
        _refuse(editor, node, held=holder is not None)
        product = None if holder is None else _read(editor, node, *holder, made=made)
        if product is None:
            return False
        names.append(node.name)
        total, count = _sum(editor, product, name=node.name)
        if counted:
            pairs = editor.constant(np.int64((len(product.weight) + 1) // 2), "pairs")
            (size,) = editor.emit("Size", [total], name=f"{node.name}/size")
            editor.emit("Mul", [size, pairs], name=f"{node.name}/pairs", outputs=[f"{PAIRS}{node.name}"])
            editor.emit("Identity", [count], name=f"{node.name}/saturated", outputs=[f"{SATURATED}{node.name}"])
        _finish(editor, product, node=node, total=total)
        return True

    editor.rewrite(replace)
    for part in (PAIRS, SATURATED) if counted else ():
        outputs = [helper.make_tensor_value_info(f"{part}{name}", TensorProto.INT64, []) for name in names]
        result.graph.output.extend(outputs)
    tidy(result, opset=next(entry.version for entry in result.opset_import if not entry.domain))
    return result, names


def weight_pairs(weight: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs of weights, by pair number and column, that can saturate: two (n,) arrays, columns ascending.

    Args:
        weight: (K, N) codes; pair i is rows 2i and 2i + 1.
    """
    first, second = _halves(weight)
    highest = LARGEST_CODE * (np.maximum(first, 0) + np.maximum(second, 0))
    lowest = LARGEST_CODE * (np.minimum(first, 0) + np.minimum(second, 0))
    columns, pairs = np.nonzero(((highest > HIGHEST) | (lowest < LOWEST)).T)
    return pairs, columns


def _halves(weight: NDArray[np.int8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the even and the odd rows, each (ceil(K / 2), N) int32; a missing last odd row is 0."""
    even = weight.astype(np.int32)
    if len(even) % 2:
        even = np.pad(even, ((0, 1), (0, 0)))
    return even[::2], even[1::2]


@dataclass(frozen=True)
class _Product:
    """One int8 product: names of its activation's uint8 codes and zero point, its weight, and names of what follows.

    `scales` are those of activation and weight, none where the product's int32 sum is what the graph goes on with.
    """

    codes: str
    zero: str
    weight: NDArray[np.int8]
    weight_zero: NDArray[np.int8]
    scales: tuple[str, ...] = ()
    bias: str = ""


def _refuse(editor: Editor, node: onnx.NodeProto, *, held: bool) -> None:
    """Refuse an integer product that `_read` has no words for; `held`: its weight is a known int8 constant."""
    refused = node.op_type in _UNREAD or (held and node.op_type == "Gemm")
    if node.op_type in WEIGHT_INPUTS and node.op_type != "DequantizeLinear":
        weight = editor.array(node.input[1])
        refused = weight is None or weight.ndim != 2
    elif node.op_type == "MatMul" and not held:
        source = editor.producers.get(node.input[1])
        if source is not None and source.op_type == "DequantizeLinear" and editor.array(source.input[0]) is None:
            zero = editor.array(source.input[2]) if len(source.input) > 2 else None
            refused = zero is None or zero.dtype == np.int8
    if refused:
        raise ExportError(
            f"{node.name}: what a CPU without VNNI makes of this {node.op_type} cannot be worked out. Known are "
            "MatMulInteger, DynamicQuantizeMatMul, MatMulIntegerToFloat and MatMul behind DequantizeLinear, each with a "
            "constant weight of two dimensions. Leave this operator in fp32."
        )


def _read(
    editor: Editor, node: onnx.NodeProto, holder: onnx.NodeProto, at: int, zero_at: int, *, made: dict[str, list[str]]
) -> _Product | None:
    """Return a product's parts, or None for one of floats; `made` keeps what activations were quantized to."""
    weight = editor.array(holder.input[at])
    assert weight is not None
    zero = weight_zero(editor, holder, zero_at)
    inputs = list(node.input) + [""] * (7 - len(node.input))
    if node.op_type == "MatMulInteger":
        return _Product(*_as_unsigned(editor, inputs[0], inputs[2]), weight, zero)
    if node.op_type == "MatMulIntegerToFloat":
        codes = _as_unsigned(editor, inputs[0], inputs[4])
        return _Product(*codes, weight, zero, (inputs[2], inputs[3]), inputs[6])
    if node.op_type == "DynamicQuantizeMatMul":
        if inputs[0] not in made:
            made[inputs[0]] = editor.emit("DynamicQuantizeLinear", [inputs[0]], name=f"{node.name}/quantize", outputs=3)
        code, scale, code_zero = made[inputs[0]]
        return _Product(code, code_zero, weight, zero, (scale, inputs[2]), inputs[4])
    source = editor.producers.get(inputs[0])
    if node.op_type != "MatMul" or source is None or source.op_type != "DequantizeLinear":
        return None
    parts = list(source.input) + [""] * (3 - len(source.input))
    return _Product(*_as_unsigned(editor, parts[0], parts[2]), weight, zero, (parts[1], holder.input[1]))


def _as_unsigned(editor: Editor, codes: str, zero: str) -> tuple[str, str]:
    """Return the names of an activation's codes and zero point, signed ones moved up as ONNX Runtime does it on x86."""
    value = editor.array(zero) if zero else None
    if value is None or value.dtype != np.int8:
        return codes, zero  # a dynamic zero point comes with uint8 codes
    (wide,) = editor.emit("Cast", [codes], name=f"{codes}/wide", to=TensorProto.INT32)
    (up,) = editor.emit("Add", [wide, editor.constant(np.int32(SHIFT), "shift")], name=f"{codes}/shift")
    (moved,) = editor.emit("Cast", [up], name=f"{codes}/unsigned", to=TensorProto.UINT8)
    return moved, editor.constant(shifted(value), f"{zero}/unsigned")


def _sum(editor: Editor, product: _Product, *, name: str) -> tuple[str, str]:
    """Emit a product's int32 sum, pairs saturating; return its name, and that of the number of pairs that did."""
    weight, zero = shifted(product.weight), shifted(product.weight_zero)
    inputs = [product.codes, editor.constant(weight, f"{name}/unsigned"), product.zero]
    (exact,) = editor.emit("MatMulInteger", [*inputs, editor.constant(zero, f"{name}/weight_zero")], name=name)
    pairs, columns = weight_pairs(product.weight)
    if not len(pairs):
        return exact, editor.constant(np.int64(0), "none")
    (lost, count) = _excess(editor, product, pairs, columns, name=name)
    (shape,) = editor.emit("Shape", [exact], name=f"{name}/shape")
    (shaped,) = editor.emit("Reshape", [lost, shape], name=f"{name}/lost")
    (total,) = editor.emit("Add", [exact, shaped], name=f"{name}/saturating")
    return total, count


def _excess(
    editor: Editor, product: _Product, pairs: NDArray[np.int64], columns: NDArray[np.int64], *, name: str
) -> tuple[str, str]:
    """Emit sum_i (clip(p_i) - p_i) over the given pairs, (rows, N) int32, and how many p_i it changed, int64.

    Columns with most pairs come first; a step takes the next few pairs of those columns that have any left, and its
    sums are added to the first rows of what is left over from later steps.
    """
    inner, width = product.weight.shape
    flat = editor.constant(np.array([-1, inner], dtype=np.int64), "flat")
    (rows,) = editor.emit("Reshape", [product.codes, flat], name=f"{name}/rows")
    (codes,) = editor.emit("Transpose", [rows], name=f"{name}/codes", perm=[1, 0])
    counts = np.bincount(columns, minlength=width)
    order = np.argsort(-counts, kind="stable")
    starts = np.cumsum(counts) - counts
    halves = _halves(product.weight)
    lost = count = ""
    used = 0
    for first, last in reversed(_steps(counts[order])):
        chosen = order[: int((counts > first).sum())]
        ranks = np.arange(first, last)
        there = ranks < counts[chosen][:, None]
        pair = np.where(there, pairs[np.minimum(starts[chosen][:, None] + ranks, len(pairs) - 1)], 0)
        factors = [np.where(there, half[pair, chosen[:, None]], 0)[..., None] for half in halves]
        places = [2 * pair, np.minimum(2 * pair + 1, inner - 1)]
        part, number = _step(editor, codes, places, factors, name=name)
        if lost:
            longer = _lengthened(editor, lost, len(chosen) - used, name=name)
            (part,) = editor.emit("Add", [part, longer], name=f"{name}/excess")
            (number,) = editor.emit("Add", [number, count], name=f"{name}/count")
        lost, count, used = part, number, len(chosen)
    lost = _lengthened(editor, lost, width - used, name=name)
    (lost,) = editor.emit(
        "Gather", [lost, editor.constant(np.argsort(order), "columns")], name=f"{name}/columns", axis=0
    )
    (lost,) = editor.emit("Transpose", [lost], name=f"{name}/excess", perm=[1, 0])
    return lost, count


def _steps(counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the ranges of ranks worked out together, for columns with so many pairs each, descending."""
    steps, first = [], 0
    while first < counts[0]:
        left = int((counts > first).sum())
        last = min(first + max(1, _PAIRS_AT_ONCE // left), int(counts[0]))
        steps.append((first, last))
        first = last
    return steps


def _step(
    editor: Editor, codes: str, places: list[NDArray[np.int64]], factors: list[NDArray[np.int32]], *, name: str
) -> tuple[str, str]:
    """Emit sum_i (clip(p_i) - p_i) over axis 1, (columns, rows) int32, and how many p_i were clipped, int64.

    Args:
        editor: where to.
        codes: (K, rows) uint8.
        places: (columns, i) rows of `codes`: of first and of second factor.
        factors: (columns, i, 1) weights of both.
        name: of the product.
    """
    terms = []
    for place, factor in zip(places, factors, strict=True):
        (taken,) = editor.emit("Gather", [codes, editor.constant(place, "places")], name=f"{name}/taken", axis=0)
        (wide,) = editor.emit("Cast", [taken], name=f"{name}/wide", to=TensorProto.INT32)
        terms += editor.emit("Mul", [wide, editor.constant(factor.astype(np.int32), "factors")], name=f"{name}/term")
    (both,) = editor.emit("Add", terms, name=f"{name}/pair")
    bounds = [editor.constant(np.int32(bound), "bound") for bound in (LOWEST, HIGHEST)]
    (clipped,) = editor.emit("Clip", [both, *bounds], name=f"{name}/clip")
    (excess,) = editor.emit("Sub", [clipped, both], name=f"{name}/excess")
    axis = editor.constant(np.array([1], dtype=np.int64), "axis")
    (lost,) = editor.emit("ReduceSum", [excess, axis], name=f"{name}/excess", keepdims=0)
    (changed,) = editor.emit("Cast", [excess], name=f"{name}/changed", to=TensorProto.BOOL)
    (ones,) = editor.emit("Cast", [changed], name=f"{name}/changed", to=TensorProto.INT32)
    (number,) = editor.emit("ReduceSum", [ones], name=f"{name}/count", keepdims=0)
    (count,) = editor.emit("Cast", [number], name=f"{name}/count", to=TensorProto.INT64)
    return lost, count


def _lengthened(editor: Editor, rows: str, by: int, *, name: str) -> str:
    """Emit (n, rows) int32 with `by` rows of zeros behind it; return its name."""
    if not by:
        return rows
    pads = editor.constant(np.array([0, 0, by, 0], dtype=np.int64), "pads")
    return editor.emit("Pad", [rows, pads, editor.constant(np.int32(0), "zero")], name=f"{name}/zeros")[0]


def _finish(editor: Editor, product: _Product, *, node: onnx.NodeProto, total: str) -> None:
    """Emit what makes a product's int32 sum the node's output: scales and bias, where it has them."""
    outputs = list(node.output)
    if not product.scales:
        editor.emit("Identity", [total], name=f"{node.name}/total", outputs=outputs)
        return
    (real,) = editor.emit("Cast", [total], name=f"{node.name}/cast", to=TensorProto.FLOAT)
    (scale,) = editor.emit("Mul", list(product.scales), name=f"{node.name}/scales")
    names = editor.emit("Mul", [real, scale], name=f"{node.name}/rescale", outputs=1 if product.bias else outputs)
    if product.bias:
        editor.emit("Add", [*names, product.bias], name=f"{node.name}/bias", outputs=outputs)
