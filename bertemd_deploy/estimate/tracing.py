"""A graph as ONNX Runtime runs it: every operator with the shape of everything it reads and writes, at any batch and length.

ONNX Runtime rewrites a graph when it loads it, so what counts is not in the file. A session tells: the graph that it writes
after its rewriting names constants and attributes, and its profile names every operator run, with shapes. Three small runs of
unlike shape show how each dimension d depends on the batch size B and the length T in tokens:

    d(B, T) = c B^i T^j,   i in {0, 1},  j in {0, 1, 2},  c a whole number

A dimension of another form is an error, so no shape is ever guessed.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertemd_deploy.errors import ArtifactError, MeasurementError, missing_extra
from bertemd_deploy.runtime import INPUT_NAMES

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnxruntime
    from numpy.typing import NDArray

PROBES = ((2, 3), (3, 5), (5, 7))  # batch, length; no two of B, T, B T, T^2, B T^2 or a constant agree in all three
DTYPE_BYTES = {
    "bool": 1, "int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "float": 4, "int32": 4, "uint32": 4, "double": 8, "int64": 8, "uint64": 8,
}  # fmt: skip
_FEEDS = {
    "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(float)": "float32", "tensor(uint8)": "uint8",
    "tensor(int8)": "int8", "tensor(bool)": "bool",
}  # fmt: skip
_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class Tensor:
    """What an operator reads or writes: type (ONNX Runtime's spelling), dimensions, and whether the graph holds it."""

    dtype: str
    dims: tuple[int, ...]
    constant: bool = False

    @property
    def elements(self) -> int:
        """How many values it has; 1 for a scalar."""
        count = 1
        for size in self.dims:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Step:
    """One operator as it is run: `inputs` without those left out, in order; `where` names the file, for messages."""

    name: str
    op_type: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, Any]
    where: str = "graph"


@dataclass(frozen=True)
class Dimension:
    """c B^i T^j."""

    factor: int
    batch: int
    sequence: int

    def at(self, batch: int, sequence: int) -> int:
        """Return the dimension at a batch size and a length."""
        return int(self.factor * batch**self.batch * sequence**self.sequence)


@dataclass(frozen=True)
class _Shape:
    dtype: str
    dims: tuple[Dimension, ...]
    constant: bool

    def at(self, batch: int, sequence: int) -> Tensor:
        return Tensor(self.dtype, tuple(size.at(batch, sequence) for size in self.dims), self.constant)


