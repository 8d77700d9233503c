"""Data sets: from a folder, the hub or the embedded demo to splits with labels by name, and length-bucketed batches.

Reads `train.*` and `dev.*` of a folder (see `readers` for the formats), `glue/<task>` through `datasets`, and `demo`.
Every fault names the file and the line. Labels become numbers in the order of the task's label names, of `labels.txt`
(multilabel and token-classification), or sorted by name, O first. By kind of task a row holds:

    classification, regression  `sentence` or `sentence1`, `sentence2`; `label`, a name or a number
    multilabel                  the same texts; `labels`, a list of names, or names parted by `|` or `,`; may be empty
    token-classification        `tokens` and `tags`, lists of equal length; or CoNLL text (`train.conll`, `train.txt`)
    question-answering          `id`, `question`, `context`, `answers` {"text": [...], "answer_start": [...]}; or SQuAD's
                                nested `train.json`. No answer text: the context does not hold the answer

Other names: `data.sentence1` is the first text, the tokens or the question, `data.sentence2` the second text or the context,
`data.label` the last column. Tags and lists of labels may be numbers where `labels.txt` (one name a line) or a parquet file
of the `datasets` library names them; such a file's classes get their names from it as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.console import note
from bertemd_deploy.demo import demo_rows
from bertemd_deploy.errors import DataError, RecipeError, missing_extra
from bertemd_deploy.readers import read_names, read_records
from bertemd_deploy.rows import Rows, as_written, make_split, names_of
from bertemd_deploy.splits import AnySplit, Split, with_no_answer
from bertemd_deploy.tasks import GLUE, TASKS, Task, column_fault, task_name

SPLITS = ("train", "dev")
DOC_STRIDE = 128
_SAMPLING_SEED = 20201116  # any fixed number; a train subset is the same for every seed of a training run


@dataclass(frozen=True)
class Dataset:
    """A task's data: the label names by number (empty for regression and questions) and its splits by name."""

    task: Task
    labels: tuple[str, ...]
    splits: dict[str, AnySplit]
    sha256: str

    @property
    def outputs(self) -> int:
        """Model outputs (of each token, where a task reads tokens): the number of labels, 2 for questions, or 1."""
        return 2 if self.task.kind == "question-answering" else len(self.labels) or 1


def load_data(
    path: str,
    *,
    task: str | None = None,
    sentence1: str | None = None,
    sentence2: str | None = None,
    label: str | None = None,
    train_limit: int | None = None,
    doc_stride: int = DOC_STRIDE,
    splits: Sequence[str] = SPLITS,
    label_names: Sequence[str] | None = None,
) -> Dataset:
    """Load a data set.

    Args:
        path: "demo", "glue/<task>", or a folder.
        task: row of `TASKS`; None takes it from `path`, and "classification" for a folder.
        sentence1: name of the (first) text column, of the tokens or of the question; None takes the task's.
        sentence2: name of the second text column, where there are pairs, or of the context.
        label: name of the label column; None takes the task's.
        train_limit: keep this many train rows, drawn with a fixed seed.
        doc_stride: tokens that neighbouring windows of a long context share; question answering only.
        splits: which of "train" and "dev" to read.
        label_names: names in order, where a model fixes them (in any case); None takes the task's or the data's.

    Raises:
        DataError: a file, column, row or label is missing or malformed; the message names file and line.
        RecipeError: unknown task, columns that it has no use for or that it lacks, or the demo for another kind of task.
    """
    kind = find_task(path, task)
    if fault := column_fault(kind, sentence1=sentence1, sentence2=sentence2):
        raise RecipeError(f"{fault}.")
    columns = kind.columns
    if sentence1:
        columns = ((sentence1, sentence2 or (kind.columns[0][1] if kind.kind == "question-answering" else None)),)
    label = label or kind.label_column
    if path == "demo":
        rows = {split: _demo(split) for split in splits}
    elif path.startswith("glue/"):
        rows = {split: _glue(path.removeprefix("glue/"), split, columns, label) for split in splits}
    else:
        rows = {split: _read_split(Path(path), split, kind, columns, label) for split in splits}
    named = kind.kind not in ("regression", "question-answering")
    names: tuple[str, ...] = ()
    if named and label_names:
        names = as_written(kind, rows[splits[0]], label_names)
    elif named:
        names = kind.labels or names_of(kind, rows[splits[0]])
    digest = hashlib.sha256(json.dumps([kind.name, names, train_limit]).encode())
    loaded: dict[str, AnySplit] = {}
    known_from = None if label_names else splits[0]
    for split in splits:
        loaded[split] = make_split(kind, rows[split], names, known_from=known_from, doc_stride=doc_stride)
        digest.update(json.dumps([split, *loaded[split].content()]).encode())
    if kind.kind == "regression" and "train" in loaded:
        _check_spread(loaded["train"], path=path)
    if train_limit is not None and "train" in loaded and train_limit < len(loaded["train"]):
        note(f"data: using {train_limit:,} of {len(loaded['train']):,} train rows (data.train_limit)")
        loaded["train"] = _subset(loaded["train"], train_limit)
    if kind.kind in ("classification", "token-classification") and len(names) < 2:
        raise DataError(f"{path}: every train row has the label {names[0]!r}; a classifier needs at least two classes.")
    if kind.kind == "multilabel" and not names:
        raise DataError(f"{path}: no train row has a label; there is nothing to learn. Fill the column {label!r}.")
    return Dataset(kind, names, with_no_answer(loaded), digest.hexdigest())


