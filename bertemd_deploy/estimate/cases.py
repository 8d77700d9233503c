"""The small graphs that a machine is calibrated with: one operator each, repeated, at a few sizes.

Repeated operators stand in a chain, each reading what the one before gave, or beside one another where a chain is not
possible; one call of the graph, less an empty call, over the number of operators, is the time of one. Inputs are random and
stay in the range in which every operator does its usual work. Weights are tiled from one random block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

WIDTH = 320  # values in a row
ROWS = (1, 16, 128, 1024, 4096, 16384)
SOFTMAX_WIDTHS = (16, 64, 256)
HEADS = 12
HEAD_WIDTHS = (24, 80)
LENGTHS = (4, 16, 64, 256, 512)
PRODUCT_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
PRODUCT_SHAPES = ((264, 264), (328, 1224), (712, 712), (712, 2888))  # there and back: K x N, then N x K
STREAM_SHAPE = (328, 1224)
STREAM_COPIES = (1, 5, 10, 20)  # pairs of weights: 3.2 to 64 MB in float32, beyond the caches of most machines
STREAM_ROWS = (1, 16, 128)
WAKE_ROWS = 128
TABLE_ROWS = 16_384
MICROSOFT = "com.microsoft"
_LONGEST_CHAIN, _SHORTEST_CHAIN = 32, 2
_CHAIN_VALUES = 200_000  # about as many values in all operators of a graph together
_CACHED_BYTES = 1_500_000  # of all values that passes take in turn, where they are small
_LOOKED_UP_BYTES = 8_000_000
_BLOCK = 1 << 16
_OPSET, _IR_VERSION = 17, 8

Feed = dict[str, Any]  # dtype, shape, and low and high (whole numbers) or scale (of normal ones)


@dataclass(frozen=True)
class Case:
    """One small graph to time.

    Attributes:
        name: unique.
        table: of the calibration, that it is measured for; "call", "wake" and "stream" are what is not a table.
        size, width: where in the table (see `operators.Part`).
        repeats: how many operators, or pairs of products, one call runs.
        feeds: inputs of the graph.
        build: makes the graph.
        macs: multiply-adds of one repeat.
        weight_bytes: constants of one repeat.
    """

    name: str
    table: str
    size: int
    width: int
    repeats: int
    feeds: dict[str, Feed]
    build: Callable[[], onnx.ModelProto] = field(compare=False)
    macs: int = 0
    weight_bytes: int = 0


def plan() -> list[Case]:
    """Return every case of a calibration."""
    cases = [_empty(), _views()]
    for rows in ROWS:
        cases += _passes(rows)
        cases += [
            _chained(f"softmax {width}", "softmax", "Softmax", rows * WIDTH // width, width, attributes={"axis": -1})
            for width in SOFTMAX_WIDTHS
        ]
    for length in LENGTHS:
        for width in HEAD_WIDTHS:
            cases += [_batched(length, width), _attention(length, width)]
    for rows in PRODUCT_ROWS:
        for shape in PRODUCT_SHAPES:
            cases += [product("fp32_product", rows, shape), product("int8_product", rows, shape)]
    cases += [product("fp32_product", 1, (16, 16), copies=8), product("int8_product", 1, (16, 16), copies=8)]
    cases += [product("stream", rows, STREAM_SHAPE, copies=copies) for rows in STREAM_ROWS for copies in STREAM_COPIES]
    cases += [product("wake", WAKE_ROWS, (264, 264), copies=copies) for copies in (1, 8)]
    return cases


def _model(
    nodes: Sequence[Any],
    *,
    inputs: dict[str, Feed],
    outputs: dict[str, str],
    constants: dict[str, NDArray[Any]] | None = None,
) -> onnx.ModelProto:
    """Return a graph; `outputs` maps names to types, their shapes are left to ONNX Runtime."""
    from onnx import helper, numpy_helper

    def kind(dtype: str) -> int:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    graph = helper.make_graph(
        list(nodes),
        "case",
        [helper.make_tensor_value_info(name, kind(feed["dtype"]), feed["shape"]) for name, feed in inputs.items()],
        [helper.make_tensor_value_info(name, kind(dtype), None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION)
    return model


def _floats(*shape: int, scale: float = 1.0) -> Feed:
    return {"dtype": "float32", "shape": list(shape), "scale": scale}


def _repeats(values: int) -> int:
    return int(np.clip(_CHAIN_VALUES // values, _SHORTEST_CHAIN, _LONGEST_CHAIN))


def _node(operator: str, inputs: Sequence[str], output: str | Sequence[str], **attributes: Any) -> Any:
    from onnx import helper

    outputs = [output] if isinstance(output, str) else list(output)
    domain = MICROSOFT if operator in _MICROSOFT_OPERATORS else ""
    return helper.make_node(operator, list(inputs), outputs, name=outputs[0], domain=domain, **attributes)


_MICROSOFT_OPERATORS = {
    "Gelu", "BiasGelu", "FastGelu", "SkipLayerNormalization", "DynamicQuantizeMatMul", "MultiHeadAttention",
}  # fmt: skip


def _empty() -> Case:
    """Return the graph of one small Identity, whose call is the price of any call."""
    feeds = {"x": _floats(1, 16)}

    def build() -> onnx.ModelProto:
        return _model([_node("Identity", ["x"], "y")], inputs=feeds, outputs={"y": "float32"})

    return Case("call", "call", 1, 1, 1, feeds, build)


def _views() -> Case:
    """Return a chain of Reshape, which moves nothing."""
    count, feeds = _LONGEST_CHAIN, {"x": _floats(16, WIDTH)}

    def build() -> onnx.ModelProto:
        nodes = [_node("Reshape", [f"x{at or ''}", f"shape{at % 2}"], f"x{at + 1}") for at in range(count)]
        shapes = {"shape0": np.array([WIDTH, 16]), "shape1": np.array([16, WIDTH])}
        return _model(nodes, inputs=feeds, outputs={f"x{count}": "float32"}, constants=shapes)

    return Case("view", "view", 1, 1, count, feeds, build)


def _chained(
    name: str,
    table: str,
    operator: str,
    rows: int,
    width: int = WIDTH,
    *,
    others: Sequence[str] = (),
    attributes: dict[str, Any] | None = None,
) -> Case:
    """Return chains of one operator on several (rows, width) values in turn, so that none is in the nearest cache.

    Args:
        name: of the case, completed by the number of rows.
        table: of the calibration.
        operator: type of the operator.
        rows: of the values.
        width: of the values.
        others: further inputs: "full" is another input of the values' shape, anything else a constant row.
        attributes: of the operator.
    """
    buffers = int(np.clip(_CACHED_BYTES // (4 * rows * width), 2, 8))
    steps = max(2, _repeats(rows * width) // buffers)
    feeds = {f"x{at}_0": _floats(rows, width) for at in range(buffers)}
    feeds |= {"full": _floats(rows, width)} if "full" in others else {}

    def build() -> onnx.ModelProto:
        nodes = [
            _node(operator, [f"x{at}_{step}", *others], f"x{at}_{step + 1}", **(attributes or {}))
            for step in range(steps)
            for at in range(buffers)
        ]
        row = np.linspace(0.5, 1.5, width, dtype=np.float32)
        constants = {other: row for other in others if other != "full"}
        given = {f"x{at}_{steps}": "float32" for at in range(buffers)}
        return _model(nodes, inputs=feeds, outputs=given, constants=constants)

    return Case(f"{name} {rows}", table, rows * width, width, buffers * steps, feeds, build)


def _passes(rows: int) -> Iterator[Case]:
    """Yield the operators that pass over (rows, WIDTH) values once."""
    yield _chained("broadcast", "broadcast", "Add", rows, others=["row"])
    yield _chained("binary", "binary", "Add", rows, others=["full"])
    yield _chained("sum", "sum", "Sum", rows, others=["full"])
    yield _chained("unary", "unary", "Abs", rows)
    yield _chained("erf", "erf", "Erf", rows)
    yield _chained("tanh", "tanh", "Tanh", rows)
    yield _chained("gelu", "gelu", "Gelu", rows)
    yield _chained("bias_gelu", "bias_gelu", "BiasGelu", rows, others=["row"])
    yield _chained("fast_gelu", "fast_gelu", "FastGelu", rows)
    yield _chained("layer_norm", "layer_norm", "LayerNormalization", rows, others=["row", "row_2"])
    yield _chained(
        "skip_layer_norm", "skip_layer_norm", "SkipLayerNormalization", rows, others=["full", "row", "row_2"]
    )
    yield _casts(rows)
    yield _splits(rows)
    yield _transposes("transpose", rows, ((0, 2, 1, 3), (0, 2, 1, 3)))
    yield _transposes("transpose_inner", rows, ((0, 2, 3, 1), (0, 3, 1, 2)))
    step = {"scale": np.float32(0.05), "zero": np.uint8(128)}
    yield _beside("dynamic_quantize", "DynamicQuantizeLinear", rows, outputs=("codes", "scale", "zero"), keep="scale")
    yield _beside("quantize", "QuantizeLinear", rows, constants=step, dtype="uint8")
    yield _beside("dequantize", "DequantizeLinear", rows, constants=step, source="uint8")
    yield _beside("reduce", "ReduceMax", rows, attributes={"axes": [-1]})
    yield _lookups(rows)


def _casts(rows: int) -> Case:
    """Return a chain of casts to whole numbers and back."""
    count, feeds = _repeats(rows * WIDTH) // 2 * 2, {"x": _floats(rows, WIDTH, scale=100.0)}

    def build() -> onnx.ModelProto:
        from onnx import TensorProto

        kinds = (TensorProto.INT32, TensorProto.FLOAT)
        nodes = [_node("Cast", [f"x{at or ''}"], f"x{at + 1}", to=kinds[at % 2]) for at in range(count)]
        return _model(nodes, inputs=feeds, outputs={f"x{count}": "float32"})

    return Case(f"cast {rows}", "cast", rows * WIDTH, WIDTH, count, feeds, build)


def _splits(rows: int) -> Case:
    """Return a chain of Split and Concat, which copy every value."""
    pairs, feeds = _repeats(rows * WIDTH) // 2, {"x": _floats(rows, WIDTH)}

    def build() -> onnx.ModelProto:
        nodes = []
        for at in range(pairs):
            nodes.append(_node("Split", [f"x{at or ''}"], [f"left{at}", f"right{at}"], axis=-1))
            nodes.append(_node("Concat", [f"right{at}", f"left{at}"], f"x{at + 1}", axis=-1))
        return _model(nodes, inputs=feeds, outputs={f"x{pairs}": "float32"})

    return Case(f"copy {rows}", "copy", rows * WIDTH, WIDTH, 2 * pairs, feeds, build)


def _transposes(table: str, rows: int, orders: Sequence[Sequence[int]]) -> Case:
    """Return a chain of transpositions of (1, rows, 10, 32), there and back."""
    count, feeds = _repeats(rows * WIDTH) // 2 * 2, {"x": _floats(1, rows, WIDTH // 32, 32)}

    def build() -> onnx.ModelProto:
        nodes = [_node("Transpose", [f"x{at or ''}"], f"x{at + 1}", perm=list(orders[at % 2])) for at in range(count)]
        return _model(nodes, inputs=feeds, outputs={f"x{count}": "float32"})

    return Case(f"{table} {rows}", table, rows * WIDTH, WIDTH, count, feeds, build)


def _beside(
    table: str,
    operator: str,
    rows: int,
    *,
    constants: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
    outputs: Sequence[str] = ("y",),
    keep: str = "y",
    source: str = "float32",
    dtype: str = "float32",
) -> Case:
    """Return operators that all read the same (rows, WIDTH) values.

    Args:
        table: of the calibration.
        operator: type of the operator.
        rows: of the values.
        constants: its further inputs.
        attributes: of the operator.
        outputs: of the operator; `keep` is the one that the graph gives out.
        keep: see `outputs`.
        source: type of the values.
        dtype: type of what is given out.
    """
    count = min(8, _repeats(rows * WIDTH))
    values: Feed = {"dtype": source, "shape": [rows, WIDTH], "low": 0, "high": 256}
    feeds = {"x": _floats(rows, WIDTH) if source == "float32" else values}
    held = {name: np.asarray(value) for name, value in (constants or {}).items()}

    def build() -> onnx.ModelProto:
        nodes = [
            _node(operator, ["x", *held], [f"{name}{at}" for name in outputs], **(attributes or {}))
            for at in range(count)
        ]
        given = {f"{keep}{at}": dtype for at in range(count)}
        return _model(nodes, inputs=feeds, outputs=given, constants=held)

    return Case(f"{table} {rows}", table, rows * WIDTH, WIDTH, count, feeds, build)


def _lookups(rows: int) -> Case:
    """Return lookups of different rows of one table of words."""
    count = int(np.clip(_LOOKED_UP_BYTES // (4 * rows * WIDTH), 4, _LONGEST_CHAIN))
    indices: Feed = {"dtype": "int64", "shape": [rows], "low": 0, "high": TABLE_ROWS}
    feeds = {f"rows{at}": indices for at in range(count)}

    def build() -> onnx.ModelProto:
        nodes = [_node("Gather", ["table", f"rows{at}"], f"y{at}", axis=0) for at in range(count)]
        table = {"table": _weights(TABLE_ROWS, WIDTH)}
        return _model(nodes, inputs=feeds, outputs={f"y{at}": "float32" for at in range(count)}, constants=table)

    return Case(f"gather {rows}", "gather", 4 * rows * WIDTH, WIDTH, count, feeds, build)


def _batched(length: int, width: int) -> Case:
    """Return pairs of products of activations, T x d by d x T and T x T by T x d, for every head."""
    size = length * length * width
    pairs = int(np.clip(8_000_000 // (2 * HEADS * size), 1, 8))
    feeds = {
        "x": _floats(1, HEADS, length, width),
        "key": _floats(1, HEADS, width, length, scale=width**-0.5),
        "value": _floats(1, HEADS, length, width, scale=length**-0.5),
    }

    def build() -> onnx.ModelProto:
        nodes = []
        for at in range(pairs):
            nodes.append(_node("MatMul", [f"x{at or ''}", "key"], f"scores{at}"))
            nodes.append(_node("MatMul", [f"scores{at}", "value"], f"x{at + 1}"))
        return _model(nodes, inputs=feeds, outputs={f"x{pairs}": "float32"})

    macs = HEADS * size
    return Case(f"batched {length} x {width}", "batched_product", size, width, 2 * pairs, feeds, build, macs=macs)


def _attention(length: int, width: int) -> Case:
    """Return a chain of attentions whose queries are what the one before gave."""
    size = 2 * length * length * width
    count = int(np.clip(8_000_000 // (HEADS * size), 1, 8))
    feeds = {name: _floats(1, length, HEADS * width) for name in ("x", "key", "value")}

    def build() -> onnx.ModelProto:
        nodes = [
            _node("MultiHeadAttention", [f"x{at or ''}", "key", "value"], f"x{at + 1}", num_heads=HEADS)
            for at in range(count)
        ]
        return _model(nodes, inputs=feeds, outputs={f"x{count}": "float32"})

    return Case(f"attention {length} x {width}", "attention", size, width, count, feeds, build, macs=HEADS * size)


def _weights(rows: int, columns: int, *, scale: float = 1.0, seed: int = 0) -> NDArray[np.float32]:
    """Return (rows, columns) random weights of standard deviation `scale`, others for another seed."""
    block = np.random.default_rng(seed).normal(0, scale, _BLOCK + 1).astype(np.float32)
    return np.resize(block, (rows, columns))


def product(table: str, rows: int, shape: tuple[int, int], *, copies: int = 1) -> Case:
    """Return a chain of pairs of products, K x N and back, each with weights of its own.

    Args:
        table: "int8_product", whose products quantize their activations themselves, or one whose weights are float32.
        rows: of the activations.
        shape: K, N.
        copies: pairs.
    """
    narrow, wide = shape
    integer = table == "int8_product"
    feeds = {"x": _floats(rows, narrow)}

    def build() -> onnx.ModelProto:
        nodes: list[Any] = []
        constants: dict[str, NDArray[Any]] = {}
        for at in range(2 * copies):
            inner, outer = (narrow, wide) if at % 2 == 0 else (wide, narrow)
            weight = _weights(inner, outer, scale=1.0 if integer else inner**-0.5, seed=at)
            if integer:
                constants[f"w{at}"] = np.clip(np.rint(weight * 40), -127, 127).astype(np.int8)
                constants[f"s{at}"] = np.full(outer, 1 / (40 * inner**0.5), dtype=np.float32)
                constants[f"b{at}"] = np.linspace(-0.1, 0.1, outer, dtype=np.float32)
                inputs = [f"x{at or ''}", f"w{at}", f"s{at}", "", f"b{at}"]
                nodes.append(_node("DynamicQuantizeMatMul", inputs, f"x{at + 1}"))
            else:
                constants[f"w{at}"] = weight
                nodes.append(_node("MatMul", [f"x{at or ''}", f"w{at}"], f"x{at + 1}"))
        return _model(nodes, inputs=feeds, outputs={f"x{2 * copies}": "float32"}, constants=constants)

    weights = 2 * narrow * wide
    return Case(
        f"{table} {rows} x {narrow} x {wide}" + (f" x {copies}" if copies > 1 else ""),
        table,
        rows,
        narrow * wide,
        copies,
        feeds,
        build,
        macs=rows * weights,
        weight_bytes=weights * (1 if integer else 4),
    )
