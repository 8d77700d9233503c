"""The files of a data folder, read into records: tsv without quoting, csv, jsonl, parquet, CoNLL text, SQuAD json.

A record is a column's value by its name, with the place it came from (file and line, or row) for messages. What the
values mean is not decided here.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertemd_deploy.errors import DataError, missing_extra
from bertemd_deploy.tasks import Kind

_CONLLU = 10  # columns
TABLES = ("tsv", "csv", "jsonl", "parquet")
SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "classification": TABLES,
    "regression": TABLES,
    "multilabel": TABLES,
    "token-classification": ("jsonl", "parquet", "conll", "txt"),
    "question-answering": ("jsonl", "parquet", "json"),
}


@dataclass(frozen=True)
class Records:
    """One file's rows.

    Attributes:
        columns: column names, in the file's order.
        rows: where each row came from, and its values by column.
        names: class names by number of columns that carry them (parquet written by the `datasets` library).
    """

    columns: list[str]
    rows: list[tuple[str, dict[str, Any]]]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_records(folder: Path, split: str, *, kind: Kind, columns: tuple[str, str, str]) -> tuple[Path, Records]:
    """Read the one file of a split.

    Args:
        folder: holds `<split>.<suffix>`.
        split: "train" or "dev".
        kind: of the task; decides which formats there are.
        columns: names that a format without columns (CoNLL, SQuAD json) gives its first text, second text and label.

    Returns:
        The file and its rows.

    Raises:
        DataError: no folder, not exactly one file, or a malformed one; the message names file and line.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such data folder. data.path is a folder with train.* and dev.*, glue/<task>, or demo."
        )
    suffixes = SUFFIXES[kind]
    present = [folder / f"{split}.{suffix}" for suffix in suffixes if (folder / f"{split}.{suffix}").is_file()]
    if len(present) != 1:
        found = ", ".join(path.name for path in present) or "none"
        raise DataError(f"{folder}: needs exactly one {split} file ({split}.{'|'.join(suffixes)}), found {found}.")
    path = present[0]
    readers: Mapping[str, Callable[[Path], Records]] = {
        ".tsv": _read_tsv,
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
        ".conll": lambda path: _read_conll(path, columns),
        ".txt": lambda path: _read_conll(path, columns),
        ".json": lambda path: _read_squad(path, columns),
    }
    records = readers[path.suffix](path)
    return path, records


