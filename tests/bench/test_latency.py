from __future__ import annotations

import gc

import pytest

from bertemd_deploy.bench.latency import MOST_WARM_UP_CALLS, WINDOW, timed_turn, warm_up


class Clock:
    """A clock that only the calls move, each by the next of `seconds` and then by the last for ever."""

    def __init__(self, *seconds: float) -> None:
        self.now = 0.0
        self.made = 0
        self.seconds = seconds

    def __call__(self) -> float:
        return self.now

    def call(self) -> None:
        self.now += self.seconds[min(self.made, len(self.seconds) - 1)]
        self.made += 1


def test_warm_up_ends_after_two_steady_changes():
    clock = Clock(*[0.100] * WINDOW, *[0.050] * WINDOW, 0.010)
    done = warm_up([clock.call], seconds=100.0, clock=clock)
    # Windows: 100, 50, 10, 10, 10 ms; the last two changes are steady.
    assert done.calls == clock.made == 5 * WINDOW
    assert done.steady
    assert done.median_ms == pytest.approx(10.0)


def test_warm_up_that_never_settles_is_capped_by_calls():
    clock = Clock(*[1.1**at for at in range(MOST_WARM_UP_CALLS)])
    done = warm_up([clock.call], seconds=1e12, clock=clock)
    assert (done.calls, done.steady) == (MOST_WARM_UP_CALLS, False)


def test_slow_warm_up_is_capped_by_time_after_two_calls():
    clock = Clock(3.0)
    done = warm_up([clock.call], seconds=0.5, clock=clock)
    assert (done.calls, done.steady, done.median_ms) == (2, False, 3000.0)


def test_warm_up_window_holds_every_call_equally_often():
    clock = Clock(0.001)
    made = {"short": 0, "long": 0}

    def short() -> None:
        made["short"] += 1
        clock.call()

    def long() -> None:
        made["long"] += 1
        for _ in range(9):
            clock.call()

    done = warm_up([short, long], seconds=100.0, clock=clock)
    assert done.steady
    assert made["short"] == made["long"] == done.calls / 2


def test_turn_times_each_call_once_in_order():
    clock = Clock(0.001, 0.002, 0.003)
    turn = timed_turn([clock.call] * 3, lead=False, clock=clock)
    assert turn.samples_ms == pytest.approx([1.0, 2.0, 3.0])


def test_leading_call_is_not_a_sample():
    clock = Clock(0.5, 0.002, 0.003)
    turn = timed_turn([clock.call] * 2, lead=True, clock=clock)
    assert turn.samples_ms == pytest.approx([2.0, 3.0])
    assert clock.made == 3


@pytest.mark.parametrize(("most_seconds", "samples"), [(None, 4), (0.015, 2), (0.001, 1)])
def test_turn_ends_early_when_it_takes_too_long(most_seconds, samples):
    clock = Clock(0.010)
    turn = timed_turn([clock.call] * 4, lead=False, most_seconds=most_seconds, clock=clock)
    assert len(turn.samples_ms) == clock.made == samples


def test_turn_counts_the_cpu_seconds_of_its_calls():
    def work() -> None:
        sum(range(300_000))

    assert timed_turn([work] * 3, lead=True).cpu_seconds > 0.0


def test_garbage_collection_is_off_inside_and_on_again_after_an_error():
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timed_turn([fail], lead=False)
    assert seen == [False]
    assert gc.isenabled()
