from __future__ import annotations

import numpy as np
import pytest

from bertemd_deploy.bench.statistics import speedup, summarize


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
    found = speedup([[8.0] * 2, [8.0] * 2], [[4.0] * 30, [1.0] * 2], seed=0)
    low, high = found["ci95"]
    assert low <= found["p50"] == 2.0 <= high == 8.0


def test_same_seed_gives_the_same_interval():
    slow, fast = [[3.0, 3.5, 4.0]] * 4, [[1.0, 1.5, 2.0]] * 4
    assert speedup(slow, fast, seed=5) == speedup(slow, fast, seed=5)
    assert speedup(slow, fast, seed=5)["p50"] == pytest.approx(3.5 / 1.5)


def test_single_samples_have_no_interval():
    assert speedup([[4.0]], [[2.0]], seed=0) == {"p50": 2.0, "ci95": None, "claimed": False}


@pytest.mark.parametrize(("baseline", "candidate"), [([[1.0]], [[1.0], [1.0]]), ([[1.0], []], [[1.0], [1.0]])])
def test_speedup_needs_the_same_rounds(baseline, candidate):
    with pytest.raises(ValueError, match="same number of rounds"):
        speedup(baseline, candidate, seed=0)
