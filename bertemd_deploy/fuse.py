"""ONNX Runtime's fused operators for a BERT, then the form of them that measures fastest on CPUs.

In: the fusable graph of `bert_graph`. ONNX Runtime's transformers optimizer fuses it, and the counts of what it fused are
checked against the layers: a pattern that silently did not match is an error here. `lower` then rewrites

    Attention               -> MatMul (query, key and value in one) + MultiHeadAttention
    last layer              -> the [CLS] row only, from the query on, where the head reads no other
    SkipLayerNormalization  -> Sum + LayerNormalization
    EmbedLayerNormalization -> Gather x 3 + Sum + LayerNormalization

All are exact. The first is faster for small heads and lets int8 weights be multiplied in one product; the last two because
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

    def replace(node: onnx.NodeProto) -> bool:
        if node.op_type == "EmbedLayerNormalization":
            _lower_embedding(editor, node)
        elif node.op_type == "Attention":
            if node is shortened:
                bounds = [editor.constant(np.array([value]), "bound") for value in (0, 1, 1)]
                editor.emit("Slice", [node.input[0], *bounds], name="first_row", outputs=[row])
            _lower_attention(editor, node, rows=row if node is shortened else "")
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


def _lower_attention(editor: Editor, node: onnx.NodeProto, *, rows: str) -> None:
    source, weight_name, bias_name, mask = node.input[:4]
    weight, bias = editor.array(weight_name), editor.array(bias_name)
    assert weight is not None
    assert bias is not None
    width = weight.shape[1] // 3
    if rows:
        (query,) = _project(editor, rows, weight[:, :width], bias[:width], name=f"{node.name}/query", parts=1)
        key, value = _project(editor, source, weight[:, width:], bias[width:], name=f"{node.name}/key_value", parts=2)
    else:
        query, key, value = _project(editor, source, weight, bias, name=f"{node.name}/query_key_value", parts=3)
    kept = {entry.name: attribute(node, entry.name) for entry in node.attribute}
    values = {name: kept[name] for name in ("num_heads", "mask_filter_value", "scale") if name in kept}
    editor.emit(
        "MultiHeadAttention",
        [query, key, value, "", mask],
        name=f"{node.name}/heads",
        outputs=[node.output[0]],
        domain=MICROSOFT,
        **values,
    )


def _project(editor: Editor, source: str, weight: np.ndarray, bias: np.ndarray, *, name: str, parts: int) -> list[str]:
    (product,) = editor.emit("MatMul", [source, editor.constant(weight, f"{name}/weight")], name=name)
    (total,) = editor.emit("Add", [product, editor.constant(bias, f"{name}/bias")], name=f"{name}/add")
    if parts == 1:
        return [total]
    sizes = editor.constant(np.full(parts, weight.shape[1] // parts, dtype=np.int64), f"{name}/sizes")
    return editor.emit("Split", [total, sizes], name=f"{name}/split", outputs=parts, axis=-1)


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