@dataclass(frozen=True)
class _Operator:
    name: str
    op_type: str
    inputs: tuple[_Shape, ...]
    outputs: tuple[_Shape, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    """The operators of one graph in the order they are run, with shapes for any batch size and length."""

    where: str
    operators: tuple[_Operator, ...]

    def at(self, *, batch: int, sequence: int) -> list[Step]:
        """Return every operator with its shapes at a batch size and a length in tokens."""
        return [
            Step(
                operator.name,
                operator.op_type,
                tuple(shape.at(batch, sequence) for shape in operator.inputs),
                tuple(shape.at(batch, sequence) for shape in operator.outputs),
                operator.attributes,
                self.where,
            )
            for operator in self.operators
        ]


def trace(path: Path) -> Trace:
    """Return the operators that ONNX Runtime runs for a graph, on this machine's build of it.

    Args:
        path: an ONNX file. Inputs other than the model's usual three have dimensions that are fixed, or named "batch" and
            "sequence".

    Raises:
        ArtifactError: the file is missing, cannot be loaded, or does not run at the small shapes.
        MeasurementError: a shape depends on the input in a way that is not understood, or the profile is not as expected.
        BertemdError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise missing_extra("train", package="onnx") from None

    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such graph.")
    with tempfile.TemporaryDirectory(prefix="bertemd-trace-") as folder:
        source = _named(path, Path(folder))
        rewritten = Path(folder) / "rewritten.onnx"
        session = _open(source, rewritten=rewritten, where=path)
        try:
            for batch, sequence in PROBES:
                session.run(None, _feeds(session, batch=batch, sequence=sequence, where=path))
        except Exception as error:  # ONNX Runtime raises plain C++ exceptions of many types
            if isinstance(error, MeasurementError):
                raise
            raise ArtifactError(
                f"{path}: does not run at batch sizes and lengths {PROBES} ({str(error).strip().splitlines()[0][:200]}), so "
                "its operators cannot be counted. Export it again with dynamic dimensions."
            ) from error
        finally:
            profile = Path(session.end_profiling())
        events = json.loads(profile.read_text(encoding="utf-8"))
        nodes = onnx.load(str(rewritten), load_external_data=False).graph
    return Trace(str(path), _operators(events, nodes, where=path))


def _named(path: Path, folder: Path) -> Path:
    """Return `path`, or a copy whose nodes all have names of their own: profile and graph are joined by name."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    counts = Counter(node.name for node in model.graph.node)
    if all(name and count == 1 for name, count in counts.items()):
        return path
    model = onnx.load(str(path))
    for at, node in enumerate(model.graph.node):
        node.name = f"{node.name or node.op_type}#{at}"
    copy = folder / "named.onnx"
    onnx.save_model(model, str(copy))
    return copy


def _open(source: Path, *, rewritten: Path, where: Path) -> onnxruntime.InferenceSession:
    """Open a session that rewrites the graph as `runtime.open_session` does, tells what became of it, and is profiled."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(rewritten)
    options.enable_profiling = True
    options.profile_file_prefix = str(rewritten.with_name("profile"))
    options.add_session_config_entry("session.disable_prepacking", "1")  # a packed weight has no shape in the profile
    try:
        return onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise ArtifactError(
            f"{where}: ONNX Runtime {onnxruntime.__version__} cannot load this file "
            f"({str(error).strip().splitlines()[0][:200]}). Export it again, or update onnxruntime."
        ) from error


def _feeds(
    session: onnxruntime.InferenceSession, *, batch: int, sequence: int, where: Path
) -> dict[str, NDArray[np.generic]]:
    """Return ones for every input but token ids and types, which are 0: any vocabulary holds that."""
    import numpy as np

    sizes = {"batch": batch, "sequence": sequence}
    feeds: dict[str, NDArray[np.generic]] = {}
    for entry in session.get_inputs():
        dims = [sizes.get(size, size) for size in entry.shape]
        if entry.name in INPUT_NAMES and len(dims) == 2:
            dims = [batch, sequence]
        if entry.type not in _FEEDS or not all(isinstance(size, int) and size >= 0 for size in dims):
            raise MeasurementError(
                f"{where}: input {entry.name!r} is {entry.type} {entry.shape}; counted are graphs with dimensions that are "
                f"fixed or called batch and sequence, of {', '.join(_FEEDS)}. Export the model with these names."
            )
        fill = 0 if entry.name in ("input_ids", "token_type_ids") else 1
        feeds[entry.name] = np.full(dims, fill, dtype=_FEEDS[entry.type])
    return feeds


def _operators(events: Sequence[Any], graph: onnx.GraphProto, *, where: Path) -> tuple[_Operator, ...]:
    """Join the profile of all probes with the rewritten graph.

    Raises:
        MeasurementError: they do not fit together.
    """
    from onnx import helper

    run = [
        event
        for event in events
        if isinstance(event, dict) and event.get("cat") == "Node" and str(event.get("name")).endswith(_KERNEL)
    ]
    size = len(run) // len(PROBES)
    probes = [run[at * size : (at + 1) * size] for at in range(len(PROBES))]
    if not size or len(run) % len(PROBES) or any(_names(part) != _names(probes[0]) for part in probes):
        raise MeasurementError(
            f"{where}: ONNX Runtime's profile lists {len(run)} operators over {len(PROBES)} runs, which do not line up. Its "
            "operators cannot be counted with this release of onnxruntime; estimate with another one."
        )
    known = {node.name: node for node in graph.node}
    constants = {tensor.name for tensor in graph.initializer} | {
        tensor.values.name for tensor in graph.sparse_initializer
    }
    found = []
    for same in zip(*probes, strict=True):
        name, arguments = _names(same[:1])[0], same[0].get("args", {})
        node = known.get(name)
        if node is None:
            raise MeasurementError(
                f"{where}: ONNX Runtime ran {arguments.get('op_name')} {name!r}, which the graph that it wrote does not hold. "
                "Estimate with another release of onnxruntime."
            )
        constant = [entry in constants for entry in node.input if entry]
        found.append(
            _Operator(
                name,
                str(arguments.get("op_name")),
                _shapes(same, "input_type_shape", constant, where=where),
                _shapes(same, "output_type_shape", [False] * sum(map(bool, node.output)), where=where),
                {entry.name: helper.get_attribute_value(entry) for entry in node.attribute},
            )
        )
    return tuple(found)


def _names(events: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(event["name"]).removesuffix(_KERNEL) for event in events]


def _shapes(
    events: Sequence[Mapping[str, Any]], key: str, constant: Sequence[bool], *, where: Path
) -> tuple[_Shape, ...]:
    """Return what an operator reads or writes, from its event in each probe."""
    listed = [event.get("args", {}).get(key) for event in events]
    name = _names(events[:1])[0]
    if any(not isinstance(entries, list) or len(entries) != len(constant) for entries in listed):
        raise MeasurementError(
            f"{where}: {name!r}: ONNX Runtime's profile tells {key} {listed[0]!r} of {len(constant)} values. Estimate with "
            "another release of onnxruntime."
        )
    shapes = []
    for at, held in enumerate(constant):
        (dtype,) = listed[0][at]
        if dtype not in DTYPE_BYTES:
            raise MeasurementError(
                f"{where}: {name!r} has values of type {dtype}; known are {', '.join(DTYPE_BYTES)}. It cannot be estimated."
            )
        sizes = [entries[at][dtype] for entries in listed]
        if len({len(dims) for dims in sizes}) != 1:
            raise MeasurementError(f"{where}: {name!r}: its values have {sizes} dimensions, unlike in each run.")
        dims = [_dimension(values, where=f"{where}: {name!r}") for values in zip(*sizes, strict=True)]
        shapes.append(_Shape(dtype, tuple(dims), held))
    return tuple(shapes)


def _dimension(values: Sequence[int], *, where: str) -> Dimension:
    """Return the form of a dimension from its values in the probes.

    Raises:
        MeasurementError: it has none of the forms.
    """
    for batch in (0, 1):
        for sequence in (0, 1, 2):
            factors = {
                value / (probe[0] ** batch * probe[1] ** sequence) for value, probe in zip(values, PROBES, strict=True)
            }
            factor = factors.pop()
            if not factors and factor.is_integer():
                return Dimension(int(factor), batch, sequence)
    raise MeasurementError(
        f"{where}: a dimension is {list(values)} at batch sizes and lengths {PROBES}, no multiple of batch and length. "
        "Such a graph cannot be counted; estimate another form of it."
    )
