"""Calibration: this machine's tables (`speeds`), made from the times of small graphs (`cases`).

A time is the least over rounds of the median of a few calls: what other programs add to it is left out. In every round all
cases take their turn, in a new order, so that drift of the machine hits all; each thread count has a process of its own. From
a call's time the empty call's is taken away, the rest divided by the number of operators; from a product's time also the
start, the quantization of its activations and the stalls that its own weights cause, so that each is counted once when an
estimate adds them up.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import TracebackType

import numpy as np

from bertemd_deploy.bench.process import Worker
from bertemd_deploy.errors import missing_extra
from bertemd_deploy.estimate.cases import Case, plan
from bertemd_deploy.estimate.speeds import PER_MAC, SHARED, Calibration, Speeds, Surface

COMMAND = (sys.executable, "-P", "-m", "bertemd_deploy.estimate.probe")
ROUNDS = 3
SECONDS = 0.006  # of calls, of a case in a round; three calls in any case
_LEAST_MS = 1e-7  # a difference of two times that noise made negative
_LEAST_SHARE = 0.1  # of a product's time, that remains when what runs beside it is taken away
_LEAST_STALL = 0.02  # of the stall beyond all caches, where there is none to see


class Prober:
    """The processes that time the cases, one for each thread count; a context manager.

    `round` times every case once in each; others may have theirs timed in between, with `worker`.
    """

    def __init__(self, threads: Sequence[int], *, seed: int = 0) -> None:
        """Take the thread counts.

        Raises:
            BertemdError: onnx is not installed.
        """
        try:
            import onnx  # noqa: F401 - the cases are made with it
        except ImportError:
            raise missing_extra("train", package="onnx") from None
        self.threads = sorted(set(threads))
        self.cases = plan()
        self._random = np.random.default_rng(seed)
        self._samples: dict[int, dict[str, list[float]]] = {count: {} for count in self.threads}
        self._stack = ExitStack()

    def __enter__(self) -> Prober:
        """Write the graphs and start the processes."""
        import onnx

        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bertemd-calibrate-")))
            self._paths = {case.name: folder / f"{at}.onnx" for at, case in enumerate(self.cases)}
            for case in self.cases:
                onnx.save_model(case.build(), str(self._paths[case.name]))
            self._workers = {
                count: stack.enter_context(Worker(f"calibration, {count} threads", threads=count, command=COMMAND))
                for count in self.threads
            }
            self._rss = self._workers[self.threads[0]].request("facts")["rss_after_import_bytes"]
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes and remove the graphs."""
        self._stack.__exit__(kind, error, trace)

    def worker(self, threads: int) -> Worker:
        """Return the process of a thread count; it speaks the protocol of `probe`."""
        return self._workers[threads]

    def round(self, *, seconds: float = SECONDS, done: Callable[[], None] = lambda: None) -> None:
        """Time every case once with every thread count.

        Args:
            seconds: of calls, for each.
            done: called after each case.

        Raises:
            MeasurementError: a process died.
        """
        for at in self._random.permutation(len(self.cases)):
            case = self.cases[int(at)]
            for count in self.threads:
                worker = self._workers[count]
                path = str(self._paths[case.name])
                worker.request("open", name="case", path=path, threads=count, optimize=False)
                samples = worker.request("time", name="case", feeds=case.feeds, seconds=seconds)["samples_ms"]
                worker.request("close", name="case")
                self._samples[count].setdefault(case.name, []).append(median(samples))
            done()

    def calibration(self) -> Calibration:
        """Return the tables of all rounds so far."""
        import onnxruntime

        from bertemd_deploy.bench.environment import device

        machine = {
            "cpu": device()["cpu"],
            "onnxruntime": onnxruntime.__version__,
            "rss_after_import_bytes": self._rss,
        }
        speeds = {
            count: reduce(self.cases, {name: min(values) for name, values in samples.items()})
            for count, samples in self._samples.items()
        }
        return Calibration(speeds, machine, {str(count): samples for count, samples in self._samples.items()})


