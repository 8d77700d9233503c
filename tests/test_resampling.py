"""Metrics over chosen units agree with the metrics, and the paired bootstrap with what is known about it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_student import examples

from bertemd_deploy.answers import Answers
from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.resampling import bootstrap, interval, mcnemar, metric_of_units
from bertemd_deploy.tasks import TASKS

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
WORDS = "the cat sat on a mat by an open door and ate some fish"


def rows_of(part: DataSlice, units: np.ndarray) -> np.ndarray:
    """Return the token positions of the chosen rows."""
    offsets = part.examples.offsets
    return np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in units])


def tagged(count: int = 40) -> tuple[DataSlice, np.ndarray]:
    generator = np.random.default_rng(1)
    part = examples(count, longest=12, seed=1)
    labels = generator.integers(0, len(TAGS), size=len(part.tokens))
    labels[generator.random(len(labels)) < 0.3] = NOT_SCORED
    logits = generator.normal(size=(len(labels), len(TAGS))).astype(np.float32)
    logits[np.arange(len(labels)), np.maximum(labels, 0)] += 1.5
    return DataSlice(part, labels, "token-classification"), logits


def asked() -> tuple[DataSlice, np.ndarray]:
    """Return 12 questions about one sentence, each with two windows (rows) of the same words; every third without answer."""
    words = WORDS.split()
    starts = [WORDS.index(f" {word}") + 1 if at else 0 for at, word in enumerate(words)]
    one = [[-1, -1], *([start, start + len(word)] for start, word in zip(starts, words, strict=True)), [-1, -1]]
    count, length = 12, len(one)
    accepted = tuple(() if at % 3 == 2 else (words[at],) for at in range(count))
    gold = Answers(
        np.repeat(np.arange(count), 2).astype(np.int32),
        np.tile(np.array(one, dtype=np.int32), (2 * count, 1)),
        (WORDS,) * count,
        accepted,
        tuple(map(str, range(count))),
    )
    part = examples(2 * count, longest=length, seed=0)
    rows = np.arange(2 * count + 1, dtype=np.int64) * length
    tokens = np.resize(part.tokens, rows[-1])
    encoded = type(part)(tokens, np.zeros(len(tokens), dtype=np.int8), rows)
    logits = np.random.default_rng(2).normal(size=(len(tokens), 2)).astype(np.float32)
    for row in range(0, 2 * count, 4):  # half of the questions are answered well
        logits[rows[row] + 1 + row // 2] += 6
    labels = np.zeros((2 * count, 2), dtype=np.int64)
    return DataSlice(encoded, labels, "question-answering", gold), logits


@pytest.mark.parametrize("metric", ["accuracy", "entity_f1"])
def test_tokens_are_chosen_by_sentences(metric: str) -> None:
    part, logits = tagged()
    statistic = metric_of_units(metric, logits=logits, part=part, label_names=TAGS)
    for seed in range(5):
        units = np.random.default_rng(seed).integers(len(part), size=len(part))
        chosen = part.select(units)
        wanted = evaluate_metrics([metric], logits=logits[rows_of(part, units)], part=chosen, label_names=TAGS)[metric]
        assert 0.1 < wanted < 1
        assert statistic(units) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("metric", ["exact_match", "f1_squad"])
def test_answers_are_chosen_by_questions_with_all_their_windows(metric: str) -> None:
    part, logits = asked()
    statistic = metric_of_units(metric, logits=logits, part=part, label_names=())
    whole = evaluate_metrics([metric], logits=logits, part=part)[metric]
    assert 0.1 < whole < 1
    assert statistic(np.arange(12)) == pytest.approx(whole)
    units = np.array([0, 1, 2, 5, 8])  # with and without an answer, as in the whole
    rows = np.concatenate([[2 * unit, 2 * unit + 1] for unit in units])
    some = evaluate_metrics([metric], logits=logits[rows_of(part, rows)], part=part.select(rows))[metric]
    assert statistic(units) == pytest.approx(some)
    twice = statistic(np.array([0, 0, 0, 2]))  # a question drawn three times counts three times
    assert twice == pytest.approx((3 * statistic(np.array([0])) + statistic(np.array([2]))) / 4)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "pearson", "spearman", "f1_micro", "f1_macro"])
def test_rows_are_chosen_with_their_labels(metric: str) -> None:
    generator = np.random.default_rng(0)
    encoded = examples(50)
    if metric in ("pearson", "spearman"):
        logits = generator.normal(size=(50, 1)).astype(np.float32)
        part = DataSlice(encoded, (logits[:, 0] + generator.normal(size=50)).astype(np.float32), "regression")
    elif metric in ("f1_micro", "f1_macro"):
        logits = generator.normal(size=(50, 3)).astype(np.float32)
        part = DataSlice(encoded, (logits + generator.normal(size=(50, 3)) > 0).astype(np.float32), "multilabel")
    else:
        logits = generator.normal(size=(50, 2)).astype(np.float32)
        part = DataSlice(encoded, generator.integers(0, 2, size=50))
    statistic = metric_of_units(metric, logits=logits, part=part, label_names=())
    units = generator.integers(50, size=50)
    wanted = evaluate_metrics([metric], logits=logits[units], part=part.select(units))[metric]
    assert statistic(units) == wanted
    assert statistic(np.arange(50)) == evaluate_metrics([metric], logits=logits, part=part)[metric]


def test_every_task_has_a_first_metric_that_can_be_resampled() -> None:
    token, question = tagged(), asked()
    for task in TASKS.values():
        if task.kind == "token-classification":
            metric_of_units(task.metrics[0], logits=token[1], part=token[0], label_names=TAGS)(np.arange(3))
        elif task.kind == "question-answering":
            metric_of_units(task.metrics[0], logits=question[1], part=question[0], label_names=())(np.arange(3))
        else:
            assert task.metrics[0] in ("accuracy", "f1", "matthews", "pearson", "spearman", "f1_micro", "f1_macro")


def test_the_spread_over_rows_is_the_one_that_theory_gives() -> None:
    """The mean of n paired differences of 0 and 1 has the standard error sd / sqrt(n)."""
    generator = np.random.default_rng(3)
    left, right = (generator.random(400) < share for share in (0.6, 0.7))
    scores = [[lambda units, hits=hits: float(hits[units].mean())] for hits in (left, right)]
    draws = bootstrap(scores, units=400, resamples=2000)
    difference = draws[:, 1] - draws[:, 0]
    paired = right.astype(float) - left
    assert difference.mean() == pytest.approx(paired.mean(), abs=0.003)
    assert difference.std() == pytest.approx(paired.std() / math.sqrt(400), rel=0.06)
    np.testing.assert_array_equal(draws, bootstrap(scores, units=400, resamples=2000))
    same = bootstrap([scores[0], scores[0]], units=400, resamples=50)
    np.testing.assert_array_equal(same[:, 0], same[:, 1])


def test_seeds_are_drawn_for_both_sides_together() -> None:
    """What a seed adds to both sides cancels; what it adds to one does not."""

    def constants(*values: float) -> list:
        return [lambda units, value=value: value for value in values]

    together = bootstrap([constants(0.1, 0.5, 0.9), constants(0.2, 0.6, 1.0)], units=5, resamples=400)
    np.testing.assert_allclose(together[:, 1] - together[:, 0], 0.1)
    assert together[:, 0].std() > 0.1
    apart = bootstrap([constants(0.5, 0.5, 0.5), constants(0.2, 0.6, 1.0)], units=5, resamples=4000)
    difference = apart[:, 1] - apart[:, 0]
    assert difference.mean() == pytest.approx(0.1, abs=0.02)
    assert difference.std() == pytest.approx(np.std([-0.3, 0.1, 0.5]) / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 3, 0.7265625), (3, 5, 0.7265625), (10, 0, 2 / 1024), (4, 4, 1.0), (0, 5000, 0.0)],
)
def test_mcnemar_is_the_exact_binomial(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, abs=1e-300)


def test_mcnemar_agrees_with_an_outside_binomial_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    for lost, gained in ((7, 19), (120, 161), (3000, 3200), (0, 3)):
        wanted = stats.binomtest(min(lost, gained), lost + gained).pvalue
        assert mcnemar(lost, gained) == pytest.approx(wanted, rel=1e-9)


def test_an_interval_leaves_a_fortieth_on_either_side() -> None:
    low, high = interval(np.arange(1001.0))
    assert (low, high) == (25, 975)
