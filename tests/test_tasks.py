from __future__ import annotations

import pytest

from bertemd_deploy.metrics import METRICS, SLICE_METRICS
from bertemd_deploy.tasks import GLUE, TASKS


def test_every_glue_task_is_a_row():
    assert len(GLUE) == 8
    assert set(GLUE) < set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_row_is_whole(name):
    task = TASKS[name]
    assert task.name == name
    assert task.columns
    assert task.max_length <= 512
    assert len(set(task.labels)) == len(task.labels)
    assert not (task.kind in ("regression", "question-answering") and task.labels)
    assert all(metric in METRICS or metric in SLICE_METRICS for metric in task.metrics)
    assert task.label_column


@pytest.mark.parametrize(
    ("name", "metric", "length"),
    [
        ("cola", "matthews", 64),
        ("sst2", "accuracy", 64),
        ("mrpc", "f1", 128),
        ("stsb", "pearson", 128),
        ("qqp", "f1", 128),
        ("mnli", "accuracy", 128),
        ("qnli", "accuracy", 128),
        ("rte", "accuracy", 128),
    ],
)
def test_published_metric_and_length(name, metric, length):
    assert TASKS[name].metrics[0] == metric
    assert TASKS[name].max_length == length


def test_labels_stand_in_the_order_of_glue():
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["rte"].labels == TASKS["qnli"].labels == ("entailment", "not_entailment")
    assert TASKS["cola"].labels == ("unacceptable", "acceptable")
    assert TASKS["mrpc"].labels == ("not_equivalent", "equivalent")
    assert TASKS["sst2"].labels == ("negative", "positive")
    assert TASKS["qqp"].labels == ("not_duplicate", "duplicate")
