"""ONNX Runtime's fused operators for a BERT, then the form of them that measures fastest on CPUs.

In: the fusable graph of `bert_graph`. ONNX Runtime's transformers optimizer fuses it, and the counts of what it fused are
checked against the layers: a pattern that silently did not match is an error here. `lower` then rewrites

    Attention               -> MatMul (query, key and value in one) + MultiHeadAttention, padding masked by one more
                               entry in every head's query (1) and key (0, or the mask's bias)
    last layer              -> the [CLS] row only, from the query on, where the head reads no other
    SkipLayerNormalization  -> Sum + LayerNormalization
    EmbedLayerNormalization -> Gather x 3 + Sum + LayerNormalization

All are exact. The first is faster for small heads, lets int8 weights be multiplied in one product and spares a pass over
the score maps (128 x 312, 12 heads: 375 microseconds against 408); and ONNX Runtime up to 1.20 misreads a mask over keys where
there are fewer queries. The last two because
ONNX Runtime's CPU kernels of the fused operators are not vectorised (128 x 312: 155 microseconds against 30).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from bertemd_deploy.errors import ExportError
from bertemd_deploy.onnx_edit import MICROSOFT, Editor, attribute, declare_microsoft, save, tidy

_LAYER_NORM_EPSILON = 1e-12  # what ONNX Runtime takes where its fused operators carry none


def fuse(
    model: onnx.ModelProto, *, layers: int, heads: int, hidden: int, opset: int, first_row: bool = True
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Return the fused fp32 graph and how many of each operator ONNX Runtime fused.

    Args:
        model: the fusable graph; it is left as it is.
        layers: encoder layers, which the counts must match.
        heads: attention heads.
        hidden: hidden size.
        opset: operator set of `model`.
        first_row: the head reads the first token only, so that the last layer need compute no other.

    Raises:
        ExportError: ONNX Runtime found fewer or more patterns than the model has.
    """
    fused = optimize(model, heads=heads, hidden=hidden)
    counts = fused_counts(fused)
    check_counts(counts, layers=layers)
    lower(fused, first_row=first_row)
    tidy(fused, opset=opset)
    return fused, counts


def optimize(model: onnx.ModelProto, *, heads: int, hidden: int) -> onnx.ModelProto:
    """Return what ONNX Runtime's transformers optimizer makes of `model`, exact operators only."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.enable_gelu_approximation = False
    options.use_raw_attention_mask(True)  # the other form keeps a length per row, which only right padding fits
    noisy = [
        name for name in logging.root.manager.loggerDict if name.startswith(("fusion", "onnx_model", "onnxruntime"))
    ]
    levels = {name: logging.getLogger(name).level for name in noisy}
    for name in noisy:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "fusable.onnx"
            save(model, path)
            optimized = optimize_model(
                str(path),
                model_type="bert",
                num_heads=heads,
                hidden_size=hidden,
                optimization_options=options,
                opt_level=0,  # ONNX Runtime's own C++ passes would write operators for this machine only
                use_gpu=False,
            )
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    result: onnx.ModelProto = optimized.model
    declare_microsoft(result)
    return result


def fused_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Return how many of each fused operator `model` has, kinds of one purpose together."""
    types = [node.op_type for node in model.graph.node]
    return {
        "attention": types.count("Attention") + types.count("MultiHeadAttention"),
        "skip_layer_normalization": types.count("SkipLayerNormalization"),
        "gelu": types.count("BiasGelu") + types.count("Gelu"),
        "embed_layer_normalization": types.count("EmbedLayerNormalization"),
    }


def check_counts(counts: Mapping[str, int], *, layers: int) -> None:
    """Check what was fused against the model's layers.

    Raises:
        ExportError: a count is off; the message lists found and expected.
    """
    expected = {
        "attention": layers,
        "skip_layer_normalization": 2 * layers,
        "gelu": layers,
        "embed_layer_normalization": 1,
    }
    wrong = [
        f"{name} {counts[name]} (expected {wanted})" for name, wanted in expected.items() if counts[name] != wanted
    ]
    if wrong:
        import onnxruntime

        raise ExportError(
            f"model_fused.onnx: ONNX Runtime {onnxruntime.__version__} fused {', '.join(wrong)} of a {layers}-layer model. "
            "Set export.exporter to torchscript and export.opset to 17, the pair its patterns are tested with."
        )


