"""The tables of one record's measurements as plain values: captions, headings and cells of text, for HTML and Markdown alike.

A table holds numbers of one record, so that what was measured and what was estimated never stand in one; an estimate is
called so in its cell and has its interval beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bertemd_deploy.report.records import Cell, Record, Span, Variant
from bertemd_deploy.report.summary import Comparison, Ratio, Row, speed_conditions
from bertemd_deploy.report.text import (
    NOT_MEASURED,
    between,
    dig,
    joined,
    joules,
    megabytes,
    milliseconds,
    number,
    per_second,
    percent,
    plain,
    ratio,
    score,
    sentence,
    spread,
)

DID_NOT_FIT = "did not fit"


@dataclass(frozen=True)
class Line:
    """One row of text cells.

    `kind` holds the words that say whose it is: teacher or student, its precision, and default for the graph that is
    used unless another is asked for. `model` is the variant's key where the row is about one model.
    """

    cells: list[str]
    kind: str = ""
    model: str = ""


@dataclass(frozen=True)
class Table:
    """A table: caption, headings, rows; columns named in `prose` hold words and stay left-aligned."""

    caption: str
    headings: list[str]
    lines: list[Line]
    prose: frozenset[int] = frozenset({0})


def stated(value: float | None, interval: Span | None, *, record: Record, write: Callable[[float | None], str]) -> str:
    """Return a number in words: as it is where it was measured, else as an estimate with its interval."""
    if not record.estimated or value is None or interval is None:
        return NOT_MEASURED if record.estimated else write(value)
    return f"estimate {write(value)} ({between(*interval, write=write)})"


def comparison_table(comparison: Comparison) -> Table:
    """Return student beside teacher: one row per model and graph, without the columns that no model has a value for."""
    record, rows = comparison.record, comparison.rows
    columns: dict[str, list[str]] = {
        **{name: [score(row.metrics[name]) for row in rows] for name in record.metric_names},
        "Of teacher": [percent(row.retention) for row in rows],
        "p50": [_timed(row, stated(row.p50_ms, row.p50_interval, record=record, write=milliseconds)) for row in rows],
        "p95": [_timed(row, milliseconds(row.p95_ms)) for row in rows],
        "Text to answer, p50": [milliseconds(row.end_to_end_ms) for row in rows],
        "Speed-up (95% interval)": [
            "baseline" if row is comparison.teacher else speedup_text(row.speedup, estimated=record.estimated)
            for row in rows
        ],
        "Throughput": [per_second(row.throughput_per_s) for row in rows],
        "Cold start": [milliseconds(row.cold_start_ms) for row in rows],
        "Peak memory": [
            _timed(row, stated(row.peak_rss_bytes, row.peak_rss_interval, record=record, write=megabytes))
            for row in rows
        ],
        "Size": [megabytes(row.model_bytes) for row in rows],
        "Energy per call": [joules(row.energy_joules) for row in rows],
        "Agrees with teacher": ["" if row is comparison.teacher else percent(row.agreement) for row in rows],
    }
    if record.estimated:
        columns["Speed-up (estimate, its interval)"] = columns.pop("Speed-up (95% interval)")
    shown = {title: cells for title, cells in columns.items() if set(cells) - {NOT_MEASURED, "", "baseline"}}
    lines = [
        Line(
            [row.variant.label, *(cells[place] for cells in shown.values())],
            kind_of(row.variant) + (" default" if comparison.student is row else ""),
            row.variant.key,
        )
        for place, row in enumerate(rows)
    ]
    return Table(_comparison_caption(comparison, shown), ["Model", *shown], lines)


def _timed(row: Row, text: str) -> str:
    return DID_NOT_FIT if row.failed is not None and text == NOT_MEASURED else text


def _comparison_caption(comparison: Comparison, shown: Mapping[str, Any]) -> str:
    record = comparison.record
    said = [f"{sentence(record.kind)}. {speed_conditions(comparison)}"]
    if "Cold start" in shown:
        whole = any(record.fact(row.variant, "cold_start_ms", "process") is not None for row in comparison.rows)
        ends = (
            "from the start of a process to its first answer"
            if whole
            else "import, load and first answer of a fresh process"
        )
        said.append(f"Cold start is {ends}.")
    if "Peak memory" in shown:
        said.append("Peak memory is the process's resident set.")
    if "Energy per call" in shown:
        sources = {
            str(dig(entry, "energy_joules_per_inference", "source"))
            for (_, cell), entry in record.cells.items()
            if cell == comparison.cell and dig(entry, "energy_joules_per_inference", "value") is not None
        }
        said.append(f"Energy by {joined(sorted(sources))}.")
    if record.estimated:
        said.append("Scores are the artifact's own, times are estimates, and a size is that of the file.")
    return " ".join(said)


def speedup_text(gain: Ratio | None, *, estimated: bool = False) -> str:
    """Return a speed-up with its interval, saying so where none is claimed."""
    if gain is None:
        return NOT_MEASURED
    text = f"{ratio(gain.value)} ({ratio(gain.low)[:-1]}–{ratio(gain.high)[:-1]})"
    if estimated:
        return f"estimate {text}"
    return f"{text}, no claim" if gain.outcome == "same" else text


def kind_of(variant: Variant) -> str:
    """Return the words for a row's looks: teacher, or student and its precision."""
    return "teacher" if variant.is_teacher else f"student {variant.precision}"


