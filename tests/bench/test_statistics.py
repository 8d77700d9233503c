from __future__ import annotations

import numpy as np
import pytest

from bertemd_deploy.bench import statistics
from bertemd_deploy.bench.statistics import change_point, speedup, summarize


def test_summarize_of_hand_made_samples():
    summary = summarize([[1.0, 2.0], [3.0, 4.0, 5.0]])
    assert summary["p50"] == 3.0
    assert summary["p90"] == pytest.approx(4.6)
    assert summary["p95"] == pytest.approx(4.8)
    assert summary["mean"] == 3.0
    assert summary["std"] == pytest.approx(np.sqrt(2.5))
    assert (summary["min"], summary["max"], summary["n"]) == (1.0, 5.0, 5)
    assert summary["samples"] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert summary["samples_per_round"] == [2, 3]


@pytest.mark.parametrize(("count", "measured"), [(99, False), (100, True)])
def test_p99_needs_a_hundred_samples(count, measured):
    summary = summarize([list(np.arange(1.0, count + 1))])
    assert (summary["p99"] is not None) is measured


def test_one_sample_has_no_spread():
    summary = summarize([[7.0]])
    assert summary["std"] is None
    assert summary["p50"] == 7.0


@pytest.mark.parametrize("rounds", [[], [[]]])
def test_summarize_refuses_nothing(rounds):
    with pytest.raises(ValueError, match="no samples"):
        summarize(rounds)


@pytest.mark.parametrize("sample", [float("nan"), float("inf"), -1.0])
def test_summarize_refuses_impossible_times(sample):
    with pytest.raises(ValueError, match="negative or not finite"):
        summarize([[1.0, sample]])


def test_speedup_of_constant_samples_is_exact():
    assert speedup([[6.0, 6.0]] * 3, [[2.0, 2.0, 2.0]] * 3, seed=0) == {"p50": 3.0, "ci95": [3.0, 3.0], "claimed": True}


def test_speedup_that_could_be_none_is_not_claimed():
    generator = np.random.default_rng(1)
    rounds = generator.normal(10.0, 1.0, size=(2, 5, 20))
    found = speedup(rounds[0].tolist(), rounds[1].tolist(), seed=0)
    assert found["ci95"][0] < 1.0 < found["ci95"][1]
    assert found["claimed"] is False


def test_slowdown_is_not_claimed():
    found = speedup([[1.0, 1.1]] * 3, [[2.0, 2.1]] * 3, seed=0)
    assert found["ci95"][1] < 1.0
    assert found["claimed"] is False


def test_interval_covers_the_true_ratio_about_as_often_as_it_says():
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(100):
        drift = generator.normal(0.0, 0.05, size=(8, 1))  # hits both models of a round alike
        slow = 4.0 * np.exp(drift + generator.normal(0.0, 0.1, size=(8, 15)))
        fast = 2.0 * np.exp(drift + generator.normal(0.0, 0.1, size=(8, 15)))
        low, high = speedup(slow.tolist(), fast.tolist(), seed=trial, resamples=300)["ci95"]
        covered += low <= 2.0 <= high
    assert covered >= 85


def test_the_same_rounds_are_drawn_for_both_models():
    drifting = [[10.0] * 5, [20.0] * 5, [40.0] * 5]
    halved = [[value / 2 for value in part] for part in drifting]
    assert speedup(drifting, halved, seed=0)["ci95"] == [2.0, 2.0]


def test_rounds_of_unequal_size_are_weighted_by_their_samples():
    found = speedup([[8.0] * 3, [8.0] * 2], [[4.0] * 30, [1.0] * 2], seed=0)
    low, high = found["ci95"]
    assert low <= found["p50"] == 2.0 <= high == 8.0


def test_same_seed_gives_the_same_interval():
    slow, fast = [[3.0, 3.5, 4.0]] * 4, [[1.0, 1.5, 2.0]] * 4
    assert speedup(slow, fast, seed=5) == speedup(slow, fast, seed=5)
    assert speedup(slow, fast, seed=5)["p50"] == pytest.approx(3.5 / 1.5)


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [([[4.0]], [[2.0]]), ([[4.0] * 9], [[2.0] * 9]), ([[4.0] * 9] * 2, [[2.0] * 2] * 2)],
    ids=["one sample", "one round", "four samples"],
)
def test_too_few_samples_have_no_interval(baseline, candidate):
    assert speedup(baseline, candidate, seed=0) == {"p50": 2.0, "ci95": None, "claimed": False}


@pytest.mark.parametrize(("baseline", "candidate"), [([[1.0]], [[1.0], [1.0]]), ([[1.0], []], [[1.0], [1.0]])])
def test_speedup_needs_the_same_rounds(baseline, candidate):
    with pytest.raises(ValueError, match="same number of rounds"):
        speedup(baseline, candidate, seed=0)


