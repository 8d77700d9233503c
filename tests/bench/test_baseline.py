from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from tiny_record import build_record, estimated, held, other_student

from bertemd_deploy.bench.baseline import baseline_entry, compare_baseline, with_baseline
from bertemd_deploy.bench.statistics import summarize
from bertemd_deploy.budget import enforce_records
from bertemd_deploy.errors import ArtifactError, BudgetError


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return build_record()


@pytest.fixture
def record(stored) -> dict[str, Any]:
    return copy.deepcopy(stored)


def slow_down(record: dict[str, Any], factor: float, *, model: str = "student") -> None:
    for entry in record["measurements"]:
        if entry["model"] == model:
            samples = factor * np.array(entry["latency_ms"]["samples"])
            sizes = np.cumsum(entry["latency_ms"]["samples_per_round"])[:-1]
            entry["latency_ms"] = summarize([part.tolist() for part in np.split(samples, sizes)])


def test_another_run_of_the_same_is_no_regression(stored) -> None:
    assert compare_baseline(build_record(seed=1), stored) == []
    assert compare_baseline(stored, stored) == []


def test_slower_beyond_the_noise_is_flagged_in_every_graph(record, stored) -> None:
    slow_down(record, 1.3)
    found = compare_baseline(record, stored)
    assert {one.model for one in found} == {
        "Student fp32", "Student int8", "Student fp32, fused", "Student int8, fused",
    }  # fmt: skip
    first = next(one for one in found if one.model == "Student int8, fused" and "batch 1" in one.what)
    assert first.change == pytest.approx(1.3, rel=1e-3)
    assert first.noise is not None
    assert first.low is not None
    assert first.low > 1 + first.noise
    assert first.words.startswith("p50 of Student int8, fused (batch 1, replay of real lengths, 2 threads) is ")
    assert ": 1.30× as long (interval " in first.words


def test_a_little_slower_is_noise(record, stored) -> None:
    slow_down(record, 1.04)
    assert compare_baseline(record, stored) == []


def test_a_faster_one_is_no_regression(record, stored) -> None:
    slow_down(record, 0.5)
    assert compare_baseline(record, stored) == []


def test_a_slower_machine_is_seen_by_the_teacher(record, stored) -> None:
    slow_down(record, 1.3)
    slow_down(record, 1.35, model="teacher")
    assert compare_baseline(record, stored) == []
    record["artifact"]["teacher"]["sha256"] = "cd" * 32  # another teacher tells nothing of the machine
    assert compare_baseline(record, stored)


def test_records_without_intervals_are_resampled(record, stored) -> None:
    slow_down(record, 1.3)
    expected = [one.words for one in compare_baseline(record, stored)]
    old = copy.deepcopy(stored)
    for entry in old["measurements"]:
        del entry["latency_ms"]["p50_ci95"], entry["latency_ms"]["p95_ci95"]
    assert [one.words for one in compare_baseline(record, old)] == expected
    for entry in old["measurements"]:
        entry["latency_ms"]["samples"] = None
    with pytest.raises(
        ArtifactError, match=r"no latency can be compared, where both were measured a latency lacks its inte"
    ):
        compare_baseline(record, old)


def only(record: dict[str, Any], *graphs: str) -> None:
    """Leave out all student graphs but these."""
    for key in ("models", "measurements"):
        record[key] = [one for one in record[key] if one["model"] == "teacher" or one["graph"] in graphs]


def test_a_graph_that_is_gone_is_a_regression_and_defaults_are_compared(record, stored) -> None:
    only(record, "fp32", "fused")
    found = compare_baseline(record, stored)
    assert [one.words for one in found[:2]] == [
        "Student int8 is in the baseline and missing from the record: export and measure it as well.",
        "Student int8, fused is in the baseline and missing from the record: export and measure it as well.",
    ]
    assert {one.model for one in found[2:]} == {"Student fp32, fused, was Student int8, fused"}
    assert {one.what.split(",")[0] for one in found[2:]} == {"p50", "peak memory", "size"}
    assert found[2].words.startswith(
        "p50 of the default graph (Student fp32, fused, was Student int8, fused) (batch 1, replay of real lengths, 2 threads)"
    )
    assert compare_baseline(stored, record) == []  # new graphs, and a faster default


def test_no_graph_in_common_is_no_pass(record, stored) -> None:
    old = copy.deepcopy(stored)
    only(record, "fp32")
    only(old, "int8", "fused", "fused-int8")
    found = compare_baseline(record, old)
    assert [one.what for one in found[:3]] == ["whether it is there"] * 3
    assert "p50, batch 1, replay of real lengths, 2 threads" in {one.what for one in found}


def test_no_cell_in_common_is_refused(record, stored) -> None:
    slow_down(record, 10)
    for entry in record["measurements"]:
        entry["threads"] += 2
    with pytest.raises(ArtifactError) as caught:
        compare_baseline(record, stored, where="old.json")
    graphs = "(Student fp32, Student int8, Student fp32, fused, Student int8, fused)"
    assert str(caught.value) == (
        "old.json: no latency can be compared, no graph was measured alike in both. The record has batch 1/8, length "
        f"16/32/64/128/replay, threads 3/4 {graphs}; the baseline has batch 1/8, length 16/32/64/128/replay, threads 1/2 "
        f"{graphs}. Measure with the settings of the baseline, or make a new baseline."
    )


