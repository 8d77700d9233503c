"""The passes of a benchmark, as seen from the parent: memory and accuracy, cold start, and the interleaved timing.

Each pass has its own fresh processes, so that none disturbs another: memory is taken where nothing is timed, cold start
where nothing is warm, and timing where each model takes its turn in every round, so that drift of the machine hits all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.candidates import Candidate
from bertemd_deploy.bench.environment import OtherWork
from bertemd_deploy.bench.latency import WINDOW
from bertemd_deploy.bench.process import Worker
from bertemd_deploy.bench.workload import REPLAY, Cell
from bertemd_deploy.settings import BenchSettings

COLD_STARTS = 3
COLD_SEQUENCE = 32
SETTLE_SECONDS = 0.005  # before a turn: OpenMP threads of the model before spin on for some milliseconds
WARM_UP_SHARE = 3  # the warm-up may take a third of what the timing takes
LEAST_CALLS = 3
OVERRUN = 4  # times its planned seconds that a turn of fixed shape may take before it ends early
LEAST_REPLAYED = 4  # rows a round, for a mixture of lengths; and two requests
MOST_CALLS = 2000  # in a round; bounds the record's size for a model of microseconds
DISTURBANCE = 0.2  # CPUs that other programs may take of those a cell needs before its speed-ups are not claimed

Rounds = list[list[float]]


@dataclass(frozen=True)
class Profile:
    """What is known of a model before it is timed.

    Attributes:
        logits: (n, outputs) float32 over the evaluation slice, or ragged, (sum of lengths, outputs), of a model that
            reads every token; columns in the artifact's label order.
        cold_start_ms: import, load, first: medians over fresh processes; and their number, n.
        peak_rss_bytes: over rows of mixed lengths at every batch size, without timing; None where not measurable.
        rss_after_import_bytes: before the model was loaded.
        parameters: count, None where unknown.
    """

    logits: NDArray[np.float32]
    cold_start_ms: dict[str, float]
    peak_rss_bytes: int | None
    rss_after_import_bytes: int
    parameters: int | None


@dataclass
class Timing:
    """Raw results of one model in one cell: milliseconds per call by round, and the CPU seconds of all calls."""

    warm_up: dict[str, Any]
    rounds: Rounds
    cpu_seconds: float


@dataclass(frozen=True)
class CellResult:
    """All models in one cell, in their order.

    Attributes:
        cell: what was measured.
        alone: the model alone.
        whole: from text to decision; None where there are no texts.
        other_cpus_busy: how many of our CPUs other programs kept busy meanwhile, on average.
        disturbed: whether that left fewer CPUs than the cell has threads.
    """

    cell: Cell
    alone: list[Timing]
    whole: list[Timing] | None
    other_cpus_busy: float
    disturbed: bool


def _open_fields(candidate: Candidate, *, artifact: Artifact, threads: int, seed: int) -> dict[str, Any]:
    return {
        "backend": candidate.backend,
        "path": str(candidate.path),
        "token_ids": candidate.token_ids,
        "threads": threads,
        "artifact": str(artifact.folder),
        "seed": seed,
    }


def profile(candidate: Candidate, *, artifact: Artifact, settings: BenchSettings, threads: int) -> Profile:
    """Measure memory and accuracy of a model in one fresh process, and its cold start in three more.

    Raises:
        MeasurementError: a worker died or could not open the model.
    """
    fields = _open_fields(candidate, artifact=artifact, threads=threads, seed=settings.seed)
    with Worker(candidate.name, threads=threads) as worker, tempfile.TemporaryDirectory() as folder:
        opened = worker.request("open", **fields)
        memory = worker.request("memory", batches=sorted(set(settings.batch_sizes)))
        worker.request("evaluate", out=str(Path(folder) / "logits.npy"))
        logits: NDArray[np.float32] = np.load(Path(folder) / "logits.npy", allow_pickle=False)
    starts = []
    for _ in range(COLD_STARTS):
        with Worker(candidate.name, threads=threads) as worker:
            start = worker.request("open", **fields)
            start |= worker.request("first", sequence=min(COLD_SEQUENCE, artifact.max_length))
            starts.append(start)
    cold_start = {part: median(start[f"{part}_ms"] for start in starts) for part in ("import", "load", "first")}
    return Profile(
        logits=logits[:, list(candidate.outputs)],
        cold_start_ms=cold_start | {"n": COLD_STARTS},
        peak_rss_bytes=memory["peak_rss_bytes"],
        rss_after_import_bytes=opened["rss_after_import_bytes"],
        parameters=candidate.parameters or opened["parameters"],
    )


def time_cells(
    candidates: Sequence[Candidate],
    cells: Sequence[Cell],
    *,
    artifact: Artifact,
    settings: BenchSettings,
    done: Callable[[Cell], None],
) -> list[CellResult]:
    """Time every model in every cell; the cells have one thread count in common, and one process per model.

    Args:
        candidates: the models; results keep their order.
        cells: what to measure, in order.
        artifact: source of the inputs.
        settings: rounds, seconds per cell, seed.
        done: called after each cell.

    Raises:
        MeasurementError: a worker died.
    """
    (threads,) = {cell.threads for cell in cells}
    generator = np.random.default_rng([settings.seed, threads])
    results = []
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(candidate.name, threads=threads)) for candidate in candidates]
        for worker, candidate in zip(workers, candidates, strict=True):
            worker.send("open", **_open_fields(candidate, artifact=artifact, threads=threads, seed=settings.seed))
        for worker in workers:
            worker.receive()
        for cell in cells:
            watch = OtherWork([worker.pid for worker in workers])
            alone = _time_cell(workers, cell, texts=False, settings=settings, generator=generator)
            whole = None
            if cell.sequence == REPLAY:
                whole = _time_cell(workers, cell, texts=True, settings=settings, generator=generator)
            busy = watch.cpus_busy()
            results.append(CellResult(cell, alone, whole, busy, busy > watch.cpus - threads + DISTURBANCE))
            done(cell)
    return results


def _time_cell(
    workers: Sequence[Worker], cell: Cell, *, texts: bool, settings: BenchSettings, generator: np.random.Generator
) -> list[Timing]:
    """Warm every worker up, then let each take its turn in every round, in an order drawn anew per round."""
    fields: dict[str, Any] = {"batch": cell.batch, "sequence": cell.sequence, "texts": texts}
    timings = []
    for worker in workers:
        time.sleep(SETTLE_SECONDS)
        warm = worker.request("warm", seconds=settings.seconds_per_cell / WARM_UP_SHARE, count=WINDOW, **fields)
        timings.append(Timing(warm, [], 0.0))
    seconds = settings.seconds_per_cell / settings.rounds
    medians = [timing.warm_up["median_ms"] for timing in timings]
    counts = [calls_per_round(median_ms, seconds=seconds) for median_ms in medians]
    most_seconds: float | None = OVERRUN * seconds
    if cell.sequence == REPLAY:  # never cut short: all models run the same requests
        most_seconds = None
        counts = [requests_per_round(medians, batch=cell.batch, seconds=seconds)] * len(workers)
    for number in range(settings.rounds):
        for at in generator.permutation(len(workers)):
            time.sleep(SETTLE_SECONDS)
            turn = workers[at].request(
                "turn",
                lead=medians[at] < 1000 * seconds,
                most_seconds=most_seconds,
                start=number * counts[at],
                count=counts[at],
                **fields,
            )
            timings[at].rounds.append(turn["samples_ms"])
            timings[at].cpu_seconds += turn["cpu_seconds"]
    return timings


def calls_per_round(median_ms: float, *, seconds: float) -> int:
    """Return how many calls fill a turn of `seconds`: at least 3, but 1 where a single call already takes longer."""
    fitting = 1000 * seconds / median_ms
    return 1 if fitting < 1 else int(np.clip(fitting, LEAST_CALLS, MOST_CALLS))


def requests_per_round(medians_ms: Sequence[float], *, batch: int, seconds: float) -> int:
    """Return how many replayed requests each model runs in a round.

    The same for all, so that all run the same lengths: as many as the slowest does in `seconds`, but at least 4 rows
    and 2 requests.
    """
    return int(np.clip(1000 * seconds / max(medians_ms), max(2, LEAST_REPLAYED // batch), MOST_CALLS))
