"""Task metrics of a model on a data set, and the check that a teacher is worth learning from."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bertemd_deploy.answers import answer_scores
from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.checkpoints import checked_encoder, label_order, missing_head, model_labels, no_head
from bertemd_deploy.console import note, progress
from bertemd_deploy.data import SPLITS, Dataset, find_task, load_data
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ModelError, TrainingError
from bertemd_deploy.families import known_inputs
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.models import load_classifier, output_logits, reorder_outputs
from bertemd_deploy.processes import Processes
from bertemd_deploy.runtime import collect_logits
from bertemd_deploy.settings import DataSettings
from bertemd_deploy.tasks import Task
from bertemd_deploy.training_device import is_out_of_memory

_LEAST_GAIN = 10
_SHOWN = 8


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
    where: str = "the model",
) -> dict[str, float]:
    """Return the task's metrics of a torch model on a tokenised dev split.

    Args:
        model: with the task's head, in eval mode.
        dev: the split.
        task: whose metrics.
        pad_id: token id of padding.
        names: label names by number; needed for entities.
        processes: that share the work; each gets the metrics.
        where: the model's name for messages.

    Raises:
        ModelError: an output is not finite.
    """
    logits = torch_logits(model, dev.examples, pad_id=pad_id, processes=processes)
    return _metrics(task, logits, dev, names=names, where=where)


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
        "metrics": dev_metrics(model, dev, task=data.task, pad_id=encoder.pad_id, names=data.labels, where=str(folder)),
        "rows": len(data.splits["dev"]),
        "backend": "pytorch",
        "task": data.task.name,
    }


def evaluate_model(folder: Path, *, settings: DataSettings) -> dict[str, Any]:
    """Return the dev metrics of a Hugging Face task model, as `evaluate_folder`, of data that may have a dev split only.

    Label names are the model's. One without names takes the data's order, for which the train split is read; so it is for
    questions, where there is one, as it may say that some have no answer.

    Raises:
        ModelError: the folder does not fit.
        DataError: the data cannot be read, or has labels that the model has not.
    """
    task = find_task(settings.path, settings.task)
    if absent := missing_head(folder, task.kind):
        raise no_head(folder, absent, task.kind)
    named = task.kind not in ("regression", "question-answering")
    names = model_labels(folder) if named and not task.labels else ()
    alone = not named or bool(names or task.labels)
    if task.kind == "question-answering" and any(Path(settings.path).glob("train.*")):
        alone = False
    if named and not alone and Path(settings.path).is_dir() and not any(Path(settings.path).glob("train.*")):
        raise ModelError(
            f"{folder}: its labels have no names, and {settings.path} has no train split to name them. Write id2label and "
            "label2id into its config.json, or add the train file that it was trained with."
        )
    data = load_data(
        settings.path,
        task=settings.task,
        sentence1=settings.sentence1,
        sentence2=settings.sentence2,
        label=settings.label,
        doc_stride=settings.doc_stride,
        splits=("dev",) if alone else SPLITS,
        label_names=names or None,
    )
    return evaluate_folder(folder, data=data, max_length=settings.max_length or data.task.max_length)


def check_teacher(
    logits: NDArray[np.float32], part: DataSlice, *, task: Task, names: tuple[str, ...], where: str
) -> dict[str, float]:
    """Return a teacher's dev metrics, refusing a teacher that has nothing to teach.

    What it has to exceed, by kind: of classes and of tags, the accuracy of always naming the most frequent one, and of tags
    of entities an F1 of 0 as well; of numbers, a correlation of 0; of several labels at once, the best micro F1 of one
    answer to all rows; of answers, the F1 of always saying "no answer" and of always giving the whole context. Where another
    order of its outputs would fit, that is named; a teacher that such an order frees of more than half of its errors is
    refused above the floor too.

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
    better = _better_order(logits, part, names=names)
    for metric, found, floor, of in _floors(logits, part, metrics=metrics, task=task):
        if found > floor:
            continue
        if task.kind == "regression":
            raise ModelError(
                f"{where}: its {metric} on dev is {found:.3f}; a teacher needs more than 0. Fine-tune it on this task first."
            )
        message = (
            f"{where}: its dev {metric} is {found:.3f}, no better than {of} ({floor:.3f}). There is nothing to distil."
        )
        if better is not None and better.reached > max(better.floor, better.found):
            raise ModelError(f"{message} With its outputs {better.told()}.")
        tail = (
            ""
            if task.kind == "classification"
            else "; if it was, check that data.path and the order of its labels are those that it was trained with"
        )
        raise ModelError(f"{message} Fine-tune it on this task first (teacher.finetune: always){tail}.")
    if better is not None and better.striking:
        raise ModelError(f"{where}: its dev {better.metric} is {better.found:.3f}. With its outputs {better.told()}.")
    return metrics


