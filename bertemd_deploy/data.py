"""Data sets: from a folder, the hub or the embedded demo to texts, labels by name, and length-bucketed batches.

Reads `train.*` and `dev.*` (tsv without quoting, csv, jsonl, parquet), `glue/<task>` through `datasets`, and `demo`. Every
fault names the file and the line. Labels become class numbers in the order of the task's label names, or sorted by name.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.console import note
from bertemd_deploy.demo import demo_rows
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import DataError, RecipeError, missing_extra
from bertemd_deploy.tasks import GLUE, TASKS, Task

SUFFIXES = ("tsv", "csv", "jsonl", "parquet")
SPLITS = ("train", "dev")
_SAMPLING_SEED = 20201116  # any fixed number; a train subset is the same for every seed of a training run


@dataclass(frozen=True)
class Split:
    """Texts of one split with their labels: int64 class numbers, or float32 for regression."""

    texts: list[str]
    pairs: list[str] | None
    labels: NDArray[Any]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    def encode(self, encoder: TextEncoder) -> DataSlice:
        """Return the split tokenised."""
        return DataSlice(encoder.encode(self.texts, self.pairs), self.labels)


@dataclass(frozen=True)
class Dataset:
    """A task's data: the label names by class number (empty for regression) and its splits by name."""

    task: Task
    labels: tuple[str, ...]
    splits: dict[str, Split]
    sha256: str

    @property
    def outputs(self) -> int:
        """Model outputs: the number of classes, or 1 for regression."""
        return len(self.labels) or 1


@dataclass(frozen=True)
class _Rows:
    """Raw rows of one split: where each came from, its texts, and its label as written."""

    where: list[str]
    texts: list[str]
    pairs: list[str] | None
    labels: list[str]


def load_data(
    path: str,
    *,
    task: str | None = None,
    sentence1: str | None = None,
    sentence2: str | None = None,
    label: str = "label",
    train_limit: int | None = None,
    splits: Sequence[str] = SPLITS,
    label_names: Sequence[str] | None = None,
) -> Dataset:
    """Load a data set.

    Args:
        path: "demo", "glue/<task>", or a folder.
        task: row of `TASKS`; None takes it from `path`, and "classification" for a folder.
        sentence1: name of the text column; None takes the task's.
        sentence2: name of the second text column, where there are pairs.
        label: name of the label column.
        train_limit: keep this many train rows, drawn with a fixed seed.
        splits: which of "train" and "dev" to read.
        label_names: class names in order, where a model fixes them; None takes the task's or the data's.

    Raises:
        DataError: a file, column, row or label is missing or malformed; the message names file and line.
        RecipeError: unknown task.
    """
    kind = find_task(path, task)
    columns: tuple[tuple[str, str | None], ...] = ((sentence1, sentence2),) if sentence1 else kind.columns
    if path == "demo":
        rows = {split: _demo(split) for split in splits}
    elif path.startswith("glue/"):
        rows = {split: _glue(path.removeprefix("glue/"), split, columns, label) for split in splits}
    else:
        rows = {split: _read_split(Path(path), split, columns, label) for split in splits}
    names: tuple[str, ...] = ()
    if kind.kind == "classification":
        names = tuple(label_names or kind.labels) or _sorted_names(rows[splits[0]].labels)
    digest = hashlib.sha256(json.dumps([kind.name, names, train_limit]).encode())
    loaded = {}
    for split in splits:
        raw = rows[split]
        labels = _numbers(raw) if kind.kind == "regression" else _classes(raw, names, known_from=splits[0])
        loaded[split] = Split(raw.texts, raw.pairs, labels)
        digest.update(json.dumps([split, raw.texts, raw.pairs, labels.tolist()]).encode())
    if train_limit is not None and "train" in loaded and train_limit < len(loaded["train"]):
        note(f"data: using {train_limit:,} of {len(loaded['train']):,} train rows (data.train_limit)")
        loaded["train"] = _subset(loaded["train"], train_limit)
    if names and len(names) < 2:
        raise DataError(f"{path}: every train row has the label {names[0]!r}; a classifier needs at least two classes.")
    return Dataset(kind, names, loaded, digest.hexdigest())


def find_task(path: str, task: str | None) -> Task:
    """Return the task of a data path.

    Raises:
        RecipeError: unknown task.
    """
    name = task or (path if path == "demo" else path.removeprefix("glue/") if path.startswith("glue/") else "")
    name = name or "classification"
    if name not in TASKS:
        raise RecipeError(f"unknown task {name!r}; known: {', '.join(TASKS)}.")
    return TASKS[name]


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


def calibration_rows(split: Split, *, rows: int) -> Split:
    """Return up to `rows` train rows for calibration, drawn with a fixed seed."""
    return split if rows >= len(split) else _subset(split, rows)


def _subset(split: Split, rows: int) -> Split:
    chosen = np.sort(np.random.default_rng(_SAMPLING_SEED).permutation(len(split))[:rows])
    pairs = None if split.pairs is None else [split.pairs[at] for at in chosen]
    return dataclasses.replace(
        split, texts=[split.texts[at] for at in chosen], pairs=pairs, labels=split.labels[chosen]
    )


