"""Whether a measurement can be relied on: what a bench record says about the quiet of its machine.

Works on the record alone, so that records of other devices are judged by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

DRIFT = 0.1  # largest relative change from the first round to the last that counts as none
WIDTH = 0.2  # of the interval of a median, relative to it
NOISY_SHARE = 0.1  # of the cells that may drift, and of the measurements that may be wide; a few do by chance


def judge_noise(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's `noise`: noisy (bool) and reasons (list of str), one per kind of disturbance.

    Noisy is a run in which other programs took CPU time that a cell needed, or the processor was throttled, or more than a
    tenth of the cells drifted by more than 10%, or more than a tenth of the medians have intervals wider than 20%. The
    last two leave out replayed requests, whose lengths differ from round to round.

    Args:
        record: with `measurements` and `conditions` as `bench` writes them.
    """
    measurements: list[Mapping[str, Any]] = record["measurements"]
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in measurements:
        cells.setdefault((entry["batch"], entry["sequence"], entry["threads"]), []).append(entry)
    reasons = []
    if disturbed := sum(any(entry["disturbed"] for entry in entries) for entries in cells.values()):
        reasons.append(f"other programs took CPU time in {disturbed} of {len(cells)} cells")
    during = record["conditions"]["during"]
    if during["throttled"]:
        count = during["throttle_count_delta"]
        reasons.append("the processor was throttled" + (f" {count} times" if count else ""))
    fixed = [entries for (_, sequence, _), entries in cells.items() if isinstance(sequence, int)]
    drifted = sum(abs(drift(entries)) > math.log1p(DRIFT) for entries in fixed)
    if drifted > NOISY_SHARE * len(fixed):
        reasons.append(
            f"latency changed by more than {DRIFT:.0%} from the first round to the last in {drifted} of {len(fixed)} cells"
        )
    latencies = [entry["latency_ms"] for entries in fixed for entry in entries]
    wide = sum(_relative_width(latency) > WIDTH for latency in latencies)
    if wide > NOISY_SHARE * len(latencies):
        reasons.append(
            f"the 95% interval of the median is wider than {WIDTH:.0%} of it in {wide} of {len(latencies)} measurements"
        )
    return {"noisy": bool(reasons), "reasons": reasons}


def drift(entries: Sequence[Mapping[str, Any]]) -> float:
    """Return the natural logarithm of last round over first round in one cell: the median over its models' medians.

    What moves the machine moves all models, what moves one of them is chance.
    """
    ratios = []
    for entry in entries:
        samples, sizes = entry["latency_ms"]["samples"], entry["latency_ms"]["samples_per_round"]
        first, last = median(samples[: sizes[0]]), median(samples[-sizes[-1] :])
        if first > 0 and last > 0:  # recorded samples are rounded; a call may be too short for that
            ratios.append(math.log(last / first))
    return median(ratios) if ratios else 0.0


def _relative_width(latency: Mapping[str, Any]) -> float:
    """Return the width of the median's interval over the median; 0 where there is none."""
    interval = latency["p50_ci95"]
    return 0.0 if interval is None or not latency["p50"] else float((interval[1] - interval[0]) / latency["p50"])
