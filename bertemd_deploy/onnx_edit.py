"""Rewriting ONNX graphs: constants by name, nodes by output, one pass that replaces nodes, and a tidy-up.

In and out: `onnx.ModelProto`. A replacement keeps the names of the outputs it replaces, so nodes further down need no
change. What to replace with what is left to `fuse` and `quantize`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bertemd_deploy.errors import ExportError

MICROSOFT = "com.microsoft"
# The oldest file format that can hold each operator set: what old runtimes on devices still read.
IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}


class Editor:
    """One model being rewritten; it is changed in place."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Index the constants, producers and consumers of `model`."""
        self.model = model
        self._emitted: list[onnx.NodeProto] = []
        self._counts: Counter[str] = Counter()
        self._index()

    def _index(self) -> None:
        graph = self.model.graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in set(node.input):
                self.consumers.setdefault(name, []).append(node)
        self._names = set(self._constants) | set(self.producers) | {node.name for node in graph.node}
        self._names |= {value.name for value in (*graph.input, *graph.output)}

    def fresh(self, hint: str) -> str:
        """Return a name that nothing in the graph has yet."""
        name = hint
        while name in self._names:
            self._counts[hint] += 1
            name = f"{hint}_{self._counts[hint]}"
        self._names.add(name)
        return name

    def array(self, name: str) -> NDArray[Any] | None:
        """Return the constant called `name`, or None where it is computed."""
        tensor = self._constants.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def constant(self, value: NDArray[Any] | np.generic, hint: str) -> str:
        """Add a constant and return its name."""
        tensor = numpy_helper.from_array(np.asarray(value, order="C"), self.fresh(hint))
        self.model.graph.initializer.append(tensor)
        self._constants[tensor.name] = tensor
        return tensor.name

    def emit(
        self,
        operator: str,
        inputs: list[str],
        *,
        name: str,
        outputs: int | list[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node to the replacement being made; return its outputs' names.

        Args:
            operator: operator type.
            inputs: names; an empty one is an input left out.
            name: node name, made unique.
            outputs: how many to name freshly, or the names of the outputs that this node takes over.
            domain: operator domain.
            **attributes: the node's attributes.
        """
        name = self.fresh(name)
        names = outputs if isinstance(outputs, list) else [self.fresh(f"{name}_out") for _ in range(outputs)]
        self._emitted.append(helper.make_node(operator, inputs, names, name=name, domain=domain, **attributes))
        return names

    def rewrite(self, replace: Callable[[onnx.NodeProto], bool]) -> None:
        """Visit every node in order; where `replace` returns True, what it emitted takes the node's place.

        What it emitted and False goes in front of the node, which stays.
        """
        nodes = list(self.model.graph.node)
        kept: list[onnx.NodeProto] = []
        for node in nodes:
            self._emitted = []
            replaced = replace(node)
            kept.extend(self._emitted)
            if not replaced:
                kept.append(node)
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        self._index()


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return a node's attribute as a Python value, or `default` where it has none of that name."""
    for found in node.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def tidy(model: onnx.ModelProto, *, opset: int) -> None:
    """Make constants initializers, share equal ones, drop Identity and dead nodes, and set the oldest file format.

    Raises:
        ExportError: the model is not of the operator set asked for.
    """
    found = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if found != opset:
        raise ExportError(
            f"the exporter wrote operator set {found}, asked for {opset}. "
            "Set export.exporter to the other exporter, or export.opset to the one found."
        )
    graph = model.graph
    _share_constants(graph)
    _drop_dead(graph)
    del graph.value_info[:]
    graph.doc_string = ""
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    del graph.metadata_props[:]
    del model.functions[:]
    model.ir_version = IR_VERSIONS[opset]
    model.producer_name, model.producer_version, model.doc_string = "bertemd-deploy", "", ""


def _share_constants(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = attribute(node, "value")
            if tensor is None:
                raise ExportError(f"{node.name}: a Constant of a form other than a tensor; use the other exporter.")
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    first: dict[str, str] = {}
    alias: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
        if key in first:
            alias[tensor.name] = first[key]
            continue
        first[key] = tensor.name
        kept.append(numpy_helper.from_array(array, tensor.name))
    outputs = {value.name for value in graph.output}
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant":
            continue
        for at, name in enumerate(node.input):
            node.input[at] = alias.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            alias[node.output[0]] = node.input[0]
            continue
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _drop_dead(graph: onnx.GraphProto) -> None:
    needed = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            nodes.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    del graph.initializer[:]
    graph.initializer.extend(initializers)


def declare_microsoft(model: onnx.ModelProto) -> None:
    """Import the domain of ONNX Runtime's own operators, without which a graph that uses them is not valid."""
    if MICROSOFT not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def histogram(model: onnx.ModelProto) -> dict[str, int]:
    """Return how often each operator occurs; operators outside the standard set carry their domain."""
    counts = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return dict(sorted(counts.items()))


def set_metadata(model: onnx.ModelProto, values: Mapping[str, Any]) -> None:
    """Store `values` in the model's metadata, strings as they are, everything else as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    helper.set_model_props(model, texts)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Check `model` and write it to `path` as one file.

    Raises:
        ExportError: the model breaks the ONNX specification, or is over the format's 2 GB.
    """
    if model.ByteSize() >= 2**31:
        raise ExportError(
            f"{path}: {model.ByteSize() / 2**30:.1f} GB, a single ONNX file holds 2 GB. Use a smaller model."
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path}: not a valid ONNX graph ({str(error).strip().splitlines()[0]}).") from error
    onnx.save_model(model, path)
