"""One cell of an estimated record: what a model is expected to take, and how many times faster than its teacher that is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.candidates import Candidate
from bertemd_deploy.bench.workload import REPLAY, Cell, Workload
from bertemd_deploy.estimate.model import ACCURACY, Estimate, breakdown, interval, waiting
from bertemd_deploy.estimate.operators import costs
from bertemd_deploy.estimate.speeds import LIMITS, Calibration
from bertemd_deploy.estimate.tracing import Trace

REPLAYED = 200  # requests of a replay, at most
STATISTICS = ("p50", "p90", "p95", "p99", "mean", "std", "min", "max", "n", "p50_ci95", "p95_ci95")


@dataclass(frozen=True)
class Model:
    """A model to estimate: what it is, its operators, and the memory it is expected to take at most."""

    candidate: Candidate
    traced: Trace
    memory_bytes: int


class Lengths:
    """The lengths that a cell's requests have."""

    def __init__(self, artifact: Artifact, *, seed: int) -> None:
        """Read the evaluation slice of `artifact`; `seed` orders its requests, as in a measurement."""
        self._workload = Workload.load(artifact, seed=seed)

    def of(self, cell: Cell) -> list[int]:
        """Return the padded length of each request of a cell, in tokens."""
        if cell.sequence != REPLAY:
            return [int(cell.sequence)]
        lengths = self._workload.evaluation.examples.lengths
        count = min(REPLAYED, max(1, len(lengths) // cell.batch))
        rows = self._workload.request_rows(batch=cell.batch, start=0, count=count)
        return [int(lengths[group].max()) for group in rows]


def measurement(
    entry: Mapping[str, Any],
    model: Model,
    cell: Cell,
    *,
    baseline: Model | None,
    lengths: Lengths,
    calibration: Calibration,
) -> dict[str, Any]:
    """Return one cell of one model; of a replay, the median over its requests, and the throughput by their mean."""
    requests = lengths.of(cell)
    parts = _times(model, cell, requests, calibration)
    middle = interval(_middle(parts), calibration)
    gain = None
    if baseline is not None and model is not baseline:
        gain = speedup(_middle(_times(baseline, cell, requests, calibration)), middle.parts, calibration)
    metrics = entry["metrics"]
    return {
        **{key: entry[key] for key in ("model", "backend", "graph", "precision", "model_bytes")},
        "batch": cell.batch,
        "sequence": cell.sequence,
        "threads": cell.threads,
        "n": None,
        "latency_ms": dict.fromkeys(STATISTICS) | {"p50": middle.p50_ms, "samples": []},
        "estimate_ms": _rounded(middle),
        "paced_ms": None,
        "end_to_end_ms": None,
        "throughput_per_s": 1000 * cell.batch / fmean(sum(one.values()) for one in parts),
        "cold_start_ms": None,
        "peak_rss_bytes": None,
        "cpu_seconds_per_inference": None,
        "energy_joules_per_inference": None,
        "metric": next(iter(metrics.values())) if metrics else None,
        "speedup_vs_teacher": gain,
        "warm_up": None,
        "other_cpus_busy": None,
        "disturbed": None,
    }


def _times(model: Model, cell: Cell, requests: Sequence[int], calibration: Calibration) -> list[dict[str, float]]:
    """Return the milliseconds of each request by limit."""
    speeds = calibration.at(cell.threads)
    by_length = {
        length: waiting(
            breakdown(costs(model.traced, batch=cell.batch, sequence=length), speeds),
            threads=cell.threads,
            share=calibration.share,
        )
        for length in set(requests)
    }
    return [by_length[length] for length in requests]


def _middle(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the parts of the request whose time is the (lower) median."""
    ordered = sorted(parts, key=lambda one: sum(one.values()))
    return ordered[(len(ordered) - 1) // 2]


def _rounded(found: Estimate) -> dict[str, Any]:
    return {
        "p50": found.p50_ms,
        "low": found.low_ms,
        "high": found.high_ms,
        "parts": {limit: round(milliseconds, 4) for limit, milliseconds in found.parts.items()},
    }


def speedup(teacher: Mapping[str, float], student: Mapping[str, float], calibration: Calibration) -> dict[str, Any]:
    """Return how many times faster a student is expected to be than its teacher, with an interval; never claimed.

    The ends are the least and the most over every choice of each limit's spread, the same for both models, widened by what
    each estimate's own error may be where both err to unlike sides.

    Args:
        teacher: its milliseconds by limit.
        student: its milliseconds by limit.
        calibration: of the device.
    """
    bounds = [calibration.spread.get(limit, (1.0, 1.0)) for limit in LIMITS]
    ratios = [_total(teacher, chosen) / _total(student, chosen) for chosen in itertools.product(*bounds)]
    either = 1 + ACCURACY.median
    return {
        "p50": sum(teacher.values()) / sum(student.values()),
        "ci95": [min(ratios) / either**2, max(ratios) * either**2],
        "claimed": False,
    }


def _total(parts: Mapping[str, float], chosen: Sequence[float]) -> float:
    return sum(parts[limit] * factor for limit, factor in zip(LIMITS, chosen, strict=True))
