"""Raw rows to splits: labels, tags and answers checked and turned into numbers, each fault with its row.

What a row of each kind of task holds is told in `data`, which reads the rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.errors import DataError
from bertemd_deploy.spans import OUTSIDE, is_entity_tag
from bertemd_deploy.splits import AnySplit, QuestionSplit, Split, TokenSplit
from bertemd_deploy.tasks import Task


@dataclass(frozen=True)
class Rows:
    """Raw rows of one split.

    Attributes:
        where: where each came from.
        texts: the first value of each: a text, a list of tokens, a question.
        pairs: the second value: a text or a context.
        labels: the label, as written.
        ids: name of each row.
        names: of labels that are written as numbers.
    """

    where: list[str]
    texts: list[Any]
    pairs: list[Any] | None
    labels: list[Any]
    ids: list[str]
    names: tuple[str, ...] = ()


def names_of(task: Task, rows: Rows) -> tuple[str, ...]:
    """Return the label names of a split by number: those that the data names itself, or its labels sorted, O first.

    Raises:
        DataError: a row's labels are malformed; the message names the row.
    """
    if task.kind == "classification":
        return _sorted_names([str(label) for label in rows.labels])
    read = _row_labels if task.kind == "multilabel" else _row_tags
    if rows.names:
        return rows.names
    found = _sorted_names([name for at in range(len(rows.labels)) for name in read(rows, at)])
    return tuple(sorted(found, key=OUTSIDE.__ne__)) if task.kind == "token-classification" else found


def _sorted_names(labels: Sequence[str]) -> tuple[str, ...]:
    names = set(labels)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def make_split(task: Task, rows: Rows, names: tuple[str, ...], *, known_from: str, doc_stride: int) -> AnySplit:
    """Return a split's rows with their labels as numbers.

    Args:
        task: what the rows are for.
        rows: as read.
        names: label names by number; empty for regression and questions.
        known_from: the split that the names come from, for messages.
        doc_stride: tokens that neighbouring windows of a long context share; question answering only.

    Raises:
        DataError: a label, tag or answer is malformed or not among the names; the message names the row.
    """
    if task.kind == "question-answering":
        pairs = rows.pairs or []
        answers = [_row_answers(rows, at, str(context)) for at, context in enumerate(pairs)]
        return QuestionSplit(rows.ids, [str(text) for text in rows.texts], list(map(str, pairs)), answers, doc_stride)
    if task.kind == "token-classification":
        numbers = {name: at for at, name in enumerate(names)}
        words, tags = [], []
        for at, value in enumerate(rows.texts):
            found = _row_tags(rows, at)
            if "entity_f1" in task.metrics and (odd := [tag for tag in found if not is_entity_tag(tag)]):
                raise DataError(
                    f"{rows.where[at]}: {odd[0]!r} is no tag of an entity; those are O, or B-, I-, E- or S- with a type. "
                    "For tags that mark no entities set data.task: tagging."
                )
            tags.append([_number(tag, numbers, rows.where[at], known_from) for tag in found])
            words.append(list(value))
        return TokenSplit(words, tags)
    texts = [str(text) for text in rows.texts]
    second = None if rows.pairs is None else [str(text) for text in rows.pairs]
    if task.kind == "regression":
        return Split(texts, second, _numbers(rows), "regression")
    if task.kind == "multilabel":
        return Split(texts, second, _several(rows, names, known_from=known_from), "multilabel")
    return Split(texts, second, _classes(rows, names, known_from=known_from))


def _row_labels(rows: Rows, at: int) -> list[str]:
    """Return the label names of one row of a multilabel split."""
    value = rows.labels[at]
    if isinstance(value, str):
        return [name for part in re.split(r"[|,]", value) if (name := part.strip())]
    if not isinstance(value, list):
        raise DataError(
            f"{rows.where[at]}: the labels should be a list of names (or text with names parted by | or ,), "
            f"found {value!r}."
        )
    return [_name(rows, at, item) for item in value]


def _row_tags(rows: Rows, at: int) -> list[str]:
    """Return the tag names of one sentence, after checking them and its words."""
    words, tags = rows.texts[at], rows.labels[at]
    for value, what in ((words, "tokens"), (tags, "tags")):
        if not isinstance(value, list) or not value:
            raise DataError(f"{rows.where[at]}: the {what} should be a list with at least one item, found {value!r}.")
    if not all(isinstance(word, str) for word in words):
        raise DataError(f"{rows.where[at]}: each token should be text, found {words!r}.")
    if len(words) != len(tags):
        raise DataError(f"{rows.where[at]}: {len(words)} tokens but {len(tags)} tags. Each token needs one.")
    return [_name(rows, at, item) for item in tags]


def _name(rows: Rows, at: int, value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        if not rows.names:
            raise DataError(
                f"{rows.where[at]}: the label {value} is a number without a name. Add labels.txt beside the file, one name "
                "a line in the order of the numbers, or write names."
            )
        if 0 <= value < len(rows.names):
            return rows.names[value]
        raise DataError(f"{rows.where[at]}: the label {value} is not one of 0 to {len(rows.names) - 1}.")
    raise DataError(f"{rows.where[at]}: a label should be a name, found {value!r}.")


def _row_answers(rows: Rows, at: int, context: str) -> list[tuple[str, int]]:
    """Return the accepted answers of one question with their places, after checking that they stand there."""
    value, where = rows.labels[at], rows.where[at]
    texts, starts = (value.get(key) if isinstance(value, dict) else None for key in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(
            f'{where}: the answers should be {{"text": [...], "answer_start": [...]}} with lists of equal length (empty '
            f"where there is no answer), found {value!r}."
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int) or isinstance(start, bool):
            raise DataError(
                f"{where}: an answer is a text and the number of its first character, found {text!r}, {start!r}."
            )
        found = context[start : start + len(text)] if start >= 0 else ""
        if found != text:
            raise DataError(
                f"{where}: the answer {text!r} does not stand at answer_start {start} of its context; there is {found!r}."
            )
    return list(zip(texts, starts, strict=True))


def _number(name: str, numbers: dict[str, int], where: str, known_from: str) -> int:
    if name not in numbers:
        known = list(numbers)
        raise DataError(
            f"{where}: unknown label {name!r}; known from the {known_from} split or the task: "
            f"{', '.join(known[:20])}{', …' if len(known) > 20 else ''}."
        )
    return numbers[name]


def _classes(rows: Rows, names: tuple[str, ...], *, known_from: str) -> NDArray[np.int64]:
    """Return class numbers; a label may be written as its name or, where no name is a number, as its number."""
    numbers = {name: at for at, name in enumerate(names)}
    by_number = {} if any(name.isdigit() for name in names) else {str(at): at for at in range(len(names))}
    classes = np.empty(len(rows.labels), dtype=np.int64)
    for at, name in enumerate(map(str, rows.labels)):
        classes[at] = by_number[name] if name in by_number else _number(name, numbers, rows.where[at], known_from)
    return classes


def _several(rows: Rows, names: tuple[str, ...], *, known_from: str) -> NDArray[np.float32]:
    """Return (n, labels) of 0 and 1."""
    numbers = {name: at for at, name in enumerate(names)}
    labels = np.zeros((len(rows.labels), len(names)), dtype=np.float32)
    for at in range(len(rows.labels)):
        labels[at, [_number(name, numbers, rows.where[at], known_from) for name in _row_labels(rows, at)]] = 1
    return labels


def _numbers(rows: Rows) -> NDArray[np.float32]:
    numbers = np.empty(len(rows.labels), dtype=np.float32)
    for at, text in enumerate(map(str, rows.labels)):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{rows.where[at]}: the label {text!r} is not a finite number, as regression needs.")
        numbers[at] = value
    return numbers
