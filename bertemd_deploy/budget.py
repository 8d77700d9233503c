"""Budgets: what a student may take on a device at most, and what it has to keep at least.

    budget:
      max_p95_ms: 20                # or "20 ms", "0.02 s"
      max_rss_mb: 200               # or "0.2 GB", "190 MiB"; MB are 10^6 bytes
      max_size_mb: 25
      min_retention: 97 %           # or 0.97: of the teacher's first metric
      raspberry-pi-5: {max_p95_ms: 60}    # other limits on one device; null lifts one

A limit is kept by the graph that is used (see `artifact.FASTEST_FIRST`), p95 in the cell the report compares models in:
batch 1, real lengths, most threads. What was not measured is missed, and an estimate is held to the upper end of its
interval. In: a recipe's section, records. Out: lines of kept and missed, and `BudgetError` (exit 4).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bertemd_deploy.errors import BudgetError, RecipeError

if TYPE_CHECKING:
    from bertemd_deploy.report.summary import Comparison, Row

DEFAULT = "default"
_MILLISECONDS = {"µs": 1e-3, "us": 1e-3, "ms": 1.0, "s": 1e3}
_MEGABYTES = {"kB": 1e-3, "MB": 1.0, "GB": 1e3, "KiB": 2**10 / 1e6, "MiB": 2**20 / 1e6, "GiB": 2**30 / 1e6}
_SHARE = {"%": 0.01}
_UNITS = {"max_p95_ms": _MILLISECONDS, "max_rss_mb": _MEGABYTES, "max_size_mb": _MEGABYTES, "min_retention": _SHARE}
_PLAIN = {
    "max_p95_ms": "milliseconds",
    "max_rss_mb": "megabytes",
    "max_size_mb": "megabytes",
    "min_retention": "a share",
}
_EXAMPLES = {"max_p95_ms": "20 ms", "max_rss_mb": "200 MB", "max_size_mb": "25 MB", "min_retention": "97 %"}
_AMOUNT = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s]*)\s*")


@dataclass(frozen=True)
class Budget:
    """The limits of one device; None where there is none.

    Attributes:
        max_p95_ms: 95th percentile of the latency of one call, in milliseconds.
        max_rss_mb: peak memory of the process, in megabytes (10^6 bytes).
        max_size_mb: the model's file, in megabytes.
        min_retention: share of the teacher's first metric, above 0 and up to 1.
    """

    max_p95_ms: float | None = None
    max_rss_mb: float | None = None
    max_size_mb: float | None = None
    min_retention: float | None = None

    def limits(self) -> dict[str, float]:
        """Return the limits that there are, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Line:
    """One limit held against a record.

    Attributes:
        name: of what is limited, in words.
        limit: the field of `Budget`.
        allowed: in the limit's unit.
        found: likewise; None where it was not measured. Of an estimate the upper end of its interval.
        passed: None where there is nothing to judge, which counts as missed.
        words: allowed and found in a sentence.
    """

    name: str
    limit: str
    allowed: float
    found: float | None
    passed: bool | None
    words: str


def read_budget(
    section: Mapping[str, Any], *, where: str = "budget", devices: Collection[str] | None = None
) -> dict[str, Budget]:
    """Return the budgets of a recipe's section: of every device that it names, and of all others under "default".

    Args:
        section: limits for all devices, and by a device's name limits that differ there.
        where: opens the message.
        devices: names that are known; None takes any.

    Raises:
        RecipeError: an unknown limit or device, a value that is no positive number, a wrong unit; all faults at once.
    """
    faults: list[str] = []
    budgets = collect_budget(section, where=where, devices=devices, faults=faults)
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise RecipeError(f"{where}: {len(faults)} fault(s) in the budget:\n{listed}")
    return budgets


def collect_budget(
    section: Mapping[str, Any], *, where: str, devices: Collection[str] | None, faults: list[str]
) -> dict[str, Budget]:
    """Return the budgets of a section, as `read_budget` does; `faults` gains a line for each fault."""
    own: dict[str, dict[str, float | None]] = {DEFAULT: {}}
    for key, value in section.items():
        if key in _UNITS:
            _read_limit(own[DEFAULT], key, value, name=f"{where}.{key}", faults=faults)
        elif isinstance(value, Mapping):
            if devices is not None and key not in (DEFAULT, *devices):
                faults.append(f"{where}.{key}: unknown device; known: {', '.join(sorted(devices))}")
            limits = own.setdefault(str(key), {})
            for limit, amount in value.items():
                if limit not in _UNITS:
                    faults.append(f"{where}.{key}.{limit}: unknown limit; known: {', '.join(_UNITS)}")
                    continue
                _read_limit(limits, limit, amount, name=f"{where}.{key}.{limit}", faults=faults)
        else:
            faults.append(
                f"{where}.{key}: unknown limit; known: {', '.join(_UNITS)}, or a device's name with limits below it"
            )
    return {device: Budget(**(own[DEFAULT] | limits)) for device, limits in own.items()}


