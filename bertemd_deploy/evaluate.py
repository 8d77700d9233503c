"""Task metrics of a model on a data set, and the check that a teacher is worth learning from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.checkpoints import checked_encoder, label_order
from bertemd_deploy.data import Dataset
from bertemd_deploy.errors import ModelError
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.models import load_classifier, reorder_outputs
from bertemd_deploy.tasks import Task
from bertemd_deploy.training import torch_logits

_PERMUTED_CLASSES = 5


def dev_metrics(model: nn.Module, dev: DataSlice, *, task: Task, pad_id: int) -> dict[str, float]:
    """Return the task's metrics of a torch classifier on a tokenised dev split.

    Raises:
        ModelError: an output is not finite.
    """
    return _metrics(task, torch_logits(model, dev.examples, pad_id=pad_id), dev.labels, where="the model")


def evaluate_folder(folder: Path, *, data: Dataset, max_length: int) -> dict[str, Any]:
    """Return the dev metrics of a Hugging Face classifier, its outputs matched to the data's labels by name.

    Raises:
        ModelError: the folder or its labels do not fit.
    """
    encoder = checked_encoder(folder, max_length=max_length)
    order = label_order(folder, data.labels)
    model = load_classifier(folder, labels=data.labels)
    reorder_outputs(model, order)
    dev = data.splits["dev"].encode(encoder)
    return {
        "metrics": dev_metrics(model, dev, task=data.task, pad_id=encoder.pad_id),
        "rows": len(dev.labels),
        "backend": "pytorch",
        "task": data.task.name,
    }


def check_teacher(
    logits: NDArray[np.float32], labels: NDArray[Any], *, task: Task, names: tuple[str, ...], where: str
) -> dict[str, float]:
    """Return a teacher's dev metrics, refusing a teacher that has nothing to teach.

    A classifier at or below the accuracy of always naming the majority class is refused, as is a regression model whose
    correlation is not positive. For up to 5 classes the order of its outputs that would fit is named.

    Args:
        logits: (n, outputs) dev outputs, in the data's label order.
        labels: (n,) gold labels.
        task: the task.
        names: label names.
        where: the teacher's name for the message.

    Raises:
        ModelError: the teacher is refused, or an output is not finite.
    """
    metrics = _metrics(task, logits, labels, where=where)
    if task.kind == "regression":
        if metrics[task.metrics[0]] <= 0:
            raise ModelError(
                f"{where}: its {task.metrics[0]} on dev is {metrics[task.metrics[0]]:.3f}; a teacher needs more than 0. "
                "Fine-tune it on this task first."
            )
        return metrics
    decided = logits.argmax(-1)
    accuracy = float((decided == labels).mean())
    majority = float(np.bincount(labels, minlength=len(names)).max() / len(labels))
    if accuracy > majority:
        return metrics
    message = (
        f"{where}: its dev accuracy is {accuracy:.3f}, no better than always answering the most frequent label "
        f"({majority:.3f}). There is nothing to distil."
    )
    better = _best_permutation(decided, labels, names) if len(names) <= _PERMUTED_CLASSES else None
    if better and better[0] > majority:
        told = ", ".join(f"{output} -> {name}" for output, name in zip(names, better[1], strict=True))
        message += (
            f" With its outputs read as {told} it reaches {better[0]:.3f}: its id2label is in another order than its weights. "
            "Correct id2label and label2id in its config.json."
        )
    else:
        message += " Fine-tune it on this task first (teacher.finetune: always)."
    raise ModelError(message)


def _best_permutation(
    decided: NDArray[np.int64], labels: NDArray[Any], names: tuple[str, ...]
) -> tuple[float, tuple[str, ...]]:
    """Return the best accuracy over all readings of the outputs, and the name each output would then carry."""
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (decided, labels), 1)
    hits, best = max(
        (sum(int(confusion[at, to]) for at, to in enumerate(order)), order)
        for order in itertools.permutations(range(len(names)))
    )
    return hits / len(labels), tuple(names[at] for at in best)


def _metrics(task: Task, logits: NDArray[np.float32], labels: NDArray[Any], *, where: str) -> dict[str, float]:
    try:
        return evaluate_metrics(task.metrics, logits=logits, labels=labels)
    except ValueError as error:
        raise ModelError(f"{where}: {error}. The weights are broken, or training diverged.") from error