@pytest.mark.parametrize(
    ("rounds", "p50", "p95"),
    [
        ([[1.0, 2.0]] * 2, False, False),
        ([[1.0] * 200], False, False),
        ([[1.0]] * 5, True, False),
        ([[1.0, 2.0, 3.0]] * 2, True, False),
        ([[1.0] * 35, [1.0] * 36], True, False),
        ([[1.0] * 36] * 2, True, True),
    ],
    ids=["four samples", "one round", "one sample per round", "six samples", "71 samples", "72 samples"],
)
def test_intervals_need_rounds_and_samples(rounds, p50, p95):
    summary = summarize(rounds)
    assert (summary["p50_ci95"] is not None, summary["p95_ci95"] is not None) == (p50, p95)


def test_interval_of_equal_samples_is_a_point():
    summary = summarize([[2.5] * 40] * 3)
    assert (summary["p50_ci95"], summary["p95_ci95"]) == ([2.5, 2.5], [2.5, 2.5])


def test_interval_of_rounds_that_differ_is_as_wide_as_they_are_apart():
    low, high = summarize([[10.0] * 9, [20.0] * 9, [40.0] * 9])["p50_ci95"]
    assert (low, high) == (10.0, 40.0)  # within a round there is no spread at all


def test_intervals_cover_the_true_percentiles_about_as_often_as_they_say():
    generator = np.random.default_rng(3)
    covered = {50: 0, 95: 0}
    truth = {50: 2.0, 95: 2.0 * np.exp(1.6449 * np.hypot(0.03, 0.1))}
    for trial in range(100):
        drift = generator.normal(0.0, 0.03, size=(8, 1))
        samples = 2.0 * np.exp(drift + generator.normal(0.0, 0.1, size=(8, 20)))
        summary = summarize(samples.tolist(), seed=trial)
        for level, true in truth.items():
            low, high = summary[f"p{level}_ci95"]
            covered[level] += low <= true <= high
    assert min(covered.values()) >= 85


def test_intervals_go_by_the_seed():
    rounds = np.random.default_rng(0).lognormal(size=(4, 20)).tolist()
    assert summarize(rounds, seed=1)["p50_ci95"] == summarize(rounds, seed=1)["p50_ci95"]
    assert summarize(rounds, seed=1)["p50_ci95"] != summarize(rounds, seed=2)["p50_ci95"]


def test_a_round_cut_short_to_nothing_does_not_count():
    assert summarize([[1.0] * 9, []])["p50_ci95"] is None


def test_a_bootstrap_in_parts_is_the_same_as_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    rounds = [generator.lognormal(size=size).tolist() for size in (30, 5, 40)]
    at_once = summarize(rounds)
    monkeypatch.setattr(statistics, "MOST_DRAWN", 1)
    assert summarize(rounds) == at_once


def test_percentiles_of_padded_rows_are_those_of_numpy():
    generator = np.random.default_rng(0)
    counts = np.array([1, 2, 7, 20])
    values = generator.lognormal(size=(4, 20))
    expected = [
        [np.percentile(row[:count], level) for row, count in zip(values, counts, strict=True)] for level in (50, 95)
    ]
    values[np.arange(20) >= counts[:, None]] = np.inf
    np.testing.assert_allclose(statistics._percentiles(values, counts, levels=[50, 95]), expected)


# ---- where a series settles


@pytest.mark.parametrize(
    ("values", "begin"),
    [
        ([5.0], 0),
        ([5.0] * 8, 0),
        ([100.0, 50.0, 10.0, 10.0, 10.0, 10.0], 2),
        ([10.3, 10.0, 10.0, 10.0, 10.0, 10.0], 0),
        ([12.0, 10.0, 10.0, 10.0, 10.0, 10.0], 1),
        ([1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0], 4),
        ([1.0] * 6 + [2.0] * 6 + [1.0] * 6, 12),
    ],
    ids=["one", "constant", "falling", "below the tolerance", "slow first", "outlier", "there and back"],
)
def test_change_point_of_hand_made_series(values, begin):
    assert change_point(values) == begin


def test_no_values_have_no_change_point():
    with pytest.raises(ValueError, match="no values"):
        change_point([])


def test_noise_alone_is_seldom_a_change():
    generator = np.random.default_rng(4)
    found = [change_point(generator.normal(10.0, 0.8, size=24).tolist()) for _ in range(200)]
    assert sum(begin > 0 for begin in found) <= 20


def test_a_change_is_found_in_noise():
    generator = np.random.default_rng(5)
    near = 0
    for _ in range(100):
        values = generator.normal(10.0, 0.3, size=20)
        values[:6] *= 1.3
        near += abs(change_point(values.tolist()) - 6) <= 1
    assert near >= 95


def test_the_scale_of_a_series_does_not_matter():
    values = np.random.default_rng(6).normal(10.0, 0.3, size=20)
    values[:5] += 4.0
    assert change_point((1e-3 * values).tolist()) == change_point((1e3 * values).tolist()) == 5
