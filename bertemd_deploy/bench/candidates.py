"""Which models are compared: the teacher in PyTorch and ONNX Runtime, the student's graphs; each checked to be comparable."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertemd_deploy.artifact import GRAPH_PRECISION, GRAPHS, Artifact
from bertemd_deploy.bench.memory import graph_bytes, weight_bytes
from bertemd_deploy.bench.process import Worker
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import MeasurementError, ModelError, missing_extra
from bertemd_deploy.files import read_json
from bertemd_deploy.settings import ExportSettings

TEACHER_GRAPH = "onnx/model.onnx"
TRAINING_PACKAGES = ("torch", "transformers", "onnx")
UNNAMED = {"0": "LABEL_0", "1": "LABEL_1"}  # what Hugging Face assumes where config.json names no labels


@dataclass(frozen=True)
class Candidate:
    """One model to measure.

    Attributes:
        model: "teacher" or "student".
        backend: "pytorch" or "onnxruntime".
        graph: name in `artifact.GRAPHS`; None for PyTorch, which has no graph file.
        precision: "fp32" or "int8".
        path: a Hugging Face folder for PyTorch, an ONNX file otherwise.
        model_bytes: weights or graph on disk.
        layers, hidden: shape, None where unknown.
        parameters: count, None where unknown.
        outputs: its column of logits for each of the artifact's labels, in their order; start and end for answers.
        token_ids: its token id for each of the artifact's, where the artifact's vocabulary was trimmed; None: the same.
    """

    model: str
    backend: str
    graph: str | None
    precision: str
    path: Path
    model_bytes: int
    layers: int | None
    hidden: int | None
    parameters: int | None
    outputs: tuple[int, ...]
    token_ids: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What to call it, such as "teacher pytorch fp32" or "student onnxruntime fused-int8"."""
        return f"{self.model} {self.backend} {self.graph or self.precision}"


def students(
    artifact: Artifact, graphs: Sequence[str] | None, *, here: bool = True
) -> tuple[list[Candidate], list[str]]:
    """Return the artifact's graphs among `graphs` (None: all) as candidates, and a note on each that it lacks.

    Args:
        artifact: whose graphs.
        graphs: their names.
        here: they are to be run on this machine for their answers, so one that this CPU would not compute is refused.

    Raises:
        MeasurementError: a name is unknown, or none of `graphs` is there.
        ArtifactError: a graph file is missing or damaged, or not for this CPU.
    """
    graphs = artifact.graphs() if graphs is None else graphs
    if unknown := sorted(set(graphs) - set(GRAPHS)):
        raise MeasurementError(f"bench.graphs: unknown {', '.join(unknown)}; known are {', '.join(GRAPHS)}.")
    present = [name for name in artifact.graphs() if name in graphs]
    if not present:
        raise MeasurementError(
            f"{artifact.folder}: has none of the graphs asked for ({', '.join(graphs) or 'none'}); it has: "
            f"{', '.join(artifact.graphs()) or 'none'}. Choose among these with bench.graphs."
        )
    absent = [name for name in GRAPHS if name in graphs and name not in present]
    shape = artifact.manifest.get("student") or {}
    found = []
    for name in present:
        path = artifact.graph(name)[1] if here else artifact.file(GRAPHS[name])
        found.append(
            Candidate(
                "student",
                "onnxruntime",
                name,
                GRAPH_PRECISION[name],
                path,
                graph_bytes(path),
                shape.get("layers"),
                shape.get("hidden"),
                shape.get("parameters"),
                tuple(range(artifact.outputs)),
            )
        )
    return found, [f"graphs {absent} left out: the artifact does not hold them"] if absent else []


def output_order(config: dict[str, Any], *, labels: Sequence[str], where: Path) -> tuple[tuple[int, ...], str | None]:
    """Return the teacher's column for each of the artifact's labels, matched by name, whatever the case.

    A teacher with the placeholders LABEL_0, LABEL_1, … has no names: its order is taken as it stands, as in distillation,
    and the second value is a note that says so (None otherwise).

    Args:
        config: the teacher's config.json.
        labels: the artifact's labels; empty for regression.
        where: the teacher's folder, for the message.

    Raises:
        ModelError: the two do not have the same labels, or a regression teacher has several outputs.
    """
    stored = config.get("id2label") or UNNAMED
    names = [str(stored[key]) for key in sorted(stored, key=int)]
    if len(names) != max(1, len(labels)):
        raise ModelError(
            f"{where}: the teacher has {len(names)} outputs ({', '.join(names[:6])}), the artifact {max(1, len(labels))} "
            f"({', '.join(labels[:6]) or 'regression'}). Name the artifact's own teacher."
        )
    if not labels:
        return (0,), None
    if names == [f"LABEL_{at}" for at in range(len(names))]:
        return tuple(
            range(len(names))
        ), "the teacher's labels have no names: its outputs are taken in the artifact's order"
    columns = {name.casefold(): column for column, name in enumerate(names)}
    wanted = [label.casefold() for label in labels]
    if sorted(columns) != sorted(wanted):
        raise ModelError(
            f"{where}: the teacher's labels are {', '.join(names)}; the artifact's are {', '.join(labels)}. "
            "They are matched by name: correct id2label in the teacher's config.json, or name the artifact's own teacher."
        )
    return tuple(columns[label] for label in wanted), None