def lower(model: onnx.ModelProto, *, first_row: bool) -> None:
    """Rewrite a fused graph in place into its fastest form on CPUs (table above); `first_row` as for `fuse`."""
    editor = Editor(model)
    shortened = [node for node in model.graph.node if node.op_type == "Attention"][-1] if first_row else None
    residual = None if shortened is None else _residual_of(editor, shortened)
    row = editor.fresh("first_row") if first_row else ""
    mask_column: list[str] = []  # made once, in front of the first attention

    def replace(node: onnx.NodeProto) -> bool:
        if node.op_type == "EmbedLayerNormalization":
            _lower_embedding(editor, node)
        elif node.op_type == "Attention":
            if not mask_column:
                mask_column.append(_mask_column(editor, node))
            if node is shortened:
                bounds = [editor.constant(np.array([value]), "bound") for value in (0, 1, 1)]
                editor.emit("Slice", [node.input[0], *bounds], name="first_row", outputs=[row])
            _lower_attention(editor, node, mask_column=mask_column[0], rows=row if node is shortened else "")
        elif node.op_type == "SkipLayerNormalization":
            rename = {shortened.input[0]: row} if shortened is not None and node is residual else {}
            _lower_skip(editor, node, rename=rename)
        else:
            return False
        return True

    editor.rewrite(replace)


def _residual_of(editor: Editor, attention: onnx.NodeProto) -> onnx.NodeProto:
    """Return the SkipLayerNormalization that adds an attention's input to its projected output."""
    name = attention.output[0]
    for _ in range(4):
        (node,) = editor.consumers[name]
        if node.op_type == "SkipLayerNormalization":
            return node
        name = node.output[0]
    raise ExportError(f"{attention.name}: no residual addition follows it. Set export.exporter to torchscript.")


def _lower_embedding(editor: Editor, node: onnx.NodeProto) -> None:
    ids, types, words, positions, segments, scale, bias = node.input[:7]
    table = editor.array(positions)
    assert table is not None
    (word,) = editor.emit("Gather", [words, ids], name="embedding/word", axis=0)
    (segment,) = editor.emit("Gather", [segments, types], name="embedding/segment", axis=0)
    (length,) = editor.emit("Shape", [ids], name="embedding/length", start=1, end=2)
    numbers = editor.constant(np.arange(len(table), dtype=np.int64), "position_ids")
    start = editor.constant(np.array([0]), "bound")
    (rows,) = editor.emit("Slice", [numbers, start, length, start], name="embedding/positions")
    (position,) = editor.emit("Gather", [positions, rows], name="embedding/position", axis=0)
    (inner,) = editor.emit("Sum", [segment, position], name="embedding/inner")
    (total,) = editor.emit("Sum", [word, inner], name="embedding/sum")
    _normalise(editor, node, [total, scale, bias], name="embedding/norm")


