from __future__ import annotations

import json
from pathlib import Path

import pytest

from bertemd_deploy.bench.monitor import Monitor

CPU = "sys/devices/system/cpu"
THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"


def write(root: Path, **files: object) -> None:
    names = {
        "clock": f"{CPU}/cpu0/cpufreq/scaling_cur_freq",
        "other_clock": f"{CPU}/cpu1/cpufreq/scaling_cur_freq",
        "temperature": "sys/class/thermal/thermal_zone0/temp",
        "core_throttled": f"{CPU}/cpu0/thermal_throttle/core_throttle_count",
        "package_throttled": f"{CPU}/cpu0/thermal_throttle/package_throttle_count",
        "throttled": THROTTLED,
        "stat": "proc/stat",
        "quota": "sys/fs/cgroup/cpu.stat",
    }
    for name, content in files.items():
        path = root / names[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_happened_between_the_first_look_and_the_last(tmp_path):
    clock = Clock()
    write(tmp_path, clock=1_800_000, other_clock=600_000, temperature=48_000, core_throttled=3, package_throttled=1)
    write(tmp_path, quota="nr_periods 5\nthrottled_usec 250000")
    monitor = Monitor(tmp_path, clock=clock)
    clock.now = 1.0
    write(tmp_path, clock=600_000, other_clock=2_400_000, temperature=81_500)
    monitor.sample()
    clock.now = 2.5
    write(tmp_path, clock=900_000, other_clock=600_000, temperature=60_000, core_throttled=5)
    monitor.sample()
    write(tmp_path, quota="throttled_usec 1250000")
    record = monitor.record()
    assert record["before"]["temperature_celsius"] == 48.0
    assert record["after"]["temperature_celsius"] == 60.0
    assert record["during"] == {
        "samples": 4,
        "frequency_mhz": {"min": 900.0, "max": 2400.0},  # of the fastest core at each look
        "temperature_celsius": {"max": 81.5},
        "throttled": True,
        "throttle_count_delta": 2,
        "stolen_cpu_seconds": None,
        "quota_throttled_seconds": 1.0,
    }
    json.dumps(record, allow_nan=False)


def test_looks_are_a_second_apart(tmp_path):
    clock = Clock()
    monitor = Monitor(tmp_path, clock=clock)
    for now in (0.2, 0.9, 1.1, 1.5, 2.0, 2.2):
        clock.now = now
        monitor.sample()
    assert monitor.record()["during"]["samples"] == 4  # at 0, 1.1, 2.2 and the end


def test_what_the_system_does_not_tell_is_none(tmp_path):
    during = Monitor(tmp_path).record()["during"]
    assert during["frequency_mhz"] == {"min": None, "max": None}
    assert during["temperature_celsius"] == {"max": None}
    assert during["throttled"] is None
    assert during["throttle_count_delta"] is None
    assert during["quota_throttled_seconds"] is None


@pytest.mark.parametrize(
    ("before", "after", "throttled"),
    [
        ("0", "0", False),
        ("50000", "50000", False),
        ("0", "50000", True),
        ("10000", "50000", True),
        ("50005", "50000", True),
        ("0x0", "0x4", True),
        ("?", "?", None),
    ],
    ids=["never", "long ago", "meanwhile", "something else meanwhile", "at first", "now", "not a number"],
)
def test_a_raspberry_pi_says_when_it_was_throttled(tmp_path, before, after, throttled):
    write(tmp_path, throttled=before)
    monitor = Monitor(tmp_path)
    write(tmp_path, throttled=after)
    assert monitor.record()["during"]["throttled"] is throttled


def test_a_kernel_that_counts_none_says_no(tmp_path):
    write(tmp_path, core_throttled=7)
    during = Monitor(tmp_path).record()["during"]
    assert (during["throttled"], during["throttle_count_delta"]) == (False, 0)


def test_a_counter_that_began_anew_is_not_negative(tmp_path):
    write(tmp_path, core_throttled=7)
    monitor = Monitor(tmp_path)
    write(tmp_path, core_throttled=0)
    assert monitor.record()["during"]["throttle_count_delta"] is None


def test_stolen_time_is_read_in_seconds(tmp_path):
    write(tmp_path, stat="cpu  10 0 10 900 5 0 0 300 0 0\ncpu0 10 0 10 900 5 0 0 300 0 0")
    monitor = Monitor(tmp_path)
    write(tmp_path, stat="cpu  10 0 10 900 5 0 0 700 0 0")
    record = monitor.record()
    ticks = 300 / record["before"]["stolen_cpu_seconds"]
    assert record["during"]["stolen_cpu_seconds"] == pytest.approx(400 / ticks)
    assert ticks >= 1