def read_names(folder: Path) -> tuple[str, ...]:
    """Return the label names in `labels.txt`, one a line in the order of their numbers; none without the file.

    Raises:
        DataError: not UTF-8, or a name stands twice.
    """
    path = folder / "labels.txt"
    if not path.is_file():
        return ()
    names = tuple(line.strip() for line in _lines(path) if line.strip())
    for at, name in enumerate(names):
        if name in names[:at]:
            raise DataError(f"{path}: the label {name!r} is there twice. Give each label one line.")
    return names


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text, without a byte order mark.

    Raises:
        DataError: not UTF-8; the message names the line.
    """
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: not UTF-8 (byte 0x{raw[error.start]:02x}). Convert the file, e.g. with iconv -t UTF-8."
        ) from error


def _lines(path: Path) -> list[str]:
    """Return a text file's lines; those of Windows keep their carriage return.

    Raises:
        DataError: not UTF-8, or its lines end in a carriage return alone.
    """
    text = read_text(path)
    if "\r" in text and "\n" not in text:
        raise DataError(
            f"{path}: its lines end in a carriage return alone, as on old Macs; lines should end in a line feed. Convert the "
            "file, e.g. with: tr '\\r' '\\n'"
        )
    return text.split("\n")


def _read_tsv(path: Path) -> Records:
    lines = _lines(path)
    rows = ((number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1) if line.strip("\r"))
    return _table(path, rows)


def _read_csv(path: Path) -> Records:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: not valid CSV ({error}).") from error

    return _table(path, rows())


def _table(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Records:
    _, header = next(rows, (0, None))
    if header is None:
        raise DataError(f"{path}: the file is empty. Give it a header line and at least one row.")
    records = []
    for number, row in rows:
        if len(row) != len(header):
            fewer = "too few" if len(row) < len(header) else "too many"
            raise DataError(f"{path} line {number}: {fewer} fields, found {len(row)}, the header has {len(header)}.")
        records.append((f"{path} line {number}", dict(zip(header, row, strict=True))))
    if not records:
        raise DataError(f"{path}: holds no rows. Give it a header line and at least one row.")
    return Records(header, records)


def _read_jsonl(path: Path) -> Records:
    columns: dict[str, None] = {}
    records = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        record = _json(line, where=f"{path} line {number}")
        if not isinstance(record, dict):
            raise DataError(f"{path} line {number}: each line is an object, found {type(record).__name__}.")
        columns |= dict.fromkeys(record)
        records.append((f"{path} line {number}", record))
    if not records:
        raise DataError(f'{path}: the file is empty. Each line is an object such as {{"sentence": …, "label": …}}.')
    return Records(list(columns), records)


def _json(text: str, *, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}).") from error
    except RecursionError as error:
        raise DataError(f"{where}: not valid JSON (nested too deep).") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise DataError(f"{where}: holds a number of thousands of digits. Shorten it, or write it as text.") from error


def _read_parquet(path: Path) -> Records:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing_extra("train", package="pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(path)
        rows = [(f"{path} row {at + 1}", row) for at, row in enumerate(table.to_pylist())]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}).") from error
    if not rows:
        raise DataError(f"{path}: holds no rows. Give it at least one row.")
    return Records(table.column_names, rows, _parquet_names(table.schema.metadata or {}))


def _parquet_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Return the class names that the `datasets` library keeps in a parquet file's metadata, by column."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        inner = {name: feature.get("feature", feature) for name, feature in features.items()}
        return {name: tuple(map(str, feature["names"])) for name, feature in inner.items() if "names" in feature}
    except (ValueError, KeyError, TypeError, AttributeError):  # other people's metadata says nothing
        return {}


def _read_conll(path: Path, columns: tuple[str, str, str]) -> Records:
    """Read one token a line, its tag behind it, and a blank line between sentences.

    Fields are parted by a tab where the line has one, else by blanks; the first is the token, the last the tag.
    Lines of -DOCSTART- are left out. Comments and CoNLL-U are refused by name: a line such as "# O" may be a token.
    """
    first, _, label = columns
    rows: list[tuple[str, dict[str, Any]]] = []
    open_row: dict[str, list[str]] | None = None
    lines = [line.removesuffix("\r") for line in _lines(path)]
    _check_conll(path, lines)
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            open_row = None
            continue
        fields = _fields(line)
        if len(fields) < 2 or not fields[0] or not fields[-1]:
            raise DataError(
                f"{path} line {number}: needs a token and its tag, found {line.strip()!r}. "
                "A blank line stands between sentences."
            )
        if open_row is None:
            open_row = {first: [], label: []}
            rows.append((f"{path} line {number}", open_row))
        open_row[first].append(fields[0])
        open_row[label].append(fields[-1])
    if not rows:
        raise DataError(f"{path}: the file is empty. Each line is a token and its tag, such as: Paris B-LOC")
    return Records([first, label], rows)


def _fields(line: str) -> list[str]:
    return [part.strip() for part in line.split("\t")] if "\t" in line else line.split()


def _check_conll(path: Path, lines: list[str]) -> None:
    """Refuse CoNLL-U, whose first field is no token and whose last is no tag, and comments, which would be tokens."""
    counts = Counter(len(_fields(line)) for line in lines if line.strip() and not line.startswith("#"))
    usual = counts.most_common(1)[0][0] if counts else 0
    for number, line in enumerate(lines, 1):
        fields = _fields(line)
        if len(fields) == _CONLLU and "\t" in line and re.fullmatch(r"[0-9]+([-.][0-9]+)?", fields[0]):
            raise DataError(
                f"{path} line {number}: this is CoNLL-U ({_CONLLU} columns, numbered tokens). Needed are the token first and "
                "its tag last; for the parts of speech: grep -v '^#' FILE | cut -f 2,4"
            )
    for number, line in enumerate(lines, 1):
        if line.startswith("#") and (re.match(r"#\s*\S+\s*=\s", line) or (usual and len(_fields(line)) != usual)):
            raise DataError(
                f"{path} line {number}: {line.strip()[:60]!r} looks like a comment, which would be read as a token and its "
                "tag. Remove such lines, e.g. with: grep -v '^# '"
            )


def _read_squad(path: Path, columns: tuple[str, str, str]) -> Records:
    """Read the nested file of SQuAD 1.1 and 2.0."""
    question, context, label = columns
    content = _json(read_text(path), where=str(path))
    rows: list[tuple[str, dict[str, Any]]] = []
    for at, article in enumerate(_list(content, "data", where=str(path))):
        where = f"{path} data[{at}]"
        for within, paragraph in enumerate(_list(article, "paragraphs", where=where)):
            place = f"{where}.paragraphs[{within}]"
            for number, asked in enumerate(_list(paragraph, "qas", where=place)):
                name = f"{place}.qas[{number}]"
                answers = _list(asked, "answers", where=name)
                if not all(isinstance(answer, dict) for answer in answers):
                    raise DataError(f"{name}: each of its answers is an object with text and answer_start.")
                if asked.get("is_impossible") is True and answers:
                    raise DataError(f"{name}: is_impossible is true, yet it has answers. Remove one of the two.")
                both = {key: [answer.get(key) for answer in answers] for key in ("text", "answer_start")}
                values = {"id": asked.get("id"), question: asked.get("question"), context: paragraph.get("context")}
                rows.append((name, values | {label: both}))
    if not rows:
        raise DataError(f"{path}: holds no questions (data[].paragraphs[].qas[]).")
    return Records(["id", question, context, label], rows)


def _list(value: Any, key: str, *, where: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{where}: needs the list {key!r} of a SQuAD file (data, paragraphs, qas, answers).")
    return found
