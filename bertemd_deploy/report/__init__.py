"""Bench records in, one page out: what distillation and quantization gained and cost, for people to read.

`report` writes `index.html` (self-contained), `report.md` (for a pull request) and `report.json` (the records, merged).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bertemd_deploy import files
from bertemd_deploy.report.html import to_html
from bertemd_deploy.report.markdown import to_markdown
from bertemd_deploy.report.records import read_records
from bertemd_deploy.report.summary import compare

__all__ = ["report"]

PAGE, SUMMARY, MERGED = "index.html", "report.md", "report.json"


def report(records: Sequence[Path], *, out: Path, force: bool = False) -> Path:
    """Write one report on one or more bench records of the same artifact.

    Args:
        records: `record.json` files, one per device.
        out: folder to write; new, empty, or holding an earlier report.
        force: write into a folder that holds something else.

    Returns:
        The path of `index.html`.

    Raises:
        ArtifactError: a record is unreadable, of another schema version or of another artifact than the first; `out`
            holds something else and `force` is not set; or a file could not be written.
        BertemdError: the `report` extra is not installed.
    """
    read = read_records(records)
    comparisons = [compare(record) for record in read]
    page, summary = to_html(comparisons), to_markdown(comparisons)
    files.claim_folder(out, marker=MERGED, force=force)
    files.write_json(out / MERGED, [record.raw for record in read])
    files.write_text(out / SUMMARY, summary)
    files.write_text(out / PAGE, page)
    return out / PAGE
