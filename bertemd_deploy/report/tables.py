"""The page's tables as plain values: captions, headings and cells of text, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bertemd_deploy.report.records import Cell, Record, Variant
from bertemd_deploy.report.summary import Comparison, Ratio, speed_conditions
from bertemd_deploy.report.text import (
    NOT_MEASURED,
    dig,
    megabytes,
    milliseconds,
    number,
    per_second,
    percent,
    plain,
    ratio,
    score,
    sentence,
    words,
)


@dataclass(frozen=True)
class Line:
    """One row of text cells.

    `kind` holds the words that say whose it is: teacher or student, its precision, and default for the graph that is
    used unless another is asked for.
    """

    cells: list[str]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table: caption, headings, rows; columns named in `prose` hold words and stay left-aligned."""

    caption: str
    headings: list[str]
    lines: list[Line]
    prose: frozenset[int] = frozenset({0})


def comparison_table(comparison: Comparison) -> Table:
    """Return student beside teacher: one row per model and graph, without the columns that no model has a value for."""
    names = comparison.record.metric_names
    columns: dict[str, list[str]] = {
        **{name: [score(row.metrics[name]) for row in comparison.rows] for name in names},
        "Of teacher": [percent(row.retention) for row in comparison.rows],
        "p50": [milliseconds(row.p50_ms) for row in comparison.rows],
        "p95": [milliseconds(row.p95_ms) for row in comparison.rows],
        "Text to answer, p50": [milliseconds(row.end_to_end_ms) for row in comparison.rows],
        "Speed-up (95% interval)": [
            "baseline" if row is comparison.teacher else speedup_text(row.speedup) for row in comparison.rows
        ],
        "Throughput": [per_second(row.throughput_per_s) for row in comparison.rows],
        "Cold start": [milliseconds(row.cold_start_ms) for row in comparison.rows],
        "Peak memory": [megabytes(row.peak_rss_bytes) for row in comparison.rows],
        "Size": [megabytes(row.model_bytes) for row in comparison.rows],
        "Agrees with teacher": ["" if row is comparison.teacher else percent(row.agreement) for row in comparison.rows],
    }
    shown = {title: cells for title, cells in columns.items() if set(cells) - {NOT_MEASURED, "", "baseline"}}
    caption = speed_conditions(comparison)
    caption += (
        " Cold start is import, load and first answer of a fresh process; peak memory is the process's resident set."
    )
    lines = [
        Line(
            [row.variant.label, *(cells[place] for cells in shown.values())],
            _kind(row.variant) + (" default" if comparison.student is row else ""),
        )
        for place, row in enumerate(comparison.rows)
    ]
    return Table(caption, ["Model", *shown], lines)


def speedup_text(gain: Ratio | None) -> str:
    """Return a speed-up with its interval, saying so where none is claimed."""
    if gain is None:
        return NOT_MEASURED
    text = f"{ratio(gain.value)} ({ratio(gain.low)[:-1]}–{ratio(gain.high)[:-1]})"
    return f"{text}, no claim" if gain.outcome == "same" else text


def _kind(variant: Variant) -> str:
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
        **{
            sentence(name): [milliseconds(record.latency(*key, name)) for key in keys]
            for name in ("p50", "p90", "p95", "p99", "mean", "min", "max")
        },
        "Text to answer, p50": [milliseconds(number(dig(entry, "end_to_end_ms", "p50"))) for entry in entries],
        "Throughput": [per_second(number(entry.get("throughput_per_s"))) for entry in entries],
        "CPU per call": [_cpu_time(entry) for entry in entries],
        "Speed-up (95% interval)": [
            "baseline" if variant == record.teacher else speedup_text(Ratio.of(entry))
            for (variant, _), entry in zip(keys, entries, strict=True)
        ],
    }
    shown = {title: cells for title, cells in columns.items() if set(cells) - {NOT_MEASURED, "baseline"}}
    lines = [
        Line(
            [variant.label, *(cells[at].replace(NOT_MEASURED, "–") for cells in shown.values())],
            _kind(variant),
        )
        for at, (variant, _) in enumerate(keys)
    ]
    caption = "Every cell, one row each; – stands for not measured. p99 wants at least 100 samples."
    return Table(caption, ["Model", *shown], lines)


def _cpu_time(entry: Mapping[str, Any]) -> str:
    seconds = number(entry.get("cpu_seconds_per_inference"))
    return milliseconds(None if seconds is None else 1000 * seconds)


_DECISIONS = {  # what "the same decision" means, by kind of task
    "classification": ", and the share of inputs with the same decision",
    "regression": "",
    "multilabel": ", and the share of inputs with the same labels",
    "token-classification": ", and the share of tokens with the same tag",
    "question-answering": ", and the share of windows with the same best span",
}


def parity_table(record: Record) -> Table | None:
    """Return how far each graph's answers lie from the torch student's, or None where that is not recorded."""
    caption = "Each graph against the torch student on the same inputs: the largest absolute difference of a logit"
    caption += _DECISIONS.get(str(dig(record.artifact, "task", "kind")), _DECISIONS["classification"]) + "."
    allowed = number(dig(record.artifact, "parity", "max_abs_logit_difference_allowed"))
    if allowed is not None:
        caption += f" An fp32 graph that differs by more than {plain('', allowed)} is not handed out."
    return _named_table(dig(record.artifact, "parity", "graphs"), caption, first="Graph")


