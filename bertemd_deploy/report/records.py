"""One bench record, asked for one model's numbers in one cell.

A record comes from another machine and is data from outside: every lookup here tolerates an absent or null value
(answering None). What cannot be tolerated, `reading` refuses before a `Record` is made.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from bertemd_deploy.artifact import FASTEST_FIRST, GRAPH_PRECISION, GRAPHS
from bertemd_deploy.report.text import dig, number

REPLAY = "replay"
ESTIMATED = "estimated"
KINDS = ("measured", "constrained", "remote", ESTIMATED)
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

    @property
    def key(self) -> str:
        """The label as an identifier for the page: lower-case letters, digits and dashes."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")


class Cell(NamedTuple):
    """The conditions of one measurement; `sequence` in tokens, or "replay" for the dev set's real lengths."""

    batch: int
    sequence: int | str
    threads: int

    @property
    def label(self) -> str:
        """Conditions in words."""
        return f"batch {self.batch}, {length_label(self.sequence)}, {count(self.threads, 'thread')}"


class Span(NamedTuple):
    """The interval around a number."""

    low: float
    high: float

    @classmethod
    def of(cls, bounds: Any) -> Span | None:
        """Return [low, high] as an interval, or None for anything else."""
        low, high = map(number, bounds) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
        return None if low is None or high is None or low > high else cls(low, high)


class Failure(NamedTuple):
    """Why a model was not measured: the reason, and the limit and peak in bytes where memory was it."""

    reason: str
    limit_bytes: float | None
    peak_bytes: float | None


def length_label(sequence: int | str) -> str:
    """Return a sequence length in words."""
    return "replay of real lengths" if sequence == REPLAY else f"{sequence} tokens"


def count(amount: int, noun: str) -> str:
    """Return an amount with its noun in the singular or plural."""
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


@dataclass(frozen=True)
class Record:
    """One student's bench record of one device, as read, with the name it goes by on the page.

    Attributes:
        raw: the record.
        name: of the device, and of the student where there are several; no other record of the page has it.
        student: what tells this student from the others on the page; empty where it is the only one.
    """

    raw: Mapping[str, Any]
    name: str
    student: str = ""

    @property
    def device(self) -> Mapping[str, Any]:
        """Facts of the machine."""
        return dict(self.raw["device"])

    @property
    def kind(self) -> str:
        """How its numbers were got: measured, constrained, remote or estimated."""
        return str(self.device.get("kind") or "measured")

    @property
    def estimated(self) -> bool:
        """Whether its times are estimates."""
        return self.kind == ESTIMATED

    @property
    def title(self) -> str:
        """Its name with how its numbers were got."""
        return f"{self.name} ({self.kind})"

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
        return {(variant_of(entry), cell_of(entry)): entry for entry in self.raw["measurements"]}

    @cached_property
    def variants(self) -> list[Variant]:
        """Everything measured or evaluated: teacher first (in PyTorch first), then the student's graphs in order."""
        found = {variant for variant, _ in self.cells} | {variant_of(entry) for entry in self._models()}
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

    @cached_property
    def failures(self) -> dict[Variant, Failure]:
        """Models that could not be measured, and why."""
        return {
            variant_of(entry): Failure(
                str(failed.get("reason") or "unknown"),
                number(failed.get("limit_bytes")),
                number(failed.get("peak_bytes")),
            )
            for entry in self._models()
            if isinstance(failed := entry.get("failed"), Mapping)
        }

    @cached_property
    def teacher(self) -> Variant | None:
        """The teacher that speed-ups are against, or None where no teacher was measured.

        That is the record's `baseline`, else the first teacher that did not fail.
        """
        named = [variant_of(entry) for entry in self._models() if entry.get("name") == self.raw.get("baseline")]
        teachers = [variant for variant in (*named, *self.variants) if variant.is_teacher]
        return next((variant for variant in teachers if variant not in self.failures), None)

    @property
    def default(self) -> Variant | None:
        """The student graph a user gets who asks for none: the first measured of `artifact.FASTEST_FIRST`."""
        students = [variant for variant, _ in self.cells if not variant.is_teacher]
        return next((item for graph in FASTEST_FIRST for item in students if item.graph == graph), None) or next(
            iter(students), None
        )

    def _models(self) -> Iterator[Mapping[str, Any]]:
        models = self.raw.get("models")
        yield from (entry for entry in models if isinstance(entry, Mapping)) if isinstance(models, list) else ()

    def fact(self, variant: Variant, *keys: str) -> Any:
        """Return a fact that holds for a variant in every cell (size, cold start, peak RSS), or None."""
        entries = [entry for entry in self._models() if variant_of(entry) == variant]
        entries += [entry for (measured, _), entry in self.cells.items() if measured == variant]
        return next((value for entry in entries if (value := dig(entry, *keys)) is not None), None)

    def metric(self, variant: Variant, name: str) -> float | None:
        """Return a task metric of a variant, measured on this device, or None."""
        measured = number(self.fact(variant, "metrics", name))
        if measured is None and name in self.metric_names[:1]:
            measured = number(self.fact(variant, "metric"))
        return measured

    def latency(self, variant: Variant, cell: Cell | None, statistic: str = "p50") -> float | None:
        """Return a statistic of a variant's latency in one cell, in ms, or None."""
        return number(dig(self._entry(variant, cell), "latency_ms", statistic))

    def interval(self, variant: Variant, cell: Cell | None, statistic: str = "p50") -> Span | None:
        """Return the interval of a statistic of the latency, in ms: a 95% one, or an estimate's; None where there is none."""
        entry = self._entry(variant, cell)
        if self.estimated:
            return (
                Span.of([dig(entry, "estimate_ms", "low"), dig(entry, "estimate_ms", "high")])
                if statistic == "p50"
                else None
            )
        return Span.of(dig(entry, "latency_ms", f"{statistic}_ci95"))

    def _entry(self, variant: Variant, cell: Cell | None) -> dict[str, Any] | None:
        return None if cell is None else self.cells.get((variant, cell))

    def cell(self, *, batch: int, among: Collection[Cell] | None = None) -> Cell | None:
        """Return the cell to compare models in at one batch size, or None where the student was not measured there.

        The replay of real lengths comes first, else the length nearest to 32 tokens; then the most threads. Cells that
        teacher and student share are preferred. `among` leaves out all others.
        """
        teacher, student = self.teacher, self.default
        shared = [
            cell
            for variant, cell in self.cells
            if variant == student and cell.batch == batch and self.latency(variant, cell) is not None
            if among is None or cell in among
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


def variant_of(entry: Mapping[str, Any]) -> Variant:
    """Return what an entry of `models` or `measurements` is about."""
    graph = entry.get("graph")
    return Variant(str(entry.get("model")), str(entry.get("backend")), None if graph is None else str(graph))


def cell_of(entry: Mapping[str, Any]) -> Cell:
    """Return the conditions of a measurement.

    Raises:
        KeyError, ValueError: they are absent, or no whole numbers above 0.
    """
    sequence = entry["sequence"]
    cell = Cell(entry["batch"], sequence, entry["threads"])
    for value in (cell.batch, cell.threads, *([] if sequence == REPLAY else [sequence])):
        if type(value) is not int or value < 1:
            raise ValueError(f"found {value!r}")
    return cell
