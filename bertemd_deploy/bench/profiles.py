"""What is measured of one model apart from its timing: memory, accuracy, cold start, and what idle threads cost.

Each measurement has a fresh process of its own. Memory and idle CPU time are taken with ONNX Runtime's memory arena, and
with threads that spin while they wait, on and off: both are on in ONNX Runtime unless switched off, and both are meant for
servers. The arena keeps what the largest requests needed; spinning threads take CPU time from everything else.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.bench.candidates import Candidate
from bertemd_deploy.bench.setup import Setup
from bertemd_deploy.bench.workload import Workload
from bertemd_deploy.errors import MemoryLimitError

COLD_STARTS = 3
FEW_TOKENS = 32  # of the one request of a cold start, and of those between which threads are idle
IDLE_INTERVAL_SECONDS = 0.1  # where no interval is set
LEAST_PAUSES = 2


@dataclass(frozen=True)
class Profile:
    """What is known of a model before it is timed.

    Attributes:
        logits: (n, outputs) float32 over the evaluation slice, or ragged, (sum of lengths, outputs), of a model that
            reads every token; columns in the artifact's label order.
        cold_start_ms: import, load, first, and process, from before the process was started to its first answer, with all
            files in the page cache: medians over fresh processes; and their number, n.
        peak_rss_bytes: over rows of mixed lengths at every batch size, without timing; None where not measurable.
        rss_after_import_bytes: before the model was loaded.
        parameters: count, None where unknown.
        memory: arena and no_arena, each {peak_rss_bytes, final_rss_bytes} over the rows of mixed lengths, or None where not
            measured or where it did not fit; and requests, how many these were. None for a model in PyTorch.
        idle: spinning and stopped, each {cpu_seconds_per_second} of the pauses between requests, and interval_ms and
            threads. None for a model in PyTorch, with one thread, or where not measured.
        confinement: by what each limit is kept; None without limits.
    """

    logits: NDArray[np.float32]
    cold_start_ms: dict[str, float]
    peak_rss_bytes: int | None
    rss_after_import_bytes: int
    parameters: int | None
    memory: dict[str, Any] | None
    idle: dict[str, Any] | None
    confinement: dict[str, str | None] | None


def profile(candidate: Candidate, *, setup: Setup, threads: int) -> Profile:
    """Measure one model in fresh processes, one after another.

    Raises:
        MemoryLimitError: the model does not fit into `setup.limits`.
        MeasurementError: a worker died or could not open the model.
    """
    with setup.worker(candidate, threads=threads) as worker, tempfile.TemporaryDirectory() as folder:
        opened = worker.request("open", **setup.opening(candidate, threads=threads))
        memory = worker.request("memory", batches=_batches(setup))
        worker.request("evaluate", out=str(Path(folder) / "logits.npy"))
        logits: NDArray[np.float32] = np.load(Path(folder) / "logits.npy", allow_pickle=False)
        confinement = worker.confinement
    native = candidate.backend == "onnxruntime"
    return Profile(
        logits=logits[:, list(candidate.outputs)],
        cold_start_ms=_cold_starts(candidate, setup=setup, threads=threads),
        peak_rss_bytes=memory["peak_rss_bytes"],
        rss_after_import_bytes=opened["rss_after_import_bytes"],
        parameters=candidate.parameters or opened["parameters"],
        memory=_both_memories(candidate, memory, setup=setup, threads=threads) if native else None,
        idle=_idle(candidate, setup=setup, threads=threads) if native and threads > 1 else None,
        confinement=confinement,
    )


def _batches(setup: Setup) -> list[int]:
    return sorted(set(setup.settings.batch_sizes))


def _cold_starts(candidate: Candidate, *, setup: Setup, threads: int) -> dict[str, float]:
    """Return import, load, first and process in milliseconds, medians over `n` fresh processes."""
    length = min(FEW_TOKENS, setup.artifact.max_length)
    workload = Workload.load(setup.artifact, seed=setup.settings.seed)
    input_ids = workload.synthetic(batch=1, sequence=length)["input_ids"].tolist()
    starts = []
    for _ in range(COLD_STARTS):
        started = time.monotonic()
        with setup.worker(candidate, threads=threads) as worker:
            start = worker.request("cold", input_ids=input_ids, **setup.model(candidate, threads=threads))
            start["process_ms"] = 1000 * (time.monotonic() - started)
        starts.append(start)
    parts = ("import", "load", "first", "process")
    return {part: median(start[f"{part}_ms"] for start in starts) for part in parts} | {"n": COLD_STARTS}


def _both_memories(candidate: Candidate, own: dict[str, Any], *, setup: Setup, threads: int) -> dict[str, Any]:
    """Return what a model in ONNX Runtime holds with its memory arena and without; `own` is as the setup has it."""
    found: dict[bool, dict[str, Any] | None] = {setup.arena: own, not setup.arena: None}
    if setup.settings.arena:
        try:
            with setup.worker(candidate, threads=threads) as worker:
                worker.request("open", **setup.opening(candidate, threads=threads, arena=not setup.arena))
                found[not setup.arena] = worker.request("memory", batches=_batches(setup))
        except MemoryLimitError:
            pass  # the model fits as it is used; that it does not the other way is what stays None
    kept = ("peak_rss_bytes", "final_rss_bytes")
    arena, no_arena = ({key: part[key] for key in kept} if part else None for part in (found[True], found[False]))
    return {"arena": arena, "no_arena": no_arena, "requests": own["requests"]}


def _idle(candidate: Candidate, *, setup: Setup, threads: int) -> dict[str, Any] | None:
    """Return the CPU seconds per second that a model in ONNX Runtime takes between requests, spinning and stopped."""
    settings = setup.settings
    if not settings.idle_seconds:
        return None
    interval = settings.paced_interval_ms / 1000 or IDLE_INTERVAL_SECONDS
    cell = {"batch": 1, "sequence": min(FEW_TOKENS, setup.artifact.max_length)}
    found: dict[str, Any] = {"interval_ms": 1000 * interval, "threads": threads}
    for name, spinning in (("spinning", True), ("stopped", False)):
        with setup.worker(candidate, threads=threads) as worker:
            worker.request("open", **setup.opening(candidate, threads=threads, spinning=spinning))
            count = max(LEAST_PAUSES, math.ceil(settings.idle_seconds / interval))
            paced = worker.request("paced", interval_seconds=interval, count=count, **cell)
        found[name] = {"cpu_seconds_per_second": paced["idle_cpu_seconds"] / paced["idle_seconds"]}
    return found
