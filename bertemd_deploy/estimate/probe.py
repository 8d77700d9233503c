"""The measured process of a calibration: opens small graphs, and times calls of them, obeying commands line by line.

`python -m bertemd_deploy.estimate.probe` speaks the protocol of `bench.worker`: a JSON object per line on stdin, an answer to
each on stdout, until stdin ends. One process serves one thread count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertemd_deploy.bench.worker import serve

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray

UNTIMED_CALLS = 2  # memory is taken and threads are made in the first
LEAST_CALLS, MOST_CALLS = 3, 200
_BLOCK = (1 << 16) + 1  # no multiple of a row
LONG_SECONDS = 0.02  # of a call that is made once untimed and once timed


def make_feeds(specification: Mapping[str, Mapping[str, Any]]) -> dict[str, NDArray[np.generic]]:
    """Return random inputs; large ones repeat a random block.

    Args:
        specification: by name: dtype, shape, and low and high (whole numbers from low to below high) or scale (normal
            numbers of that standard deviation).
    """
    import numpy as np

    random = np.random.default_rng(0)
    feeds: dict[str, NDArray[np.generic]] = {}
    for name, entry in specification.items():
        count = min(_BLOCK, math.prod(entry["shape"]))
        block: NDArray[Any]
        if "scale" in entry:
            block = random.normal(0, entry["scale"], count)
        else:
            block = random.integers(entry["low"], entry["high"], count)
        feeds[name] = np.resize(block.astype(entry["dtype"]), entry["shape"])
    return feeds


class Session:
    """What the process holds between commands; each public method is a command and returns its answer."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def facts(self) -> dict[str, Any]:
        """Import what a session needs: rss_after_import_bytes, of a process that holds no graph yet."""
        import onnxruntime  # noqa: F401 - its size is what is asked
        import tokenizers  # noqa: F401 - as above

        from bertemd_deploy.bench.memory import rss_bytes

        return {"rss_after_import_bytes": rss_bytes()}

    def open(self, *, name: str, path: str, threads: int, optimize: bool) -> dict[str, Any]:
        """Open the graph at `path` under a name."""
        from bertemd_deploy.runtime import open_session

        self._sessions[name] = open_session(Path(path), threads=threads, optimize=optimize)
        return {}

    def close(self, *, name: str) -> dict[str, Any]:
        """Forget a graph."""
        del self._sessions[name]
        return {}

    def time(self, *, name: str, feeds: Mapping[str, Mapping[str, Any]], seconds: float) -> dict[str, Any]:
        """Time calls of an opened graph for about `seconds`, after untimed ones: samples_ms, cpu_seconds.

        Args:
            name: of the graph.
            feeds: random inputs, as `make_feeds` takes them.
            seconds: for the timed calls; at least 3 are made, 1 where a call takes longer than `LONG_SECONDS`.
        """
        from bertemd_deploy.bench.latency import timed_turn

        call = partial(self._sessions[name].run, None, make_feeds(feeds))
        took = 0.0
        for _ in range(UNTIMED_CALLS):
            before = time.perf_counter()
            call()
            took = time.perf_counter() - before
            if took > LONG_SECONDS:
                break
        least = LEAST_CALLS if took <= LONG_SECONDS else 1
        count = min(MOST_CALLS, max(least, int(seconds / max(took, 1e-9))))
        turn = timed_turn([call] * count, lead=False)
        return {"samples_ms": turn.samples_ms, "cpu_seconds": turn.cpu_seconds}


def main() -> None:
    """Answer commands until stdin ends."""
    serve(Session())


if __name__ == "__main__":
    main()
