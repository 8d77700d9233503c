"""What a person sees while a command works: progress bars and notes, all on stderr.

Quiet when stderr is no terminal: bars vanish, notes stay (one line each), so logs hold facts and no control characters.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_drawn: ContextVar[Progress | None] = ContextVar("drawn", default=None)
_console = Console(stderr=True, highlight=False, soft_wrap=True)


def silence() -> None:
    """Say nothing more from this process: of several that train together, one speaks."""
    _console.quiet = True


def silenced() -> bool:
    """Say whether this process was told to be silent."""
    return bool(_console.quiet)


def note(text: str) -> None:
    """Print one line for the user on stderr."""
    _console.print(text, markup=False)


def warn(text: str) -> None:
    """Print one loud line for the user on stderr: a choice of theirs, or a fact, that they should not miss."""
    _console.print(f"! {text}", markup=False, style="bold yellow")


class Task:
    """One running bar; `advance` moves it and, given tokens, shows the rate in tokens per second."""

    def __init__(self, progress: Progress | None, name: str, total: int) -> None:
        """Start a bar called `name` of `total` steps; `progress` None draws nothing."""
        self._progress = progress
        self._tokens = 0
        self._started = time.monotonic()
        self._id = progress.add_task(name, total=total, detail="") if progress else None

    def remove(self) -> None:
        """Take the bar off the screen."""
        if self._progress is not None and self._id is not None:
            self._progress.remove_task(self._id)

    def advance(self, steps: int = 1, *, tokens: int = 0, detail: str = "") -> None:
        """Move the bar by `steps`; add `tokens` to the rate; show `detail` (a loss, a model) at its end."""
        if self._progress is None or self._id is None:
            return
        self._tokens += tokens
        if self._tokens:
            rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
            detail = f"{rate:,.0f} tokens/s {detail}"
        self._progress.update(self._id, advance=steps, detail=detail)


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[Task]:
    """Yield a bar over `total` steps with time elapsed and left; draws nothing when stderr is no terminal.

    Inside another bar (an evaluation inside training) the new one is drawn below it and vanishes at its end.
    """
    if silenced() or not sys.stderr.isatty():
        yield Task(None, name, total)
        return
    outer = _drawn.get()
    if outer is not None:
        task = Task(outer, name, total)
        try:
            yield task
        finally:
            task.remove()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=_console) as bars:
        token = _drawn.set(bars)
        try:
            yield Task(bars, name, total)
        finally:
            _drawn.reset(token)
