"""Dev metrics by label name, and the refusal of teachers that have nothing to teach."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bertemd_deploy.data import load_data
from bertemd_deploy.errors import ModelError
from bertemd_deploy.evaluate import check_teacher, dev_metrics, evaluate_folder
from bertemd_deploy.models import load_classifier
from bertemd_deploy.tasks import TASKS

Task = Callable[..., tuple[Path, Path]]


def one_hot(answers: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers] * 5


def test_a_folder_is_scored_on_the_dev_split(tiny_task: Task) -> None:
    teacher, folder = tiny_task()
    data = load_data(str(folder))
    record = evaluate_folder(teacher, data=data, max_length=32)
    assert record == {"metrics": {"accuracy": 1.0}, "rows": 24, "backend": "pytorch", "task": "classification"}


def test_outputs_are_matched_by_name(tiny_task: Task) -> None:
    teacher, folder = tiny_task()
    path = teacher / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}))
    data = load_data(str(folder))
    assert evaluate_folder(teacher, data=data, max_length=32)["metrics"] == {"accuracy": 0.0}
    weights = load_file(teacher / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    assert evaluate_folder(teacher, data=data, max_length=32)["metrics"] == {"accuracy": 1.0}


@pytest.mark.parametrize("kind", ["pair", "regression"])
def test_pairs_and_numbers_are_scored_too(tiny_task: Task, kind: str) -> None:
    teacher, folder = tiny_task(kind)
    data = load_data(str(folder), task="regression" if kind == "regression" else None)
    metrics = evaluate_folder(teacher, data=data, max_length=32)["metrics"]
    assert all(value == pytest.approx(1.0, abs=1e-5) for value in metrics.values())
    assert list(metrics) == (["pearson", "spearman"] if kind == "regression" else ["accuracy"])


def test_outputs_that_are_not_finite_have_no_metric(tiny_task: Task) -> None:
    from bertemd_deploy.encoding import TextEncoder

    teacher, folder = tiny_task()
    model = load_classifier(teacher, labels=("no", "yes"))
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    dev = load_data(str(folder)).splits["dev"].encode(TextEncoder.load(teacher, max_length=32))
    with pytest.raises(ModelError, match=r"the model: 24 of 24 outputs are not finite\. The weights are broken, or"):
        dev_metrics(model, dev, task=TASKS["classification"], pad_id=0)


@pytest.mark.parametrize("answers", [[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, 0, 1, 1, 0]])
def test_a_teacher_at_or_below_majority_is_refused(answers: list[int]) -> None:
    labels = np.array([0, 0, 0, 1, 1])
    logits, task = one_hot(answers, 2), TASKS["sst2"]
    names = ("negative", "positive")
    accuracy = float((np.array(answers) == labels).mean())
    with pytest.raises(ModelError) as raised:
        check_teacher(logits, labels, task=task, names=names, where="the/teacher")
    assert str(raised.value) == (
        f"the/teacher: its dev accuracy is {accuracy:.3f}, no better than always answering the most frequent label "
        "(0.600). There is nothing to distil. Fine-tune it on this task first (teacher.finetune: always)."
    )


def test_a_teacher_above_majority_is_taken() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    logits = one_hot([0, 0, 0, 1, 0], 2)
    assert check_teacher(logits, labels, task=TASKS["sst2"], names=("a", "b"), where="t") == {"accuracy": 0.8}


def test_the_permutation_that_would_fit_is_named() -> None:
    labels = np.array([0, 1, 2] * 10)
    logits = one_hot([2, 0, 1] * 10, 3)  # output 2 means class 0, output 0 class 1, output 1 class 2
    names = ("entailment", "neutral", "contradiction")
    with pytest.raises(ModelError) as raised:
        check_teacher(logits, labels, task=TASKS["mnli"], names=names, where="t")
    assert (
        "With its outputs read as entailment -> neutral, neutral -> contradiction, contradiction -> entailment it "
        "reaches 1.000: its id2label is in another order than its weights."
    ) in str(raised.value)


def test_beyond_five_classes_no_permutation_is_sought() -> None:
    labels = np.arange(6).repeat(3)
    logits = one_hot([(label + 1) % 6 for label in labels], 6)
    with pytest.raises(ModelError) as raised:
        check_teacher(logits, labels, task=TASKS["classification"], names=tuple("abcdef"), where="t")
    assert "outputs read as" not in str(raised.value)
    assert "Fine-tune it on this task first" in str(raised.value)


def test_a_regression_teacher_needs_a_positive_correlation() -> None:
    labels = np.array([0.0, 1.0, 2.0, 3.0], dtype=np.float32)
    task = TASKS["stsb"]
    good = check_teacher(labels[:, None] * 2, labels, task=task, names=(), where="t")
    assert good["pearson"] == pytest.approx(1.0)
    for answers, found in ((-labels, "-1.000"), (np.zeros(4, np.float32), "0.000")):
        with pytest.raises(ModelError, match=f"its pearson on dev is {found}; a teacher needs more than 0"):
            check_teacher(answers[:, None], labels, task=task, names=(), where="t")
