"""The estimate: a graph's operators, each timed by the calibration's tables, added up; with an interval.

    time = call + sum over operators of start + work,    work by limit: fp32 or int8 products, passes over values, memory

The interval on the calibrated machine is what 19 of 20 estimates of `benchmarks/estimate.py` kept to. For another CPU each
limit's share is stretched by how far that CPU's facts may be from what its kernels reach (`scaling`), all to the same side,
and the interval on the calibrated machine is put on top. An estimate is no measurement and is never printed as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertemd_deploy.estimate.calibration import passing
from bertemd_deploy.estimate.operators import OperatorCost, Part, costs
from bertemd_deploy.estimate.speeds import LIMITS, SHARED, Calibration, Speeds
from bertemd_deploy.estimate.tracing import Trace, trace


@dataclass(frozen=True)
class Accuracy:
    """How far estimates were from measurements: |estimate / measurement - 1|, as shares of 1, over `n` of them.

    `most` is what 19 of 20 kept to, as a ratio either way.
    """

    median: float
    worst: float
    most: float
    n: int

    def record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"median": self.median, "worst": self.worst, "p95_ratio": self.most, "n": self.n}


# benchmarks/results/estimate.json: graphs of 4L-312, 4L-384 and 6L-768, 16 to 512 tokens, batches of 1 and 8, 1 and 2 threads.
ACCURACY = Accuracy(median=0.023, worst=0.336, most=1.16, n=240)


@dataclass(frozen=True)
class Estimate:
    """A latency that was not measured.

    Attributes:
        p50_ms: what is expected.
        low_ms, high_ms: what it may be.
        parts: what `p50_ms` is made of, in milliseconds by limit (`speeds.LIMITS`).
    """

    p50_ms: float
    low_ms: float
    high_ms: float
    parts: Mapping[str, float]


def estimate(path: Path, *, batch: int, sequence: int, threads: int, calibration: Calibration) -> Estimate:
    """Return how long one call of a graph is expected to take.

    Args:
        path: an ONNX file.
        batch: examples per call.
        sequence: tokens per example.
        threads: intra-op threads.
        calibration: of this machine, or scaled to a device.

    Raises:
        ArtifactError: the file cannot be loaded or run.
        MeasurementError: an operator is unknown, or the thread count is beyond the calibration.
        BertemdError: onnx is not installed.
    """
    return estimate_traced(trace(path), batch=batch, sequence=sequence, threads=threads, calibration=calibration)


def estimate_traced(traced: Trace, *, batch: int, sequence: int, threads: int, calibration: Calibration) -> Estimate:
    """Return how long one call of a traced graph is expected to take; arguments and errors as of `estimate`."""
    operators = costs(traced, batch=batch, sequence=sequence)
    parts = breakdown(operators, calibration.at(threads))
    return interval(waiting(parts, threads=threads, share=calibration.share), calibration)


def breakdown(operators: Sequence[OperatorCost], speeds: Speeds) -> dict[str, float]:
    """Return the milliseconds of one call by limit, on a machine's tables."""
    weights = sum(part.weight_bytes for operator in operators for part in operator.parts)
    found = dict.fromkeys(LIMITS, 0.0)
    found["overhead"] = speeds.call_ms
    for operator in operators:
        for part in operator.parts:
            for limit, milliseconds in part_ms(part, speeds, weights=weights).items():
                found[limit] += milliseconds
    return found


def part_ms(part: Part, speeds: Speeds, *, weights: int) -> dict[str, float]:
    """Return the milliseconds of a piece of work by limit.

    Args:
        part: the work.
        speeds: a machine's tables.
        weights: bytes of weights that the whole graph reads in a call.
    """
    table = speeds.tables[part.table]
    if part.table in SHARED:
        return {
            part.table: part.macs * table.at(part.size, part.width),
            "memory": part.weight_bytes * speeds.stall.at(weights, part.size),
            "overhead": speeds.product_start[part.table],
        }
    if part.macs:
        start = 0.0 if part.inner else speeds.product_start["fp32_product"]
        return {"fp32_product": part.macs * table.at(part.size, part.width), "overhead": start}
    return {"elementwise": passing(table, part.size, part.width), "overhead": 0.0 if part.inner else table.start}


def waiting(parts: Mapping[str, float], *, threads: int, share: float | None) -> dict[str, float]:
    """Return times in a place that may use `share` CPUs: with more threads than that, all wait for the next period."""
    stretch = 1.0 if share is None else max(1.0, threads / share)
    return {limit: stretch * milliseconds for limit, milliseconds in parts.items()}


def interval(parts: Mapping[str, float], calibration: Calibration) -> Estimate:
    """Return the estimate whose parts are these."""
    ends = [
        sum(milliseconds * calibration.spread.get(limit, (1.0, 1.0))[side] for limit, milliseconds in parts.items())
        for side in (0, 1)
    ]
    return Estimate(sum(parts.values()), ends[0] / ACCURACY.most, ends[1] * ACCURACY.most, dict(parts))