def _floors(
    logits: NDArray[np.float32], part: DataSlice, *, metrics: dict[str, float], task: Task
) -> list[tuple[str, float, float, str]]:
    """Return what a teacher must exceed: a metric, its value, that of an answer which looks at no input, and its name."""
    metric = "f1_squad" if part.kind == "question-answering" else task.metrics[0]
    if part.kind == "classification":
        return [("accuracy", *_accuracy(logits, part), "always answering the most frequent label")]
    if part.kind == "token-classification":
        entities = [(metric, metrics[metric], 0.0, "finding nothing")] if metric == "entity_f1" else []
        return [*entities, ("accuracy", *_accuracy(logits, part), "always naming the most frequent tag")]
    if part.kind == "multilabel":
        return [(metric, metrics[metric], _best_one_answer(part.labels), "the best one answer to all rows")]
    if part.gold is not None:
        accepted = part.gold.accepted
        nothing = answer_scores([""] * len(accepted), accepted=accepted)[metric]
        everything = answer_scores(part.gold.contexts, accepted=accepted)[metric]
        floor, of = max(
            (nothing, "always saying that there is no answer"), (everything, "always giving the whole context")
        )
        return [(metric, metrics[metric], floor, of)]
    return [(metric, metrics[metric], 0.0, "a constant")]


def _decided(logits: NDArray[np.float32], part: DataSlice) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return what the model says and the labels, of the rows or tokens that count."""
    decided, labels = logits.argmax(-1), part.labels
    scored = labels != NOT_SCORED
    return decided[scored], labels[scored]


def _accuracy(logits: NDArray[np.float32], part: DataSlice) -> tuple[float, float]:
    """Return the accuracy over rows or tokens, and that of always naming the most frequent label."""
    decided, labels = _decided(logits, part)
    count = max(len(labels), 1)
    return float((decided == labels).sum() / count), float(np.bincount(labels, minlength=1).max() / count)


def _best_one_answer(labels: NDArray[Any]) -> float:
    """Return the best micro F1 of one set of labels for all rows, (n, labels) of 0 and 1."""
    counts = np.sort(labels.sum(axis=0))[::-1]
    chosen = np.arange(1, len(counts) + 1)
    return float((2 * counts.cumsum() / (chosen * len(labels) + counts.sum())).max())


@dataclass(frozen=True)
class _Order:
    """The reading of a model's outputs that fits the labels best.

    Attributes:
        metric: accuracy, or micro F1 of several labels at once.
        found: its value as the outputs are named.
        reached: its value with the outputs read in the best order.
        floor: of an answer that looks at no input.
        gained: hits that the other order adds.
        moves: name of an output, and the name that it should carry, where they differ.
    """

    metric: str
    found: float
    reached: float
    floor: float
    gained: int
    moves: tuple[tuple[str, str], ...]

    @property
    def striking(self) -> bool:
        """Whether the other order mends more than half of the errors, and more of them than chance does."""
        return (
            self.gained >= _LEAST_GAIN
            and self.reached > self.floor
            and (self.reached - self.found > (1 - self.found) / 2)
        )

    def told(self) -> str:
        """Return the order in words."""
        named = ", ".join(f"{output} -> {name}" for output, name in self.moves[:_SHOWN])
        return (
            f"read as {named}{', …' if len(self.moves) > _SHOWN else ''} it reaches {self.reached:.3f}: its id2label is in "
            "another order than its weights. Correct id2label and label2id in its config.json"
        )


def _better_order(logits: NDArray[np.float32], part: DataSlice, *, names: tuple[str, ...]) -> _Order | None:
    """Return the order of the outputs that would fit the labels best, or None where none is better than theirs.

    An assignment problem: with C_ij the number of times that output i is chosen where label j is right, the best order
    maximises sum_i C_i,order(i), and with it the accuracy, or the micro F1 2 TP / (P + A), of which no order changes P + A.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    if part.kind == "multilabel":
        chosen, right = logits > 0, part.labels > 0
        confusion = chosen.T.astype(np.int64) @ right.astype(np.int64)
        total, metric, floor = float(chosen.sum() + right.sum()) / 2, "f1_micro", _best_one_answer(part.labels)
    elif part.kind in ("classification", "token-classification"):
        decided, labels = _decided(logits, part)
        confusion = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(confusion, (decided, labels), 1)
        total, metric, floor = float(len(labels)), "accuracy", _accuracy(logits, part)[1]
    else:
        return None
    size = len(names)
    weights = confusion * (size + 1) + np.eye(size, dtype=np.int64)  # of equal orders the one nearest to theirs
    _, order = linear_sum_assignment(weights, maximize=True)
    hits, best = int(np.trace(confusion)), int(confusion[np.arange(size), order].sum())
    if best <= hits:
        return None
    moves = tuple((names[at], names[to]) for at, to in enumerate(order) if to != at and confusion[at, to])
    return _Order(metric, hits / total, best / total, floor, best - hits, moves)


def _metrics(
    task: Task, logits: NDArray[np.float32], part: DataSlice, *, names: Sequence[str], where: str
) -> dict[str, float]:
    try:
        return evaluate_metrics(task.metrics, logits=logits, part=part, label_names=names)
    except ValueError as error:
        raise ModelError(f"{where}: {error}. The weights are broken, or training diverged.") from error
