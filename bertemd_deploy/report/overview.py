"""All devices at a glance.

Numbers got in different ways never stand in one table: there is one for what was measured, one for what was measured under
limits, one for what other machines measured, and one for estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bertemd_deploy.report.gates import budget_word
from bertemd_deploy.report.kinds import missing
from bertemd_deploy.report.records import Record
from bertemd_deploy.report.summary import Comparison, Row
from bertemd_deploy.report.tables import Line, Table, stated
from bertemd_deploy.report.text import NOT_MEASURED, megabytes, milliseconds, percent, score, sentence


def overview_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """Return the student that is used on every device, one row each: one table for each way of getting the numbers."""
    found: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        found.setdefault(comparison.record.kind, []).append(comparison)
    return [_overview(kind, group) for kind, group in found.items()]


def _overview(kind: str, group: Sequence[Comparison]) -> Table:
    rows = [comparison.student for comparison in group]
    records = [comparison.record for comparison in group]

    def write(text: Callable[[Row, Record], str]) -> list[str]:
        return [NOT_MEASURED if row is None else text(row, record) for row, record in zip(rows, records, strict=True)]

    metric = next(iter(records[0].metric_names), "score")
    columns = {
        "Graph": [
            f"none ({missing(record)})" if row is None else row.variant.label
            for row, record in zip(rows, records, strict=True)
        ],
        metric: write(lambda row, record: score(row.metrics.get(metric))),
        "Of teacher": write(lambda row, record: percent(row.retention)),
        "p50": write(lambda row, record: stated(row.p50_ms, row.p50_interval, record=record, write=milliseconds)),
        "p95": write(lambda row, record: milliseconds(row.p95_ms)),
        "Measured at": [comparison.cell.label if comparison.cell else NOT_MEASURED for comparison in group],
        "Peak memory": write(
            lambda row, record: stated(row.peak_rss_bytes, row.peak_rss_interval, record=record, write=megabytes)
        ),
        "Size": write(lambda row, record: megabytes(row.model_bytes)),
        "Budget": [budget_word(record) for record in records],
    }
    if kind == "estimated":
        columns = {"Estimated at" if title == "Measured at" else title: cells for title, cells in columns.items()}
    shown = {title: cells for title, cells in columns.items() if set(cells) - {NOT_MEASURED, ""}}
    wordy = frozenset(
        at for at, title in enumerate(shown, start=1) if title in ("Graph", "Measured at", "Estimated at")
    )
    lines = [Line([record.name, *(cells[at] for cells in shown.values())]) for at, record in enumerate(records)]
    return Table(
        f"{sentence(kind)}: the graph that is used, on every device.",
        ["Student and device" if records[0].student else "Device", *shown],
        lines,
        wordy | {0},
    )
