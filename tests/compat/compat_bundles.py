"""Bundles of the cases with their portable fp32 graph, whose answers are equal wherever they are computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compat_cases import Case

from bertemd_deploy.artifact import GRAPHS, MANIFEST, Artifact
from bertemd_deploy.classifier import Classifier
from bertemd_deploy.files import read_json, write_json


def fp32_only(artifact: Artifact, folder: Path) -> Path:
    """Return a copy of an artifact with its portable fp32 graph alone."""
    shutil.copytree(artifact.folder, folder, ignore=shutil.ignore_patterns("model_*.onnx"))
    manifest = read_json(folder / MANIFEST, what="manifest")
    for graph, path in GRAPHS.items():
        if graph != "fp32":
            manifest["files"].pop(path, None)
    write_json(folder / MANIFEST, manifest)
    return folder


def records(case: Case, graph: str, texts: Sequence[str], pairs: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return what this package says of texts, as JSON would hold it."""
    classifier = Classifier.load(case.artifact.folder, graph=graph, threads=1)
    found = [classifier.record(one) for one in classifier.predict(texts, pairs)]
    plain: list[dict[str, Any]] = json.loads(json.dumps(found))
    return plain
