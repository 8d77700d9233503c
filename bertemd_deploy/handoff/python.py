"""The single-file Python predictor: `predictor.py` with the folder `model` beside it; every kind of task."""

from __future__ import annotations

from pathlib import Path

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.files import write_text
from bertemd_deploy.handoff.student import copy_template, fill_template, find_student, pins, write_model, write_readme


def write(artifact: Artifact, folder: Path) -> str:
    """Write the bundle into `folder` and return the name of its graph.

    Raises:
        ArtifactError: see `find_student`.
    """
    return write_predictor(artifact, folder, templates="python")


def write_predictor(artifact: Artifact, folder: Path, *, templates: str) -> str:
    """Write the predictor, its model, and the requirements and README of `templates`; return the name of its graph.

    Raises:
        ArtifactError: see `find_student`.
    """
    versions = pins(artifact)
    release = versions["onnxruntime"]
    student = find_student(artifact, runtime=f"onnxruntime {release}", release=release)
    write_model(student, folder / "model")
    copy_template("python/predictor.py", folder)
    write_text(folder / "requirements.txt", fill_template(f"{templates}/requirements.txt", **versions))
    write_readme(folder, f"{templates}/README.md", **student.described())
    return student.graph
