"""Freed memory that stays with the process: told by page faults, which every first use of a new page is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bertemd_deploy.allocator import freed_memory_kept

LARGE = 2**26  # bytes, beyond what glibc keeps by itself
# In a process of its own, whose heap has no holes.
MEASURE = f"""
import ctypes, json, resource
from bertemd_deploy.allocator import freed_memory_kept

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc({LARGE}))
    ctypes.memset(block, 1, {LARGE})
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

found = {{"start": resident(), "before": faults()}}
with freed_memory_kept():
    faults()
    found |= {{"kept": faults(), "held": resident()}}
print(json.dumps(found | {{"released": resident(), "after": faults()}}))
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")
def test_freed_memory_is_used_again_and_handed_back_after() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["kept"] * 10 < found["before"]
    assert found["held"] >= found["start"] + LARGE
    assert found["released"] < found["start"] + LARGE / 4
    assert found["after"] * 2 > found["before"]


def test_it_is_handed_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

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
    assert calls == [(-4, 0), (-1, -1), (-4, 65_536), (-3, 2**25), (-1, 2**17), (0,)]


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("ctypes.CDLL", lambda _name: object())
    with freed_memory_kept():
        ran = True
    assert ran