def _token_ids(teacher: Path, artifact: Artifact, config: dict[str, Any]) -> tuple[int, ...] | None:
    """Return the teacher's token id for each of the artifact's where that was trimmed, else None.

    Raises:
        ModelError: the artifact's token ids or lengths mean something else to the teacher.
    """
    positions = config.get("max_position_embeddings")
    if positions is not None and positions < artifact.max_length:
        raise ModelError(
            f"{teacher}: takes {positions} tokens, the artifact up to {artifact.max_length}. Name the artifact's own teacher."
        )
    theirs = TextEncoder.load(teacher, max_length=artifact.max_length).vocabulary()
    ours = TextEncoder.load(artifact.folder, max_length=artifact.max_length).vocabulary()
    if artifact.manifest.get("vocabulary") and not set(ours) - set(theirs):
        return tuple(theirs[token] for token in sorted(ours, key=ours.__getitem__))
    if theirs != ours:
        differing = len(set(theirs.items()) ^ set(ours.items()))
        raise ModelError(
            f"{teacher}: its vocabulary differs from the artifact's in {differing} entries, so the artifact's token ids mean "
            "other words to it. Name the teacher the student was distilled from."
        )
    return None


def teachers(teacher: Path, artifact: Artifact, *, scratch: Path) -> tuple[list[Candidate], list[str]]:
    """Return the teacher in PyTorch and, exported once into `scratch`, in ONNX Runtime; and notes for the record.

    A teacher of another family than BERT, whose graph is not written here, is in PyTorch alone, and a note says so.
    Without torch, a folder that holds `onnx/model.onnx` serves as an ONNX Runtime teacher alone.

    Raises:
        BertemdError: torch, transformers or onnx is not installed and the folder holds no graph.
        ModelError: the folder is incomplete, or its labels, vocabulary or length do not fit the artifact.
        MeasurementError: the export failed.
    """
    if not teacher.is_dir():
        raise ModelError(
            f"{teacher}: there is no such folder. The teacher is a Hugging Face folder of a fine-tuned model."
        )
    if not (teacher / "config.json").is_file():
        raise ModelError(f"{teacher}: no config.json. The teacher is a Hugging Face folder of a fine-tuned model.")
    config = read_json(teacher / "config.json", what="teacher's configuration")
    outputs: tuple[int, ...] = (0, 1)
    unnamed = None
    if artifact.kind != "question-answering":  # whose two outputs have no names
        outputs, unnamed = output_order(config, labels=artifact.labels, where=teacher)
    notes = [unnamed] if unnamed else []
    ids = _token_ids(teacher, artifact, config)
    if ids is not None:
        notes.append("the teacher reads the pieces of words that the student's trimmed vocabulary makes")
    layers, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    missing = [package for package in TRAINING_PACKAGES if importlib.util.find_spec(package) is None]
    graph = teacher / TEACHER_GRAPH
    found = []
    if not missing:
        size = weight_bytes(teacher)
        found.append(Candidate("teacher", "pytorch", None, "fp32", teacher, size, layers, hidden, None, outputs, ids))
        family = config.get("model_type", "bert")
        if family != "bert":
            return found, [*notes, f"the teacher is measured in PyTorch only: the graph of a {family} is not written"]
        graph = scratch / "teacher.onnx"
        _export(teacher, graph, artifact)
    elif not graph.is_file():
        raise missing_extra("train", package=missing[0])
    size = graph_bytes(graph)
    found.append(Candidate("teacher", "onnxruntime", "fp32", "fp32", graph, size, layers, hidden, None, outputs, ids))
    return found, notes


def _export(teacher: Path, path: Path, artifact: Artifact) -> None:
    """Export in a process of its own, so that this one stays small; same opset as the student's fp32 graph."""
    defaults = ExportSettings()
    opset = (artifact.manifest["files"].get(GRAPHS["fp32"]) or {}).get("opset") or defaults.opset
    with Worker("teacher export", threads=1) as worker:
        request = {"teacher": str(teacher), "path": str(path), "exporter": defaults.exporter, "opset": opset}
        worker.request("export", kind=artifact.kind, **request)
