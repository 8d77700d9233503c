"""The measurements arranged for comparison: every model's row, the cells compared, and the report's head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bertemd_deploy.report.records import KINDS, Cell, Failure, Record, Span, Variant, count, length_label
from bertemd_deploy.report.text import dig, joined, number, ratio


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
    """One model's numbers in the cells the page compares; None for what was not measured.

    Of an estimate only numbers with an interval are here.

    Attributes:
        variant: which model.
        metrics: the task's metrics by name.
        retention: share of the teacher's first metric.
        p50_ms, p95_ms: latency.
        p50_interval, p95_interval: theirs: 95% ones, or an estimate's own.
        end_to_end_ms: from text to decision, median.
        speedup: over the teacher.
        throughput_per_s: examples, at the larger batch.
        cold_start_ms: from the start of a process to its first answer where that was measured, else the sum of its parts.
        peak_rss_bytes: of the process; of an estimate, what is expected.
        peak_rss_interval: an estimate's.
        model_bytes: of the model's file.
        agreement: share of decisions that are the teacher's.
        energy_joules: of one call.
        failed: why nothing was measured, where that is so.
    """

    variant: Variant
    metrics: dict[str, float | None]
    retention: float | None
    p50_ms: float | None
    p50_interval: Span | None
    p95_ms: float | None
    p95_interval: Span | None
    end_to_end_ms: float | None
    speedup: Ratio | None
    throughput_per_s: float | None
    cold_start_ms: float | None
    peak_rss_bytes: float | None
    peak_rss_interval: Span | None
    model_bytes: float | None
    agreement: float | None
    energy_joules: float | None
    failed: Failure | None


@dataclass(frozen=True)
class Comparison:
    """All models of one record: rows, and the cells their latency and throughput come from."""

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
        if self.record.estimated:
            return False
        held_back = (gain for gain in map(Ratio.of, entries) if gain is not None and gain.held_back)
        return any(entry.get("disturbed") is True for entry in entries) or any(held_back)

    @property
    def student(self) -> Row | None:
        """The row of the student graph that is used unless another is asked for."""
        return self.row(self.record.default)

    def graph(self, name: str) -> Row | None:
        """Return the row of a student graph by its name."""
        return next((row for row in self.rows if not row.variant.is_teacher and row.variant.graph == name), None)


def compare(record: Record, *, among: Collection[Cell] | None = None) -> Comparison:
    """Return every model of a record side by side, latency at the smallest batch and throughput at batch 8.

    Args:
        record: the record.
        among: the cells that may be compared in; None takes any.
    """
    sizes = [size for size in record.batches if among is None or size in {cell.batch for cell in among}]
    cell = record.cell(batch=sizes[0], among=among) if sizes else None
    batch_cell = record.cell(batch=8 if 8 in sizes else sizes[-1], among=among) if len(sizes) > 1 else None
    return Comparison(record, cell, batch_cell, [_row(record, item, cell, batch_cell) for item in record.variants])


def _row(record: Record, variant: Variant, cell: Cell | None, batch_cell: Cell | None) -> Row:
    metrics = {name: record.metric(variant, name) for name in record.metric_names}
    entry = record.cells.get((variant, cell)) if cell else None
    batched = record.cells.get((variant, batch_cell)) if batch_cell else None
    memory, memory_interval = _memory(record, variant)
    return Row(
        variant,
        metrics,
        _retention(record, metrics),
        record.latency(variant, cell),
        record.interval(variant, cell),
        record.latency(variant, cell, "p95"),
        record.interval(variant, cell, "p95"),
        number(dig(entry, "end_to_end_ms", "p50")),
        Ratio.of(entry),
        None if record.estimated else number(dig(batched, "throughput_per_s")),
        None if record.estimated else cold_start(record, variant),
        memory,
        memory_interval,
        number(record.fact(variant, "model_bytes")),
        number(record.fact(variant, "agreement_with_teacher")),
        None if record.estimated else number(dig(entry, "energy_joules_per_inference", "value")),
        record.failures.get(variant),
    )


def cold_start(record: Record, variant: Variant) -> float | None:
    """Return the time from nothing to a model's first answer, in ms."""
    whole = number(record.fact(variant, "cold_start_ms", "process"))
    parts = [number(record.fact(variant, "cold_start_ms", part)) for part in ("import", "load", "first")]
    known = [part for part in parts if part is not None]
    return whole if whole is not None else sum(known) if len(known) == len(parts) else None


def _memory(record: Record, variant: Variant) -> tuple[float | None, Span | None]:
    """Return the peak memory; of an estimate with its interval, and nothing where it states none."""
    if not record.estimated:
        return number(record.fact(variant, "peak_rss_bytes")), None
    found = record.fact(variant, "memory_estimate_bytes")
    interval = Span.of([dig(found, "low"), dig(found, "high")])
    return (None if interval is None else number(dig(found, "value"))), interval


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
    text = f"{'Estimated latency' if comparison.record.estimated else 'Latency'} at {cell.label}."
    if batched and any(row.throughput_per_s is not None for row in comparison.rows):
        text += f" Throughput at batch {batched.batch}, {length_label(batched.sequence)}, "
        text += f"{count(batched.threads, 'thread')}."
    return text


@dataclass(frozen=True)
class Head:
    """What stands at the top of the report."""

    title: str
    subtitle: str


def head(records: Sequence[Record]) -> Head:
    """Return title and subtitle of a report on `records`, which are of one task and teacher."""
    artifact = records[0].artifact
    task, teacher = dig(artifact, "task", "name"), dig(artifact, "teacher", "name")
    layers = number(dig(artifact, "student", "layers"))
    students = list(dict.fromkeys(record.student for record in records))
    if len(students) > 1:
        title, said = f"{len(students)} students", [f"Students: {'; '.join(students)}"]
    else:
        title = f"{int(layers)}-layer student" if layers else "Student"
        said = [_student(artifact)]
    if teacher:
        said.append(f"taught by {teacher}")
    started = min((str(record.raw["started"]) for record in records if record.raw.get("started")), default=None)
    if started:
        said.append(f"{'measured' if any(not record.estimated for record in records) else 'estimated'} {started[:10]}")
    said += _places(records)
    if any(record.teacher for record in records):
        title += " beside their teacher" if len(students) > 1 else " beside its teacher"
    return Head(f"{task}: {title}" if task else title, ", ".join(said) + ".")


def _student(artifact: Mapping[str, Any]) -> str:
    layers, hidden, parameters = (number(dig(artifact, "student", key)) for key in ("layers", "hidden", "parameters"))
    facts = [
        count(int(layers), "layer") if layers else "",
        f"width {int(hidden)}" if hidden else "",
        (f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,.0f}") + " parameters"
        if parameters
        else "",
    ]
    return f"Student of {', '.join(fact for fact in facts if fact)}" if any(facts) else "One student"


def _places(records: Sequence[Record]) -> list[str]:
    """Return on how many devices the numbers are, and how they were got where that is not plain measuring."""
    devices = {(str(record.device.get("name")) if record.student else record.name, record.kind) for record in records}
    kinds = Counter(kind for _, kind in devices)
    if len(devices) == 1:
        (kind,) = kinds
        return [] if kind == "measured" else [f"one device ({kind})"]
    amounts = [f"{kinds[kind]} {kind}" for kind in KINDS if kinds[kind]]
    detail = "" if set(kinds) == {"measured"} else f" ({joined(amounts)})"
    return [f"on {len(devices)} devices{detail}"]
