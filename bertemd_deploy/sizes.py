"""What the bytes of an ONNX file of a BERT are: embedding, encoder, head, and everything that is no weight.

    embedding  constants that the first LayerNormalization and what leads to it read
    head       constants that only what follows the last LayerNormalization reads
    encoder    the constants between
    metadata   nodes, their names and attributes, inputs and outputs, properties

The four add up to the file to the byte. A constant that several parts read counts for the first of them. Scales and zero
points belong to what they scale. Works on every form written here: fp32, fp16, int8, fused, static. onnx is imported late.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bertemd_deploy.errors import ExportError

if TYPE_CHECKING:
    import onnx

COMPONENTS = ("embedding", "encoder", "head", "metadata")
_NORMS = ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization")


def component_sizes(model: onnx.ModelProto | Path) -> dict[str, int]:
    """Return the bytes of each of `COMPONENTS` in a graph, or in the file that holds it; their sum is the whole.

    Raises:
        ExportError: the graph has no LayerNormalization, or keeps weights in other files.
    """
    loaded, total = _loaded(model)
    external = [tensor.name for tensor in loaded.graph.initializer if tensor.external_data]
    if external:
        raise ExportError(f"{_name(model)}: keeps {external[0]} and {len(external) - 1} more weights in other files.")
    readers = _first_readers(loaded, where=_name(model))
    sizes = dict.fromkeys(COMPONENTS, 0)
    for tensor in loaded.graph.initializer:
        if tensor.name not in readers:
            continue  # nothing reads it: no weight
        size = tensor.ByteSize()
        # In the graph's message each constant has a field number (one byte) and a length before it, seven bits a byte.
        sizes[readers[tensor.name]] += 1 + max(1, -(-size.bit_length() // 7)) + size
    return sizes | {"metadata": total - sum(sizes.values())}


def stored_twice(model: onnx.ModelProto | Path) -> list[tuple[str, ...]]:
    """Return the names of constants whose type, shape and values are the same, group by group."""
    from onnx import numpy_helper

    groups: dict[bytes, list[str]] = {}
    for tensor in _loaded(model)[0].graph.initializer:
        array = numpy_helper.to_array(tensor)
        key = hashlib.sha256(f"{tensor.data_type}{array.shape}".encode() + array.tobytes()).digest()
        groups.setdefault(key, []).append(tensor.name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _loaded(model: onnx.ModelProto | Path) -> tuple[onnx.ModelProto, int]:
    """Return a graph and its bytes, on disk or as it would be written."""
    if not isinstance(model, Path):
        return model, model.ByteSize()
    import onnx

    return onnx.load_model(model, load_external_data=False), model.stat().st_size


def _name(model: onnx.ModelProto | Path) -> str:
    return str(model) if isinstance(model, Path) else "the graph"


def _first_readers(model: onnx.ModelProto, *, where: str) -> dict[str, str]:
    """Return the component of every value of a graph by the first of `COMPONENTS` that reads it."""
    nodes = list(model.graph.node)
    norms = [at for at, node in enumerate(nodes) if node.op_type in _NORMS]
    if not norms:
        raise ExportError(f"{where}: has no LayerNormalization, so it is no BERT; its parts cannot be told apart.")
    before = {nodes[norms[0]].output[0]}
    for node in reversed(nodes[: norms[0] + 1]):
        if before.intersection(node.output):
            before.update(node.input)
    behind = set(nodes[norms[-1]].output)
    for node in nodes[norms[-1] + 1 :]:
        if behind.intersection(node.input):
            behind.update(node.output)
    given = {value.name for value in model.graph.input}
    for node in nodes:
        if given.intersection(node.input):
            given.update(node.output)
    found: dict[str, str] = {}

    def read(names: Iterable[str], by: str) -> None:
        for name in names:
            known = found.get(name, by)
            found[name] = min(known, by, key=COMPONENTS.index)

    # Backwards, so that what is computed of constants alone (dequantized weights) is read where its result is.
    for node in reversed(nodes):
        if before.intersection(node.output):
            read(node.input, "embedding")
        elif not given.intersection(node.output):
            read(node.input, found.get(node.output[0], "encoder"))
        elif behind.intersection(node.output) and not set(nodes[norms[-1]].output).intersection(node.output):
            read(node.input, "head")
        else:
            read(node.input, "encoder")
    return found