def _demo(split: str) -> _Rows:
    rows = demo_rows("train" if split == "train" else "dev")
    where = [f"demo {split} row {at + 1}" for at in range(len(rows))]
    return _Rows(where, [text for text, _ in rows], None, [label for _, label in rows])


def _glue(name: str, split: str, columns: tuple[tuple[str, str | None], ...], label: str) -> _Rows:
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
    return _Rows(where, list(table[first]), list(table[second]) if second else None, named)


def _read_split(folder: Path, split: str, columns: tuple[tuple[str, str | None], ...], label: str) -> _Rows:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such data folder. data.path is a folder with train.* and dev.*, glue/<task>, or demo."
        )
    present = [folder / f"{split}.{suffix}" for suffix in SUFFIXES if (folder / f"{split}.{suffix}").is_file()]
    if len(present) != 1:
        found = ", ".join(path.name for path in present) or "none"
        raise DataError(f"{folder}: needs exactly one {split} file ({split}.{'|'.join(SUFFIXES)}), found {found}.")
    path = present[0]
    readers = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    found_columns, records = readers[path.suffix](path)
    first, second = _find_columns(found_columns, columns, label, where=str(path))
    if not records:
        raise DataError(f"{path}: holds no rows. Give it a header line and at least one row.")
    kept: list[tuple[str, ...]] = []
    for where, record in records:
        row = tuple(record.get(column) for column in (first, label, *([second] if second else [])))
        for column, value in zip((first, label, second), row, strict=False):
            # A text may be empty (QQP has such questions), a label not: it would become a class of its own.
            if value is None or value != value or (column == label and not str(value).strip()):
                raise DataError(f"{where}: nothing in column {column!r}.")
        kept.append(tuple("" if value is None else str(value) for value in row))
    return _Rows(
        [where for where, _ in records],
        [row[0] for row in kept],
        [row[2] for row in kept] if second else None,
        [row[1] for row in kept],
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


_Records = tuple[list[str], list[tuple[str, dict[str, Any]]]]


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}). Convert the file, e.g. with iconv -t UTF-8."
        ) from error


def _read_tsv(path: Path) -> _Records:
    lines = _read_text(path).split("\n")
    rows = ((number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1) if line.strip("\r"))
    return _table(path, rows)


def _read_csv(path: Path) -> _Records:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: not valid CSV ({error}).") from error

    return _table(path, rows())


def _table(path: Path, rows: Iterator[tuple[int, list[str]]]) -> _Records:
    _, header = next(rows, (0, None))
    if header is None:
        raise DataError(f"{path}: the file is empty. Give it a header line and at least one row.")
    records = []
    for number, row in rows:
        if len(row) != len(header):
            fewer = "too few" if len(row) < len(header) else "too many"
            raise DataError(f"{path} line {number}: {fewer} fields, found {len(row)}, the header has {len(header)}.")
        records.append((f"{path} line {number}", dict(zip(header, row, strict=True))))
    return header, records


def _read_jsonl(path: Path) -> _Records:
    columns: dict[str, None] = {}
    records = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number}: not valid JSON ({error.msg}).") from error
        if not isinstance(record, dict):
            raise DataError(f"{path} line {number}: each line is an object, found {type(record).__name__}.")
        columns |= dict.fromkeys(record)
        records.append((f"{path} line {number}", record))
    if not records:
        raise DataError(f'{path}: the file is empty. Each line is an object such as {{"sentence": …, "label": …}}.')
    return list(columns), records


def _read_parquet(path: Path) -> _Records:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing_extra("train", package="pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}).") from error
    return table.column_names, [(f"{path} row {at + 1}", row) for at, row in enumerate(table.to_pylist())]


def _sorted_names(labels: Sequence[str]) -> tuple[str, ...]:
    names = set(labels)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def _classes(rows: _Rows, names: tuple[str, ...], *, known_from: str) -> NDArray[np.int64]:
    """Return class numbers; a label may be written as its name or, where no name is a number, as its number."""
    numbers = {name: at for at, name in enumerate(names)}
    if not any(name.isdigit() for name in names):
        numbers |= {str(at): at for at in range(len(names))}
    classes = np.empty(len(rows.labels), dtype=np.int64)
    for at, name in enumerate(rows.labels):
        if name not in numbers:
            raise DataError(
                f"{rows.where[at]}: unknown label {name!r}; known from the {known_from} split or the task: "
                f"{', '.join(names[:20])}{', …' if len(names) > 20 else ''}."
            )
        classes[at] = numbers[name]
    return classes


def _numbers(rows: _Rows) -> NDArray[np.float32]:
    numbers = np.empty(len(rows.labels), dtype=np.float32)
    for at, text in enumerate(rows.labels):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{rows.where[at]}: the label {text!r} is not a finite number, as regression needs.")
        numbers[at] = value
    return numbers
