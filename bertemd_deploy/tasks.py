"""The task table: what each data set's columns, labels and metrics are called. Adding a task is adding a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["classification", "regression", "multilabel", "token-classification", "question-answering"]


@dataclass(frozen=True)
class Task:
    """One kind of data set.

    Attributes:
        name: key in `TASKS`.
        kind: how labels are read: names of classes, or numbers.
        columns: accepted (first text, second text or None) column pairs, tried in order.
        metrics: names in `metrics.METRICS`; the first selects checkpoints and gates.
        labels: class names by number, or empty where the data says (sorted).
        max_length: longest input in tokens, special tokens included.
        hub_dev: name of the labelled development split on the hub.
    """

    name: str
    kind: Kind
    columns: tuple[tuple[str, str | None], ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    max_length: int = 128
    hub_dev: str = "validation"


_SINGLE = ("sentence", None)
_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", "classification", (_SINGLE,), ("matthews", "accuracy"), ("unacceptable", "acceptable"), 64),
        Task("sst2", "classification", (_SINGLE,), ("accuracy",), ("negative", "positive"), 64),
        Task("mrpc", "classification", (_PAIR,), ("f1", "accuracy"), ("not_equivalent", "equivalent")),
        Task("stsb", "regression", (_PAIR,), ("pearson", "spearman")),
        Task(
            "qqp",
            "classification",
            (_PAIR, ("question1", "question2")),
            ("f1", "accuracy"),
            ("not_duplicate", "duplicate"),
        ),
        Task(
            "mnli",
            "classification",
            (_PAIR, ("premise", "hypothesis")),
            ("accuracy",),
            _NLI,
            hub_dev="validation_matched",
        ),
        Task(
            "qnli",
            "classification",
            (_PAIR, ("question", "sentence")),
            ("accuracy",),
            ("entailment", "not_entailment"),
        ),
        Task("rte", "classification", (_PAIR,), ("accuracy",), ("entailment", "not_entailment")),
        Task("demo", "classification", (_SINGLE,), ("accuracy",), max_length=64),
        Task("classification", "classification", (_SINGLE, _PAIR), ("accuracy",)),
        Task("regression", "regression", (_SINGLE, _PAIR), ("pearson", "spearman")),
    )
}

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
