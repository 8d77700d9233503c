"""The artifact folder: its file names, manifest and hashes, and the slices of tokenised data it carries.

Written by export, read by everything that runs on a device. Files named in the manifest are data from outside: names may
not leave the folder and every file's SHA-256 is checked before use.
"""

from __future__ import annotations

import typing
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.answers import Answers
from bertemd_deploy.compatibility import release_fault
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.files import inside, read_json, sha256_file
from bertemd_deploy.targets import check_isa
from bertemd_deploy.tasks import Kind

SCHEMA_VERSION = 1
DOC_STRIDE = 128  # tokens, where the manifest does not tell
LONGEST_INPUT = 100_000  # tokens; beyond what any model here has positions for
MANIFEST = "bertemd.json"
EVALUATION = "eval.npz"
GRAPHS = {
    "fp32": "onnx/model.onnx",
    "int8": "onnx/model_quantized.onnx",
    "fused": "onnx/model_fused.onnx",
    "fused-int8": "onnx/model_fused_quantized.onnx",
    "fp16": "onnx/model_fp16.onnx",
}
GRAPH_PRECISION = {"fp32": "fp32", "int8": "int8", "fused": "fp32", "fused-int8": "int8", "fp16": "fp16"}
FASTEST_FIRST = ("fused-int8", "int8", "fused", "fp32", "fp16")


NOT_SCORED = -100  # label of a token that no loss and no metric counts
_LABELS: dict[Kind, tuple[str, int]] = {  # dtype kind and dimensions of the labels
    "classification": ("i", 1),
    "regression": ("f", 1),
    "multilabel": ("f", 2),
    "token-classification": ("i", 1),
    "question-answering": ("i", 2),
}


