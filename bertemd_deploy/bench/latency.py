"""The timed loops, run inside a worker: warm up until steady, then time single calls, back to back or one at a time.

Back to back ("closed loop", `timed_turn`) tells what a machine can do at most. One request per interval (`paced_turn`) is
what most devices see: between two requests threads fall asleep, caches are taken by others and the clock goes down.
Calls are functions without arguments, prepared beforehand, so that nothing but the measured work is inside the clock.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from bertemd_deploy.bench.statistics import change_point

WINDOW = 5  # calls whose median is one point of the series in which a change is looked for
STEADY_WINDOWS = 4  # windows since the last change that end the warm-up
STEADY_CHANGE = 0.05  # largest relative change between the halves of these windows: beyond it they still drift
MOST_WARM_UP_CALLS = 200

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class WarmUp:
    """How a warm-up went.

    Attributes:
        calls: how many were made.
        steady: whether the time per call became steady before the cap.
        median_ms: of the steady calls, or of the last window where they never became so.
        settled_after: calls before the steady ones; None where there are none.
    """

    calls: int
    steady: bool
    median_ms: float
    settled_after: int | None


@dataclass(frozen=True)
class Turn:
    """One model's share of one round.

    Attributes:
        samples_ms: wall time of each call.
        cpu_seconds: of all calls together, over all threads.
        energy_joules: that the machine's counter advanced meanwhile; None without one.
    """

    samples_ms: list[float]
    cpu_seconds: float
    energy_joules: float | None


@dataclass(frozen=True)
class Paced:
    """Requests that came one by one.

    Attributes:
        samples_ms: wall time of each.
        idle_seconds: waited between them.
        idle_cpu_seconds: that this process used while it waited.
    """

    samples_ms: list[float]
    idle_seconds: float
    idle_cpu_seconds: float


def warm_up(calls: Sequence[Call], *, seconds: float, clock: Clock = time.perf_counter) -> WarmUp:
    """Call until the medians of successive windows have settled, or `seconds` or 200 calls are spent.

    They have settled when the last change point lies `STEADY_WINDOWS` windows back and no drift is left since.

    Args:
        calls: what to run, over and over from the first on; a window is `WINDOW` calls or all of `calls`, whichever is
            more, so every window holds the same mixture of work.
        seconds: cap on the time; two calls are made in any case.
        clock: seconds, monotonic.
    """
    window = -(-WINDOW // len(calls)) * len(calls)
    started = clock()
    times: list[float] = []
    medians: list[float] = []
    for call in itertools.cycle(calls):
        before = clock()
        call()
        after = clock()
        times.append(1000 * (after - before))
        if len(times) % window == 0:
            medians.append(median(times[-window:]))
            begin = change_point(medians)
            if _steady(medians[begin:]):
                return WarmUp(len(times), True, median(times[begin * window :]), begin * window)
        if len(times) >= 2 and (len(times) >= MOST_WARM_UP_CALLS or after - started >= seconds):
            break
    return WarmUp(len(times), False, median(times[-window:]), None)


def _steady(medians: Sequence[float]) -> bool:
    """Say whether windows without a change point among them are enough, and without drift."""
    if len(medians) < STEADY_WINDOWS:
        return False
    half = len(medians) // 2
    first, last = median(medians[:half]), median(medians[half:])
    return abs(last - first) <= STEADY_CHANGE * first


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the timed loop."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def no_counter() -> float | None:
    """Return None: there is no energy counter to read."""
    return None


def timed_turn(
    calls: Sequence[Call],
    *,
    lead: bool,
    most_seconds: float | None = None,
    joules: Callable[[], float | None] = no_counter,
    clock: Clock = time.perf_counter,
) -> Turn:
    """Time each of `calls` once, in order.

    Args:
        calls: what to run.
        lead: make one untimed call first, because another model had the caches in between.
        most_seconds: end the turn early once it has taken so long (the machine became busy); None runs all calls.
        joules: reading of an energy counter that only grows; None where it cannot be read.
        clock: seconds, monotonic.
    """
    samples: list[float] = []
    with _no_collection():
        if lead:
            calls[0]()
        energy = joules()
        cpu = time.process_time()
        started = clock()
        for call in calls:
            before = clock()
            call()
            after = clock()
            samples.append(1000 * (after - before))
            if most_seconds is not None and after - started >= most_seconds:
                break
        cpu = time.process_time() - cpu
        energy_after = joules()
    used = None if energy is None or energy_after is None else energy_after - energy
    return Turn(samples, cpu, used)


def paced_turn(
    calls: Sequence[Call],
    *,
    interval_seconds: float,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    cpu_clock: Clock = time.process_time,
) -> Paced:
    """Time each of `calls` once, in order, one at the beginning of each interval; the process sleeps in between.

    A model that takes longer than the interval is asked again at the next beginning after its answer, so every call comes
    after a pause and none waits in a queue.

    Args:
        calls: what to run; the first is made once more, untimed, before.
        interval_seconds: above 0.
        clock: seconds, monotonic.
        sleep: waits so many seconds.
        cpu_clock: CPU seconds of this process, over all threads.
    """
    samples: list[float] = []
    idle = idle_cpu = 0.0
    with _no_collection():
        started = clock()
        calls[0]()
        for call in calls:
            now, cpu = clock(), cpu_clock()
            passed = math.floor((now - started) / interval_seconds)
            sleep(max(0.0, started + (passed + 1) * interval_seconds - now))
            idle_cpu += cpu_clock() - cpu
            before = clock()
            call()
            after = clock()
            idle += before - now
            samples.append(1000 * (after - before))
    return Paced(samples, idle, idle_cpu)