def calibrate(*, threads: Sequence[int], rounds: int = ROUNDS, done: Callable[[], None] = lambda: None) -> Calibration:
    """Time small graphs on this machine and return its tables.

    Args:
        threads: counts; 1 is always measured.
        rounds: how often all cases take their turn.
        done: called after each case.

    Raises:
        MeasurementError: a process died.
        BertemdError: onnx is not installed.
    """
    with Prober([1, *threads]) as prober:
        for _ in range(rounds):
            prober.round(done=done)
        return prober.calibration()


def reduce(cases: Sequence[Case], times: Mapping[str, float]) -> Speeds:
    """Return the tables from the time of one call of each case, in milliseconds.

    Args:
        cases: those of `cases.plan`.
        times: by case name.
    """
    call = times["call"]
    by_table: dict[str, list[Case]] = {}
    for case in cases:
        by_table.setdefault(case.table, []).append(case)

    def each(case: Case) -> float:
        return max((times[case.name] - call) / case.repeats, _LEAST_MS)

    tables = {
        name: _surface(group, each)
        for name, group in by_table.items()
        if name not in (*PER_MAC, "call", "wake", "stream")
    }
    stall = _stall(by_table["stream"], each)
    starts = {}
    for name in SHARED:
        smallest = min(by_table[name], key=lambda case: case.macs)
        by_table[name].remove(smallest)
        starts[name] = each(smallest) / 2  # of two products; sixteen by sixteen weights are no work

    def remaining(case: Case, beside: float) -> float:
        """Return milliseconds per multiply-add, of what is left without what runs beside the products."""
        return max(each(case) - beside, _LEAST_SHARE * each(case)) / case.macs

    def product(case: Case) -> float:
        beside = 2 * starts[case.table]
        beside += case.weight_bytes * stall.at(case.weight_bytes * case.repeats, case.size)
        if case.table == "int8_product":
            narrow = case.feeds["x"]["shape"][1]
            for columns in (narrow, case.width // narrow):
                beside += passing(tables["dynamic_quantize"], case.size * columns, columns)
        return remaining(case, beside)

    def attention(case: Case) -> float:
        moved = passing(tables["transpose"], math.prod(case.feeds["x"]["shape"]), case.width)
        return remaining(case, starts["fp32_product"] + 3 * moved)

    for name in SHARED:
        tables[name] = _surface(by_table[name], product)
    tables["attention"] = _surface(by_table["attention"], attention)
    tables["batched_product"] = _surface(
        by_table["batched_product"], lambda case: remaining(case, starts["fp32_product"])
    )
    short, long = sorted(by_table["wake"], key=lambda case: case.repeats)
    slope = (times[long.name] - times[short.name]) / (long.repeats - short.repeats)
    wake = max(0.0, times[short.name] - short.repeats * slope - call)  # threads that sleep between calls
    return Speeds(tables, starts, stall, call + wake)


def passing(table: Surface, values: float, width: float) -> float:
    """Return the milliseconds of a pass over values beyond those of starting it."""
    return max(0.0, table.at(values, width, grows=True) - table.start)


def _surface(cases: Sequence[Case], value: Callable[[Case], float]) -> Surface:
    """Return the surface of the values of cases by their width and size."""
    widths = sorted({case.width for case in cases})
    return Surface(
        tuple(
            (float(width), tuple(sorted((float(case.size), value(case)) for case in cases if case.width == width)))
            for width in widths
        )
    )


def _stall(cases: Sequence[Case], each: Callable[[Case], float]) -> Surface:
    """Return milliseconds per byte beyond those of the fewest weights, by all weights' bytes (size) and rows (width)."""
    lines = []
    for rows in sorted({case.size for case in cases}):
        group = sorted((case for case in cases if case.size == rows), key=lambda case: case.repeats)
        beyond = np.array([(each(case) - each(group[0])) / case.weight_bytes for case in group])
        most = max(float(beyond.max()), _LEAST_MS / group[0].weight_bytes)
        grown = np.maximum.accumulate(np.maximum(beyond, _LEAST_STALL * most))
        sizes = [float(case.weight_bytes * case.repeats) for case in group]
        lines.append((float(rows), tuple(zip(sizes, map(float, grown), strict=True))))
    return Surface(tuple(lines))
