"""What a student folder carries for export beside its weights: the facts of its making, and tokenised slices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bertemd_deploy.artifact import DataSlice, read_slices
from bertemd_deploy.checkpoints import checked_encoder, label_order
from bertemd_deploy.data import Dataset, calibration_rows
from bertemd_deploy.errors import ModelError
from bertemd_deploy.files import read_json
from bertemd_deploy.splits import QuestionSplit, Split

FACTS = "bertemd_student.json"
SLICES = "eval.npz"
RANGES = "quantization_ranges.json"  # what int8-aware epochs have learnt; not every student has them
CALIBRATION_ROWS = 256


@dataclass(frozen=True)
class StudentFacts:
    """What a student folder carries for export: task, labels, teacher, metrics, history; and the tokenised slices."""

    task: dict[str, Any]
    labels: list[str]
    max_length: int
    teacher: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    distillation: dict[str, Any]
    evaluation: DataSlice
    calibration: DataSlice


def read_student(folder: Path) -> StudentFacts:
    """Return what a student folder carries for export.

    Raises:
        ArtifactError: the facts or slices are missing or damaged.
        ModelError: the facts lack something, or facts and slices are for different kinds of task.
    """
    facts = read_json(folder / FACTS, what="student's facts")
    slices = read_slices(folder / SLICES)
    names = ("task", "labels", "max_length", "teacher", "metrics", "distillation")
    missing = [name for name in names if name not in facts] + [
        name for name in ("evaluation", "calibration") if name not in slices
    ]
    if missing:
        raise ModelError(f"{folder / FACTS}: lacks {', '.join(missing)}. Distil the student again.")
    kind, found = facts["task"].get("kind"), {part.kind for part in slices.values()}
    if found != {kind}:
        raise ModelError(
            f"{folder / SLICES}: its slices are for {', '.join(sorted(found))}, {FACTS} says {kind}. Distil the student again."
        )
    return StudentFacts(
        **{name: facts[name] for name in names}, evaluation=slices["evaluation"], calibration=slices["calibration"]
    )


def task_facts(data: Dataset) -> dict[str, Any]:
    """Return what a student carries of its task: name, kind, metrics.

    And, where these are questions: how long contexts are cut; where they may be either: whether texts come in pairs.
    """
    found: dict[str, Any] = {"name": data.task.name, "kind": data.task.kind, "metrics": list(data.task.metrics)}
    dev = data.splits["dev"]
    if isinstance(dev, QuestionSplit):
        return found | {"doc_stride": dev.doc_stride}
    return found | ({"pairs": dev.pairs is not None} if isinstance(dev, Split) else {})


def facts_from_data(folder: Path, data: Dataset, *, max_length: int) -> StudentFacts:
    """Return what export needs for a classifier that was not distilled here, from a data set.

    Raises:
        ModelError: the folder's labels, in the data's order, are not those of the data.
    """
    encoder = checked_encoder(folder, max_length=max_length)
    order = label_order(folder, data.labels, kind=data.task.kind)
    if order != list(range(len(order))):
        names = ", ".join(data.labels[at] for at in np.argsort(order))
        raise ModelError(
            f"{folder}: its labels stand in another order ({names}) than the data's ({', '.join(data.labels)})."
        )
    calibration = calibration_rows(data.splits["train"], rows=CALIBRATION_ROWS).encode(encoder)
    return StudentFacts(
        task=task_facts(data),
        labels=list(data.labels),
        max_length=max_length,
        teacher={},
        metrics={},
        distillation={},
        evaluation=data.splits["dev"].encode(encoder),
        calibration=calibration,
    )
