"""What every hand-off takes from an artifact: a graph its runtime can run, the files beside it, versions to pin.

Out: the folder `model` that the templates' code reads, with `model.json` as its index:
    kind, labels, max_length, pairs, doc_stride, no_answer    what is decided, as in the artifact's manifest
    inputs, outputs, pad_id                                   the graph's tensors; the token of padding
    graph, onnxruntime, isa                                   its name, its oldest release, flags of which a CPU needs one
    files                                                     SHA-256 by name
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from bertemd_deploy.artifact import FASTEST_FIRST, GRAPHS, MANIFEST, Artifact
from bertemd_deploy.compatibility import release_fault
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.files import sha256_file, write_text
from bertemd_deploy.runtime import OUTPUT_NAME, SPAN_OUTPUTS, check_session, open_session
from bertemd_deploy.targets import saturation_probe
from bertemd_deploy.tasks import Kind

TEMPLATES = Path(__file__).with_name("templates")
MODEL, GRAPH, TOKENIZER, PROBE = "model.json", "model.onnx", "tokenizer.json", "saturation.onnx"
PACKAGES = ("numpy", "onnxruntime", "tokenizers")
DECIDED: dict[Kind, str] = {
    "classification": "one of several classes",
    "regression": "a number",
    "multilabel": "any of several labels",
    "token-classification": "entities in a text",
    "question-answering": "an answer in a context",
}
_CPUS = """- **CPUs.** The graph needs one of {flags} (Linux' names): where sums of int8 products are clipped, it would be
  less accurate than it was measured.
"""
_VERSION = re.compile(r"\d+(\.\d+){1,3}(\.post\d+)?")
_FLAG = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class Student:
    """An artifact with the graph that is handed off.

    Attributes:
        artifact: it is from.
        graph: name in `artifact.GRAPHS`.
        path: of the graph, its SHA-256 checked.
        inputs: the graph's, in its order.
        outputs: those that are read.
        needs: the oldest release of ONNX Runtime that runs it rightly; None where the manifest (of an older version) does
            not say.
        isa: flags of which a CPU must have any one; none where any CPU will do.
        pad_id: token id of padding.
    """

    artifact: Artifact
    graph: str
    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    needs: str | None
    isa: tuple[str, ...]
    pad_id: int

    def described(self) -> dict[str, str]:
        """Return the words that every README has places for."""
        flags = ", ".join(f"`{flag}`" for flag in self.isa)
        return {
            "kind": DECIDED[self.artifact.kind],
            "graph": f"`{self.graph}`" + (f", which needs ONNX Runtime {self.needs} or newer" if self.needs else ""),
            "cpus": _CPUS.format(flags=flags) if self.isa else "",
        }


def find_student(artifact: Artifact, *, runtime: str, release: str) -> Student:
    """Return the artifact's fastest graph that a runtime can run.

    Args:
        artifact: checked here: graph, tokenizer, and that the two fit its kind of task.
        runtime: name of what is to run it, for messages.
        release: of ONNX Runtime there.

    Raises:
        ArtifactError: a file is damaged, the manifest is malformed, or the runtime can run none of the graphs.
        ModelError: the tokenizer is damaged or has no padding token.
    """
    where = artifact.folder / MANIFEST
    faults = []
    for graph in (name for name in FASTEST_FIRST if name in artifact.graphs()):
        needs = _needed_release(artifact, graph)
        fault = release_fault(needs, installed=release) if needs is not None else None
        if fault is None:
            return _opened(artifact, graph, needs=needs)
        faults.append(f"graph {graph!r}: {fault}")
    raise ArtifactError(
        f"{where}: {runtime} can run none of its graphs. {'; '.join(faults) or 'It names none'}. Export the student again, "
        "with a lower export.opset."
    )


def _opened(artifact: Artifact, graph: str, *, needs: str | None) -> Student:
    path = artifact.file(GRAPHS[graph])
    artifact.file(TOKENIZER)
    session = open_session(path, threads=1, optimize=False)
    check_session(session, kind=artifact.kind, path=path)
    outputs = SPAN_OUTPUTS if artifact.kind == "question-answering" else (OUTPUT_NAME,)
    if artifact.kind != "question-answering":
        shape = next(node.shape for node in session.get_outputs() if node.name == OUTPUT_NAME)
        if shape and isinstance(shape[-1], int) and shape[-1] != artifact.outputs:
            raise ArtifactError(
                f"{path}: it has {shape[-1]} outputs, the manifest names {len(artifact.labels)} labels. Export the student "
                "again."
            )
    return Student(
        artifact,
        graph,
        path,
        tuple(node.name for node in session.get_inputs()),
        outputs,
        needs,
        _needed_flags(artifact, graph),
        TextEncoder.load(artifact.folder, max_length=artifact.max_length).pad_id,
    )


def _required(artifact: Artifact, key: str, graph: str) -> Any:
    """Return a graph's entry in a table of the manifest's `requires`, or None."""
    requires = artifact.manifest.get("requires")
    table = requires.get(key) if isinstance(requires, dict) else None
    return table.get(graph) if isinstance(table, dict) else None


def _needed_release(artifact: Artifact, graph: str) -> str | None:
    found = _required(artifact, "onnxruntime", graph)
    if found is None or (isinstance(found, str) and _VERSION.fullmatch(found)):
        return found
    raise ArtifactError(
        f"{artifact.folder / MANIFEST}: requires.onnxruntime of graph {graph!r} should be a version such as 1.21, found "
        f"{found!r}. Export again."
    )


def _needed_flags(artifact: Artifact, graph: str) -> tuple[str, ...]:
    found = _required(artifact, "isa", graph) or []
    if isinstance(found, list) and all(isinstance(flag, str) and _FLAG.fullmatch(flag) for flag in found):
        return tuple(found)
    raise ArtifactError(
        f"{artifact.folder / MANIFEST}: requires.isa of graph {graph!r} should be a list of names, found {found!r}. Export "
        "again."
    )


def pins(artifact: Artifact) -> dict[str, str]:
    """Return the versions of `PACKAGES` that an artifact was checked with; those installed here where it does not say."""
    told = artifact.manifest.get("versions")
    found = {}
    for package in PACKAGES:
        version = told.get(package) if isinstance(told, dict) else None
        known = isinstance(version, str) and _VERSION.fullmatch(version)
        found[package] = str(version) if known else importlib.metadata.version(package)
    return found


def write_model(student: Student, folder: Path, *, graph: bool = True, more: Mapping[str, Any] | None = None) -> None:
    """Write the folder that the templates' code reads.

    Args:
        student: what is handed off.
        folder: made here.
        graph: put the graph there too; else it runs elsewhere.
        more: further entries of model.json.
    """
    folder.mkdir(parents=True)
    artifact = student.artifact
    shutil.copyfile(artifact.folder / TOKENIZER, folder / TOKENIZER)
    if graph:
        shutil.copyfile(student.path, folder / GRAPH)
    if graph and student.isa:
        (folder / PROBE).write_bytes(saturation_probe())
    index = {
        "kind": artifact.kind,
        "labels": artifact.labels,
        "max_length": artifact.max_length,
        "pairs": artifact.pairs,
        "doc_stride": artifact.doc_stride,
        "no_answer": artifact.no_answer,
        "pad_id": student.pad_id,
        "inputs": student.inputs,
        "outputs": student.outputs,
        "graph": student.graph,
        "onnxruntime": student.needs,
        "isa": student.isa,
        **(more or {}),
        "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
    }
    # ASCII only, so that a label of whatever characters is written: half a surrogate pair as well.
    write_text(folder / MODEL, json.dumps(index, indent=2) + "\n")


def copy_template(name: str, folder: Path) -> None:
    """Copy a template that has nothing to fill, such as "python/predictor.py", into `folder`."""
    shutil.copyfile(TEMPLATES / name, folder / Path(name).name)


def fill_template(template: str, /, **values: object) -> str:
    """Return a template's text with its places filled; a `$` of its own is written `$$`."""
    return Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)


def write_readme(folder: Path, template: str, /, **values: object) -> None:
    """Write README.md into `folder`; a place that stays empty at its end leaves no blank lines."""
    write_text(folder / "README.md", fill_template(template, **values).rstrip() + "\n")
