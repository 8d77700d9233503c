"""The HTTP service: the single-file predictor behind FastAPI, with limits, a health check and a Dockerfile."""

from __future__ import annotations

from pathlib import Path

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.handoff.python import write_predictor
from bertemd_deploy.handoff.student import copy_template

COPIED = ("service.py", "healthcheck.py", "service.json", "Dockerfile")


def write(artifact: Artifact, folder: Path) -> str:
    """Write the bundle into `folder` and return the name of its graph.

    Raises:
        ArtifactError: see `find_student`.
    """
    graph = write_predictor(artifact, folder, templates="fastapi")
    for name in COPIED:
        copy_template(f"fastapi/{name}", folder)
    return graph
