"""Whether two models decide alike: on a class, on every label, on each token's label, on the best span.

In: the logits of both over the same rows, ragged where each token has its own. Out: one truth value per decision. Where
the first model itself scores both decisions within `TIE` of each other, they count as the same: which of two equal scores
is a hair larger is chance, and among thousands of tokens it happens.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.answers import best_span
from bertemd_deploy.metrics import decisions
from bertemd_deploy.tasks import Kind

TIE = 1e-4  # difference of two of the expected logits; a tenth of what parity allows of each
SPREAD = 0.25  # of the standard deviation; a regression's number that moves further counts as another


def same_decisions(
    kind: Kind,
    *,
    expected: NDArray[np.floating],
    found: NDArray[np.floating],
    offsets: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Return which decisions of `found` are those of `expected`.

    Args:
        kind: of the task; regression decides nothing and has no place here.
        expected: (n, outputs); (sum of lengths, labels) for tokens; (sum of lengths, 2), start and end, for answers.
        found: the other model's, of the same shape.
        offsets: (n + 1,) row starts, for answers.

    Returns:
        One value per row, by all its labels for multilabel and by its best span for answers; for token classification one
        per token.
    """
    if kind == "question-answering":
        rows = itertools.pairwise(offsets)
        regret = np.array([_span_regret(expected[start:stop], found[start:stop]) for start, stop in rows])
    elif kind == "multilabel":
        regret = np.where((expected > 0) != (found > 0), np.abs(expected), 0).max(axis=-1)
    else:
        at = np.arange(len(expected))
        regret = expected[at, decisions(expected)] - expected[at, decisions(found)]
    return np.asarray(regret <= TIE)


def _span_regret(expected: NDArray[np.floating], found: NDArray[np.floating]) -> float:
    """Return how much lower than its own best span the first model scores the second's."""
    inside = np.ones(len(expected), dtype=bool)
    score, _, _ = best_span(expected, inside=inside)
    _, first, last = best_span(found, inside=inside)
    return score - float(expected[first, 0] + expected[last, 1])
