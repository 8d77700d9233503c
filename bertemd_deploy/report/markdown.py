"""The summaries in Markdown: for a pull request, and the measured table of an artifact's model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bertemd_deploy.report.changes import change_list, change_sentences, change_table
from bertemd_deploy.report.gates import baseline_table, budget_table
from bertemd_deploy.report.overview import overview_tables
from bertemd_deploy.report.reading import named
from bertemd_deploy.report.records import Record
from bertemd_deploy.report.summary import Comparison, compare, head
from bertemd_deploy.report.tables import Table, comparison_table
from bertemd_deploy.report.text import markdown
from bertemd_deploy.report.verdict import remarks, verdict

LIST_SHOWN = 20  # examples; the page has more


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """Return the summary of one comparison per record, all of one task and teacher."""
    records = [comparison.record for comparison in comparisons]
    top = head(records)
    parts = [f"## {markdown(top.title)}", markdown(top.subtitle)]
    if len(comparisons) > 1:
        parts += [_table(table) for table in overview_tables(comparisons)]
    told: list[Any] = []
    for comparison in comparisons:
        record = comparison.record
        if len(comparisons) > 1:
            parts.append(f"### {markdown(record.title)}")
        parts.append(f"**{markdown(verdict(comparison))}**")
        parts += [markdown(remark) for remark in remarks(comparison)]
        gates = (budget_table(record), baseline_table(record))
        parts += [_table(table) for table in gates if table is not None]
        if comparison.rows:
            parts.append(_table(comparison_table(comparison)))
        if record.raw.get("churn") not in told:
            parts += _changes(record)
            told.append(record.raw.get("churn"))
    parts.append("Figures and all measurements: [index.html](index.html). Records: [report.json](report.json).")
    return "\n\n".join(parts) + "\n"


def model_card_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return what an artifact's records say, as Markdown for its model card: teacher beside every graph, by device.

    Args:
        records: bench records of one artifact, one per device, as `bench` returns them; at least one.
    """
    parts = []
    for record in named(records):
        comparison = compare(record)
        if comparison.rows:
            parts += [f"**{markdown(record.title)}**", _table(comparison_table(comparison))]
    return "\n\n".join(parts)


def _changes(record: Record) -> list[str]:
    """Return what changed from model to model, the examples folded away."""
    steps, listed = change_table(record), change_list(record, most=LIST_SHOWN)
    if steps is None:
        return []
    parts = [
        "**What changed**",
        "\n".join(f"- **{markdown(name)}:** {markdown(said)}" for name, said in change_sentences(record).items()),
        _table(steps),
    ]
    if listed is not None:
        parts.append(f"<details><summary>The examples decided otherwise</summary>\n\n{_table(listed)}\n\n</details>")
    return parts


def _table(table: Table) -> str:
    rules = [":--" if place in table.prose else "--:" for place in range(len(table.headings))]
    rows = [table.headings, rules, *(line.cells for line in table.lines)]
    cells = [row if row is rules else [markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + f"\n\n{markdown(table.caption)}"