def find_task(path: str, task: str | None) -> Task:
    """Return the task of a data path.

    Raises:
        RecipeError: unknown task, or the demo for a task of another kind.
    """
    name = task_name(path, task)
    if name not in TASKS:
        raise RecipeError(f"unknown task {name!r}; known: {', '.join(TASKS)}.")
    kind = TASKS[name]
    if path == "demo" and (kind.kind != "classification" or kind.columns[0][1] is not None):
        raise RecipeError(
            f"demo: it is a classification of single texts, no data for the task {kind.name}. Set data.path to a folder, or "
            "leave out the task."
        )
    return kind


def training_batches(
    lengths: NDArray[np.integer], *, batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Return one epoch's batches of row numbers: shuffled, of like length, every row once, the last batch kept.

    The order depends on `seed` and `epoch` alone, so a resumed run finds its place by counting.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    window = batch_size * 50
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
    return [batches[at] for at in generator.permutation(len(batches))]


def calibration_rows(split: AnySplit, *, rows: int) -> AnySplit:
    """Return up to `rows` train rows for calibration, drawn with a fixed seed."""
    return split if rows >= len(split) else _subset(split, rows)


def _check_spread(train: AnySplit, *, path: str) -> None:
    if isinstance(train, Split) and np.ptp(train.labels) == 0:
        raise DataError(
            f"{path}: every train row has the label {train.labels[0]:g}; a regression needs at least two numbers."
        )


def _subset(split: AnySplit, rows: int) -> AnySplit:
    return split.select(np.sort(np.random.default_rng(_SAMPLING_SEED).permutation(len(split))[:rows]))


def _demo(split: str) -> Rows:
    rows = demo_rows("train" if split == "train" else "dev")
    where = [f"demo {split} row {at + 1}" for at in range(len(rows))]
    return Rows(where, [text for text, _ in rows], None, [label for _, label in rows], where)


def _glue(name: str, split: str, columns: tuple[tuple[str, str | None], ...], label: str) -> Rows:
    if name not in GLUE:
        raise RecipeError(f"glue/{name}: unknown GLUE task; known: {', '.join(GLUE)}.")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing_extra("train", package="datasets") from error
    hub_split = "train" if split == "train" else TASKS[name].hub_dev
    try:
        table = datasets.load_dataset("nyu-mll/glue", name, split=hub_split)
    except Exception as error:  # the hub client raises many kinds; all mean that the data did not arrive
        raise DataError(
            f"glue/{name}: the hub's data set nyu-mll/glue could not be loaded ({str(error).splitlines()[0][:160]}). "
            "Without a network, set data.path to a folder with train.tsv and dev.tsv."
        ) from error
    first, second = _find_columns(table.column_names, columns, label, where=f"glue/{name}")
    feature = table.features[label]
    raw = table[label]
    named = [feature.int2str(value) if hasattr(feature, "int2str") else str(value) for value in raw]
    where = [f"glue/{name} {hub_split} row {at + 1}" for at in range(len(named))]
    return Rows(where, list(table[first]), list(table[second]) if second else None, named, where)


def _read_split(folder: Path, split: str, task: Task, columns: tuple[tuple[str, str | None], ...], label: str) -> Rows:
    first, second = columns[0]
    path, records = read_records(folder, split, kind=task.kind, columns=(first, second or "", label))
    first, second = _find_columns(records.columns, columns, label, where=str(path))
    for where, record in records.rows:
        for column in filter(None, (first, label, second)):
            value = record.get(column)
            # A text may be empty (QQP has such questions), a label not: it would become a class of its own.
            blank = column == label and task.kind != "multilabel" and not str(value).strip()
            if value is None or value != value or blank:
                raise DataError(f"{where}: nothing in column {column!r}.")
    names: tuple[str, ...] = ()
    if task.kind in ("multilabel", "token-classification"):
        names = read_names(folder) or records.names.get(label, ())
    elif task.kind == "classification":
        names = records.names.get(label, ())
    return Rows(
        [where for where, _ in records.rows],
        [record[first] for _, record in records.rows],
        [record[second] for _, record in records.rows] if second else None,
        [record[label] for _, record in records.rows],
        [str(record.get("id") or where) for where, record in records.rows],
        names,
    )


def _find_columns(
    present: Sequence[str], allowed: tuple[tuple[str, str | None], ...], label: str, *, where: str
) -> tuple[str, str | None]:
    if label not in present:
        raise DataError(f"{where}: no column {label!r}; found: {', '.join(present)}. Name yours in data.label.")
    for first, second in sorted(allowed, key=lambda pair: pair[1] is None):
        if first in present and (second is None or second in present):
            twice = [name for name in (first, second, label) if name is not None and list(present).count(name) > 1]
            if twice:
                raise DataError(f"{where}: the column {twice[0]!r} is there twice. Rename or remove one of them.")
            return first, second
    wanted = " or ".join(", ".join(filter(None, pair)) for pair in allowed)
    raise DataError(
        f"{where}: needs the column(s) {wanted}; found: {', '.join(present)}. Name yours in data.sentence1, data.sentence2."
    )