def invariance_table(record: Record) -> Table | None:
    """Return how far padding and batch mates change each graph's answers, or None where that is not recorded."""
    graphs = dig(record.artifact, "invariance")
    found = {str(name): entry for name, entry in graphs.items()} if isinstance(graphs, Mapping) else {}
    found = {name: entry for name, entry in found.items() if isinstance(entry, Mapping)}
    if not found:
        return None
    columns = {
        "Activation scales": [str(entry.get("activation_scales") or NOT_MEASURED) for entry in found.values()],
        "Examples": [plain("", entry.get("examples")) for entry in found.values()],
        "Changed decisions": [percent(number(entry.get("changed_decision_share"))) for entry in found.values()],
        "Allowed": [percent(number(entry.get("changed_decision_share_allowed"))) for entry in found.values()],
        "Largest logit difference": [plain("", entry.get("max_abs_logit_difference")) for entry in found.values()],
        "Most changed": [_most_changed(entry) for entry in found.values()],
    }
    caption = (
        "Each graph's answers to examples that are padded further, in batches that mix lengths or with other mates, against "
        "its answers to each alone and unpadded: the largest share of changed decisions, and what is allowed."
    )
    lines = [Line([name, *(cells[at] for cells in columns.values())]) for at, name in enumerate(found)]
    return Table(caption, ["Graph", *columns], lines, frozenset({0, 1, 6}))


def _most_changed(entry: Mapping[str, Any]) -> str:
    arrangements = entry.get("arrangements")
    shares = {
        str(name): number(dig(arrangement, "changed_decision_share")) or 0.0
        for name, arrangement in (arrangements.items() if isinstance(arrangements, Mapping) else ())
    }
    return max(shares, key=lambda name: shares[name]) if any(shares.values()) else "–"


def trials_table(record: Record) -> Table | None:
    """Return what quantization tried, in order, or None where nothing is recorded."""
    trials = dig(record.artifact, "quantization", "trials")
    if not isinstance(trials, list):
        return None
    numbered = {str(place): trial for place, trial in enumerate(trials, start=1) if isinstance(trial, Mapping)}
    return _named_table(numbered, "Quantization settings in the order they were tried.", first="Trial")


def settings_table(record: Record) -> Table | None:
    """Return the quantization settings that were kept, or None."""
    quantization = dig(record.artifact, "quantization")
    if not isinstance(quantization, Mapping):
        return None
    kept = {str(key): value for key, value in quantization.items() if key != "trials" and value is not None}
    if not kept:
        return None
    lines = [Line([sentence(words(key)), plain(key, value)]) for key, value in kept.items()]
    return Table("The quantization settings in the artifact.", ["Setting", "Value"], lines, frozenset({0, 1}))


def _named_table(entries: Any, caption: str, *, first: str) -> Table | None:
    """Return a table of like objects by name, with one column per key any of them has."""
    if not isinstance(entries, Mapping):
        return None
    rows = {str(name): entry for name, entry in entries.items() if isinstance(entry, Mapping)}
    keys = list(dict.fromkeys(str(key) for entry in rows.values() for key in entry))
    if not rows or not keys:
        return None
    lines = [Line([name, *(plain(key, entry.get(key)) for key in keys)]) for name, entry in rows.items()]
    wordy = {
        place
        for place, key in enumerate(keys, start=1)
        if any(number(entry.get(key)) is None for entry in rows.values())
    }
    return Table(caption, [first, *(sentence(words(key)) for key in keys)], lines, frozenset({0} | wordy))


def machine_table(records: Sequence[Record]) -> Table:
    """Return the facts of every device, one column each."""
    keys = ("started", "duration_seconds", "conditions")
    facts = [
        {sentence(name): text for name, text in _flat({**record.device, **{key: record.raw.get(key) for key in keys}})}
        for record in records
    ]
    return _side_by_side("The machines, as they described themselves.", facts, records)


def versions_table(records: Sequence[Record]) -> Table | None:
    """Return the versions that ran on every device, one column each, or None where none are recorded."""
    facts = [dict(_versions(record)) for record in records]
    return _side_by_side("Software versions.", facts, records) if any(facts) else None


def _versions(record: Record) -> Iterable[tuple[str, str]]:
    versions = record.raw.get("versions")
    for package, version in versions.items() if isinstance(versions, Mapping) else ():
        yield str(package), "not installed" if version is None else plain("", version)


def _side_by_side(caption: str, facts: Sequence[dict[str, str]], records: Sequence[Record]) -> Table:
    keys = list(dict.fromkeys(key for column in facts for key in column))
    lines = [Line([key, *(column.get(key, "not stated") for column in facts)]) for key in keys]
    return Table(caption, ["Fact", *(record.name for record in records)], lines, frozenset(range(len(facts) + 1)))


def _flat(value: Any, prefix: str = "", key: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            label = f"{prefix} {words(str(name))}".strip()
            yield from _flat(inner, label, str(name))
    elif prefix and value is not None:
        yield prefix, plain(key, value)
