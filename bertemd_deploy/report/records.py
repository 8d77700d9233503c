"""Bench records in: read, checked, and asked for one model's numbers in one cell.

A record comes from another machine and is data from outside: every lookup here tolerates an absent or null value
(answering None) and refuses only what would make the page wrong, such as two different students in one table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from bertemd_deploy.artifact import FASTEST_FIRST, GRAPH_PRECISION, GRAPHS
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.files import read_json
from bertemd_deploy.report.text import dig, number

SCHEMA_VERSION = 1
REPLAY = "replay"
_BACKENDS = {"pytorch": "PyTorch", "onnxruntime": "ONNX Runtime"}


class Variant(NamedTuple):
    """One thing that was measured: whose model, on which backend, which graph."""

    model: str
    backend: str
    graph: str | None

    @property
    def is_teacher(self) -> bool:
        """Whether this is the teacher."""
        return self.model == "teacher"

    @property
    def precision(self) -> str:
        """Number format of the weights: fp32 or int8."""
        return GRAPH_PRECISION.get(self.graph or "fp32", self.graph or "fp32")

    @property
    def runtime(self) -> str:
        """The backend's own name."""
        return _BACKENDS.get(self.backend, self.backend)

    @property
    def label(self) -> str:
        """Name for tables and legends, such as "Student int8, fused"."""
        if self.is_teacher:
            return f"Teacher, {self.runtime}"
        name = f"Student {self.precision}" + (", fused" if (self.graph or "").startswith("fused") else "")
        return name if self.backend == "onnxruntime" else f"{name}, {self.runtime}"


class Cell(NamedTuple):
    """The conditions of one measurement; `sequence` in tokens, or "replay" for the dev set's real lengths."""

    batch: int
    sequence: int | str
    threads: int

    @property
    def label(self) -> str:
        """Conditions in words."""
        return f"batch {self.batch}, {length_label(self.sequence)}, {count(self.threads, 'thread')}"


def length_label(sequence: int | str) -> str:
    """Return a sequence length in words."""
    return "replay of real lengths" if sequence == REPLAY else f"{sequence} tokens"


def count(amount: int, noun: str) -> str:
    """Return an amount with its noun in the singular or plural."""
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


@dataclass(frozen=True)
class Record:
    """One device's bench record, as read, with the name it goes by on the page."""

    raw: dict[str, Any]
    name: str

    @property
    def device(self) -> Mapping[str, Any]:
        """Facts of the machine."""
        return dict(self.raw["device"])

    @property
    def artifact(self) -> Mapping[str, Any]:
        """What the record carries of the artifact's manifest."""
        return dict(self.raw["artifact"])

    @property
    def metric_names(self) -> list[str]:
        """The task's metrics, the gating one first."""
        names = dig(self.artifact, "task", "metrics")
        return [str(name) for name in names] if isinstance(names, list) else []

    @cached_property
    def cells(self) -> dict[tuple[Variant, Cell], dict[str, Any]]:
        """Every measurement by what was measured and under which conditions."""
        return {(_variant(entry), _cell(entry)): entry for entry in self.raw["measurements"]}

    @cached_property
    def variants(self) -> list[Variant]:
        """Everything measured or evaluated: teacher first (in PyTorch first), then the student's graphs in order."""
        found = {variant for variant, _ in self.cells} | {_variant(entry) for entry in self._models()}
        graphs = list(GRAPHS)
        place = {graph: position for position, graph in enumerate(graphs)}
        return sorted(
            found,
            key=lambda item: (
                not item.is_teacher,
                item.backend != "pytorch",
                place.get(item.graph or "fp32", len(graphs)),
                *map(str, item),
            ),
        )

    @property
    def teacher(self) -> Variant | None:
        """The teacher that speed-ups are against: in PyTorch where it was, or None where the record has no teacher."""
        return next((variant for variant in self.variants if variant.is_teacher), None)

    @property
    def default(self) -> Variant | None:
        """The student graph a user gets who asks for none: the first measured of `artifact.FASTEST_FIRST`."""
        students = [variant for variant, _ in self.cells if not variant.is_teacher]
        return next((item for graph in FASTEST_FIRST for item in students if item.graph == graph), None) or next(
            iter(students), None
        )

    def _models(self) -> Iterator[dict[str, Any]]:
        models = self.raw.get("models")
        yield from (entry for entry in models if isinstance(entry, dict)) if isinstance(models, list) else ()

    def fact(self, variant: Variant, *keys: str) -> Any:
        """Return a fact that holds for a variant in every cell (size, cold start, peak RSS), or None."""
        entries = [entry for entry in self._models() if _variant(entry) == variant]
        entries += [entry for (measured, _), entry in self.cells.items() if measured == variant]
        return next((value for entry in entries if (value := dig(entry, *keys)) is not None), None)

    def metric(self, variant: Variant, name: str) -> float | None:
        """Return a task metric of a variant, measured on this device, or None."""
        measured = number(self.fact(variant, "metrics", name))
        if measured is None and name in self.metric_names[:1]:
            measured = number(self.fact(variant, "metric"))
        return measured

    def latency(self, variant: Variant, cell: Cell, statistic: str = "p50") -> float | None:
        """Return a statistic of a variant's latency in one cell, in ms, or None."""
        return number(dig(self.cells.get((variant, cell)), "latency_ms", statistic))

    def cell(self, *, batch: int) -> Cell | None:
        """Return the cell to compare models in at one batch size, or None where the student was not measured there.

        The replay of real lengths comes first, else the length nearest to 32 tokens; then the most threads. Cells that
        teacher and student share are preferred.
        """
        teacher, student = self.teacher, self.default
        shared = [
            cell
            for variant, cell in self.cells
            if variant == student and cell.batch == batch and self.latency(variant, cell) is not None
        ]
        if teacher is not None:
            shared = [cell for cell in shared if self.latency(teacher, cell) is not None] or shared

        def preference(cell: Cell) -> tuple[bool, float, int]:
            distance = 0.0 if isinstance(cell.sequence, str) else abs(cell.sequence - 32)
            return cell.sequence != REPLAY, distance, -cell.threads

        return min(shared, key=preference, default=None)

    @property
    def batches(self) -> list[int]:
        """Batch sizes measured, ascending."""
        return sorted({cell.batch for _, cell in self.cells})