def _read_limit(limits: dict[str, float | None], key: str, value: Any, *, name: str, faults: list[str]) -> None:
    try:
        limits[key] = None if value is None else _amount(key, value)
    except ValueError as error:
        faults.append(f"{name}: {error}")


def _amount(key: str, value: Any) -> float:
    """Return a limit in its own unit.

    Raises:
        ValueError: it is no positive number, or its unit is another one.
    """
    units, allowed = _UNITS[key], f"allowed: a number ({_PLAIN[key]}) or a text such as {_EXAMPLES[key]!r}"
    if isinstance(value, str):
        found = _AMOUNT.fullmatch(value)
        if found is None:
            raise ValueError(f"found {value!r}, {allowed}")
        number, unit = float(found[1]), found[2]
        if unit not in units:
            said = f"the unit {unit!r}" if unit else "no unit"
            raise ValueError(f"found {value!r} with {said}, allowed units: {', '.join(units)}")
        number *= units[unit]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number that no float holds, and that may be too long to print
            raise ValueError(f"found a number too large to be a limit, {allowed}") from None
    else:
        raise ValueError(f"found {type(value).__name__} {value!r}, {allowed}")
    if not 0 < number < math.inf:
        raise ValueError(f"found {value!r}, allowed: above 0")
    if key == "min_retention" and number > 1:
        raise ValueError(
            f"found {value!r}, allowed: a share of the teacher's score above 0 and up to 1, or up to '100 %'"
        )
    return number


def budget_for(device: str, budgets: Mapping[str, Budget], *, flags: Mapping[str, Any] | None = None) -> Budget | None:
    """Return the budget of one device, or None where nothing is limited there.

    Args:
        device: its name, or the address it was given by.
        budgets: from `read_budget`; empty for none.
        flags: limits of the command line by field of `Budget`, None for those not given; they come before the recipe's.

    Raises:
        RecipeError: a flag is no positive number.
    """
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    base = budgets.get(device) or budgets.get(DEFAULT) or Budget()
    over = read_budget(given, where="command line")[DEFAULT].limits()
    budget = dataclasses.replace(base, **over)
    return budget if budget.limits() else None


def check_budget(record: Mapping[str, Any], budget: Budget) -> list[Line]:
    """Hold a record against a budget; return a line per limit, in the order of the fields.

    Args:
        record: a bench record, measured or estimated.
        budget: of its device.
    """
    from bertemd_deploy.report.records import Record
    from bertemd_deploy.report.summary import compare

    comparison = compare(Record(record, str(record["device"].get("name"))))
    checks = {
        "max_p95_ms": _check_p95,
        "max_rss_mb": _check_memory,
        "max_size_mb": _check_size,
        "min_retention": _check_retention,
    }
    return [checks[limit](comparison, allowed) for limit, allowed in budget.limits().items()]


def _check_p95(comparison: Comparison, allowed: float) -> Line:
    from bertemd_deploy.report.text import between, milliseconds

    student, name = comparison.student, "p95 latency"
    where = f" ({comparison.cell.label})" if comparison.cell else ""
    limit = f"allowed {milliseconds(allowed)}"
    if comparison.record.estimated:
        interval = student.p50_interval if student else None
        if student is None or student.p50_ms is None or interval is None:
            return _unknown(name, "max_p95_ms", allowed, comparison, limit)
        words = (
            f"estimate {milliseconds(student.p50_ms)} ({between(*interval, write=milliseconds)}){where}, {limit}; the upper "
            "end of the estimated median has to stay below, for no p95 is estimated"
        )
        return Line(name, "max_p95_ms", allowed, interval.high, interval.high <= allowed, f"{words}.")
    if student is None or student.p95_ms is None:
        return _unknown(name, "max_p95_ms", allowed, comparison, limit)
    words = f"{milliseconds(student.p95_ms)}{where}, {limit}."
    return Line(name, "max_p95_ms", allowed, student.p95_ms, student.p95_ms <= allowed, words)