def _lower_attention(editor: Editor, node: onnx.NodeProto, *, mask_column: str, rows: str) -> None:
    heads, weights, biases = _projections(editor, node)
    scale = attribute(node, "scale", (weights[2].shape[1] // heads) ** -0.5)
    for at, fill in enumerate((1.0, 0.0)):  # query, key
        weights[at], biases[at] = _widen(weights[at], heads, fill=0.0), _widen(biases[at], heads, fill=fill)
    if rows:
        parts = _project(editor, rows, weights[:1], biases[:1], name=f"{node.name}/query")
        parts += _project(editor, node.input[0], weights[1:], biases[1:], name=f"{node.name}/key_value")
    else:
        parts = _project(editor, node.input[0], weights, biases, name=f"{node.name}/query_key_value")
    (parts[1],) = editor.emit("Add", [parts[1], mask_column], name=f"{node.name}/mask")
    editor.emit(
        "MultiHeadAttention",
        parts,
        name=f"{node.name}/heads",
        outputs=[node.output[0]],
        domain=MICROSOFT,
        num_heads=heads,
        scale=scale,
    )


def _projections(editor: Editor, node: onnx.NodeProto) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
    """Return an Attention's heads, and weights (H, H) and biases (H,) of query, key and value."""
    weight, bias = (editor.array(name) for name in node.input[1:3])
    assert weight is not None
    assert bias is not None
    return attribute(node, "num_heads"), np.split(weight, 3, axis=1), np.split(bias, 3)


def _widen(values: np.ndarray, heads: int, *, fill: float) -> np.ndarray:
    """Return (..., heads * d) with one more entry for every head, `fill`: (..., heads * (d + 1))."""
    split = values.reshape(*values.shape[:-1], heads, -1)
    wide = np.pad(split, [(0, 0)] * (split.ndim - 1) + [(0, 1)], constant_values=fill)
    return np.ascontiguousarray(wide.reshape(*values.shape[:-1], -1))


def _mask_column(editor: Editor, node: onnx.NodeProto) -> str:
    """Emit what the mask adds to all widened keys, (B, T, heads * (d + 1)): its bias in every head's last entry, else 0."""
    heads, weights, _ = _projections(editor, node)
    entry = _widen(np.zeros(weights[1].shape[1], dtype=np.float32), heads, fill=1.0)
    lowest, one = (editor.constant(np.float32(value), "mask") for value in (np.finfo(np.float32).min, 1.0))
    axis = editor.constant(np.array([2]), "axis")
    (visible,) = editor.emit("Cast", [node.input[3]], name="mask/visible", to=onnx.TensorProto.FLOAT)
    (hidden,) = editor.emit("Sub", [one, visible], name="mask/hidden")
    (bias,) = editor.emit("Mul", [hidden, lowest], name="mask/bias")
    (tokens,) = editor.emit("Unsqueeze", [bias, axis], name="mask/tokens")
    (column,) = editor.emit("Mul", [tokens, editor.constant(entry, "mask/entry")], name="mask/column")
    return column


def _project(
    editor: Editor, source: str, weights: list[np.ndarray], biases: list[np.ndarray], *, name: str
) -> list[str]:
    """Emit several projections of one input as one product; return the outputs."""
    weight, bias = np.concatenate(weights, axis=1), np.concatenate(biases)
    (product,) = editor.emit("MatMul", [source, editor.constant(weight, f"{name}/weight")], name=name)
    (total,) = editor.emit("Add", [product, editor.constant(bias, f"{name}/bias")], name=f"{name}/add")
    if len(weights) == 1:
        return [total]
    widths = np.array([part.shape[1] for part in weights], dtype=np.int64)
    sizes = editor.constant(widths, f"{name}/sizes")
    return editor.emit("Split", [total, sizes], name=f"{name}/split", outputs=len(weights), axis=-1)


def _lower_skip(editor: Editor, node: onnx.NodeProto, *, rename: Mapping[str, str]) -> None:
    left, right, scale, bias = node.input[:4]
    left, right = rename.get(left, left), rename.get(right, right)
    if len(node.input) > 4 and node.input[4]:
        producer = editor.producers.get(left)
        if producer is None or producer.op_type != "MatMul":
            left, right = right, left
        (left,) = editor.emit("Add", [left, node.input[4]], name=f"{node.name}/bias")
    (total,) = editor.emit("Sum", [left, right], name=f"{node.name}/sum")
    _normalise(editor, node, [total, scale, bias], name=f"{node.name}/norm")


def _normalise(editor: Editor, node: onnx.NodeProto, inputs: list[str], *, name: str) -> None:
    epsilon = attribute(node, "epsilon", _LAYER_NORM_EPSILON)
    editor.emit("LayerNormalization", inputs, name=name, outputs=[node.output[0]], axis=-1, epsilon=epsilon)
