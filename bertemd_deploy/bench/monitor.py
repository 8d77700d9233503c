"""The state of the machine over a whole measurement: clock, temperature, throttling and stolen time, before, during, after.

Samples are taken between two turns, when no model is running: nothing disturbs a timed call, and the clock that is read is
still the one the last turn ran at.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bertemd_deploy.bench.environment import conditions

SAMPLE_SECONDS = 1.0  # reading all clocks of a large machine takes milliseconds
# The firmware of a Raspberry Pi: bits 0 to 3 tell of under-voltage, a capped clock, throttling and the soft temperature
# limit now, bits 16 to 19 whether each has occurred since boot.
NOW_BITS, EVER_BITS = 0xF, 0xF0000


class Monitor:
    """Looks at the machine from its creation on."""

    def __init__(self, root: Path = Path("/"), *, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the first look; `root` is where `proc` and `sys` lie, `clock` gives seconds."""
        self._root = root
        self._clock = clock
        self._seen = [conditions(root)]
        self._next = clock() + SAMPLE_SECONDS

    def sample(self) -> None:
        """Look again, if the last look is a second or more ago."""
        if self._clock() >= self._next:
            self._seen.append(conditions(self._root))
            self._next = self._clock() + SAMPLE_SECONDS

    def record(self) -> dict[str, Any]:
        """Take the last look and return a record's `conditions`.

        Returns:
            before and after, as `environment.conditions` gives them, and during: samples (count), frequency_mhz {min, max}
            and temperature_celsius {max} over all samples, throttled (bool), throttle_count_delta, stolen_cpu_seconds and
            quota_throttled_seconds, by how much each counter grew. None is what the system does not tell.
        """
        self._seen.append(conditions(self._root))
        first, last = self._seen[0], self._seen[-1]
        clocks = self._known("frequency_mhz")
        temperatures = self._known("temperature_celsius")
        count = _growth(first, last, "throttle_count")
        return {
            "before": first,
            "after": last,
            "during": {
                "samples": len(self._seen),
                "frequency_mhz": {"min": min(clocks, default=None), "max": max(clocks, default=None)},
                "temperature_celsius": {"max": max(temperatures, default=None)},
                "throttled": _throttled(self._known("throttled"), count),
                "throttle_count_delta": count,
                "stolen_cpu_seconds": _growth(first, last, "stolen_cpu_seconds"),
                "quota_throttled_seconds": _growth(first, last, "quota_throttled_seconds"),
            },
        }

    def _known(self, key: str) -> list[Any]:
        return [seen[key] for seen in self._seen if seen[key] is not None]


def _growth(first: dict[str, Any], last: dict[str, Any], key: str) -> Any:
    """Return by how much a counter grew; None where it cannot be read, or began anew (a processor taken off line)."""
    before, after = first[key], last[key]
    return None if before is None or after is None or after < before else after - before


def _throttled(flags: list[str], count: int | None) -> bool | None:
    """Say whether the firmware's `flags` or the kernel's `count` of throttlings tell of any; None where neither does."""
    bits = [int(flag, 16) for flag in flags if re.fullmatch("(0x)?[0-9a-fA-F]+", flag)]
    new = bits[-1] & ~bits[0] & EVER_BITS if bits else 0
    if any(value & NOW_BITS for value in bits) or new or count:
        return True
    return None if not bits and count is None else False
