from __future__ import annotations

from typing import Any

from bertemd_deploy.report.gates import (
    baseline_sentence,
    baseline_table,
    budget_sentence,
    budget_table,
    budget_word,
    stands,
)
from bertemd_deploy.report.records import Record


def with_budget(record: dict[str, Any], *passed: bool | None) -> Record:
    names = ("p95 latency", "peak memory", "score kept")
    lines = [
        {"name": name, "passed": one, "words": f"{name}: 3, allowed 2."}
        for name, one in zip(names, passed, strict=False)
    ]
    return Record(record | {"budget": {"limits": {}, "lines": lines}}, "device")


def test_no_budget_no_words(empty) -> None:
    record = Record(empty, "device")
    assert (budget_sentence(record), budget_table(record), budget_word(record), stands(record)) == (
        None,
        None,
        "",
        True,
    )
    assert (baseline_sentence(record), baseline_table(record)) == (None, None)


def test_kept(empty) -> None:
    record = with_budget(empty, True, True)
    assert budget_sentence(record) == "Budget: kept, p95 latency and peak memory."
    assert (budget_word(record), stands(record)) == ("kept", True)


def test_missed_and_not_measured_are_both_missed(empty) -> None:
    record = with_budget(empty, True, False, None)
    assert budget_sentence(record) == "Budget: missed on peak memory and score kept."
    assert (budget_word(record), stands(record)) == ("missed (2 of 3)", False)
    table = budget_table(record)
    assert table is not None
    assert [(line.cells[:2], line.kind) for line in table.lines] == [
        (["p95 latency", "kept"], "kept"),
        (["peak memory", "missed"], "missed"),
        (["score kept", "missed"], "missed"),
    ]


def test_regressions_are_listed(empty) -> None:
    regression = {"model": "Student int8", "what": "p50", "words": "slower."}
    against = {"started": "2026-01-02T03:04:05+00:00", "regressions": [regression]}
    record = Record(empty | {"against_baseline": against}, "device")
    assert baseline_sentence(record) == "Worse than the baseline of 2026-01-02 in 1 number."
    assert not stands(record)
    table = baseline_table(record)
    assert table is not None
    assert table.lines[0].cells == ["Student int8", "p50", "slower."]


def test_no_regression_is_said(empty) -> None:
    record = Record(empty | {"against_baseline": {"started": None, "regressions": []}}, "device")
    assert (
        baseline_sentence(record) == "No regression against the baseline: nothing compared is worse beyond its noise."
    )
    assert stands(record)


def test_what_is_no_line_is_no_line(empty) -> None:
    record = Record(empty | {"budget": {"lines": ["x", None]}, "against_baseline": {"regressions": "x"}}, "device")
    assert (budget_sentence(record), stands(record)) == (None, True)
