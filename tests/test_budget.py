from __future__ import annotations

import pytest
from tiny_record import build_record, estimated, held

from bertemd_deploy.budget import (
    Budget,
    budget_entry,
    budget_for,
    check_budget,
    enforce_records,
    read_budget,
)
from bertemd_deploy.errors import BudgetError, RecipeError
from bertemd_deploy.report.gates import budget_word
from bertemd_deploy.report.records import Record


@pytest.fixture(scope="module")
def record():
    return build_record()


def test_numbers_and_units_say_the_same() -> None:
    plain = read_budget({"max_p95_ms": 20, "max_rss_mb": 200, "max_size_mb": 25, "min_retention": 0.97})
    units = read_budget(
        {"max_p95_ms": "0.02 s", "max_rss_mb": "0.2 GB", "max_size_mb": "25000kB", "min_retention": "97 %"}
    )
    assert plain == units == {"default": Budget(20, 200, 25, 0.97)}
    assert read_budget({"max_rss_mb": "100 MiB"})["default"].max_rss_mb == pytest.approx(104.8576)
    assert read_budget({"max_p95_ms": "500 µs"})["default"].max_p95_ms == 0.5


def test_a_device_overrides_and_lifts() -> None:
    budgets = read_budget({"max_p95_ms": 20, "max_rss_mb": 200, "pi": {"max_p95_ms": "60 ms", "max_rss_mb": None}})
    assert budgets == {"default": Budget(20, 200), "pi": Budget(60)}
    assert budget_for("pi", budgets) == Budget(60)
    assert budget_for("local", budgets) == Budget(20, 200)
    assert budget_for("pi", budgets, flags={"max_p95_ms": 10.0, "max_rss_mb": None}) == Budget(10)
    assert budget_for("local", {}) is None
    assert budget_for("local", {}, flags={"min_retention": 0.9}) == Budget(min_retention=0.9)
    assert budget_for("pi", read_budget({"max_size_mb": 3, "pi": {"max_size_mb": None}})) is None


def test_all_faults_are_listed_at_once() -> None:
    section = {
        "max_p95_ms": "20 MB",
        "max_rss_mb": "200",
        "max_size_mb": True,
        "min_retention": 97,
        "max_watts": 3,
        "pi": {"max_p95_ms": -1, "speed": 2},
    }
    with pytest.raises(RecipeError) as caught:
        read_budget(section, devices=["raspberry-pi-5"])
    said = str(caught.value)
    assert caught.value.exit_code == 2
    assert said.startswith("budget: 8 fault(s) in the budget:\n")
    for fault in (
        "budget.max_p95_ms: found '20 MB' with the unit 'MB', allowed units: µs, us, ms, s",
        "budget.max_rss_mb: found '200' with no unit, allowed units: kB, MB, GB",
        "budget.max_size_mb: found bool True, allowed: a number (megabytes) or a text such as '25 MB'",
        "budget.min_retention: found 97, allowed: a share of the teacher's score above 0 and up to 1",
        "budget.max_watts: unknown limit; known: max_p95_ms, max_rss_mb, max_size_mb, min_retention, or a device's name",
        "budget.pi: unknown device; known: raspberry-pi-5",
        "budget.pi.max_p95_ms: found -1, allowed: above 0",
        "budget.pi.speed: unknown limit; known: max_p95_ms",
    ):
        assert fault in said


@pytest.mark.parametrize("value", ["fast", "1 2 ms", "", [20], {"ms": 3}, float("nan"), float("inf"), 0, "1e999 ms"])
def test_what_is_no_amount_is_refused(value) -> None:
    with pytest.raises(RecipeError, match=r"budget\.max_p95_ms|budget: 1 fault"):
        read_budget({"max_p95_ms": value})


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["large", "negative", "unprintable"])
def test_a_number_that_no_float_holds_is_refused(value) -> None:
    with pytest.raises(
        RecipeError, match=r"budget\.max_p95_ms: found a number too large to be a limit, allowed: a number"
    ):
        read_budget({"max_p95_ms": value})


