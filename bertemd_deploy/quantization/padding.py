"""Padding that cannot widen the range of any activation: its rows become copies of the example's first one.

A scale measured over a whole tensor, as in `dynamic`, covers the rows of padding too, so the same example gets other codes
in a longer batch. Behind the embedding's LayerNorm each of these rows is replaced by that of the first token. From there on
every layer treats equal rows equally (they attend to the same unmasked keys), so they stay copies to the end and no tensor
holds a value that the example without padding does not. Nothing that is read changes: padding is masked as before. What is
left is the batch mates'. Graph in, graph out, torch-free; standard operators, within the noise of a measurement for free.
"""

from __future__ import annotations

import numpy as np
import onnx

from bertemd_deploy.errors import ExportError
from bertemd_deploy.onnx_edit import Editor, tidy

MASK = "attention_mask"


def copy_first_row(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a BERT graph, of any precision, whose rows of padding are copies of the first token's.

    Args:
        model: with the input `attention_mask`, 1 for tokens and 0 for padding, and the embedding's LayerNormalization as its
            first; padded on the right. It is left as it is.

    Raises:
        ExportError: the graph has no such input or no LayerNormalization.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    norm = next((node for node in result.graph.node if node.op_type == "LayerNormalization"), None)
    if norm is None or MASK not in {value.name for value in result.graph.input}:
        raise ExportError(
            f"int8: padding needs the graph's {MASK} and the LayerNormalization behind its embedding; "
            f"{'the input' if norm is not None else 'the operator'} is absent. Set export.exporter to torchscript."
        )
    editor = Editor(result)
    embedded = norm.output[0]

    def replace(node: onnx.NodeProto) -> bool:
        if node is not norm:
            return False
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        (every,) = editor.emit("LayerNormalization", list(node.input), name=f"{node.name}/tokens", **attributes)
        bounds = [editor.constant(np.array([value]), "bound") for value in (0, 1, 1)]
        (first,) = editor.emit("Slice", [every, *bounds], name="padding/first_row")
        (real,) = editor.emit("Cast", [MASK], name="padding/is_token", to=onnx.TensorProto.BOOL)
        last = editor.constant(np.array([2]), "last_axis")
        (wide,) = editor.emit("Unsqueeze", [real, last], name="padding/rows")
        editor.emit("Where", [wide, every, first], name="padding/copied", outputs=[embedded])
        return True

    editor.rewrite(replace)
    tidy(result, opset=next(entry.version for entry in result.opset_import if not entry.domain))
    return result
