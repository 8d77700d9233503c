"""The timing passes of a benchmark, as seen from the parent: every model takes its turn in every round of every cell.

Timing has its own fresh processes, one per model, which were not used for anything else; drift of the machine hits all
models alike. A model that meets its memory limit is left out from there on, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bertemd_deploy.bench.candidates import Candidate
from bertemd_deploy.bench.environment import OtherWork
from bertemd_deploy.bench.latency import WINDOW
from bertemd_deploy.bench.process import Worker
from bertemd_deploy.bench.setup import Setup
from bertemd_deploy.bench.workload import REPLAY, Cell
from bertemd_deploy.errors import MemoryLimitError
from bertemd_deploy.settings import BenchSettings

SETTLE_SECONDS = 0.005  # before a turn: OpenMP threads of the model before spin on for some milliseconds
WARM_UP_SHARE = 3  # the warm-up may take a third of what the timing takes
LEAST_CALLS = 3
OVERRUN = 4  # times its planned seconds that a turn of fixed shape may take before it ends early
LEAST_REPLAYED = 4  # rows a round, for a mixture of lengths; and two requests
MOST_CALLS = 2000  # in a round; bounds the record's size for a model of microseconds
DISTURBANCE = 0.2  # CPUs that other programs may take of those a cell needs before its speed-ups are not claimed

Rounds = list[list[float]]


@dataclass
class Timing:
    """Raw results of one model in one cell.

    Attributes:
        warm_up: how the warm-up went.
        rounds: milliseconds per call, by round.
        cpu_seconds: of all calls together.
        energy_joules: of all calls together; None where it is not counted, or too little for the counter's steps.
    """

    warm_up: dict[str, Any]
    rounds: Rounds
    cpu_seconds: float
    energy_joules: float | None


@dataclass(frozen=True)
class CellResult:
    """All models in one cell, by name.

    Attributes:
        cell: what was measured.
        alone: the model alone.
        whole: from text to decision; None where there are no texts, or that was not asked for.
        paced_ms: one sample per request, of requests that came one by one; None where that was not measured.
        energy_source: what energy was read from; None where there is nothing.
        other_cpus_busy: how many of our CPUs other programs kept busy meanwhile, on average.
        disturbed: whether that left fewer CPUs than the cell has threads.
    """

    cell: Cell
    alone: dict[str, Timing]
    whole: dict[str, Timing] | None
    paced_ms: dict[str, list[float]] | None
    energy_source: str | None
    other_cpus_busy: float
    disturbed: bool


class _LimitMet(Exception):  # noqa: N818 - not an error, but which model it was
    """A model met its memory limit while several were measured together."""

    def __init__(self, name: str, error: MemoryLimitError) -> None:
        super().__init__(name)
        self.name, self.error = name, error


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Tell which model it was that met its memory limit."""
    try:
        yield
    except MemoryLimitError as error:
        raise _LimitMet(name, error) from error


def time_cells(
    candidates: Sequence[Candidate],
    cells: Sequence[Cell],
    *,
    setup: Setup,
    paced: Collection[Cell] = (),
    done: Callable[[Cell], None],
    between: Callable[[], None] = lambda: None,
) -> tuple[list[CellResult], dict[str, MemoryLimitError]]:
    """Time every model in every cell; the cells have one thread count in common, and one process per model.

    Args:
        candidates: the models.
        cells: what to measure, in order.
        setup: how models are opened and for how long they are timed.
        paced: of the cells, those that are also run one request at a time.
        done: called after each cell.
        between: called between two turns, when no model is running.

    Returns:
        The cells' results, and the models that met their memory limit, by name: these are absent from the cell where they
        did so and from all later ones.

    Raises:
        MeasurementError: a worker died.
    """
    (threads,) = {cell.threads for cell in cells}
    generator = np.random.default_rng([setup.settings.seed, threads])
    failed: dict[str, MemoryLimitError] = {}
    results: list[CellResult] = []
    with ExitStack() as stack:
        workers = {one.name: stack.enter_context(setup.worker(one, threads=threads)) for one in candidates}
        meters: dict[str, dict[str, Any]] = {}
        for ask in ("send", "receive"):  # all open their models at the same time
            for one in candidates:
                try:
                    with _asking(one.name):
                        if ask == "send":
                            workers[one.name].send("open", **setup.opening(one, threads=threads))
                        elif one.name not in failed:
                            meters[one.name] = workers[one.name].receive()
                except _LimitMet as met:
                    failed[met.name] = met.error
        workers = {name: worker for name, worker in workers.items() if name not in failed}
        for cell in cells:
            result = None
            while workers and result is None:
                try:
                    timed = _measure(
                        workers, cell, meters, settings=setup.settings, generator=generator, between=between
                    )
                    paced_ms = _paced(workers, cell, settings=setup.settings) if cell in paced else None
                    result = replace(timed, paced_ms=paced_ms)
                except _LimitMet as met:
                    failed[met.name] = met.error
                    del workers[met.name]
            if result is not None:
                results.append(result)
            done(cell)
    return results, failed


