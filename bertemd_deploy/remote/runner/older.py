"""What the standard library of Python 3.11 has and that of 3.9 lacks, as far as the copied modules use it.

Importing this fills the gaps in the library's own modules, in these processes alone; `remote.downlevel` rewrites what no
library can mend.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Union

__all__ = ["Union", "zip_strict"]

_CHUNK = 2**18
_MISSING = object()


def zip_equal(*iterables: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield as `zip` does, and refuse iterables of unequal length, as its `strict` does from 3.10 on.

    Raises:
        ValueError: one ends before another.
    """
    for items in itertools.zip_longest(*iterables, fillvalue=_MISSING):
        if any(item is _MISSING for item in items):
            raise ValueError("zip() arguments are of unequal length")
        yield items


# The real one where there is one: it is in code that is timed.
zip_strict: Callable[..., Any] = partial(zip, strict=True) if sys.version_info >= (3, 10) else zip_equal


def pairwise(iterable: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield each item with the one after it."""
    before, after = itertools.tee(iterable)
    next(after, None)
    return zip(before, after)


def file_digest(handle: Any, name: str) -> Any:
    """Return the hash object of a file that is open for reading bytes."""
    digest = hashlib.new(name)
    for block in iter(lambda: handle.read(_CHUNK), b""):
        digest.update(block)
    return digest


FILLED = (
    (datetime, "UTC", datetime.timezone.utc),
    (itertools, "pairwise", pairwise),
    (hashlib, "file_digest", file_digest),
)
for _module, _name, _value in FILLED:
    if not hasattr(_module, _name):
        setattr(_module, _name, _value)
