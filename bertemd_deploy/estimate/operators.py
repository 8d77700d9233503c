"""What every operator of a graph costs: multiply-adds, bytes, and the calibration table that each part of it is timed by.

    product of M x K activations and K x N weights      M K N multiply-adds, K N weights read from memory
    product of activations, `count` matrices            M K N multiply-adds each
    attention, H heads of width d_k and d_v             H matrices of T_q T_k (d_k + d_v) multiply-adds, softmax included
    everything else                                     values, of its largest input or output

An operator that no table here times is an error that names it, never nothing. What is counted is what ONNX Runtime runs (see
`tracing`): its fused operators are a product with a quantization in front, or an attention with three transpositions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bertemd_deploy.errors import MeasurementError
from bertemd_deploy.estimate.tracing import Step, Tensor, Trace, trace

Kind = Literal["fp32_product", "int8_product", "elementwise", "gather", "other"]


@dataclass(frozen=True)
class Part:
    """A piece of an operator's work, timed by one table of the calibration.

    Attributes:
        table: which one.
        size: where in it: values; rows M of a product; multiply-adds of one matrix of a product of activations; bytes of
            a lookup.
        width: the table's other axis where it has one: K N of a product, values per row, head width.
        count: matrices, of a product of activations and of attention.
        macs: multiply-adds, of all matrices.
        weight_bytes: constants that a product reads.
        inner: part of an operator whose start another part has counted.
    """

    table: str
    size: int
    width: int = 1
    count: int = 1
    macs: int = 0
    weight_bytes: int = 0
    inner: bool = False


@dataclass(frozen=True)
class OperatorCost:
    """What one operator does in one call.

    Attributes:
        name, op_type: of the node that ONNX Runtime runs.
        kind: of work, roughly.
        macs: multiply-adds of its products.
        bytes_read: inputs, constants included.
        bytes_written: outputs.
        constant_bytes: of `bytes_read`, what the graph holds.
        parts: its work by calibration table.
    """

    name: str
    op_type: str
    kind: Kind
    macs: int
    bytes_read: int
    bytes_written: int
    constant_bytes: int
    parts: tuple[Part, ...]


def count_operators(path: Path, *, batch: int, sequence: int) -> list[OperatorCost]:
    """Return what every operator of a graph costs in one call, in the order they are run.

    Args:
        path: an ONNX file.
        batch: examples per call.
        sequence: tokens per example.

    Raises:
        ArtifactError: the file cannot be loaded or run.
        MeasurementError: an operator is unknown, or a shape is not understood; the message names it.
        BertemdError: onnx is not installed.
    """
    return costs(trace(path), batch=batch, sequence=sequence)


def costs(traced: Trace, *, batch: int, sequence: int) -> list[OperatorCost]:
    """Return what every operator of a traced graph costs in one call.

    Raises:
        MeasurementError: an operator is unknown; the message names it.
    """
    return [operator_cost(step) for step in traced.at(batch=batch, sequence=sequence)]


def operator_cost(step: Step) -> OperatorCost:
    """Return what one operator costs.

    Raises:
        MeasurementError: it is not in the table, or is used in a way that is not.
    """
    rule = RULES.get(step.op_type)
    if rule is None:
        raise MeasurementError(
            f"{step.where}: operator {step.op_type} ({step.name!r}) is not among the {len(RULES)} that an estimate can cost "
            f"({', '.join(sorted(RULES))}). Measure this graph on the device instead (--device ssh://user@host)."
        )
    kind, parts = rule(step)
    return OperatorCost(
        step.name,
        step.op_type,
        kind,
        sum(part.macs for part in parts),
        sum(tensor.bytes for tensor in step.inputs),
        sum(tensor.bytes for tensor in step.outputs),
        sum(tensor.bytes for tensor in step.inputs if tensor.constant),
        parts,
    )


_FACTORS = {"fp32_product": ("float",), "int8_product": ("uint8", "int8", "float")}  # types of activations
Rule = Callable[[Step], tuple[Kind, tuple[Part, ...]]]


def _fault(step: Step, why: str) -> MeasurementError:
    shapes = ", ".join(f"{tensor.dtype}{list(tensor.dims)}" for tensor in step.inputs)
    return MeasurementError(
        f"{step.where}: operator {step.op_type} ({step.name!r}) on {shapes} cannot be costed: {why}. Measure this graph on the "
        "device instead (--device ssh://user@host)."
    )


def _largest(step: Step) -> Tensor:
    return max((*step.inputs, *step.outputs), key=lambda tensor: tensor.elements)


def _last(tensor: Tensor) -> int:
    return tensor.dims[-1] if tensor.dims else 1


def _values(table: str) -> Rule:
    """Return the rule of an operator that passes over its values once."""

    def rule(step: Step) -> tuple[Kind, tuple[Part, ...]]:
        largest = _largest(step)
        return "elementwise", (Part(table, largest.elements, _last(largest)),)

    return rule


def _view(step: Step) -> tuple[Kind, tuple[Part, ...]]:
    """Cost an operator that moves no values."""
    return "other", (Part("view", 1),)


def _moved(step: Step) -> tuple[Kind, tuple[Part, ...]]:
    """Cost an operator that copies as many values as it gives, such as Slice, whatever it takes them from."""
    count = sum(tensor.elements for tensor in step.outputs)
    return "other", (Part("copy", count, _last(step.outputs[0])),)


def _arithmetic(step: Step) -> tuple[Kind, tuple[Part, ...]]:
    """Cost Add, Mul and their like: with equal shapes, or one repeated along the other."""
    output = step.outputs[0]
    same = all(tensor.elements == output.elements for tensor in step.inputs)
    return "elementwise", (Part("binary" if same else "broadcast", output.elements, _last(output)),)


def _transpose(step: Step) -> tuple[Kind, tuple[Part, ...]]:
    """Cost a transposition: whole rows move, or, where the last axis does, single values."""
    source = step.inputs[0]
    order = list(step.attributes.get("perm", range(len(source.dims))[::-1]))
    table = "transpose" if order and order[-1] == len(order) - 1 else "transpose_inner"
    return "other", (Part(table, source.elements, _last(source)),)


def _gather(step: Step) -> tuple[Kind, tuple[Part, ...]]:
    """Cost a lookup: rows of a table that the graph holds, or a choice among activations or dimensions."""
    table, output = step.inputs[0], step.outputs[0]
    if table.constant and len(table.dims) > 1:
        return "gather", (Part("gather", output.bytes, _last(output)),)
    return _moved(step)


def _embedding(step: Step) -> tuple[Kind, tuple[Part, ...]]:
    """Cost EmbedLayerNormalization: up to three lookups, and a LayerNorm."""
    output = step.outputs[0]
    tables = [tensor for tensor in step.inputs if tensor.constant and len(tensor.dims) == 2]
    lookups = tuple(Part("gather", output.bytes, _last(output), inner=True) for _ in tables)
    return "gather", (Part("layer_norm", output.elements, _last(output)), *lookups)


def _product(table: str, *, right: int = 1, quantize: bool = False) -> Rule:
    """Return the rule of a product with constant weights.

    Args:
        table: "fp32_product" or "int8_product".
        right: place of the weights among the inputs.
        quantize: it turns its activations into 8 bits first.
    """
    kind: Kind = "fp32_product" if table == "fp32_product" else "int8_product"

    def rule(step: Step) -> tuple[Kind, tuple[Part, ...]]:
        left, weight, output = step.inputs[0], step.inputs[right], step.outputs[0]
        if left.dtype not in _FACTORS[table]:
            raise _fault(step, f"only {', '.join(_FACTORS[table])} activations were calibrated")
        if not weight.constant or len(weight.dims) != 2:
            if kind == "fp32_product":
                return kind, (_activations(step),)
            raise _fault(step, "its second factor is no constant matrix")
        columns = _last(output)
        if not columns or weight.elements % columns:
            raise _fault(step, f"weights {list(weight.dims)} do not give {columns} columns")
        rows = output.elements // columns
        parts = [Part(table, rows, weight.elements, macs=rows * weight.elements, weight_bytes=weight.bytes)]
        if quantize:
            parts.append(Part("dynamic_quantize", left.elements, _last(left), inner=True))
        return kind, tuple(parts)

    return rule


def _activations(step: Step) -> Part:
    """Return the work of a product of two activations: one matrix for every example and head."""
    left, output = step.inputs[0], step.outputs[0]
    if len(output.dims) < 2 or len(left.dims) < 2:
        raise _fault(step, "it is a product of vectors")
    rows, columns = output.dims[-2:]
    depth = left.dims[-2] if step.attributes.get("transA") else left.dims[-1]
    count = output.elements // max(1, rows * columns)
    size = rows * columns * depth
    head = max(1, columns * depth // max(rows, 1))  # T x d by d x T, or T x T by T x d: the head's width either way
    return Part("batched_product", size, head, count=count, macs=count * size)


def attention_parts(query: Tensor, key: Tensor, value: Tensor, *, heads: int) -> tuple[Part, ...]:
    """Return the work of attention on (B, T, H) activations: three transpositions, and the products with their softmax."""
    batch, rows, width = query.dims
    length, wide = key.dims[1], value.dims[2]
    size = rows * length * (width + wide) // heads
    moved = [
        Part("transpose", tensor.elements, _last(tensor) // heads, inner=True)
        for tensor in (query, key, value)
        if tensor.dims[1] > 1
    ]
    core = Part("attention", size, wide // heads, count=batch * heads, macs=batch * heads * size)
    return (core, *moved)


def _heads(step: Step) -> int:
    heads = step.attributes.get("num_heads")
    if not isinstance(heads, int) or heads < 1:
        raise _fault(step, f"num_heads is {heads!r}")
    return heads


def _multi_head_attention(step: Step) -> tuple[Kind, tuple[Part, ...]]:
    if len(step.inputs) < 3 or any(len(tensor.dims) != 3 for tensor in step.inputs[:3]):
        raise _fault(step, "query, key and value of three dimensions each are needed")
    query, key, value = step.inputs[:3]
    return "fp32_product", attention_parts(query, key, value, heads=_heads(step))


def _whole_attention(table: str) -> Rule:
    """Return the rule of attention that holds the projections of queries, keys and values."""
    project = _product(table)

    def rule(step: Step) -> tuple[Kind, tuple[Part, ...]]:
        source, weight = step.inputs[:2]
        if len(source.dims) != 3 or len(weight.dims) != 2:
            raise _fault(step, "its input needs three dimensions, its weights two")
        batch, length, _ = source.dims
        projected = Tensor("float", (batch, length, weight.dims[1]))
        kind, parts = project(
            Step(step.name, step.op_type, step.inputs, (projected,), step.attributes, where=step.where)
        )
        third = Tensor("float", (batch, length, weight.dims[1] // 3))
        return kind, (*parts, *attention_parts(third, third, third, heads=_heads(step)))

    return rule


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant"), _view),
    **dict.fromkeys(("Slice", "Split", "Concat", "Expand", "ConstantOfShape", "Range", "Tile"), _moved),
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Equal", "Less", "Greater", "And", "Or", "Where"), _arithmetic
    ),
    **dict.fromkeys(("Abs", "Neg", "Floor", "Reciprocal", "Sqrt", "Not", "Clip", "Relu"), _values("unary")),
    "Sum": _values("sum"),
    "Cast": _values("cast"),
    "Transpose": _transpose,
    "Gather": _gather,
    "EmbedLayerNormalization": _embedding,
    "Erf": _values("erf"),
    "Tanh": _values("tanh"),
    "Gelu": _values("gelu"),
    "BiasGelu": _values("bias_gelu"),
    "FastGelu": _values("fast_gelu"),
    "Softmax": _values("softmax"),
    "LayerNormalization": _values("layer_norm"),
    "SkipLayerNormalization": _values("skip_layer_norm"),
    "ReduceMax": _values("reduce"),
    "ReduceMean": _values("reduce"),
    "ReduceSum": _values("reduce"),
    "DynamicQuantizeLinear": _values("dynamic_quantize"),
    "QuantizeLinear": _values("quantize"),
    "DequantizeLinear": _values("dequantize"),
    "MatMul": _product("fp32_product"),
    "FusedMatMul": _product("fp32_product"),
    "Gemm": _product("fp32_product"),
    "FusedGemm": _product("fp32_product"),
    "MatMulInteger": _product("int8_product"),
    "MatMulIntegerToFloat": _product("int8_product"),
    "DynamicQuantizeMatMul": _product("int8_product", quantize=True),
    "MultiHeadAttention": _multi_head_attention,
    "Attention": _whole_attention("fp32_product"),
    "QAttention": _whole_attention("int8_product"),
}
TABLES = (
    "view", "copy", "transpose", "transpose_inner", "binary", "broadcast", "sum", "cast", "unary", "erf", "tanh", "gelu",
    "bias_gelu", "fast_gelu", "softmax", "layer_norm", "skip_layer_norm", "reduce", "gather", "dynamic_quantize", "quantize",
    "dequantize", "fp32_product", "int8_product", "batched_product", "attention",
)  # fmt: skip
