from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bertemd_deploy.answers import Answers
from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.metrics import (
    accuracy,
    decisions,
    evaluate_metrics,
    f1,
    f1_macro,
    f1_micro,
    matthews,
    pearson,
    spearman,
    tag_sequences,
)
from bertemd_deploy.tasks import TASKS

# decisions 1 0 1 1 against 1 0 0 1: TP 2, FP 1, TN 1, FN 0
LOGITS = np.array([[0.0, 1.0], [2.0, -1.0], [0.1, 0.2], [-3.0, 0.0]], dtype=np.float32)
LABELS = np.array([1, 0, 0, 1])


def part(labels: np.ndarray) -> DataSlice:
    """A slice of one-token rows with these labels."""
    rows = len(labels)
    return DataSlice(Encoded(np.zeros(rows, np.int32), np.zeros(rows, np.int8), np.arange(rows + 1)), labels)


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
    found = evaluate_metrics(("matthews", "accuracy"), logits=LOGITS, part=part(LABELS))
    assert list(found) == ["matthews", "accuracy"]
    assert found["accuracy"] == 0.75


def test_outputs_that_are_not_finite_have_no_metric():
    logits = LOGITS.copy()
    logits[1, 0] = np.nan
    logits[3] = np.inf
    with pytest.raises(ValueError, match="2 of 4 outputs are not finite"):
        evaluate_metrics(("accuracy",), logits=logits, part=part(LABELS))


def test_multilabel_f1_by_hand():
    """Label 0: TP 1, FP 1; label 1: FN 1; label 2: nowhere; label 3: TP 2. Micro 2 * 3 / (3 + 1 + 3 + 1)."""
    logits = np.array([[1.0, -1.0, -2.0, 0.5], [0.1, -3.0, -1.0, 2.0], [-1.0, 0.0, -1.0, -1.0]])
    labels = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=np.float32)
    assert f1_micro(logits, labels) == pytest.approx(6 / 8)
    assert f1_macro(logits, labels) == pytest.approx((2 / 3 + 0 + 0 + 1) / 4)
    assert f1_micro(-np.ones((2, 3)), np.zeros((2, 3))) == f1_macro(-np.ones((2, 3)), np.zeros((2, 3))) == 0.0


@pytest.mark.parametrize("seed", [0, 1])
def test_multilabel_f1_agrees_with_scikit_learn(seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    logits, labels = random.normal(size=(80, 6)), (random.random((80, 6)) < 0.3).astype(np.float32)
    for average, metric in (("micro", f1_micro), ("macro", f1_macro)):
        assert metric(logits, labels) == pytest.approx(sklearn.f1_score(labels, logits > 0, average=average))


TAGS = ("O", "B-PER", "I-PER")
TAGGED = DataSlice(
    Encoded(np.zeros(9, np.int32), np.zeros(9, np.int8), np.array([0, 5, 9])),
    np.array([-100, 1, -100, 2, -100, -100, 0, 1, -100]),
    "token-classification",
)


def test_entities_are_counted_at_scored_tokens_within_rows():
    """The right one in row 0 spans a continuation piece that says O; row 1 finds one at O and the one there is."""
    decided = [0, 1, 0, 2, 1, 1, 1, 1, 2]
    logits = np.eye(3, dtype=np.float32)[decided]
    found = evaluate_metrics(("entity_f1", "accuracy"), logits=logits, part=TAGGED, label_names=TAGS)
    assert found == {"entity_f1": pytest.approx(2 * 2 / 5), "accuracy": pytest.approx(3 / 4)}
    predicted, actual = tag_sequences(logits, TAGGED, TAGS)
    assert predicted == [["B-PER", "I-PER"], ["B-PER", "B-PER"]]
    assert actual == [["B-PER", "I-PER"], ["O", "B-PER"]]


def test_tags_without_a_name_have_no_entities():
    with pytest.raises(ValueError, match="3 outputs or their labels do not fit 2 tag names"):
        evaluate_metrics(("entity_f1",), logits=np.zeros((9, 3)), part=TAGGED, label_names=TAGS[:2])
    broken = replace(TAGGED, labels=np.where(TAGGED.labels == 2, 7, TAGGED.labels))
    with pytest.raises(ValueError, match="do not fit 3 tag names"):
        evaluate_metrics(("entity_f1",), logits=np.zeros((9, 3)), part=broken, label_names=TAGS)


def test_answers_are_scored_by_example():
    """Two windows of one question whose answer is in the second, and a question without an answer."""
    spans = np.array([(-1, -1), (0, 3), (4, 8)] * 3, np.int32)
    gold = Answers(np.array([0, 0, 1], np.int32), spans, ("the cats", "the cats"), (("cats",), ()), ("q", "r"))
    examples = Encoded(np.zeros(9, np.int32), np.zeros(9, np.int8), np.array([0, 3, 6, 9]))
    asked = DataSlice(examples, np.zeros((3, 2), np.int64), "question-answering", gold)
    logits = np.zeros((9, 2), np.float32)
    logits[5] = 4.0  # "cats", in the second window
    logits[6] = 1.0  # no answer, in the third
    logits[3] = 5.0  # the second window's "no answer"; the first one's is lower
    names = ("f1_squad", "exact_match")
    assert evaluate_metrics(names, logits=logits, part=asked) == {"f1_squad": 1.0, "exact_match": 1.0}
    logits[7] = 2.0  # "the" in the third
    assert evaluate_metrics(names, logits=logits, part=asked) == {"f1_squad": 1.0, "exact_match": 1.0}
    logits[8] = 3.0
    assert evaluate_metrics(names, logits=logits, part=asked) == {"f1_squad": 0.5, "exact_match": 0.5}
    with pytest.raises(TypeError, match="needs a slice with accepted answers"):
        evaluate_metrics(names, logits=logits, part=part(np.zeros(9)))


def perfect(kind: str) -> tuple[np.ndarray, DataSlice]:
    """Logits that answer every row of a slice rightly."""
    labels = np.array([0, 1, 1, 0, 1])
    examples = part(labels).examples
    if kind == "regression":
        return labels[:, None].astype(np.float64), DataSlice(examples, labels.astype(np.float32), kind)
    if kind == "multilabel":
        return np.eye(2)[labels] - 0.5, DataSlice(examples, np.eye(2, dtype=np.float32)[labels], kind)
    if kind == "question-answering":
        spans = np.tile(np.array([[0, 4]], np.int32), (5, 1))
        gold = Answers(np.arange(5, dtype=np.int32), spans, ("word",) * 5, (("word",),) * 5, tuple("abcde"))
        return np.ones((5, 2)), DataSlice(examples, np.zeros((5, 2), np.int64), kind, gold)
    return np.eye(2)[labels], DataSlice(examples, labels, kind)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_tasks_metrics_exist_and_are_perfect_on_perfect_answers(task):
    logits, whole = perfect(task.kind)
    found = evaluate_metrics(task.metrics, logits=logits, part=whole, label_names=("O", "B-X"))
    assert list(found) == list(task.metrics)
    assert all(value == pytest.approx(1.0) for value in found.values())
