"""Bench records in, one page out: what distillation and quantization gained and cost, for people to read.

`report` writes `index.html` (self-contained), `report.md` (for a pull request) and `report.json` (the records, merged);
`enforce` then says whether every record keeps its budget and baseline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bertemd_deploy import files
from bertemd_deploy.budget import enforce_records
from bertemd_deploy.report.html import to_html
from bertemd_deploy.report.markdown import model_card_table, to_markdown
from bertemd_deploy.report.reading import named, read_record, read_records
from bertemd_deploy.report.summary import compare

__all__ = ["enforce", "model_card_table", "report"]

PAGE, SUMMARY, MERGED = "index.html", "report.md", "report.json"


def report(records: Sequence[Path], *, out: Path, force: bool = False, baseline: Path | None = None) -> Path:
    """Write one report on one or more bench records of one task and teacher.

    Args:
        records: `record.json` files, one per student and device.
        out: folder to write; new, empty, or holding an earlier report.
        force: write into a folder that holds something else.
        baseline: an earlier `record.json`, to compare those records with that are of its device.

    Returns:
        The path of `index.html`.

    Raises:
        ArtifactError: a record is unreadable, of another schema version, or of another task or teacher than the first; the
            baseline is of none of the devices; `out` holds something else and `force` is not set; or a file could not be
            written.
        BertemdError: the `report` extra is not installed.
    """
    read = read_records(records)
    if baseline is not None:
        from bertemd_deploy.bench.baseline import with_baseline  # it reads records by this package

        earlier = read_record(baseline)
        read = named(with_baseline([record.raw for record in read], earlier, where=str(baseline)))
    comparisons = [compare(record) for record in read]
    page, summary = to_html(comparisons), to_markdown(comparisons)
    files.claim_folder(out, marker=MERGED, force=force)
    files.write_json(out / MERGED, [record.raw for record in read])
    files.write_text(out / SUMMARY, summary)
    files.write_text(out / PAGE, page)
    return out / PAGE


def enforce(out: Path) -> None:
    """Check a written report's records against their budgets and baselines.

    Args:
        out: the report's folder.

    Raises:
        BudgetError: a limit was missed, or a number is worse than its baseline (exit 4).
    """
    enforce_records(json.loads((out / MERGED).read_text(encoding="utf-8")))
