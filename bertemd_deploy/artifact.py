"""The artifact folder: its file names, manifest and hashes, and the slices of tokenised data it carries.

Written by export, read by everything that runs on a device. Files named in the manifest are data from outside: names may
not leave the folder and every file's SHA-256 is checked before use.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.files import inside, read_json, sha256_file

SCHEMA_VERSION = 1
MANIFEST = "bertemd.json"
EVALUATION = "eval.npz"
GRAPHS = {
    "fp32": "onnx/model.onnx",
    "int8": "onnx/model_quantized.onnx",
    "fused": "onnx/model_fused.onnx",
    "fused-int8": "onnx/model_fused_quantized.onnx",
}
GRAPH_PRECISION = {"fp32": "fp32", "int8": "int8", "fused": "fp32", "fused-int8": "int8"}
FASTEST_FIRST = ("fused-int8", "int8", "fused", "fp32")


@dataclass(frozen=True)
class DataSlice:
    """Tokenised examples with their labels: int64 (n,) class numbers, or float32 (n,) for regression."""

    examples: Encoded
    labels: NDArray[Any]


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: its folder and its checked manifest."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Artifact:
        """Read the manifest of `folder`; files are checked when `file` hands them out.

        Raises:
            ArtifactError: no folder, no manifest, or a manifest of another schema version or shape.
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
        return cls(folder, manifest)

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
            ArtifactError: unknown or absent graph, or a damaged file.
        """
        present = self.graphs()
        if not present:
            raise ArtifactError(f"{self.folder / MANIFEST}: names no graph. Export the student again.")
        if name == "auto":
            name = next(candidate for candidate in FASTEST_FIRST if candidate in present)
        if name not in present:
            raise ArtifactError(f"{self.folder}: no graph {name!r}; this artifact has: {', '.join(present)}.")
        return name, self.file(GRAPHS[name])

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


def write_slices(path: Path, slices: dict[str, DataSlice]) -> None:
    """Write named slices as one compressed npz: `<name>_tokens`, `_types`, `_offsets`, `_labels`."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, part in slices.items():
        arrays |= {
            f"{name}_tokens": part.examples.tokens,
            f"{name}_types": part.examples.types,
            f"{name}_offsets": part.examples.offsets,
            f"{name}_labels": part.labels,
        }
    with path.open("wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **arrays)


def read_slices(path: Path) -> dict[str, DataSlice]:
    """Return the slices `write_slices` wrote.

    Raises:
        ArtifactError: not such a file, or its arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = [key.removesuffix("_tokens") for key in stored.files if key.endswith("_tokens")]
            slices = {
                name: DataSlice(
                    Encoded(stored[f"{name}_tokens"], stored[f"{name}_types"], stored[f"{name}_offsets"]),
                    stored[f"{name}_labels"],
                )
                for name in names
            }
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"{path}: not a readable data slice ({error}). Export again.") from error
    for name, part in slices.items():
        if len(part.examples) != len(part.labels) or part.examples.offsets[-1] != len(part.examples.tokens):
            raise ArtifactError(f"{path}: slice {name!r} has arrays of unequal length. Export again.")
    return slices