@dataclass(frozen=True)
class DataSlice:
    """Tokenised rows with their labels.

    Attributes:
        examples: the rows; for question answering each is a window of an example.
        labels: by kind, for n rows:
            classification int64 (n,) class numbers;
            regression float32 (n,);
            multilabel float32 (n, labels) of 0 and 1;
            token-classification int64 (sum of lengths,), ragged as the tokens, `NOT_SCORED` at special tokens and at all
            but the first piece of a word;
            question-answering int64 (n, 2), first and last token of the answer in the row, (0, 0) where it holds none.
        kind: of the task.
        gold: question answering only: what answers are made of and compared with.
    """

    examples: Encoded
    labels: NDArray[Any]
    kind: Kind = "classification"
    gold: Answers | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.examples)

    def batch(
        self, rows: Sequence[int] | NDArray[np.integer], *, pad_id: int
    ) -> tuple[dict[str, NDArray[np.int64]], NDArray[Any]]:
        """Return the model's inputs of `rows`, each (B, T) int64 padded on the right, and their labels.

        Labels of tokens are (B, T) int64, padded with `NOT_SCORED`; others are the rows of `labels`.

        Args:
            rows: row numbers.
            pad_id: token id of padding.
        """
        inputs = self.examples.batch(rows, pad_id=pad_id)
        if self.kind != "token-classification":
            return inputs, self.labels[np.asarray(rows, dtype=np.int64)]
        labels = np.full(inputs["input_ids"].shape, NOT_SCORED, dtype=np.int64)
        offsets = self.examples.offsets
        for at, row in enumerate(rows):
            labels[at, : offsets[row + 1] - offsets[row]] = self.labels[offsets[row] : offsets[row + 1]]
        return inputs, labels

    def select(self, rows: Sequence[int] | NDArray[np.integer]) -> DataSlice:
        """Return the given rows, in the given order."""
        offsets = self.examples.offsets
        if self.kind == "token-classification":
            pieces = [self.labels[offsets[row] : offsets[row + 1]] for row in rows]
            labels = np.concatenate([self.labels[:0], *pieces])
        else:
            labels = self.labels[np.asarray(rows, dtype=np.int64)]
        gold = None if self.gold is None else self.gold.select(rows, offsets=offsets)
        return DataSlice(self.examples.select(rows), labels, self.kind, gold)

    def fault(self) -> str | None:
        """Return what does not fit together in the arrays, or None."""
        examples, (dtype, dimensions) = self.examples, _LABELS[self.kind]
        offsets, tokens = examples.offsets, examples.tokens
        if any(array.dtype.kind != "i" for array in (offsets, tokens, examples.types)):
            return "tokens that are not whole numbers"
        if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
            return "row starts that do not ascend from 0"
        ragged = self.kind == "token-classification"
        units = len(tokens) if ragged else len(examples)
        if len(self.labels) != units or not int(offsets[-1]) == len(tokens) == len(examples.types):
            return "arrays of unequal length"
        if self.labels.dtype.kind != dtype or self.labels.ndim != dimensions:
            return f"labels of {self.labels.dtype} with {self.labels.ndim} dimension(s), unlike {self.kind}"
        if self.kind == "question-answering":
            if self.gold is None:
                return "no answers"
            if len(self.gold.example) != len(examples) or len(self.gold.spans) != len(tokens):
                return "answers for other rows"
        return None


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: its folder and its checked manifest."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Artifact:
        """Read the manifest of `folder`; files are checked when `file` hands them out.

        Raises:
            ArtifactError: no folder, no manifest, or a manifest of another schema version or shape, or of another model
                than the config beside it.
        """
        if not folder.is_dir():
            raise ArtifactError(f"{folder}: there is no such folder. An artifact is what `bertemd export` wrote.")
        manifest = read_json(folder / MANIFEST, what="artifact's manifest")
        found = manifest.get("schema_version")
        if found != SCHEMA_VERSION:
            raise ArtifactError(
                f"{folder / MANIFEST}: schema_version is {found!r}, this bertemd reads {SCHEMA_VERSION}. "
                "Export the student again with this version."
            )
        for key, kind in (("task", dict), ("labels", list), ("max_length", int), ("files", dict)):
            if not isinstance(manifest.get(key), kind):
                raise ArtifactError(f"{folder / MANIFEST}: {key!r} should be a {kind.__name__}. Export again.")
        loaded = cls(folder, manifest)
        if fault := _fault(manifest, kind=loaded.kind, longest=_positions(folder)):
            raise ArtifactError(f"{folder / MANIFEST}: {fault}. Export again.")
        return loaded

    @property
    def labels(self) -> list[str]:
        """Label names by class number; empty for regression."""
        return list(self.manifest["labels"])

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return int(self.manifest["max_length"])

    @property
    def metric_names(self) -> list[str]:
        """The task's metrics, the gating one first."""
        return list(self.manifest["task"]["metrics"])

    @property
    def kind(self) -> Kind:
        """What kind of task it decides; without a word on it, by whether there are labels.

        Raises:
            ArtifactError: a kind that this version does not know.
        """
        found = self.manifest["task"].get("kind") or ("classification" if self.labels else "regression")
        known: tuple[Kind, ...] = typing.get_args(Kind)
        for kind in known:
            if found == kind:
                return kind
        raise ArtifactError(
            f"{self.folder / MANIFEST}: task.kind is {found!r}; this bertemd knows {', '.join(known)}. Update bertemd-deploy."
        )

    @property
    def outputs(self) -> int:
        """Number of the model's outputs, of every token for kinds that read every token."""
        return 2 if self.kind == "question-answering" else len(self.labels) or 1

    @property
    def doc_stride(self) -> int:
        """Tokens that neighbouring windows of a long context share, for question answering."""
        return int(self.manifest["task"].get("doc_stride", DOC_STRIDE))

    @property
    def no_answer(self) -> bool:
        """Whether a context may hold no answer, for question answering."""
        return bool(self.manifest["task"].get("no_answer", False))

    @property
    def pairs(self) -> bool | None:
        """Whether the model was trained on pairs of texts; None where the manifest (of an older version) does not say."""
        found = self.manifest["task"].get("pairs")
        return None if found is None else bool(found)

    def file(self, name: str) -> Path:
        """Return the path of a file the manifest names, after checking its SHA-256.

        Raises:
            ArtifactError: the manifest does not name it, it is missing, or its bytes changed.
        """
        entry = self.manifest["files"].get(name)
        if not isinstance(entry, dict):
            raise ArtifactError(f"{self.folder / MANIFEST}: names no file {name!r}.")
        path = inside(self.folder, name)
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, though the manifest names it. Copy the whole folder again.")
        found = sha256_file(path)
        if found != entry.get("sha256"):
            raise ArtifactError(
                f"{path}: its SHA-256 is {found[:12]}…, the manifest says {str(entry.get('sha256'))[:12]}…; the file is "
                "truncated or was changed. Copy the whole folder again, or export the student again."
            )
        return path

    def graphs(self) -> list[str]:
        """Return the names of the graphs this artifact holds (keys of `GRAPHS`), in table order."""
        return [name for name, path in GRAPHS.items() if path in self.manifest["files"]]

    def graph(self, name: str = "auto") -> tuple[str, Path]:
        """Return a graph's name and checked path; "auto" takes the fastest kind present.

        Raises:
            ArtifactError: unknown or absent graph, a damaged file, or one that this CPU or ONNX Runtime would not compute as
                it was measured.
        """
        present = self.graphs()
        if not present:
            raise ArtifactError(f"{self.folder / MANIFEST}: names no graph. Export the student again.")
        if name == "auto":
            name = next(candidate for candidate in FASTEST_FIRST if candidate in present)
        if name not in present:
            raise ArtifactError(f"{self.folder}: no graph {name!r}; this artifact has: {', '.join(present)}.")
        path = self.file(GRAPHS[name])
        self._check_requirements(name)
        return name, path

    def _check_requirements(self, graph: str) -> None:
        import onnxruntime

        from bertemd_deploy.bench.environment import instruction_sets

        requires = self.manifest.get("requires")
        check_isa(requires, graph=graph, found=instruction_sets())
        releases = requires.get("onnxruntime") if isinstance(requires, dict) else None
        if releases is None:
            return  # of an older version, which did not tell
        try:
            needed = releases[graph]
            fault = release_fault(needed, installed=onnxruntime.__version__)
        except (KeyError, TypeError):
            raise ArtifactError(
                f"{self.folder / MANIFEST}: requires.onnxruntime should name a release for graph {graph!r}, found "
                f"{releases!r:.200}. Export again."
            ) from None
        except ValueError as error:
            raise ArtifactError(f"{self.folder / MANIFEST}: requires.onnxruntime: {error}. Export again.") from error
        if fault is not None:
            raise ArtifactError(f"graph {graph!r}: {fault}. Update onnxruntime, or load another graph.")

    def evaluation(self) -> DataSlice:
        """Return the evaluation slice (dev examples, gold labels)."""
        return self._slice("evaluation")

    def calibration(self) -> DataSlice:
        """Return the calibration slice (train examples)."""
        return self._slice("calibration")

    def _slice(self, name: str) -> DataSlice:
        path = self.file(EVALUATION)
        slices = read_slices(path)
        if name not in slices:
            raise ArtifactError(f"{path}: holds no slice {name!r}, only {', '.join(slices) or 'none'}. Export again.")
        return slices[name]