def _variant(entry: Mapping[str, Any]) -> Variant:
    graph = entry.get("graph")
    return Variant(str(entry.get("model")), str(entry.get("backend")), None if graph is None else str(graph))


def _cell(entry: Mapping[str, Any]) -> Cell:
    sequence = entry["sequence"]
    cell = Cell(entry["batch"], sequence, entry["threads"])
    for value in (cell.batch, cell.threads, *([] if sequence == REPLAY else [sequence])):
        if type(value) is not int or value < 1:
            raise ValueError(f"found {value!r}")
    return cell


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Return the records in `paths`, in that order, each with a name of its own.

    Raises:
        ArtifactError: no path; a file that is no bench record of this schema version; or records of different
            artifacts, whose numbers must not share a table.
    """
    if not paths:
        raise ArtifactError("no bench record was given. Name at least one record.json, as `bertemd bench` writes it.")
    raws = [_read(path) for path in paths]
    for path, raw in zip(paths, raws, strict=True):
        _same_artifact(raws[0], raw, first=paths[0], other=path)
    names: dict[str, int] = {}
    records = []
    for raw in raws:
        name = str(raw["device"].get("name") or "unnamed device")
        names[name] = names.get(name, 0) + 1
        records.append(Record(raw, name if names[name] == 1 else f"{name} ({names[name]})"))
    return records


def _read(path: Path) -> dict[str, Any]:
    raw = read_json(path, what="bench record")
    found = raw.get("schema_version")
    if found != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema_version is {found!r}, this bertemd reads {SCHEMA_VERSION}. "
            "Run `bertemd bench` again with this version, or report with the version that wrote it."
        )
    for key, kind in (("device", dict), ("artifact", dict), ("measurements", list)):
        if not isinstance(raw.get(key), kind):
            raise ArtifactError(
                f"{path}: {key!r} should be a {kind.__name__}, found {type(raw.get(key)).__name__}; "
                "this is no bench record. Name the record.json that `bertemd bench` wrote."
            )
    seen: set[tuple[Variant, Cell]] = set()
    for place, entry in enumerate(raw["measurements"]):
        try:
            found_at = (_variant(entry), _cell(entry))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f'{path}: measurements[{place}] needs whole numbers above 0 for batch, sequence (or "replay") and '
                f"threads ({error!r}). Run `bertemd bench` again."
            ) from None
        if found_at in seen:
            raise ArtifactError(
                f"{path}: measurements[{place}] measures {found_at[0].label}, {found_at[1].label} once more; "
                "one record holds each cell once. Run `bertemd bench` again."
            )
        seen.add(found_at)
    return raw


def _same_artifact(left: Mapping[str, Any], right: Mapping[str, Any], *, first: Path, other: Path) -> None:
    for keys in (("task",), ("labels",), ("student",), ("teacher",)):
        mine, theirs = dig(left, "artifact", *keys), dig(right, "artifact", *keys)
        if mine != theirs:
            raise ArtifactError(
                f"{other}: its {keys[0]} is {_short(theirs)}, that of {first} is {_short(mine)}. One report holds one "
                "artifact on one or more devices; report the others into folders of their own."
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= 160 else text[:159] + "…"