def test_a_wrong_flag_names_the_command_line() -> None:
    with pytest.raises(RecipeError, match=r"command line\.max_rss_mb: found -5\.0, allowed: above 0"):
        budget_for("local", {}, flags={"max_rss_mb": -5.0})


def test_lines_of_a_measured_record(record) -> None:
    lines = {line.limit: line for line in check_budget(record, Budget(1000, 124, 14.9, 0.98))}
    assert [line.passed for line in lines.values()] == [True, True, False, True]
    assert "(batch 1, replay of real lengths, 2 threads), allowed 1,000 ms." in lines["max_p95_ms"].words
    assert lines["max_size_mb"].words == "15 MB, allowed 15 MB."
    assert (lines["max_size_mb"].found, lines["max_size_mb"].allowed) == (15.0, 14.9)
    assert lines["min_retention"].words == "98.7% of the teacher's accuracy (0.941), allowed 98.0% of the teacher's."


def test_without_a_teacher_the_artifact_says_what_it_scored() -> None:
    (line,) = check_budget(build_record(teacher=False), Budget(min_retention=0.99))
    assert line.passed is False
    assert line.words.startswith("98.9% of the teacher's accuracy (0.941; the teacher's as the artifact states it)")


def test_an_estimate_is_held_to_its_upper_end(record) -> None:
    guess = estimated(record)
    (line,) = check_budget(guess, Budget(max_p95_ms=1.0))
    upper = line.found
    assert upper is not None
    (just,) = check_budget(guess, Budget(max_p95_ms=upper * 1.001))
    (below,) = check_budget(guess, Budget(max_p95_ms=upper * 0.999))
    assert (just.passed, below.passed) == (True, False)
    assert just.words.startswith("estimate ")
    memory = check_budget(guess, Budget(max_rss_mb=140))[0]
    assert (memory.passed, memory.found) == (False, pytest.approx(148.8))
    assert memory.words == "estimate 124 MB (112–149 MB), allowed 140 MB."


def test_an_estimate_without_an_interval_is_missed(record) -> None:
    guess = estimated(record)
    for entry in guess["models"]:
        entry["memory_estimate_bytes"] = {"value": 1, "how": "x"}
    (line,) = check_budget(guess, Budget(max_rss_mb=140))
    assert (line.passed, line.words) == (None, "not estimated with an interval, allowed 140 MB.")


def test_what_was_not_measured_is_missed(record) -> None:
    failed = held(record)
    failed["measurements"] = []
    for entry in failed["models"]:
        entry["failed"] = {"reason": "out of memory", "limit_bytes": 1, "peak_bytes": 1}
    lines = check_budget(failed, Budget(20, 200, 25, 0.9))
    assert [line.passed for line in lines] == [None] * 4
    assert lines[0].words == "not measured, out of memory, allowed 20.0 ms."
    assert budget_word(Record(failed | {"budget": budget_entry(failed, Budget(20))}, "x")) == "missed (1 of 1)"


def test_entry_holds_limits_and_lines(record) -> None:
    entry = budget_entry(record, Budget(max_size_mb=20))
    assert entry["limits"] == {"max_size_mb": 20}
    assert entry["lines"] == [
        {
            "name": "model size",
            "limit": "max_size_mb",
            "allowed": 20,
            "found": 15.0,
            "passed": True,
            "words": "15 MB, allowed 20 MB.",
        }
    ]


def test_enforcing_names_device_limit_and_numbers(record) -> None:
    kept = record | {"budget": budget_entry(record, Budget(max_size_mb=20))}
    enforce_records([record, kept])
    missed = estimated(record) | {"budget": budget_entry(record, Budget(max_size_mb=10))}
    with pytest.raises(BudgetError) as caught:
        enforce_records([kept, missed])
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith(
        "1 line(s) of budget or baseline missed:\n  - raspberry-pi-5 (estimated): model size, 15 MB, allowed 10 MB.\n"
    )
