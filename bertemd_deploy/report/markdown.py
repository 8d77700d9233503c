"""The summary for a pull request: verdict, student beside teacher, links to the page and the records."""

from __future__ import annotations

from collections.abc import Sequence

from bertemd_deploy.report.summary import Comparison, head
from bertemd_deploy.report.tables import Table, comparison_table
from bertemd_deploy.report.text import markdown
from bertemd_deploy.report.verdict import remarks, verdict


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """Return the summary of one comparison per device, all of one artifact."""
    top = head([comparison.record for comparison in comparisons])
    parts = [f"## {markdown(top.title)}", markdown(top.subtitle)]
    for comparison in comparisons:
        if len(comparisons) > 1:
            parts.append(f"### {markdown(comparison.record.name)}")
        parts.append(f"**{markdown(verdict(comparison))}**")
        parts += [markdown(remark) for remark in remarks(comparison)]
        parts.append(_table(comparison_table(comparison)))
    parts.append("Figures and all measurements: [index.html](index.html). Records: [report.json](report.json).")
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    rules = [":--" if place in table.prose else "--:" for place in range(len(table.headings))]
    rows = [table.headings, rules, *(line.cells for line in table.lines)]
    cells = [row if row is rules else [markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + f"\n\n{markdown(table.caption)}"
