"""`bertemd_deploy.console` without rich: lines on stderr, and of a bar the step it is at, now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

EVERY_SECONDS = 5.0  # between two lines of one bar: each costs the device a moment, so none is written while timing
_said = {"quiet": False}


def silence() -> None:
    """Say nothing more from this process."""
    _said["quiet"] = True


def silenced() -> bool:
    """Say whether this process was told to be silent."""
    return _said["quiet"]


def note(text: str) -> None:
    """Print one line for the user on stderr."""
    if not silenced():
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print one line that should not be missed on stderr."""
    note(f"! {text}")


class Task:
    """One running bar, as lines."""

    def __init__(self, name: str, total: int) -> None:
        """Begin `name` of `total` steps."""
        self._name = name
        self._total = total
        self._done = 0
        self._told = time.monotonic()

    def remove(self) -> None:
        """Do nothing: a line stays."""

    def advance(self, steps: int = 1, *, tokens: int = 0, detail: str = "") -> None:
        """Count `steps`; tell where it is and `detail`, at most once in 5 seconds and at the end."""
        self._done += steps
        if self._done >= self._total or time.monotonic() - self._told >= EVERY_SECONDS:
            self._told = time.monotonic()
            note(f"{self._name} {self._done}/{self._total} {detail}".rstrip())


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[Task]:
    """Yield a bar over `total` steps."""
    yield Task(name, total)
