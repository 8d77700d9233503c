"""The HTTP service: the single-file predictor behind FastAPI, with limits, a health check and a Dockerfile."""

from __future__ import annotations

from pathlib import Path

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.files import write_text
from bertemd_deploy.handoff.student import copy_template, fill_template, find_student, pins, write_model, write_readme

COPIED = ("service.py", "healthcheck.py", "service.json", "Dockerfile")


def write(artifact: Artifact, folder: Path) -> str:
    """Write the bundle into `folder` and return the name of its graph.

    Raises:
        ArtifactError: see `find_student`.
    """
    versions = pins(artifact)
    release = versions["onnxruntime"]
    student = find_student(artifact, runtime=f"onnxruntime {release}", release=release)
    write_model(student, folder / "model")
    copy_template("python/predictor.py", folder)
    for name in COPIED:
        copy_template(f"fastapi/{name}", folder)
    write_text(folder / "requirements.txt", fill_template("fastapi/requirements.txt", **versions))
    write_readme(folder, "fastapi/README.md", **student.described())
    return student.graph
