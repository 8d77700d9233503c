"""Freed memory that stays with the process: told by page faults, which every first use of a new page is."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from bertemd_deploy import allocator
from bertemd_deploy.allocator import freed_memory_kept

LARGE, SMALLER = 2**26, 2**24  # bytes, more than glibc ever keeps by itself, and what it learns to keep
# In a process of its own, whose heap has no holes.
MEASURE = f"""
import ctypes, json, resource
from bertemd_deploy import allocator
from bertemd_deploy.allocator import freed_memory_kept

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(size))
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

faults({SMALLER})
found = {{"start": resident(), "before": faults({LARGE})}}
with freed_memory_kept():
    faults({LARGE})
    found |= {{"kept": faults({LARGE}), "held": resident()}}
found |= {{"released": resident(), "after": faults({LARGE})}}
faults({SMALLER})
print(json.dumps(found | {{"smaller": faults({SMALLER})}}))
"""
PLAIN = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and name not in allocator._CHOSEN}


def measured(**environment: str) -> dict[str, int]:
    """Return bytes that were resident, and pages that had to be cleared for a block of memory, at each stage."""
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, env=PLAIN | environment, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_freed_memory_is_used_again_and_handed_back_after() -> None:
    found = measured()
    assert found["kept"] * 10 < found["before"]
    assert found["held"] > found["start"] + LARGE * 0.9  # the kernel counts pages now and then
    assert found["released"] < found["start"] + LARGE / 4
    assert found["after"] * 2 > found["before"]
    assert (
        found["smaller"] * 10 < found["before"] * SMALLER / LARGE
    )  # as glibc does once it has seen such a block freed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_what_the_environment_says_stands() -> None:
    found = measured(MALLOC_MMAP_THRESHOLD_="131072")
    assert found["kept"] * 2 > found["before"]
    assert found["smaller"] * 2 > found["before"] * SMALLER / LARGE


def test_it_is_handed_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    for name in allocator._CHOSEN:
        monkeypatch.delenv(name, raising=False)

    class Libc:
        def mallopt(self, option: int, value: int) -> int:
            calls.append((option, value))
            return 1

        def malloc_trim(self, pad: int) -> int:
            calls.append((pad,))
            return 1

    monkeypatch.setattr("ctypes.CDLL", lambda _name: Libc())
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        calls.append((1 // 0,))
    assert calls == [(-4, 0), (-1, -1), (-4, 65_536), (-3, 2**25), (-1, 2**26), (0,)]


class Part:
    """A C library that has `mallopt` alone."""

    def mallopt(self, *_given: int) -> int:
        raise AssertionError("called")


@pytest.mark.parametrize(("system", "libc"), [("linux", object()), ("linux", Part()), ("darwin", Part())])
def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch, system: str, libc: object) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("ctypes.CDLL", lambda _name: libc)
    with freed_memory_kept():
        ran = True
    assert ran
