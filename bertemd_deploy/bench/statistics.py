"""From raw samples to what a record states: percentiles and speed-ups with their intervals, and where a series settled.

Samples come in rounds (every model takes its turn in every round), and slow drift of the machine moves whole rounds. The
bootstrap therefore draws rounds first, the same rounds for both models of a ratio, and then samples within each drawn
round. An interval is stated only where there are enough samples to bear it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 95, 99)
SAMPLES_FOR_P99 = 100
RESAMPLES = 1000
# Fewer samples cannot enclose a percentile: all lie on one side of the median with a chance of 2 * 0.5**5 = 6%, and all
# lie below the 95th percentile with one of 0.95**72 = 2.5%.
SAMPLES_FOR_INTERVAL = {50: 5, 95: 72}
MOST_DRAWN = 2_000_000  # samples held in memory at once by a bootstrap
TOLERANCE = 0.01  # of a series' level: changes and noise below it do not count
CUT_PRICE = (
    3.0  # typical deviations, times ln(n), that a cut has to save; the Bayesian information criterion asks for 1
)
DEVIATION_PER_STEP = 0.8365  # mean absolute deviation over median absolute difference of neighbours, of normal noise

Rounds = Sequence[Sequence[float]]


def summarize(rounds: Rounds, *, seed: int = 0) -> dict[str, Any]:
    """Return the distribution of raw samples.

    Args:
        rounds: samples in milliseconds, one inner sequence per round, together at least one.
        seed: of the resampling.

    Returns:
        p50, p90, p95, p99, mean, std, min, max in the samples' unit; p50_ci95 and p95_ci95, [low, high] of a bootstrap
        over rounds; then n, samples and samples_per_round. None are p99 below 100 samples, std (n - 1 in the denominator)
        below 2, and an interval with a single round, below 5 samples (p50) or below 72 (p95).

    Raises:
        ValueError: no samples, or one is not finite or negative.
    """
    samples = np.concatenate([np.asarray(part, dtype=np.float64) for part in rounds]) if rounds else np.empty(0)
    if not len(samples):
        raise ValueError("no samples")
    if not np.isfinite(samples).all() or samples.min() < 0:
        raise ValueError("a sample is negative or not finite")
    summary: dict[str, Any] = {f"p{level}": float(np.percentile(samples, level)) for level in PERCENTILES}
    if len(samples) < SAMPLES_FOR_P99:
        summary["p99"] = None
    return summary | {
        **{f"p{level}_ci95": interval for level, interval in _intervals(rounds, seed=seed).items()},
        "mean": float(samples.mean()),
        "std": float(samples.std(ddof=1)) if len(samples) > 1 else None,
        "min": float(samples.min()),
        "max": float(samples.max()),
        "n": len(samples),
        "samples": [round(float(sample), 4) for sample in samples],
        "samples_per_round": [len(part) for part in rounds],
    }


def _intervals(rounds: Rounds, *, seed: int) -> dict[int, list[float] | None]:
    """Return the 95% interval of each percentile of `SAMPLES_FOR_INTERVAL`, None where the samples do not bear it."""
    filled = [part for part in rounds if len(part)]
    count = sum(map(len, filled))
    levels = [level for level, least in SAMPLES_FOR_INTERVAL.items() if count >= least and len(filled) > 1]
    found: dict[int, list[float] | None] = dict.fromkeys(SAMPLES_FOR_INTERVAL)
    if levels:
        generator = np.random.default_rng(seed)
        picks = generator.integers(len(filled), size=(RESAMPLES, len(filled)))
        drawn = _resampled(filled, picks, generator, levels=levels)
        found.update({level: _middle_95(drawn[at]) for at, level in enumerate(levels)})
    return found


def _middle_95(values: NDArray[np.float64]) -> list[float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return [float(low), float(high)]


def speedup(baseline: Rounds, candidate: Rounds, *, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Return how many times faster `candidate` is than `baseline`, by the ratio of their medians.

    Args:
        baseline: samples of the model compared against, one inner sequence per round, none empty.
        candidate: samples of the model compared, in the same rounds.
        seed: seed of the resampling.
        resamples: how often to resample.

    Returns:
        p50 (above 1 is faster); ci95 [low, high], a bootstrap interval, or None where there is a single round or a model
        has fewer than 5 samples; claimed, whether the whole interval lies above 1.

    Raises:
        ValueError: the rounds differ in number, or one is empty.
    """
    if len(baseline) != len(candidate) or not all(len(part) for part in (*baseline, *candidate)):
        raise ValueError("baseline and candidate need the same number of rounds, each with samples")
    ratio = float(np.median(np.concatenate(baseline)) / np.median(np.concatenate(candidate)))
    fewest = min(sum(map(len, baseline)), sum(map(len, candidate)))
    if len(baseline) < 2 or fewest < SAMPLES_FOR_INTERVAL[50]:
        return {"p50": ratio, "ci95": None, "claimed": False}
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(baseline), size=(resamples, len(baseline)))
    slow, fast = (_resampled(rounds, picks, generator, levels=[50])[0] for rounds in (baseline, candidate))
    interval = _middle_95(slow / fast)
    return {"p50": ratio, "ci95": interval, "claimed": interval[0] > 1.0}