def _check_memory(comparison: Comparison, allowed: float) -> Line:
    from bertemd_deploy.report.text import between, megabytes

    student, name, limit = comparison.student, "peak memory", f"allowed {megabytes(1e6 * allowed)}"
    if student is None or student.peak_rss_bytes is None:
        return _unknown(name, "max_rss_mb", allowed, comparison, limit)
    found, words = student.peak_rss_bytes, megabytes(student.peak_rss_bytes)
    if (interval := student.peak_rss_interval) is not None:
        found = interval.high
        words = f"estimate {words} ({between(*interval, write=megabytes)})"
    return Line(name, "max_rss_mb", allowed, found / 1e6, found <= 1e6 * allowed, f"{words}, {limit}.")


def _check_size(comparison: Comparison, allowed: float) -> Line:
    from bertemd_deploy.report.text import megabytes

    student, name, limit = comparison.student, "model size", f"allowed {megabytes(1e6 * allowed)}"
    if student is None or student.model_bytes is None:
        return _unknown(name, "max_size_mb", allowed, comparison, limit)
    found = student.model_bytes
    return Line(name, "max_size_mb", allowed, found / 1e6, found <= 1e6 * allowed, f"{megabytes(found)}, {limit}.")


def _check_retention(comparison: Comparison, allowed: float) -> Line:
    from bertemd_deploy.report.text import percent, score

    student, name, limit = comparison.student, "score kept", f"allowed {percent(allowed)} of the teacher's"
    found, source = _retention(comparison, student)
    if student is None or found is None:
        return _unknown(name, "min_retention", allowed, comparison, limit)
    metric = comparison.record.metric_names[0]
    words = f"{percent(found)} of the teacher's {metric} ({score(student.metrics[metric])}{source}), {limit}."
    return Line(name, "min_retention", allowed, found, found >= allowed, words)


def _retention(comparison: Comparison, student: Row | None) -> tuple[float | None, str]:
    """Return the share of the teacher's score that the student keeps, and where the teacher's comes from, in words.

    A teacher that was not measured along has the score that the artifact states of it.
    """
    from bertemd_deploy.report.text import dig, number

    if student is None or student.retention is not None or not comparison.record.metric_names:
        return (None if student is None else student.retention), ""
    metric = comparison.record.metric_names[0]
    stated, own = number(dig(comparison.record.artifact, "metrics", "teacher", metric)), student.metrics[metric]
    if stated is None or own is None or stated <= 0:
        return None, ""
    return own / stated, "; the teacher's as the artifact states it"


def _unknown(name: str, limit: str, allowed: float, comparison: Comparison, said: str) -> Line:
    """Return the line of a limit that nothing can be said to, which misses it."""
    students = [failure for variant, failure in comparison.record.failures.items() if not variant.is_teacher]
    why = "not estimated with an interval" if comparison.record.estimated else "not measured"
    if comparison.student is None and students:
        why = f"not measured, {students[0].reason}"
    return Line(name, limit, allowed, None, None, f"{why}, {said}.")


def budget_entry(record: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
    """Return what a record keeps of its budget: `limits` by name, and `lines`."""
    return {
        "limits": budget.limits(),
        "lines": [dataclasses.asdict(line) for line in check_budget(record, budget)],
    }


def enforce_records(records: Sequence[Mapping[str, Any]]) -> None:
    """Check records that carry a budget or were compared with a baseline.

    Args:
        records: bench records, with `budget` (see `budget_entry`) and `against_baseline` (see `bench.baseline`) or without.

    Raises:
        BudgetError: a limit was missed, or a number is worse than its baseline.
    """
    from bertemd_deploy.report.gates import missed_lines, regressions
    from bertemd_deploy.report.reading import named

    found = []
    for record in named(records):
        found += [f"{record.title}: {line.get('name')}, {line.get('words')}" for line in missed_lines(record)]
        found += [f"{record.title}: regression, {line.get('words')}" for line in regressions(record)]
    if found:
        listed = "\n".join(f"  - {line}" for line in found)
        raise BudgetError(
            f"{len(found)} line(s) of budget or baseline missed:\n{listed}\n"
            "Take a smaller student, a faster graph or another device, or change the limit (budget in the recipe, --max-... on "
            "the command line) or the baseline."
        )
