"""The measurements arranged for comparison: every model's row, the cells compared, and the report's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bertemd_deploy.report.records import Cell, Record, Variant, count, length_label
from bertemd_deploy.report.text import (
    dig,
    number,
    ratio,
)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than a baseline, with its 95% interval; `claimed` False holds a speed-up back."""

    value: float
    low: float
    high: float
    claimed: bool = True

    @classmethod
    def of(cls, measurement: Any) -> Ratio | None:
        """Return a measurement's speed-up over the teacher, or None where it or its interval was not measured."""
        found = dig(measurement, "speedup_vs_teacher")
        value, interval = number(dig(found, "p50")), dig(found, "ci95")
        low, high = map(number, interval) if isinstance(interval, list) and len(interval) == 2 else (None, None)
        if value is None or low is None or high is None or min(value, low) <= 0:
            return None
        return cls(value, low, high, dig(found, "claimed") is not False)

    @property
    def outcome(self) -> Literal["faster", "slower", "same"]:
        """What the interval lets one say; "same" where it covers 1 or the benchmark claims nothing."""
        if self.low > 1 and self.claimed:
            return "faster"
        return "slower" if self.high < 1 else "same"

    @property
    def held_back(self) -> bool:
        """Whether the interval lies above 1 and yet the benchmark claims nothing."""
        return self.low > 1 and not self.claimed

    @property
    def inverse(self) -> Ratio:
        """The same fact seen from the other side: how many times slower."""
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)

    @property
    def interval(self) -> str:
        """The interval in words."""
        return f"{ratio(self.low)} to {ratio(self.high)}"


@dataclass(frozen=True)
class Row:
    """One model's numbers in the cells the page compares; None for what was not measured."""

    variant: Variant
    metrics: dict[str, float | None]
    retention: float | None
    p50_ms: float | None
    p95_ms: float | None
    end_to_end_ms: float | None
    speedup: Ratio | None
    throughput_per_s: float | None
    cold_start_ms: float | None
    peak_rss_bytes: float | None
    model_bytes: float | None
    agreement: float | None


@dataclass(frozen=True)
class Comparison:
    """All models of one device: rows, and the cells their latency and throughput come from."""

    record: Record
    cell: Cell | None
    batch_cell: Cell | None
    rows: list[Row]

    def row(self, variant: Variant | None) -> Row | None:
        """Return a variant's row, or None."""
        return next((row for row in self.rows if row.variant == variant), None)

    @property
    def teacher(self) -> Row | None:
        """The teacher's row, or None where it was not measured."""
        return self.row(self.record.teacher)

    @property
    def disturbed(self) -> bool:
        """Whether the benchmark held back speed-ups in the compared cell, since other programs took CPU time there."""
        entries = [entry for (_, cell), entry in self.record.cells.items() if cell == self.cell]
        held_back = (gain for gain in map(Ratio.of, entries) if gain is not None and gain.held_back)
        return any(entry.get("disturbed") is True for entry in entries) or any(held_back)

    @property
    def student(self) -> Row | None:
        """The row of the student graph that is used unless another is asked for."""
        return self.row(self.record.default)

    def graph(self, name: str) -> Row | None:
        """Return the row of a student graph by its name."""
        return next((row for row in self.rows if not row.variant.is_teacher and row.variant.graph == name), None)


def compare(record: Record) -> Comparison:
    """Return every model of a record side by side, latency at the smallest batch and throughput at batch 8."""
    sizes = record.batches
    cell = record.cell(batch=sizes[0]) if sizes else None
    batch_cell = record.cell(batch=8 if 8 in sizes else sizes[-1]) if len(sizes) > 1 else None
    return Comparison(record, cell, batch_cell, [_row(record, item, cell, batch_cell) for item in record.variants])


def _row(record: Record, variant: Variant, cell: Cell | None, batch_cell: Cell | None) -> Row:
    metrics = {name: record.metric(variant, name) for name in record.metric_names}
    cold = [number(record.fact(variant, "cold_start_ms", part)) for part in ("import", "load", "first")]
    known = [part for part in cold if part is not None]
    entry = record.cells.get((variant, cell)) if cell else None
    batched = record.cells.get((variant, batch_cell)) if batch_cell else None
    return Row(
        variant,
        metrics,
        _retention(record, metrics),
        number(dig(entry, "latency_ms", "p50")),
        number(dig(entry, "latency_ms", "p95")),
        number(dig(entry, "end_to_end_ms", "p50")),
        Ratio.of(entry),
        number(dig(batched, "throughput_per_s")),
        sum(known) if len(known) == len(cold) else None,
        number(record.fact(variant, "peak_rss_bytes")),
        number(record.fact(variant, "model_bytes")),
        number(record.fact(variant, "agreement_with_teacher")),
    )


def _retention(record: Record, metrics: Mapping[str, float | None]) -> float | None:
    """Share of the teacher's gating metric; a teacher at or below 0 leaves nothing to keep a share of."""
    teacher = record.teacher
    if teacher is None or not record.metric_names:
        return None
    reference, own = record.metric(teacher, record.metric_names[0]), metrics[record.metric_names[0]]
    return None if own is None or reference is None or reference <= 0 else own / reference


def speed_conditions(comparison: Comparison) -> str:
    """Return where the table's latency and throughput were taken, for its caption."""
    if comparison.cell is None:
        return "No latency was measured."
    cell, batched = comparison.cell, comparison.batch_cell
    text = f"Latency at {cell.label}."
    if batched:
        text += f" Throughput at batch {batched.batch}, {length_label(batched.sequence)}, "
        text += f"{count(batched.threads, 'thread')}."
    return text


@dataclass(frozen=True)
class Head:
    """What stands at the top of the report."""

    title: str
    subtitle: str


def head(records: Sequence[Record]) -> Head:
    """Return title and subtitle of a report on `records`, which are of one artifact."""
    artifact = records[0].artifact
    task, teacher = dig(artifact, "task", "name"), dig(artifact, "teacher", "name")
    layers, hidden, parameters = (number(dig(artifact, "student", key)) for key in ("layers", "hidden", "parameters"))
    facts = [
        count(int(layers), "layer") if layers else "",
        f"width {int(hidden)}" if hidden else "",
        (f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,.0f}") + " parameters"
        if parameters
        else "",
    ]
    said = [f"Student of {', '.join(fact for fact in facts if fact)}" if any(facts) else "One student"]
    if teacher:
        said.append(f"taught by {teacher}")
    started = min((str(record.raw["started"]) for record in records if record.raw.get("started")), default=None)
    if started:
        said.append(f"measured {started[:10]}")
    if len(records) > 1:
        said.append(f"on {len(records)} devices")
    title = f"{int(layers)}-layer student" if layers else "Student"
    if any(record.teacher for record in records):
        title += " beside its teacher"
    return Head(f"{task}: {title}" if task else title, ", ".join(said) + ".")
