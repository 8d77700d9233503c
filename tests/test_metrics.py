from __future__ import annotations

import numpy as np
import pytest

from bertemd_deploy.metrics import (
    METRICS,
    accuracy,
    decisions,
    evaluate_metrics,
    f1,
    matthews,
    pearson,
    spearman,
)
from bertemd_deploy.tasks import TASKS

# decisions 1 0 1 1 against 1 0 0 1: TP 2, FP 1, TN 1, FN 0
LOGITS = np.array([[0.0, 1.0], [2.0, -1.0], [0.1, 0.2], [-3.0, 0.0]], dtype=np.float32)
LABELS = np.array([1, 0, 0, 1])


def random_case(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(200, classes)).astype(np.float32), random.integers(0, classes, 200)


def test_by_hand():
    assert decisions(LOGITS).tolist() == [1, 0, 1, 1]
    assert accuracy(LOGITS, LABELS) == 0.75
    assert f1(LOGITS, LABELS) == pytest.approx(4 / 5)
    assert matthews(LOGITS, LABELS) == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1))


def test_correlations_by_hand():
    predictions, labels = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0])
    assert pearson(predictions, labels) == pytest.approx(1 / np.sqrt(14 / 3 * 2))
    assert spearman(predictions, labels) == pytest.approx(0.5)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_classification_metrics_agree_with_scikit_learn(classes, seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = random_case(classes, seed)
    predicted = logits.argmax(-1)
    assert accuracy(logits, labels) == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert matthews(logits, labels) == pytest.approx(sklearn.matthews_corrcoef(labels, predicted))
    assert f1(logits, labels) == pytest.approx(sklearn.f1_score(labels == 1, predicted == 1))


@pytest.mark.parametrize("decimals", [8, 0])  # 0 makes many ties
def test_correlations_agree_with_scipy(decimals):
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(2)
    predictions = random.normal(size=(150, 1)).round(decimals).astype(np.float32)
    labels = (predictions[:, 0] + random.normal(size=150)).round(decimals).astype(np.float32)
    left, right = predictions[:, 0].astype(np.float64), labels.astype(np.float64)
    assert pearson(predictions, labels) == pytest.approx(stats.pearsonr(left, right).statistic)
    assert spearman(predictions, labels) == pytest.approx(stats.spearmanr(left, right).statistic)


def test_no_positive_at_all_is_an_f1_of_zero():
    assert f1(LOGITS[1:2], np.array([0])) == 0.0


@pytest.mark.parametrize("labels", [np.zeros(4, dtype=np.int64), LABELS])
def test_matthews_of_a_constant_side_is_zero(labels):
    assert matthews(np.tile([[1.0, 0.0]], (4, 1)), labels) == 0.0


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_correlation_of_a_constant_side_is_zero(metric):
    """0.1 three times has a mean that is not 0.1: the sides must be seen to be constant, not computed to be."""
    constant, varied = np.full((3, 1), 0.1), np.array([1.0, 2.0, 4.0])
    assert metric(constant, np.full(3, 0.1)) == 0.0
    assert metric(constant, varied) == 0.0
    assert metric(varied[:, None], np.full(3, 0.1)) == 0.0


def test_evaluate_gives_the_named_metrics_in_order():
    found = evaluate_metrics(("matthews", "accuracy"), logits=LOGITS, labels=LABELS)
    assert list(found) == ["matthews", "accuracy"]
    assert found["accuracy"] == 0.75


def test_outputs_that_are_not_finite_have_no_metric():
    logits = LOGITS.copy()
    logits[1, 0] = np.nan
    logits[3] = np.inf
    with pytest.raises(ValueError, match="2 of 4 outputs are not finite"):
        evaluate_metrics(("accuracy",), logits=logits, labels=LABELS)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_tasks_metrics_exist_and_are_perfect_on_perfect_answers(task):
    labels = np.array([0, 1, 1, 0, 1])
    logits = labels[:, None].astype(np.float64) if task.kind == "regression" else np.eye(2)[labels]
    assert task.metrics
    for name in task.metrics:
        assert METRICS[name](logits, labels) == pytest.approx(1.0)
