"""Task metrics of a model on a data set, and the check that a teacher is worth learning from."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bertemd_deploy.answers import answer_scores
from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.checkpoints import checked_encoder, label_order
from bertemd_deploy.console import note, progress
from bertemd_deploy.data import Dataset
from bertemd_deploy.devices import is_out_of_memory
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ModelError, TrainingError
from bertemd_deploy.families import known_inputs
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.models import load_classifier, output_logits, reorder_outputs
from bertemd_deploy.processes import Processes
from bertemd_deploy.runtime import collect_logits
from bertemd_deploy.tasks import Task

_PERMUTED_CLASSES = 5


def torch_logits(
    model: nn.Module, examples: Encoded, *, pad_id: int, batch_size: int = 64, processes: Processes | None = None
) -> NDArray[np.float32]:
    """Return a model's outputs over all `examples`, in their order, run in batches of like length.

    Several processes share the work; each gets all of the outputs. Where memory is short, fewer rows are run at once.

    Returns:
        (n, outputs) float32; of a model that reads every token ragged as the tokens are: (sum of lengths, labels), or
        (sum of lengths, 2) start and end logits for question answering.

    Raises:
        TrainingError: there is no memory for one row.
    """
    processes = processes or Processes()
    if len(examples) < processes.size:
        processes = Processes()
    device = next(model.parameters()).device
    known = known_inputs(model.config.to_dict())  # type: ignore[union-attr, operator]

    def run(inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        given = {name: torch.from_numpy(value).to(device) for name, value in inputs.items() if name in known}
        with torch.inference_mode():
            return np.asarray(output_logits(model(**given)).float().cpu().numpy())

    fitting = _Fitting(run, most=batch_size)
    mine = np.arange(len(examples))[processes.rank :: processes.size]
    part = examples if processes.size == 1 else examples.select(mine)
    with progress("evaluate", len(part)) as bar:
        found = collect_logits(fitting, part, pad_id=pad_id, batch_size=batch_size, done=bar.advance)
    if processes.size == 1:
        return found
    ragged = len(found) != len(part)
    places = np.concatenate([np.arange(*examples.offsets[row : row + 2]) for row in mine]) if ragged else mine
    total = np.zeros((len(examples.tokens) if ragged else len(examples), found.shape[-1]), dtype=np.float32)
    total[places] = found
    return np.asarray(processes.sum(torch.from_numpy(total).to(device)).cpu().numpy())


class _Fitting:
    """Runs a model on as many rows at once as memory allows, which is found out by halving."""

    def __init__(self, run: Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]], *, most: int) -> None:
        self._run, self._most = run, most

    def __call__(self, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        rows, width = inputs["input_ids"].shape
        found: list[NDArray[np.float32]] = []
        at = 0
        while at < rows:
            size = min(self._most, rows - at)
            outputs = self._try({name: value[at : at + size] for name, value in inputs.items()})
            if outputs is not None:
                found.append(outputs)
                at += size
                continue
            if size == 1:
                raise TrainingError(
                    f"evaluation: out of memory with one row of {width} tokens. Lower data.max_length, or use a machine "
                    "with more memory. The last checkpoint of a training run is kept."
                )
            self._most = size // 2
            note(f"evaluation: out of memory with {size} rows of {width} tokens; going on with {self._most} at once")
            gc.collect()
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _try(self, inputs: dict[str, NDArray[np.int64]]) -> NDArray[np.float32] | None:
        """Return the outputs; None where memory is short, with what was allocated gone."""
        try:
            return self._run(inputs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None


def dev_metrics(
    model: nn.Module,
    dev: DataSlice,
    *,
    task: Task,
    pad_id: int,
    names: Sequence[str] = (),
    processes: Processes | None = None,
) -> dict[str, float]:
    """Return the task's metrics of a torch model on a tokenised dev split.

    Args:
        model: with the task's head, in eval mode.
        dev: the split.
        task: whose metrics.
        pad_id: token id of padding.
        names: label names by number; needed for entities.
        processes: that share the work; each gets the metrics.

    Raises:
        ModelError: an output is not finite.
    """
    logits = torch_logits(model, dev.examples, pad_id=pad_id, processes=processes)
    return _metrics(task, logits, dev, names=names, where="the model")


def evaluate_folder(folder: Path, *, data: Dataset, max_length: int) -> dict[str, Any]:
    """Return the dev metrics of a Hugging Face task model, its outputs matched to the data's labels by name.

    Raises:
        ModelError: the folder or its labels do not fit.
    """
    encoder = checked_encoder(folder, max_length=max_length)
    order = label_order(folder, data.labels, kind=data.task.kind)
    model = load_classifier(folder, labels=data.labels, kind=data.task.kind)
    reorder_outputs(model, order)
    dev = data.splits["dev"].encode(encoder)
    return {
        "metrics": dev_metrics(model, dev, task=data.task, pad_id=encoder.pad_id, names=data.labels),
        "rows": len(data.splits["dev"]),
        "backend": "pytorch",
        "task": data.task.name,
    }


def check_teacher(
    logits: NDArray[np.float32], part: DataSlice, *, task: Task, names: tuple[str, ...], where: str
) -> dict[str, float]:
    """Return a teacher's dev metrics, refusing a teacher that has nothing to teach.

    What it has to exceed, by kind: of classes and of tags that are no entities, the accuracy of always naming the most
    frequent one; of numbers, a correlation of 0; of several labels at once, the best micro F1 of one answer to all rows; of
    entities, an F1 of 0; of answers, the F1 of always saying "no answer" and of always giving the whole context. For up to
    5 classes the order of its outputs that would fit is named.

    Args:
        logits: outputs over the slice (see `metrics.evaluate_metrics`), in the data's label order.
        part: the dev slice.
        task: the task.
        names: label names.
        where: the teacher's name for the message.

    Raises:
        ModelError: the teacher is refused, or an output is not finite.
    """
    metrics = _metrics(task, logits, part, names=names, where=where)
    if task.kind == "classification":
        _check_classes(logits, part.labels, names=names, where=where)
        return metrics
    metric = "f1_squad" if task.kind == "question-answering" else task.metrics[0]
    floor, of = _floor(part, metric=metric)
    if metrics[metric] > floor:
        return metrics
    if task.kind == "regression":
        raise ModelError(
            f"{where}: its {metric} on dev is {metrics[metric]:.3f}; a teacher needs more than 0. "
            "Fine-tune it on this task first."
        )
    raise ModelError(
        f"{where}: its dev {metric} is {metrics[metric]:.3f}, no better than {of} ({floor:.3f}). There is nothing to "
        "distil. Fine-tune it on this task first (teacher.finetune: always); if it was, check that data.path and the order "
        "of its labels are those that it was trained with."
    )


def _floor(part: DataSlice, *, metric: str) -> tuple[float, str]:
    """Return what the best answer that looks at no input scores in `metric`, and what that answer is called."""
    if part.kind == "multilabel":
        counts = np.sort(part.labels.sum(axis=0))[::-1]
        chosen = np.arange(1, len(counts) + 1)
        scores = 2 * counts.cumsum() / (chosen * len(part.labels) + counts.sum())
        return float(scores.max()), "the best one answer to all rows"
    if part.gold is not None:
        accepted = part.gold.accepted
        nothing = answer_scores([""] * len(accepted), accepted=accepted)[metric]
        everything = answer_scores(part.gold.contexts, accepted=accepted)[metric]
        return max((nothing, "always saying that there is no answer"), (everything, "always giving the whole context"))
    if part.kind == "token-classification" and metric == "accuracy":
        scored = part.labels[part.labels != NOT_SCORED]
        return float(np.bincount(scored).max() / len(scored)), "always naming the most frequent tag"
    return 0.0, "finding nothing"


def _check_classes(logits: NDArray[np.float32], labels: NDArray[Any], *, names: tuple[str, ...], where: str) -> None:
    decided = logits.argmax(-1)
    accuracy = float((decided == labels).mean())
    majority = float(np.bincount(labels, minlength=len(names)).max() / len(labels))
    if accuracy > majority:
        return
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


def _metrics(
    task: Task, logits: NDArray[np.float32], part: DataSlice, *, names: Sequence[str], where: str
) -> dict[str, float]:
    try:
        return evaluate_metrics(task.metrics, logits=logits, part=part, label_names=names)
    except ValueError as error:
        raise ModelError(f"{where}: {error}. The weights are broken, or training diverged.") from error
