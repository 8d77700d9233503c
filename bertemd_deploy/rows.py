"""Raw rows to splits: labels, tags and answers checked and turned into numbers, each fault with its row.

What a row of each kind of task holds is told in `data`, which reads the rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.errors import DataError
from bertemd_deploy.spans import OUTSIDE, is_entity_tag
from bertemd_deploy.splits import AnySplit, QuestionSplit, Split, TokenSplit
from bertemd_deploy.tasks import Task

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"[-+]?[0-9]+(\.0*)?")
_OTHER_TAGS = re.compile(r"[BILUOMES][-_].+", re.DOTALL | re.IGNORECASE)  # BILOU, BMES, an underscore, small letters
_LONGEST_NAME = 1000
_SHOWN = 80


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
    if rows.names:
        return rows.names
    written = _written(task, rows)
    if task.kind == "classification" and all(_NUMBER.fullmatch(name) for names in written for name in names):
        for at, (name,) in enumerate(written):
            if not _WHOLE.fullmatch(name):
                raise _fraction(rows.where[at], name)
    found = _sorted_names([name for names in written for name in names])
    return tuple(sorted(found, key=OUTSIDE.__ne__)) if task.kind == "token-classification" else found


def as_written(task: Task, rows: Rows, names: Sequence[str]) -> tuple[str, ...]:
    """Return a model's label names, those that the data writes in other case as the data has them.

    Raises:
        DataError: a row's labels are malformed; the message names the row.
    """
    found = {name for row in _written(task, rows) for name in row}
    spellings: dict[str, list[str]] = {}
    for name in found:
        spellings.setdefault(name.casefold(), []).append(name)
    if len({name.casefold() for name in names}) < len(names):
        return tuple(names)
    alone = {folded: same[0] for folded, same in spellings.items() if len(same) == 1}
    return tuple(name if name in found else alone.get(name.casefold(), name) for name in names)


def _written(task: Task, rows: Rows) -> list[list[str]]:
    """Return each row's label names."""
    read = {"classification": _row_class, "multilabel": _row_labels}.get(task.kind, _row_tags)
    return [read(rows, at) for at in range(len(rows.labels))]


def _sorted_names(labels: Sequence[str]) -> tuple[str, ...]:
    names = set(labels)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def make_split(task: Task, rows: Rows, names: tuple[str, ...], *, known_from: str | None, doc_stride: int) -> AnySplit:
    """Return a split's rows with their labels as numbers.

    Args:
        task: what the rows are for.
        rows: as read.
        names: label names by number; empty for regression and questions.
        known_from: the split that the names come from, for messages; None where a model fixes them.
        doc_stride: tokens that neighbouring windows of a long context share; question answering only.

    Raises:
        DataError: a label, tag or answer is malformed or not among the names; the message names the row.
    """
    if task.kind == "question-answering":
        pairs = rows.pairs or []
        questions, contexts = _texts(rows, rows.texts, "question"), _texts(rows, pairs, "context")
        answers = [_row_answers(rows, at, context) for at, context in enumerate(contexts)]
        return QuestionSplit(_texts(rows, rows.ids, "id"), questions, contexts, answers, doc_stride)
    known = _Known(names, known_from, task)
    if task.kind == "token-classification":
        words, tags = [], []
        for at, value in enumerate(rows.texts):
            found = _row_tags(rows, at)
            if "entity_f1" in task.metrics and (odd := [tag for tag in found if not is_entity_tag(tag)]):
                raise DataError(
                    f"{rows.where[at]}: {odd[0]!r} is no tag of an entity; those are O, or B-, I-, E- or S- with a type. "
                    + _tag_advice(odd[0])
                )
            tags.append([known.number(tag, rows.where[at]) for tag in found])
            words.append(list(value))
        return TokenSplit(words, tags)
    texts = _texts(rows, rows.texts, "text")
    second = None if rows.pairs is None else _texts(rows, rows.pairs, "second text")
    if task.kind == "regression":
        return Split(texts, second, _numbers(rows), "regression")
    if task.kind == "multilabel":
        return Split(texts, second, _several(rows, known), "multilabel")
    return Split(texts, second, _classes(rows, known))


@dataclass(frozen=True)
class _Known:
    """The label names by number, and where they come from."""

    names: tuple[str, ...]
    source: str | None
    task: Task

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {name: at for at, name in enumerate(self.names)}

    def number(self, name: str, where: str) -> int:
        """Return a label's number; one that is not known is an error."""
        if name in self.numbers:
            return self.numbers[name]
        source = "artifact or model" if self.source is None else f"{self.source} split or the task"
        listed = f"{', '.join(self.names[:20])}{', …' if len(self.names) > 20 else ''}"
        step = "Correct the row, or use the data that the model was trained for."
        if self.source is not None and self.task.kind != "classification":
            step = "Correct the row, or list all labels in labels.txt beside the file, one a line."
        elif self.source is not None:
            step = "Correct the row." if self.task.labels else f"Correct the row, or add one of it to {self.source}."
        raise DataError(f"{where}: unknown label {name!r}; known from the {source}: {listed}. {step}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[:_SHOWN] + '…'}"


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half a character (the lone surrogate U+{ord(text[error.start]):04X}) in {_shown(text)}. "
            "It cannot be written as UTF-8; remove it, or repair the program that cut the text."
        ) from error


