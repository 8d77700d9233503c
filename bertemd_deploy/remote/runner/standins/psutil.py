"""What the measuring code asks of psutil, read from Linux's /proc and /sys, for a device that has no psutil.

Names and values are psutil's. Where a process is gone or the system has no /proc, an OSError says so.
"""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path
from typing import Any

PROC = Path("/proc")
SYS_CPU = Path("/sys/devices/system/cpu")
TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")

_CpuTimes = namedtuple(
    "_CpuTimes",
    ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"),
)
_Memory = namedtuple("_Memory", ("rss", "vms"))
_Times = namedtuple("_Times", ("user", "system", "children_user", "children_system"))
_Total = namedtuple("_Total", ("total", "available"))


class Process:
    """A running process."""

    def __init__(self, pid: int | None = None) -> None:
        """Take the process number; None is this process."""
        self.pid = os.getpid() if pid is None else pid
        self._stat()

    def _stat(self) -> list[str]:
        """Return the fields behind the program's name, which may hold blanks and brackets itself."""
        return (PROC / str(self.pid) / "stat").read_text().rpartition(")")[2].split()

    def memory_info(self) -> Any:
        """Return the resident and virtual bytes."""
        pages = (PROC / str(self.pid) / "statm").read_text().split()
        return _Memory(rss=int(pages[1]) * PAGE, vms=int(pages[0]) * PAGE)

    def cpu_times(self) -> Any:
        """Return the CPU seconds of the process, and of its ended children."""
        return _Times(*(int(ticks) / TICK for ticks in self._stat()[11:15]))


def cpu_times(percpu: bool = False) -> Any:
    """Return the seconds since boot that all CPUs, or each by itself, spent in which state."""
    rows = [line.split() for line in (PROC / "stat").read_text().splitlines() if line.startswith("cpu")]
    times = [_CpuTimes(*(int(ticks) / TICK for ticks in [*row[1:], *["0"] * 10][:10])) for row in rows]
    return times[1:] if percpu else times[0]


def cpu_count(logical: bool = True) -> int | None:
    """Return the number of hardware threads, or of physical cores where the system tells them apart."""
    if logical:
        return os.cpu_count()
    cores = set()
    for topology in SYS_CPU.glob("cpu[0-9]*/topology"):
        try:
            cores.add(tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id")))
        except OSError:
            return None
    return len(cores) or None


def virtual_memory() -> Any:
    """Return the machine's memory in bytes, all of it and what is free to take."""
    lines = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines() if ":" in line)
    return _Total(*(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable")))
