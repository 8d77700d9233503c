"""Task metrics from logits and labels, in numpy: logits in, numbers between -1 and 1 out.

`METRICS` maps a metric's name to its function of logits and labels; `SLICE_METRICS` names those that need more of a slice
than its labels: entities (see `spans`) and answers (see `answers`). A task lists the names it reports, the first being the
one that gates and selects checkpoints (`tasks.TASKS`). Classification takes logits (n, classes) and integer labels (n,);
regression takes predictions (n, 1) and float labels (n,); several labels at once take logits (n, labels) and 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.answers import answer_scores, best_answers
from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.spans import entity_f1

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


def f1_micro(logits: Array, labels: Labels) -> float:
    """Return the F1 over all (row, label) pairs, decided where the logit (n, labels) is above 0; 0 without any."""
    predicted, actual = logits > 0, labels > 0
    denominator = int(predicted.sum() + actual.sum())
    return 2.0 * int((predicted & actual).sum()) / denominator if denominator else 0.0


def f1_macro(logits: Array, labels: Labels) -> float:
    """Return the mean over the labels of each one's own F1; a label neither there nor predicted counts as 0."""
    predicted, actual = logits > 0, labels > 0
    denominators = predicted.sum(axis=0) + actual.sum(axis=0)
    shared = 2.0 * (predicted & actual).sum(axis=0)
    return float(np.divide(shared, denominators, out=np.zeros(len(shared)), where=denominators > 0).mean())


METRICS: dict[str, Callable[[Array, Labels], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "f1_micro": f1_micro,
    "f1_macro": f1_macro,
}


def slice_entity_f1(logits: Array, part: DataSlice, label_names: Sequence[str]) -> float:
    """Return the entity F1 of ragged token logits (sum of lengths, tags) over the scored tokens of a slice."""
    predicted, actual = tag_sequences(logits, part, label_names)
    return entity_f1(predicted, actual)


def tag_sequences(
    logits: Array, part: DataSlice, label_names: Sequence[str]
) -> tuple[list[list[str]], list[list[str]]]:
    """Return every row's predicted and actual tag names at its scored tokens.

    Raises:
        ValueError: a label number has no name, or there is another number of outputs than of names.
    """
    labels, decided = part.labels, decisions(logits)
    scored = labels != NOT_SCORED
    if logits.shape[-1] != len(label_names) or not np.isin(labels[scored], np.arange(len(label_names))).all():
        raise ValueError(f"{logits.shape[-1]} outputs or their labels do not fit {len(label_names)} tag names")
    predicted, actual = [], []
    for start, stop in zip(part.examples.offsets[:-1], part.examples.offsets[1:], strict=True):
        chosen = np.flatnonzero(scored[start:stop]) + start
        predicted.append([label_names[at] for at in decided[chosen]])
        actual.append([label_names[at] for at in labels[chosen]])
    return predicted, actual


def _answer_metric(name: str) -> Callable[[Array, DataSlice, Sequence[str]], float]:
    def metric(logits: Array, part: DataSlice, _label_names: Sequence[str]) -> float:
        if part.gold is None:
            raise TypeError(f"{name} needs a slice with accepted answers")
        answers = best_answers(logits, offsets=part.examples.offsets, gold=part.gold)
        return answer_scores([answer.text for answer in answers], accepted=part.gold.accepted)[name]

    return metric


SLICE_METRICS: dict[str, Callable[[Array, DataSlice, Sequence[str]], float]] = {
    "entity_f1": slice_entity_f1,
    "exact_match": _answer_metric("exact_match"),
    "f1_squad": _answer_metric("f1_squad"),
}


def evaluate_metrics(
    names: Sequence[str], *, logits: Array, part: DataSlice, label_names: Sequence[str] = ()
) -> dict[str, float]:
    """Return each named metric of a model's outputs over a slice, in the order given.

    Args:
        names: keys of `METRICS` or `SLICE_METRICS`.
        logits: (n, outputs); for tokens (sum of lengths, labels) and for question answering (sum of lengths, 2), ragged
            as the slice's tokens.
        part: the slice.
        label_names: names by number; needed by "entity_f1".

    Raises:
        ValueError: a logit is not finite; such an output has no metric. Or labels and outputs do not fit the names.
    """
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).any(axis=-1).sum())} of {len(logits)} outputs are not finite")
    labels, plain = part.labels, logits
    if part.kind == "token-classification":
        scored = labels != NOT_SCORED
        labels, plain = labels[scored], logits[scored]
    return {
        name: METRICS[name](plain, labels) if name in METRICS else SLICE_METRICS[name](logits, part, label_names)
        for name in names
    }
