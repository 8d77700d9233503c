"""What a record has to keep to: its budget, and the baseline it was compared with; as words and as tables.

Both were judged before (`bertemd_deploy.budget`, `bertemd_deploy.bench.baseline`) and stand in the record; here they are
only written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bertemd_deploy.report.records import Record, count
from bertemd_deploy.report.tables import Line, Table
from bertemd_deploy.report.text import NOT_MEASURED, dig, joined

PASSED, MISSED = "kept", "missed"


def budget_lines(record: Record) -> list[Mapping[str, Any]]:
    """Return the lines of a record's budget; none where it has no budget."""
    lines = dig(record.raw, "budget", "lines")
    return [line for line in lines if isinstance(line, Mapping)] if isinstance(lines, list) else []


def missed_lines(record: Record) -> list[Mapping[str, Any]]:
    """Return the lines of the budget that were not kept; what was not measured is among them."""
    return [line for line in budget_lines(record) if line.get("passed") is not True]


def regressions(record: Record) -> list[Mapping[str, Any]]:
    """Return in what a record is worse than its baseline."""
    found = dig(record.raw, "against_baseline", "regressions")
    return [line for line in found if isinstance(line, Mapping)] if isinstance(found, list) else []


def budget_word(record: Record) -> str:
    """Return whether the budget is kept, in a word; empty where there is none."""
    lines, missed = budget_lines(record), missed_lines(record)
    if not lines:
        return ""
    return f"{MISSED} ({len(missed)} of {len(lines)})" if missed else PASSED


def budget_sentence(record: Record) -> str | None:
    """Return whether the budget is kept, and what misses it; None where there is no budget."""
    lines, missed = budget_lines(record), missed_lines(record)
    if not lines:
        return None
    if not missed:
        return f"Budget: kept, {joined([_name(line) for line in lines])}."
    return f"Budget: missed on {joined([_name(line) for line in missed])}."


def budget_table(record: Record) -> Table | None:
    """Return the budget, one line per limit with kept or missed, or None where there is none."""
    lines = budget_lines(record)
    if not lines:
        return None
    rows = [
        Line([_name(line), PASSED if line.get("passed") is True else MISSED, _words(line)], _state(line))
        for line in lines
    ]
    caption = "The budget for this device. What was not measured is missed; an estimate is held to its upper bound."
    return Table(caption, ["Limit", "Result", "In words"], rows, frozenset({0, 1, 2}))


def _state(line: Mapping[str, Any]) -> str:
    return "kept" if line.get("passed") is True else "missed"


def _name(line: Mapping[str, Any]) -> str:
    return str(line.get("name") or "a limit")


def _words(line: Mapping[str, Any]) -> str:
    return str(line.get("words") or NOT_MEASURED)


def baseline_sentence(record: Record) -> str | None:
    """Return how a record stands to its baseline; None where it was compared with none."""
    against = dig(record.raw, "against_baseline")
    if not isinstance(against, Mapping):
        return None
    when = str(against.get("started") or "")[:10]
    name = f"the baseline of {when}" if when else "the baseline"
    found = regressions(record)
    if found:
        return f"Worse than {name} in {count(len(found), 'number')}."
    return f"No regression against {name}: nothing compared is worse beyond its noise."


def baseline_table(record: Record) -> Table | None:
    """Return the regressions, one row each, or None where there are none."""
    found = regressions(record)
    if not found:
        return None
    rows = [Line([str(line.get("model") or ""), str(line.get("what") or ""), _words(line)], "missed") for line in found]
    caption = (
        "Regressions against the baseline: the whole interval of the change lies beyond what two runs differ by anyway."
    )
    return Table(caption, ["Model", "Number", "In words"], rows, frozenset({0, 1, 2}))


def stands(record: Record) -> bool:
    """Return whether a record keeps its budget and is no worse than its baseline."""
    return not missed_lines(record) and not regressions(record)