def _fault(manifest: dict[str, Any], *, kind: Kind, longest: int) -> str | None:
    """Return what is wrong with a manifest whose outermost parts are of the right types, or None."""
    task, labels, length = manifest["task"], manifest["labels"], manifest["max_length"]
    if not isinstance(task.get("name"), str):
        return f"task.name should be text, found {task.get('name')!r}"
    metrics = task.get("metrics")
    if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) for name in metrics):
        return f"task.metrics should be a list of at least one name, found {metrics!r}"
    if odd := [label for label in labels if not isinstance(label, str)]:
        return f"'labels' should all be text, found {odd[0]!r}"
    if bool(labels) == (kind in ("regression", "question-answering")):
        return f"{len(labels)} labels do not fit {kind}"
    if isinstance(length, bool) or not 1 <= length <= longest:
        return f"'max_length' should be from 1 to {longest:,}, found {length!r}"
    stride = task.get("doc_stride", DOC_STRIDE)
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 0:
        return f"task.doc_stride should be a whole number from 0, found {stride!r}"
    for key in ("no_answer", "pairs"):
        if not isinstance(task.get(key), bool | None):
            return f"task.{key} should be true or false, found {task[key]!r}"
    return None


def _positions(folder: Path) -> int:
    """Return how many tokens the model beside a manifest has positions for, as its config says, where it is there."""
    path = folder / "config.json"
    found = read_json(path, what="model's config").get("max_position_embeddings") if path.is_file() else None
    return min(found, LONGEST_INPUT) if isinstance(found, int) else LONGEST_INPUT


def write_slices(path: Path, slices: dict[str, DataSlice]) -> None:
    """Write named slices as one compressed npz, without pickle.

    Arrays are `<name>_tokens`, `_types`, `_offsets`, `_labels`, `_kind` (ASCII text as uint8), and for question answering
    `_gold_example`, `_gold_spans`, `_gold_text` (see `Answers.arrays`).
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, part in slices.items():
        arrays |= {
            f"{name}_tokens": part.examples.tokens,
            f"{name}_types": part.examples.types,
            f"{name}_offsets": part.examples.offsets,
            f"{name}_labels": part.labels,
            f"{name}_kind": np.frombuffer(part.kind.encode(), dtype=np.uint8),
        }
        if part.gold is not None:
            arrays |= {f"{name}_gold_{key}": value for key, value in part.gold.arrays().items()}
    with path.open("wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **arrays)


def read_slices(path: Path) -> dict[str, DataSlice]:
    """Return the slices `write_slices` wrote; one without a kind (of an older version) has that of its labels' type.

    Raises:
        ArtifactError: not such a file, or its arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = [key.removesuffix("_tokens") for key in stored.files if key.endswith("_tokens")]
            slices = {name: _read_slice(stored, name) for name in names}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"{path}: not a readable data slice ({error}). Export again.") from error
    for name, part in slices.items():
        if fault := part.fault():
            raise ArtifactError(f"{path}: slice {name!r} has {fault}. Export again.")
    return slices


def _read_slice(stored: Any, name: str) -> DataSlice:
    examples = Encoded(stored[f"{name}_tokens"], stored[f"{name}_types"], stored[f"{name}_offsets"])
    labels = stored[f"{name}_labels"]
    if f"{name}_kind" in stored.files:
        kind = stored[f"{name}_kind"].tobytes().decode()
        if kind not in typing.get_args(Kind):
            raise ValueError(f"unknown kind {kind!r}")
    else:
        kind = "regression" if labels.dtype.kind == "f" else "classification"
    prefix = f"{name}_gold_"
    gold = {key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}
    return DataSlice(examples, labels, kind, Answers.from_arrays(gold) if gold else None)
