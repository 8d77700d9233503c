from __future__ import annotations

from typing import Any

import pytest

from bertemd_deploy.bench.noise import drift, judge_noise
from bertemd_deploy.bench.statistics import summarize

STILL = [[1.0, 1.01, 0.99]] * 3
DRIFTING = [[1.0, 1.0, 1.0], [1.1, 1.1, 1.1], [1.2, 1.2, 1.2]]
WIDE = [[1.0, 2.0, 3.0]] * 3


def entry(rounds: list[list[float]], *, sequence: int | str = 16, disturbed: bool = False) -> dict[str, Any]:
    return {
        "batch": 1,
        "sequence": sequence,
        "threads": 1,
        "latency_ms": summarize(rounds),
        "disturbed": disturbed,
    }


def record(*entries: dict[str, Any], throttled: bool | None = None, count: int | None = None) -> dict[str, Any]:
    during = {"throttled": throttled, "throttle_count_delta": count}
    return {"measurements": list(entries), "conditions": {"during": during}}


def test_a_quiet_run():
    assert judge_noise(record(entry(STILL), entry(STILL), entry(STILL, sequence="replay"))) == {
        "noisy": False,
        "reasons": [],
    }


def test_a_run_of_nothing_is_quiet():
    assert judge_noise(record())["noisy"] is False


def test_other_programs_are_counted_by_cell():
    found = judge_noise(record(entry(STILL, disturbed=True), entry(STILL), entry(STILL, sequence=32)))
    assert found == {"noisy": True, "reasons": ["other programs took CPU time in 1 of 2 cells"]}


@pytest.mark.parametrize(
    ("count", "words"), [(None, "the processor was throttled"), (4, "the processor was throttled 4 times")]
)
def test_throttling(count, words):
    assert judge_noise(record(entry(STILL), throttled=True, count=count))["reasons"] == [words]


@pytest.mark.parametrize("rounds", [DRIFTING, DRIFTING[::-1]], ids=["slower", "faster"])
def test_drift_of_all_models(rounds):
    (reason,) = judge_noise(record(entry(rounds), entry(rounds)))["reasons"]
    assert reason == "latency changed by more than 10% from the first round to the last in 1 of 1 cells"


def test_drift_of_one_model_among_three_is_chance():
    entries = [entry(STILL), entry(DRIFTING), entry(STILL)]
    assert drift(entries) == 0.0
    assert judge_noise(record(*entries))["noisy"] is False


def test_wide_intervals():
    (reason,) = judge_noise(record(entry(WIDE), entry(STILL)))["reasons"]
    assert reason == "the 95% interval of the median is wider than 20% of it in 1 of 2 measurements"


def test_one_wide_interval_in_ten_is_chance():
    assert judge_noise(record(entry(WIDE), *[entry(STILL)] * 9))["noisy"] is False
    assert judge_noise(record(*[entry(WIDE)] * 2, *[entry(STILL)] * 9))["noisy"] is True


def test_replayed_requests_differ_in_length_and_are_not_judged():
    replayed = [entry(rounds, sequence="replay") for rounds in (DRIFTING, WIDE)]
    assert judge_noise(record(*replayed))["noisy"] is False


def test_all_reasons_stand_together():
    found = judge_noise(record(entry(DRIFTING, disturbed=True), entry(WIDE), throttled=True))
    assert [reason.split()[0] for reason in found["reasons"]] == ["other", "the", "the"]


def test_samples_rounded_to_nothing_have_no_drift():
    assert drift([entry([[0.0, 0.0], [0.0, 0.0]])]) == 0.0