def test_the_cells_that_both_have_are_compared(record, stored) -> None:
    slow_down(record, 10)
    for entry in record["measurements"]:
        entry["threads"] *= 2  # 2 and 4, where the baseline has 1 and 2
    found = compare_baseline(record, stored)
    assert {one.what for one in found if one.what.startswith("p50, batch 1,")} == {
        "p50, batch 1, replay of real lengths, 2 threads"
    }


def test_a_student_that_no_longer_runs_at_all_is_a_regression(record, stored) -> None:
    for entry in record["models"]:
        if entry["model"] == "student":
            entry |= {"failed": {"reason": "out of memory"}, "peak_rss_bytes": None, "metrics": {}}
    record["measurements"] = [entry for entry in record["measurements"] if entry["model"] == "teacher"]
    assert [one.what for one in compare_baseline(record, stored)] == ["whether it runs"] * 4
    with pytest.raises(ArtifactError, match=r"The record has none; the baseline has none\. Measure with"):
        compare_baseline(record, record)


def test_memory_and_size(record, stored) -> None:
    for entry in record["models"]:
        if entry["graph"] == "int8":
            entry["peak_rss_bytes"] *= 1.5
            entry["model_bytes"] *= 1.1
        if entry["graph"] == "fused-int8":
            entry["peak_rss_bytes"] *= 1.03
    found = {one.what: one for one in compare_baseline(record, stored)}
    assert set(found) == {"peak memory", "size"}
    assert found["peak memory"].words == (
        "peak memory of Student int8 is 196 MB, was 131 MB: 1.50× as much (noise up to 1.05×)."
    )


def test_a_score_falls_beyond_the_choice_of_examples(record, stored) -> None:
    for entry in record["models"]:
        if entry["graph"] == "int8":
            entry["metrics"]["accuracy"] = 0.90
        if entry["graph"] == "fused-int8":
            entry["metrics"]["accuracy"] = 0.93  # 1.1 points, of 872 examples
    (found,) = compare_baseline(record, stored)
    assert (found.model, found.what, found.before, found.after) == ("Student int8", "accuracy", 0.94, 0.9)
    assert "−4.0 points (95% interval −6." in found.words


def test_a_graph_that_no_longer_fits(record, stored) -> None:
    for entry in record["models"]:
        if entry["graph"] == "fp32" and entry["model"] == "student":
            entry |= {"failed": {"reason": "out of memory"}, "peak_rss_bytes": None, "metrics": {}}
    record["measurements"] = [
        entry for entry in record["measurements"] if (entry["model"], entry["graph"]) != ("student", "fp32")
    ]
    (found,) = compare_baseline(record, stored)
    assert found.words == "Student fp32 was measured in the baseline and now could not be: out of memory."
    assert found.change is None


def test_estimates_are_compared_by_their_intervals(stored) -> None:
    now, was = estimated(stored, factor=3.0), estimated(stored, factor=2.0)
    assert compare_baseline(now, was) == []
    found = compare_baseline(estimated(stored, factor=6.0), was)
    assert found
    assert " is estimate " in found[0].words


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 7}, r"old\.json: schema_version is 7, this bertemd reads 1"),
        ({"device": {"name": "other", "kind": "measured", "cpu": "AMD EPYC"}}, r"old\.json: its device is 'other'"),
        (
            {"artifact": {"task": {"name": "rte"}}},
            r"old\.json: its task is 'rte', that of the record is 'sst2'\. A baseline is",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(stored, change, said) -> None:
    with pytest.raises(ArtifactError, match=said):
        compare_baseline(stored, stored | change, where="old.json")


def test_kinds_are_not_compared_with_one_another(stored) -> None:
    name = stored["device"]["name"]
    with pytest.raises(ArtifactError, match=r"its kind of numbers is 'estimated', that of the record is 'measured'"):
        compare_baseline(stored, estimated(stored, name=name))


def test_a_baseline_goes_to_the_record_of_its_device(record, stored) -> None:
    slow_down(record, 1.5)
    found = with_baseline([held(stored), record], stored, where="old.json")
    assert "against_baseline" not in found[0]
    assert found[1]["against_baseline"]["started"] == stored["started"]
    assert found[1]["against_baseline"]["regressions"]
    with pytest.raises(ArtifactError, match=r"old\.json: is of the device AMD EPYC .* Name a baseline of one of these"):
        with_baseline([held(stored)], stored, where="old.json")


def test_of_several_students_the_baselines_own_is_compared(record, stored) -> None:
    found = with_baseline([other_student(record), record], stored, where="old.json")
    assert ["against_baseline" in one for one in found] == [False, True]
    (alone,) = with_baseline([other_student(record)], stored, where="old.json")
    assert {one["what"] for one in alone["against_baseline"]["regressions"]} >= {"size"}


def test_a_regression_is_enforced(record, stored) -> None:
    enforce_records([record | {"against_baseline": baseline_entry(record, stored)}])
    slow_down(record, 1.5)
    with pytest.raises(BudgetError, match=r"regression, p50 of Student fp32 "):
        enforce_records([record | {"against_baseline": baseline_entry(record, stored)}])