def _texts(rows: Rows, values: Sequence[Any], what: str) -> list[str]:
    """Return the values of one column after checking that each is text."""
    for value, where in zip(values, rows.where, strict=True):
        if not isinstance(value, str):
            raise DataError(
                f"{where}: the {what} should be text, found {_shown(value)}. Write it as one text in quotes."
            )
        _check_characters(value, where)
    return list(values)


def _checked_name(name: str, where: str) -> str:
    if len(name) > _LONGEST_NAME:
        raise DataError(
            f"{where}: a label of {len(name):,} characters ({name[:40]!r}…); at most {_LONGEST_NAME:,} are allowed. Is "
            "data.label the right column?"
        )
    _check_characters(name, where)
    return name


def _fraction(where: str, value: object) -> DataError:
    return DataError(
        f"{where}: the label {value} is a number with a fraction, and no class number. For numbers to predict set "
        "data.task: regression; classes are names or whole numbers (of a half star make a name, such as: 1.5 stars)."
    )


def _tag_advice(tag: str) -> str:
    if not _OTHER_TAGS.fullmatch(tag):
        return "For tags that mark no entities set data.task: tagging."
    return (
        "Write IOB2, with a hyphen and a capital: the first word of an entity B-PER, each further one I-PER, all others O. "
        "(Of BILOU's tags, L- is I- there, and U- is B-.)"
    )


def _row_class(rows: Rows, at: int) -> list[str]:
    """Return the one label name of a row of a classification split."""
    value, where = rows.labels[at], rows.where[at]
    if isinstance(value, float):
        if not value.is_integer():
            raise _fraction(where, value)
        value = int(value)
    if not isinstance(value, str | int):
        raise DataError(f"{where}: the label should be a name or a class number, found {_shown(value)}.")
    if rows.names and isinstance(value, int) and not isinstance(value, bool):
        return [_name(rows, at, value)]
    return [_checked_name(str(value).strip(), where)]


def _row_labels(rows: Rows, at: int) -> list[str]:
    """Return the label names of one row of a multilabel split."""
    value = rows.labels[at]
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            raise DataError(
                f"{rows.where[at]}: the labels are text that looks like a list, {_shown(value)}. In a table part the names by "
                "| or ,; lists belong into a jsonl file, without quotes around them."
            )
        value = [name for part in re.split(r"[|,]", value) if (name := part.strip())]
    if not isinstance(value, list):
        raise DataError(
            f"{rows.where[at]}: the labels should be a list of names (or text with names parted by | or ,), "
            f"found {value!r}."
        )
    marks = len(value) > 1 and len(value) == len(rows.names) and not set(rows.names) & {"0", "1"}
    if marks and all(str(item) in ("0", "1", "0.0", "1.0") for item in value):
        raise DataError(
            f"{rows.where[at]}: the labels {value!r} may be numbers of labels, or a 0 or 1 for each of the {len(value)} "
            f"labels. Write the names of those that apply, such as [{json.dumps(rows.names[-1], ensure_ascii=False)}]."
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
    for word in words:
        _check_characters(word, rows.where[at])
    if len(words) != len(tags):
        raise DataError(f"{rows.where[at]}: {len(words)} tokens but {len(tags)} tags. Each token needs one.")
    return [_name(rows, at, item) for item in tags]


def _name(rows: Rows, at: int, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and (name := value.strip()):
        by_number = rows.names and name.isdecimal() and len(name) < 10 and not any(map(str.isdecimal, rows.names))
        if not by_number:
            return _checked_name(name, rows.where[at])
        value = int(name)
    if isinstance(value, int) and not isinstance(value, bool):
        if not rows.names:
            raise DataError(
                f"{rows.where[at]}: the label {value} is a number without a name. Add labels.txt beside the file, one name "
                "a line in the order of the numbers, or write names."
            )
        if 0 <= value < len(rows.names):
            return rows.names[value]
        raise DataError(f"{rows.where[at]}: the label {value} is not one of 0 to {len(rows.names) - 1}.")
    raise DataError(f"{rows.where[at]}: a label should be a name, found {value!r:.{_SHOWN}}.")


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


def _classes(rows: Rows, known: _Known) -> NDArray[np.int64]:
    """Return class numbers; a label may be written as its name or, where no name is a number, as its number."""
    names = known.names
    by_number = {} if any(name.isdigit() for name in names) else {str(at): at for at in range(len(names))}
    classes = np.empty(len(rows.labels), dtype=np.int64)
    for at in range(len(rows.labels)):
        (name,) = _row_class(rows, at)
        classes[at] = by_number[name] if name in by_number else known.number(name, rows.where[at])
    return classes


def _several(rows: Rows, known: _Known) -> NDArray[np.float32]:
    """Return (n, labels) of 0 and 1."""
    labels = np.zeros((len(rows.labels), len(known.names)), dtype=np.float32)
    for at in range(len(rows.labels)):
        labels[at, [known.number(name, rows.where[at]) for name in _row_labels(rows, at)]] = 1
    return labels


def _numbers(rows: Rows) -> NDArray[np.float32]:
    numbers = np.empty(len(rows.labels), dtype=np.float32)
    for at, text in enumerate(map(str, rows.labels)):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"{rows.where[at]}: the label {text[:_SHOWN]!r} is not a finite number, as regression needs."
            )
        if abs(value) > float(np.finfo(np.float32).max):
            raise DataError(
                f"{rows.where[at]}: the label {text[:_SHOWN]!r} is beyond what 32 bits hold (3.4e38). Scale the labels, for "
                "example to the range 0 to 1."
            )
        numbers[at] = value
    return numbers