def _resampled(
    rounds: Rounds, picks: NDArray[np.int64], generator: np.random.Generator, *, levels: Sequence[int]
) -> NDArray[np.float64]:
    """Return (levels, resamples) percentiles, one per row of `picks` (resamples, rounds).

    Each row draws, with replacement, as many samples as each of its rounds has.
    """
    sizes = np.array([len(part) for part in rounds])
    starts = np.cumsum(sizes) - sizes
    samples = np.concatenate([np.asarray(part, dtype=np.float64) for part in rounds])
    share = max(1, MOST_DRAWN // (picks.shape[1] * int(sizes.max())))
    found = []
    for at in range(0, len(picks), share):
        part = picks[at : at + share]
        drawn = sizes[part][:, :, None]  # (resamples, rounds, 1)
        within = (generator.random((*part.shape, sizes.max())) * drawn).astype(np.int64)
        values = np.where(np.arange(sizes.max()) < drawn, samples[starts[part][:, :, None] + within], np.inf)
        found.append(_percentiles(values.reshape(len(part), -1), sizes[part].sum(axis=1), levels=levels))
    return np.concatenate(found, axis=1)


def _percentiles(
    values: NDArray[np.float64], counts: NDArray[np.int64], *, levels: Sequence[int]
) -> NDArray[np.float64]:
    """Return (levels, rows) percentiles of the `counts` smallest values of each row, between neighbours linearly."""
    places = (counts - 1) * np.array(levels)[:, None] / 100
    below = np.floor(places).astype(np.int64)
    above = np.ceil(places).astype(np.int64)
    ordered = np.partition(values, np.unique(np.concatenate([below, above])), axis=1)
    rows = np.arange(len(values))
    low, high = ordered[rows, below], ordered[rows, above]
    return np.asarray(low + (high - low) * (places - below), dtype=np.float64)


def change_point(values: Sequence[float], *, tolerance: float = TOLERANCE) -> int:
    """Return where the last level of a series begins: the index after its last shift, 0 where it never shifted.

    The series is cut into levels such that the absolute deviations from each level's median, plus a price for every cut,
    are least (optimal partitioning). The price follows from the typical deviation of the values, which is taken from the
    differences of neighbours, since a few shifts hardly touch these, and is never below `tolerance` of the median value.
    A single outlier is a level of its own where it is far enough off.

    Args:
        values: such as the medians of successive windows of calls, in order.
        tolerance: as a share of the median value.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    count = len(values)
    steps = [abs(values[at] - values[at - 1]) for at in range(1, count)] or [0.0]
    deviation = max(DEVIATION_PER_STEP * median(steps), tolerance * median(values))
    price = CUT_PRICE * deviation * math.log(count)
    least, begins = [0.0], [0]  # least[end]: the lowest cost of values[:end], whose last level begins at begins[end]
    for end in range(1, count + 1):
        costs = [
            (least[begin] + (price if begin else 0.0) + _deviations(values[begin:end]), begin) for begin in range(end)
        ]
        cost, begin = min(costs)
        least.append(cost)
        begins.append(begin)
    return begins[count]


def _deviations(values: Sequence[float]) -> float:
    """Return the sum of absolute deviations from the median."""
    middle = median(values)
    return sum(abs(value - middle) for value in values)
