"""How far a metric could have come out otherwise: models scored again and again on resampled dev rows and seeds.

The paired bootstrap (Efron & Tibshirani 1993; for such metrics Berg-Kirkpatrick et al., EMNLP 2012): rows are drawn with
replacement, the same ones for every model, and so are seeds, the same ones for both sides of a pair. The spread of a
difference over the draws is what the choice of rows (and seeds) alone would have changed. In: logits and slices. Out:
numbers. With few seeds the spread is rather too small, for a sample of three tells little of how much seeds differ.

Where a model is right or wrong of each unit, McNemar's exact test (1947; exact by the binomial distribution) says how often
chance alone would divide what only one of two models has right as unevenly as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.answers import answer_scores, best_answers
from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.console import progress
from bertemd_deploy.metrics import decisions, evaluate_metrics, tag_sequences
from bertemd_deploy.spans import entities

RESAMPLES = 1000
_SEED = 20201116  # any fixed number: the same models give the same interval

Statistic = Callable[[NDArray[np.int64]], float]


def metric_of_units(
    metric: str, *, logits: NDArray[np.float32], part: DataSlice, label_names: Sequence[str]
) -> Statistic:
    """Return the function that gives a metric over any choice of dev units, each as often as it is chosen.

    A unit is what was drawn from the world by itself: a row, or for question answering an example with all its windows.
    Metrics of tokens and answers are a ratio of sums over units, counted once; others are computed anew.

    Args:
        metric: name of the metric.
        logits: the model's outputs over `part`, ragged where the model reads every token.
        part: dev slice of U units.
        label_names: names by number.
    """
    if part.kind not in ("token-classification", "question-answering"):

        def anew(rows: NDArray[np.int64]) -> float:
            chosen = dataclasses.replace(part, labels=part.labels[rows])  # these metrics read nothing else of a slice
            return evaluate_metrics([metric], logits=logits[rows], part=chosen, label_names=label_names)[metric]

        return anew
    above, below = _sums(metric, logits=logits, part=part, label_names=label_names)

    def ratio(units: NDArray[np.int64]) -> float:
        total = float(below[units].sum())
        return float(above[units].sum()) / total if total else 0.0

    return ratio


def _sums(
    metric: str, *, logits: NDArray[np.float32], part: DataSlice, label_names: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (U,) numerators and denominators whose sums' ratio is the metric."""
    if part.gold is not None:
        gold = part.gold
        answers = best_answers(logits, offsets=part.examples.offsets, gold=gold)
        scores = [
            answer_scores([answer.text], accepted=[accepted])[metric]
            for answer, accepted in zip(answers, gold.accepted, strict=True)
        ]
        return np.array(scores), np.ones(len(scores))
    if metric == "accuracy":
        row = np.repeat(np.arange(len(part)), part.examples.lengths)
        scored = part.labels != NOT_SCORED
        hits = np.zeros(len(part))
        np.add.at(hits, row[scored], (decisions(logits) == part.labels)[scored])
        return hits, np.bincount(row[scored], minlength=len(part)).astype(np.float64)
    if metric != "entity_f1":
        raise KeyError(metric)
    predicted, actual = tag_sequences(logits, part, label_names)
    pairs = [(set(entities(guess)), set(entities(truth))) for guess, truth in zip(predicted, actual, strict=True)]
    shared = np.array([2.0 * len(found & wanted) for found, wanted in pairs])
    return shared, np.array([float(len(found) + len(wanted)) for found, wanted in pairs])


def bootstrap(
    statistics: Sequence[Sequence[Statistic]], *, units: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Return every mapping's metric on resampled units and seeds, the same ones for all mappings.

    Args:
        statistics: for each mapping and seed, the metric over a choice of units.
        units: number of dev units.
        resamples: R.

    Returns:
        (R, mappings) float64, means over the drawn seeds.
    """
    generator = np.random.default_rng(_SEED)
    seeds = len(statistics[0])
    draws = np.empty((resamples, len(statistics)))
    with progress("bootstrap", resamples) as bar:
        for at in range(resamples):
            chosen = generator.integers(units, size=units)
            drawn = np.bincount(generator.integers(seeds, size=seeds), minlength=seeds)
            for column, of_seeds in enumerate(statistics):
                values = [count * statistic(chosen) for count, statistic in zip(drawn, of_seeds, strict=True) if count]
                draws[at, column] = sum(values) / seeds
            bar.advance()
    return draws


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Return the bounds that hold the middle 95% of draws (R,)."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p of McNemar's exact test, in [0, 1]; 1 where neither model has anything alone.

    Under chance each of the n = lost + gained units falls to either model with probability 1/2, so that
    p = min(1, 2 P(X <= min(lost, gained))) with X ~ Binomial(n, 1/2).

    Args:
        lost: units that only the first model has right.
        gained: units that only the second has right.
    """
    total, smaller = lost + gained, min(lost, gained)
    ways = term = 1
    for at in range(smaller):
        term = term * (total - at) // (at + 1)
        ways += term
    return min(1.0, float(2 * ways / 2**total))
