"""From raw samples to what a record states: percentiles with their count, and a speed-up with its interval.

Samples come in rounds (every model takes its turn in every round), and slow drift of the machine moves whole rounds. The
bootstrap therefore draws rounds first, the same rounds for both models, and then samples within each drawn round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 95, 99)
SAMPLES_FOR_P99 = 100
RESAMPLES = 1000

Rounds = Sequence[Sequence[float]]


def summarize(rounds: Rounds) -> dict[str, Any]:
    """Return the distribution of raw samples.

    Args:
        rounds: samples in milliseconds, one inner sequence per round, together at least one.

    Returns:
        p50, p90, p95, p99, mean, std, min, max in the samples' unit, then n, samples and samples_per_round. p99 is None
        below 100 samples, std (n - 1 in the denominator) below 2.

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
        "mean": float(samples.mean()),
        "std": float(samples.std(ddof=1)) if len(samples) > 1 else None,
        "min": float(samples.min()),
        "max": float(samples.max()),
        "n": len(samples),
        "samples": [round(float(sample), 4) for sample in samples],
        "samples_per_round": [len(part) for part in rounds],
    }


def speedup(baseline: Rounds, candidate: Rounds, *, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Return how many times faster `candidate` is than `baseline`, by the ratio of their medians.

    Args:
        baseline: samples of the model compared against, one inner sequence per round, none empty.
        candidate: samples of the model compared, in the same rounds.
        seed: seed of the resampling.
        resamples: how often to resample.

    Returns:
        p50 (above 1 is faster); ci95 [low, high], a bootstrap interval, or None where a model has a single sample;
        claimed, whether the whole interval lies above 1.

    Raises:
        ValueError: the rounds differ in number, or one is empty.
    """
    if len(baseline) != len(candidate) or not all(len(part) for part in (*baseline, *candidate)):
        raise ValueError("baseline and candidate need the same number of rounds, each with samples")
    ratio = float(np.median(np.concatenate(baseline)) / np.median(np.concatenate(candidate)))
    if min(sum(map(len, baseline)), sum(map(len, candidate))) < 2:
        return {"p50": ratio, "ci95": None, "claimed": False}
    generator = np.random.default_rng(seed)
    picks = generator.integers(len(baseline), size=(resamples, len(baseline)))
    ratios = _resampled_medians(baseline, picks, generator) / _resampled_medians(candidate, picks, generator)
    low, high = (float(bound) for bound in np.percentile(ratios, (2.5, 97.5)))
    return {"p50": ratio, "ci95": [low, high], "claimed": low > 1.0}


def _resampled_medians(rounds: Rounds, picks: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Return one median per row of `picks` (resamples, rounds): of as many samples as each picked round has."""
    sizes = np.array([len(part) for part in rounds])
    starts = np.cumsum(sizes) - sizes
    samples = np.concatenate([np.asarray(part, dtype=np.float64) for part in rounds])
    drawn = sizes[picks][:, :, None]  # (resamples, rounds, 1)
    within = (generator.random((*picks.shape, sizes.max())) * drawn).astype(np.int64)
    values = np.where(np.arange(sizes.max()) < drawn, samples[starts[picks][:, :, None] + within], np.inf)
    ordered = np.sort(values.reshape(len(picks), -1), axis=1)
    count, rows = sizes[picks].sum(axis=1), np.arange(len(picks))
    return np.asarray((ordered[rows, (count - 1) // 2] + ordered[rows, count // 2]) / 2, dtype=np.float64)
