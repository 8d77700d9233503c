"""How a worker is started and a model opened: what all passes of one benchmark have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.candidates import Candidate
from bertemd_deploy.bench.limits import Limits
from bertemd_deploy.bench.process import Worker
from bertemd_deploy.settings import BenchSettings


@dataclass(frozen=True)
class Setup:
    """One benchmark's means.

    Attributes:
        artifact: source of the inputs.
        settings: what to measure and for how long.
        limits: of the place this machine stands in for; None leaves it as it is.
        spinning, arena: options of ONNX Runtime's sessions, as in `runtime.open_session`.
    """

    artifact: Artifact
    settings: BenchSettings
    limits: Limits | None = None
    spinning: bool = False
    arena: bool = True

    def worker(self, candidate: Candidate, *, threads: int) -> Worker:
        """Return a new process for a model."""
        return Worker(candidate.name, threads=threads, limits=self.limits)

    def model(self, candidate: Candidate, *, threads: int, **options: bool) -> dict[str, Any]:
        """Return the fields by which a worker opens a model; `options` go before those of the setup."""
        fields: dict[str, Any] = {
            "backend": candidate.backend,
            "path": str(candidate.path),
            "token_ids": candidate.token_ids,
            "threads": threads,
            "artifact": str(self.artifact.folder),
        }
        if candidate.backend == "onnxruntime":
            fields["options"] = {"spinning": self.spinning, "arena": self.arena, **options}
        return fields

    def opening(self, candidate: Candidate, *, threads: int, **options: bool) -> dict[str, Any]:
        """Return the fields of a worker's "open": those of `model`, and from what its inputs are drawn."""
        return self.model(candidate, threads=threads, **options) | {"seed": self.settings.seed}
