"""The summary for a pull request: verdict, student beside teacher, what changed, links to the page and the records."""

from __future__ import annotations

from collections.abc import Sequence

from bertemd_deploy.report.changes import change_list, change_sentences, change_table
from bertemd_deploy.report.records import Record
from bertemd_deploy.report.summary import Comparison, head
from bertemd_deploy.report.tables import Table, comparison_table
from bertemd_deploy.report.text import markdown
from bertemd_deploy.report.verdict import remarks, verdict

LIST_SHOWN = 20  # examples; the page has more


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
        parts += _changes(comparison.record)
    parts.append("Figures and all measurements: [index.html](index.html). Records: [report.json](report.json).")
    return "\n\n".join(parts) + "\n"


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
