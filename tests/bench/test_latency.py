from __future__ import annotations

import gc
import random

import pytest

from bertemd_deploy.bench.latency import MOST_WARM_UP_CALLS, WINDOW, paced_turn, timed_turn, warm_up


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


def test_warm_up_ends_four_windows_after_the_last_change():
    clock = Clock(*[0.100] * WINDOW, *[0.050] * WINDOW, 0.010)
    done = warm_up([clock.call], seconds=100.0, clock=clock)
    # Windows: 100, 50, 10, 10, 10, 10 ms.
    assert done.calls == clock.made == 6 * WINDOW
    assert done.steady
    assert done.settled_after == 2 * WINDOW
    assert done.median_ms == pytest.approx(10.0)


def test_warm_up_goes_on_while_the_time_drifts():
    clock = Clock(*[0.100 * 0.98**at for at in range(60)], 0.100 * 0.98**60)
    done = warm_up([clock.call], seconds=100.0, clock=clock)
    assert done.steady
    assert done.calls > 60
    assert done.median_ms == pytest.approx(100 * 0.98**60, rel=0.05)


def test_warm_up_in_noise_becomes_steady_at_the_new_level():
    generator = random.Random(0)
    clock = Clock(*[0.030] * 12, *[0.010 * generator.uniform(0.95, 1.05) for _ in range(188)])
    done = warm_up([clock.call], seconds=100.0, clock=clock)
    assert done.steady
    assert done.settled_after in (10, 15)
    assert done.median_ms == pytest.approx(10.0, rel=0.05)


def test_warm_up_that_never_settles_is_capped_by_calls():
    clock = Clock(*[1.1**at for at in range(MOST_WARM_UP_CALLS)])
    done = warm_up([clock.call], seconds=1e12, clock=clock)
    assert (done.calls, done.steady, done.settled_after) == (MOST_WARM_UP_CALLS, False, None)


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


def test_turn_counts_the_joules_between_its_first_and_last_call():
    readings = iter([100.0, 102.5])
    made = []
    turn = timed_turn([lambda: made.append(1)] * 2, lead=True, joules=lambda: made.append(0) or next(readings))
    assert turn.energy_joules == 2.5
    assert made == [1, 0, 1, 1, 0]  # the untimed call is not counted


@pytest.mark.parametrize("readings", [(None, None), (1.0, None), (None, 1.0)])
def test_a_counter_that_cannot_be_read_gives_no_joules(readings):
    assert timed_turn([int], lead=False, joules=iter(readings).__next__).energy_joules is None


def test_garbage_collection_is_off_inside_and_on_again_after_an_error():
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timed_turn([fail], lead=False)
    assert seen == [False]
    assert gc.isenabled()


class Sleeper(Clock):
    """A clock that sleeping moves too, each time by `late` seconds more than asked; sleeping costs CPU time."""

    def __init__(self, *seconds: float, late: float = 0.0, share: float = 0.0) -> None:
        super().__init__(*seconds)
        self.late, self.share, self.cpu = late, share, 0.0
        self.began: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late
        self.cpu += self.share * (seconds + self.late)

    def call(self) -> None:
        self.began.append(self.now)
        super().call()
        self.cpu += 5.0

    def run(self, count: int):
        return paced_turn(
            [self.call] * count, interval_seconds=0.1, clock=self, sleep=self.sleep, cpu_clock=lambda: self.cpu
        )


def test_paced_requests_begin_with_the_intervals():
    clock = Sleeper(0.05, 0.02, 0.03, 0.02)
    paced = clock.run(3)
    assert clock.began == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert paced.samples_ms == pytest.approx([20.0, 30.0, 20.0])
    assert paced.idle_seconds == pytest.approx(0.05 + 0.08 + 0.07)


def test_a_slow_model_is_asked_again_at_the_next_beginning():
    clock = Sleeper(0.13)
    paced = clock.run(3)
    assert clock.began == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert paced.samples_ms == pytest.approx([130.0] * 3)


def test_waking_late_is_not_part_of_a_sample():
    paced = Sleeper(0.02, late=0.015).run(2)
    assert paced.samples_ms == pytest.approx([20.0, 20.0])


def test_cpu_time_counts_in_the_pauses_only():
    paced = Sleeper(0.02, share=0.5).run(4)
    assert paced.idle_cpu_seconds == pytest.approx(0.5 * paced.idle_seconds)


def test_really_paced_requests_wait():
    paced = paced_turn([lambda: None] * 2, interval_seconds=0.02)
    assert len(paced.samples_ms) == 2
    assert 0.0 <= paced.idle_cpu_seconds < paced.idle_seconds <= 10.0
