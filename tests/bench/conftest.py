from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tiny_artifact import write_artifact, write_graph_teacher

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench import candidates


@pytest.fixture
def artifact_folder(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact")


@pytest.fixture
def artifact(artifact_folder: Path) -> Artifact:
    return Artifact.load(artifact_folder)


@pytest.fixture
def graph_teacher(tmp_path: Path) -> Path:
    return write_graph_teacher(tmp_path / "teacher")


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the parent believe that torch is not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        candidates.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