def _measure(
    workers: Mapping[str, Worker],
    cell: Cell,
    meters: Mapping[str, dict[str, Any]],
    *,
    settings: BenchSettings,
    generator: np.random.Generator,
    between: Callable[[], None],
) -> CellResult:
    """Time all models in one cell back to back, alone and, where asked for, from text to decision."""
    watch = OtherWork([worker.pid for worker in workers.values()])
    alone = _time_cell(workers, cell, texts=False, settings=settings, generator=generator, between=between)
    whole = None
    if cell.sequence == REPLAY and settings.end_to_end:
        whole = _time_cell(workers, cell, texts=True, settings=settings, generator=generator, between=between)
    busy = watch.cpus_busy()
    for name, timing in alone.items():
        least = meters[name]["least_joules"]
        if timing.energy_joules is not None and not timing.energy_joules > least:
            timing.energy_joules = None
    source = next((meters[name]["energy_source"] for name in workers), None)
    return CellResult(cell, alone, whole, None, source, busy, busy > watch.cpus - cell.threads + DISTURBANCE)


def _time_cell(
    workers: Mapping[str, Worker],
    cell: Cell,
    *,
    texts: bool,
    settings: BenchSettings,
    generator: np.random.Generator,
    between: Callable[[], None],
) -> dict[str, Timing]:
    """Warm every worker up, then let each take its turn in every round, in an order drawn anew per round."""
    fields: dict[str, Any] = {"batch": cell.batch, "sequence": cell.sequence, "texts": texts}
    timings: dict[str, Timing] = {}
    for name, worker in workers.items():
        time.sleep(SETTLE_SECONDS)
        with _asking(name):
            warm = worker.request("warm", seconds=settings.seconds_per_cell / WARM_UP_SHARE, count=WINDOW, **fields)
        timings[name] = Timing(warm, [], 0.0, 0.0)
    seconds = settings.seconds_per_cell / settings.rounds
    medians = {name: timing.warm_up["median_ms"] for name, timing in timings.items()}
    counts = {name: calls_per_round(median_ms, seconds=seconds) for name, median_ms in medians.items()}
    most_seconds: float | None = OVERRUN * seconds
    if cell.sequence == REPLAY:  # never cut short: all models run the same requests
        most_seconds = None
        same = requests_per_round(list(medians.values()), batch=cell.batch, seconds=seconds)
        counts = dict.fromkeys(medians, same)
    names = list(workers)
    for number in range(settings.rounds):
        for at in generator.permutation(len(names)):
            name = names[at]
            time.sleep(SETTLE_SECONDS)
            with _asking(name):
                turn = workers[name].request(
                    "turn",
                    lead=medians[name] < 1000 * seconds,
                    most_seconds=most_seconds,
                    start=number * counts[name],
                    count=counts[name],
                    **fields,
                )
            between()
            timing, joules = timings[name], turn["energy_joules"]
            timing.rounds.append(turn["samples_ms"])
            timing.cpu_seconds += turn["cpu_seconds"]
            so_far = timing.energy_joules
            timing.energy_joules = None if so_far is None or joules is None else so_far + joules
    return timings


def _paced(workers: Mapping[str, Worker], cell: Cell, *, settings: BenchSettings) -> dict[str, list[float]]:
    """Run one request per interval on each model in turn; all are given the same requests."""
    found: dict[str, list[float]] = {}
    for name, worker in workers.items():
        with _asking(name):
            found[name] = worker.request(
                "paced",
                interval_seconds=settings.paced_interval_ms / 1000,
                batch=cell.batch,
                sequence=cell.sequence,
                count=settings.paced_requests,
            )["samples_ms"]
    return found


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