def measurement_table(record: Record) -> Table:
    """Return every cell that was measured, without the columns that have no value anywhere."""
    order = {variant: place for place, variant in enumerate(record.variants)}

    def place(key: tuple[Variant, Cell]) -> tuple[int, int, int, bool, int]:
        variant, cell = key
        replay = isinstance(cell.sequence, str)
        return order[variant], cell.batch, cell.threads, replay, 0 if isinstance(cell.sequence, str) else cell.sequence

    keys = sorted(record.cells, key=place)
    entries = [record.cells[key] for key in keys]
    columns = {
        "Batch": [str(cell.batch) for _, cell in keys],
        "Tokens": [str(cell.sequence) for _, cell in keys],
        "Threads": [str(cell.threads) for _, cell in keys],
        "n": [plain("n", entry.get("n")) for entry in entries],
        **_latency_columns(record, keys),
        "Text to answer, p50": [milliseconds(number(dig(entry, "end_to_end_ms", "p50"))) for entry in entries],
        "Throughput": [per_second(number(entry.get("throughput_per_s"))) for entry in entries],
        "CPU per call": [_cpu_time(entry) for entry in entries],
        "Energy per call": [joules(number(dig(entry, "energy_joules_per_inference", "value"))) for entry in entries],
        "Speed-up (95% interval)": [
            "baseline" if variant == record.teacher else speedup_text(Ratio.of(entry), estimated=record.estimated)
            for (variant, _), entry in zip(keys, entries, strict=True)
        ],
    }
    if record.estimated:
        columns["Speed-up (estimate, its interval)"] = columns["Speed-up (95% interval)"]
        for title in (
            "n",
            "Text to answer, p50",
            "Throughput",
            "CPU per call",
            "Energy per call",
            "Speed-up (95% interval)",
        ):
            del columns[title]  # an estimate states what has an interval
    shown = {title: cells for title, cells in columns.items() if set(cells) - {NOT_MEASURED, "baseline"}}
    lines = [
        Line(
            [variant.label, *(cells[at].replace(NOT_MEASURED, "–") for cells in shown.values())],
            kind_of(variant),
            variant.key,
        )
        for at, (variant, _) in enumerate(keys)
    ]
    caption = f"{sentence(record.kind)}. Every cell, one row each; – stands for not measured."
    caption += "" if record.estimated else " p99 wants at least 100 samples."
    return Table(caption, ["Model", *shown], lines)


def _latency_columns(record: Record, keys: Sequence[tuple[Variant, Cell]]) -> dict[str, list[str]]:
    """Return the statistics of the latency, each with its interval behind it."""
    if record.estimated:
        return {
            "P50": [
                stated(record.latency(*key), record.interval(*key), record=record, write=milliseconds) for key in keys
            ]
        }
    columns: dict[str, list[str]] = {}
    for name in ("p50", "p90", "p95", "p99", "mean", "min", "max"):
        columns[sentence(name)] = [milliseconds(record.latency(*key, name)) for key in keys]
        if name in ("p50", "p95"):
            spans = [record.interval(*key, name) for key in keys]
            columns[f"{sentence(name)}, 95% interval"] = [
                NOT_MEASURED if span is None else f"{spread(*span)} ms" for span in spans
            ]
    return columns


def _cpu_time(entry: Mapping[str, Any]) -> str:
    seconds = number(entry.get("cpu_seconds_per_inference"))
    return milliseconds(None if seconds is None else 1000 * seconds)
