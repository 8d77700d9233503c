"""Half precision: an fp32 graph with its weights and products in float16, for GPUs. Graph in, graph out, torch-free.

    float16    weights, tables, matrix products, activations
    float32    Softmax and LayerNormalization with their parameters, the graph's outputs

ONNX Runtime's converter writes the casts. Prepared for it: the mask's bias, float32's lowest number, becomes -1e4, since
beyond float16's range it would turn infinite, and sums of infinite numbers into NaN; exp(-1e4) is 0 all the same.

A CPU has no float16 kernels for the products: ONNX Runtime casts weights to float32 at load and activations around every
operator. That takes the memory of the fp32 graph and is no faster (6 layers of 384, 1 x 128, one core: 27 ms against 26), so
for a CPU the graph is refused unless forced.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bertemd_deploy.errors import ExportError, RecipeError
from bertemd_deploy.onnx_edit import Editor, attribute, tidy

Device = Literal["cpu", "gpu"]
IN_FLOAT32 = ("LayerNormalization", "Softmax")
MASKED = -1e4
_LARGEST = float(np.finfo(np.float16).max)


def to_half(model: onnx.ModelProto, *, device: Device, force: bool = False) -> onnx.ModelProto:
    """Return the float16 form of an fp32 graph; inputs and outputs keep their types.

    Args:
        model: portable or fused fp32 graph, tidied; it is left as it is.
        device: what it is to run on.
        force: make one for a CPU all the same.

    Raises:
        RecipeError: for a CPU, not forced.
        ExportError: a weight is beyond float16's range, or the graph is quantized.
    """
    if device == "cpu" and not force:
        raise RecipeError(
            "fp16: asked for on a CPU, which has no float16 kernels for matrix products. ONNX Runtime would cast weights and "
            "activations to float32 and back: slower than the fp32 graph, at the same memory. Use int8 on CPUs, or force it "
            "to try out a graph that is meant for GPUs."
        )
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    _bound_mask(prepared)
    _check_range(prepared)
    kept = [node for node in prepared.graph.node if node.op_type in IN_FLOAT32]
    _own_parameters(prepared, kept)
    constants = {tensor.name for tensor in prepared.graph.initializer}
    for name in dict.fromkeys(
        name for node in kept for name in (*node.input, *node.output) if name and name not in constants
    ):
        # What the converter casts at, it knows by its type; shape inference does not see past Microsoft's operators.
        prepared.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    converted: onnx.ModelProto = convert_float_to_float16(
        prepared, keep_io_types=True, disable_shape_infer=True, op_block_list=list(IN_FLOAT32)
    )
    OnnxModel(converted).topological_sort()  # the converter appends its casts at the end
    tidy(converted, opset=next(entry.version for entry in converted.opset_import if not entry.domain))
    return converted


def _bound_mask(model: onnx.ModelProto) -> None:
    """Replace the lowest float32 by `MASKED`, as a constant and as the attribute of fused attention."""
    for at, tensor in enumerate(model.graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            if array.size == 1 and array.item() < -_LARGEST:
                bounded = numpy_helper.from_array(np.full_like(array, MASKED), tensor.name)
                model.graph.initializer[at].CopyFrom(bounded)
    for node in model.graph.node:
        for entry in node.attribute:
            if entry.name == "mask_filter_value" and attribute(node, entry.name) < MASKED:
                entry.f = MASKED


def _check_range(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8):
            raise ExportError(f"fp16: {tensor.name} is int8 already. Convert the fp32 graph.")
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(tensor)
        largest = float(np.abs(array).max(initial=0))
        if not largest <= _LARGEST:
            raise ExportError(
                f"fp16: {tensor.name} holds {largest:.3g}, float16 up to {_LARGEST:g}. Keep the fp32 graph for this model."
            )


def _own_parameters(model: onnx.ModelProto, kept: Collection[onnx.NodeProto]) -> None:
    """Give the nodes kept in float32 their own copy of a constant that others read too: equal ones are shared."""
    editor = Editor(model)
    names = {node.name for node in kept}
    for node in kept:
        for at, name in enumerate(node.input):
            array = editor.array(name)
            if array is not None and any(reader.name not in names for reader in editor.consumers[name]):
                node.input[at] = editor.constant(array, f"{name}/float32")
