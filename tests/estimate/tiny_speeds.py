"""Tables of a machine made up for tests: simple laws, so that what an estimate should be is worked out by hand."""

from __future__ import annotations

from bertemd_deploy.devices import Device, Runtimes, Session
from bertemd_deploy.estimate.operators import TABLES
from bertemd_deploy.estimate.speeds import PER_MAC, Calibration, Speeds, Surface

START = 0.001  # ms, of any operator
PER_VALUE = 1e-6  # ms, beyond the first
PER_MAC_MS = {"fp32_product": 2e-8, "int8_product": 0.5e-8, "batched_product": 4e-8, "attention": 4e-8}
STALL = 1e-7  # ms per byte, beyond 1,000,000 bytes of weights
CALL = 0.01


def values_table(*, start: float = START, per_value: float = PER_VALUE) -> Surface:
    """Return `start` at 1 value and `start` + 1000 `per_value` at 1001, straight in logarithms between."""
    return Surface(((320.0, ((1.0, start), (1001.0, start + 1000 * per_value))),))


def make_speeds(*, share: float = 1.0) -> Speeds:
    """Return tables in which products take `share` of their time on one thread."""
    tables = {name: values_table() for name in TABLES if name not in PER_MAC}
    tables["view"] = Surface(((1.0, ((1.0, START),)),))
    for name, value in PER_MAC_MS.items():
        tables[name] = Surface(((100.0, ((1.0, value * share),)),))
    stall = Surface(((1.0, ((1e5, STALL / 50), (1e6, STALL))),))
    return Speeds(tables, {"fp32_product": START, "int8_product": START}, stall, CALL)


def make_calibration(*, threads: tuple[int, ...] = (1, 2)) -> Calibration:
    """Return a machine whose products are divided among threads, and nothing else."""
    machine = {"cpu": "Test CPU", "onnxruntime": "1.31.1", "rss_after_import_bytes": 50_000_000}
    return Calibration({count: make_speeds(share=1 / count) for count in threads}, machine)


def make_device(**changes) -> Device:
    """Return a device on whose every peak the made-up machine's best products are easy to place."""
    facts = {
        "name": "board",
        "title": "A board",
        "cpu": "4 cores",
        "target": "arm64-dotprod",
        "cores": 4,
        "threads": 4,
        "isa": ("asimd", "asimddp"),
        "memory_bytes": 2**32,
        "clock_mhz": 1500.0,
        "bandwidth_gb_s": 10.0,
        "fp32_flop_per_cycle": 8.0,
        "int8_op_per_cycle": 32.0,
        "cpu_share": None,
        "memory_limit_bytes": None,
        "graph": "fused-int8",
        "session": Session(threads=4, spinning=False, arena=False),
        "onnxruntime": Runtimes(good=(), bad=()),
        "ways": ("estimated",),
        "note": "",
        "sources": (("cores", "https://example.org/board"),),
    }
    return Device(**(facts | changes))
