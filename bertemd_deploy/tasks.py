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
        kind: what a row's answer is: a class, a number, any of several labels, a tag for each word, a span of the text.
        columns: accepted (first text, second text or None) column pairs, tried in order; the tokens where words have
            tags, the question and its context where spans are sought.
        metrics: names in `metrics.METRICS` or `metrics.SLICE_METRICS`; the first selects checkpoints and gates.
        labels: class names by number, or empty where the data says (sorted).
        max_length: longest input in tokens, special tokens included.
        hub_dev: name of the labelled development split on the hub.
        label_column: name of the label column.
    """

    name: str
    kind: Kind
    columns: tuple[tuple[str, str | None], ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    max_length: int = 128
    hub_dev: str = "validation"
    label_column: str = "label"


_SINGLE = ("sentence", None)
_PAIR = ("sentence1", "sentence2")
_TOKENS = ("tokens", None)
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
        Task("multilabel", "multilabel", (_SINGLE, _PAIR), ("f1_micro", "f1_macro"), label_column="labels"),
        Task("token-classification", "token-classification", (_TOKENS,), ("entity_f1",), label_column="tags"),
        Task("tagging", "token-classification", (_TOKENS,), ("accuracy",), label_column="tags"),
        Task(
            "question-answering",
            "question-answering",
            (("question", "context"),),
            ("f1_squad", "exact_match"),
            max_length=384,
            label_column="answers",
        ),
    )
}


def task_name(path: str, task: str | None) -> str:
    """Return the name of the task of a data path: the given one, that of demo or glue/…, or "classification"."""
    if task:
        return task
    return path if path == "demo" else path.removeprefix("glue/") if path.startswith("glue/") else "classification"


def column_fault(task: Task, *, sentence1: str | None, sentence2: str | None) -> str | None:
    """Return what is wrong with the names given to a task's text columns, or None."""
    if task.kind == "token-classification" and sentence2 is not None:
        return f"data.sentence2 is given, but {task.name} reads one column of tokens, data.sentence1; remove it"
    if sentence2 is not None and sentence1 is None:
        return "data.sentence2 is given without data.sentence1; name both columns"
    paired = task.kind != "question-answering" and all(second is not None for _, second in task.columns)
    if paired and sentence1 is not None and sentence2 is None:
        return (
            f"data.sentence1 is given without data.sentence2, but {task.name} reads pairs of texts; name both columns"
        )
    return None


GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
