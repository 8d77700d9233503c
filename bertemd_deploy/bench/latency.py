"""The timed loop, run inside a worker: warm up until steady, then time single calls.

Calls are functions without arguments, prepared beforehand, so that nothing but the measured work is inside the clock.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

WINDOW = 5  # calls whose median is compared with the median of the next as many
STEADY_CHANGE = 0.05  # largest relative change between two window medians that counts as steady
STEADY_WINDOWS = 2  # how many such changes in a row end the warm-up
MOST_WARM_UP_CALLS = 200

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class WarmUp:
    """How a warm-up went: calls made, whether the time became steady, median of the last window in milliseconds."""

    calls: int
    steady: bool
    median_ms: float


@dataclass(frozen=True)
class Turn:
    """One model's share of one round: a wall time per call in milliseconds, and the CPU seconds of all of them."""

    samples_ms: list[float]
    cpu_seconds: float


def warm_up(calls: Sequence[Call], *, seconds: float, clock: Clock = time.perf_counter) -> WarmUp:
    """Call until the median of successive windows stops changing, or `seconds` or 200 calls are spent.

    Args:
        calls: what to run, over and over from the first on; a window is `WINDOW` calls or all of `calls`, whichever is
            more, so every window holds the same mixture of work.
        seconds: cap on the time; two calls are made in any case.
        clock: seconds, monotonic.
    """
    window = -(-WINDOW // len(calls)) * len(calls)
    started, made, quiet = clock(), 0, 0
    previous: float | None = None
    while True:
        times: list[float] = []
        for call in itertools.islice(itertools.cycle(calls), window):
            before = clock()
            call()
            after = clock()
            times.append(1000 * (after - before))
            made += 1
            if made >= 2 and (made >= MOST_WARM_UP_CALLS or after - started >= seconds):
                return WarmUp(made, False, median(times))
        current = median(times)
        quiet = quiet + 1 if previous is not None and abs(current - previous) <= STEADY_CHANGE * previous else 0
        if quiet == STEADY_WINDOWS:
            return WarmUp(made, True, current)
        previous = current


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the timed loop."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed_turn(
    calls: Sequence[Call], *, lead: bool, most_seconds: float | None = None, clock: Clock = time.perf_counter
) -> Turn:
    """Time each of `calls` once, in order.

    Args:
        calls: what to run.
        lead: make one untimed call first, because another model had the caches in between.
        most_seconds: end the turn early once it has taken so long (the machine became busy); None runs all calls.
        clock: seconds, monotonic.
    """
    samples: list[float] = []
    with _no_collection():
        if lead:
            calls[0]()
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
    return Turn(samples, cpu)
