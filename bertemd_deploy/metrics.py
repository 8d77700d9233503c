"""Task metrics from logits and labels, in numpy: logits in, numbers between -1 and 1 out.

`METRICS` maps a metric's name to its function; a task lists the names it reports, the first being the one that gates and
selects checkpoints (`data.TASKS`). Classification takes logits (n, classes) and integer labels (n,); regression takes
predictions (n, 1) and float labels (n,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Labels = NDArray[np.integer] | NDArray[np.floating]


def decisions(logits: Array) -> NDArray[np.int64]:
    """Return the (n,) index of the largest logit of each row of `logits` (n, classes)."""
    return np.asarray(logits.argmax(axis=-1), dtype=np.int64)


def accuracy(logits: Array, labels: Labels) -> float:
    """Return the share of rows whose largest logit is at the label, in [0, 1]."""
    return float((decisions(logits) == labels).mean())


def f1(logits: Array, labels: Labels) -> float:
    """Return the F1 of class 1 against the rest, 2 TP / (2 TP + FP + FN), in [0, 1]; 0 without positives."""
    predicted, actual = decisions(logits) == 1, labels == 1
    denominator = int(predicted.sum() + actual.sum())
    return 2.0 * int((predicted & actual).sum()) / denominator if denominator else 0.0


def matthews(logits: Array, labels: Labels) -> float:
    """Return the Matthews correlation over any number of classes, in [-1, 1]; 0 when a side is constant."""
    predicted = decisions(logits)
    classes = logits.shape[-1]
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels.astype(np.int64), predicted), 1)
    actual_counts, predicted_counts, total = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    covariance = np.trace(confusion) * total - actual_counts @ predicted_counts
    spread = (total**2 - predicted_counts @ predicted_counts) * (total**2 - actual_counts @ actual_counts)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def _correlation(left: Array, right: Array) -> float:
    if np.ptp(left) == 0 or np.ptp(right) == 0:  # a mean rounds: a constant minus its mean need not be 0
        return 0.0
    left, right = left - left.mean(), right - right.mean()
    spread = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / spread if spread > 0 else 0.0


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def pearson(logits: Array, labels: Labels) -> float:
    """Return the linear correlation of predictions (n, 1) with labels, in [-1, 1]; 0 when a side is constant."""
    return _correlation(logits[:, 0].astype(np.float64), labels.astype(np.float64))


def spearman(logits: Array, labels: Labels) -> float:
    """Return the rank correlation (ties take their mean rank) of predictions (n, 1) with labels, in [-1, 1]."""
    return _correlation(_ranks(logits[:, 0].astype(np.float64)), _ranks(labels.astype(np.float64)))


METRICS: dict[str, Callable[[Array, Labels], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def evaluate_metrics(names: Sequence[str], *, logits: Array, labels: Labels) -> dict[str, float]:
    """Return each named metric of `logits` against `labels`, in the order given.

    Raises:
        ValueError: a logit is not finite; such an output has no metric.
    """
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).any(axis=-1).sum())} of {len(logits)} outputs are not finite")
    return {name: METRICS[name](logits, labels) for name in names}
