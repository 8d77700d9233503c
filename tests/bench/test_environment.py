from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest

from bertemd_deploy.bench import environment
from bertemd_deploy.bench.environment import OtherWork, conditions, device, memory_limit, parse_cpuinfo, versions

X86 = """processor\t: 0
model name\t: Intel(R) Xeon(R) Gold
cpu MHz\t\t: 2100.500
flags\t\t: fpu sse2 avx avx2 avx512f avx512_vnni amx_int8 hypervisor

processor\t: 1
model name\t: Intel(R) Xeon(R) Gold
flags\t\t: fpu sse2 avx avx2 avx512f avx512_vnni amx_int8
"""
PI_4 = """processor\t: 0
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU part\t: 0xd08

Model\t\t: Raspberry Pi 4 Model B Rev 1.4
"""
BIG_LITTLE = """processor\t: 0
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 1
Features\t: fp asimd asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd41

processor\t: 2
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xfff
"""


def test_x86_name_and_flags_that_matter():
    assert parse_cpuinfo(X86) == ("Intel(R) Xeon(R) Gold", ["avx", "avx2", "avx512f", "avx512_vnni", "amx_int8"])


def test_arm_part_number_becomes_a_name():
    assert parse_cpuinfo(PI_4) == ("Cortex-A72", ["asimd"])


def test_big_little_names_all_cores_and_only_common_flags():
    assert parse_cpuinfo(BIG_LITTLE) == ("Cortex-A55 + Cortex-A78 + Arm part 0xfff", ["asimd", "asimddp"])


def test_cpuinfo_that_tells_nothing_is_none():
    assert parse_cpuinfo("processor : 0\n") == (None, None)


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "1073741824\n", 2**30),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "536870912\n", 2**29),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
    ],
)
def test_memory_limit_of_both_cgroup_versions(tmp_path, name, text, limit):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert memory_limit(tmp_path) == limit


def test_memory_limit_without_cgroups_is_none(tmp_path):
    assert memory_limit(tmp_path) is None


def fake_board(root):
    files = {
        "proc/cpuinfo": PI_4,
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1800000\n",
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        "sys/class/thermal/thermal_zone1/temp": "51000\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": "1073741824\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_device_of_a_board(tmp_path):
    fake_board(tmp_path)
    found = device(tmp_path)
    assert found["name"].startswith("Raspberry Pi 4 Model B Rev 1.4 (")
    assert (found["kind"], found["cpu"], found["isa"]) == ("measured", "Cortex-A72", ["asimd"])
    assert found["governor"] == "ondemand"
    assert found["frequency"] == {"current_mhz": 600.0, "max_mhz": 1800.0}
    assert found["container"] == {"cpu_quota": 1.5, "memory_limit_bytes": 2**30}


def test_what_the_system_does_not_tell_is_none(tmp_path):
    found = device(tmp_path)
    assert found["isa"] is None
    assert found["governor"] is None
    assert found["frequency"] == {"current_mhz": None, "max_mhz": None}
    assert found["container"] == {"cpu_quota": None, "memory_limit_bytes": None}
    assert found["memory_bytes"] > 2**20


def test_device_holds_no_host_name_and_is_json():
    text = json.dumps(device(), allow_nan=False)
    host = platform.node()
    assert len(host) < 4 or host not in text


def test_conditions_of_a_board(tmp_path):
    fake_board(tmp_path)
    found = conditions(tmp_path)
    assert found["temperature_celsius"] == 51.0
    assert found["frequency_mhz"] == 600.0
    assert found["throttled"] == "50005"


def test_conditions_unknown_are_none(tmp_path):
    found = conditions(tmp_path)
    del found["load_1m"]  # of the system itself
    assert set(found.values()) == {None}


def test_the_clock_is_that_of_the_fastest_core(tmp_path):
    fake_board(tmp_path)
    other = tmp_path / "sys/devices/system/cpu/cpu3/cpufreq"
    other.mkdir(parents=True)
    (other / "scaling_cur_freq").write_text("1500000\n")
    assert conditions(tmp_path)["frequency_mhz"] == 1500.0


def test_the_clock_without_cpufreq_is_read_from_cpuinfo(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(X86 + "cpu MHz\t\t: 3200.25\n")
    assert conditions(tmp_path)["frequency_mhz"] == 3200.25


def test_counters_since_boot(tmp_path):
    files = {
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "2\n",
        "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "3\n",
        "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": "4\n",
        "sys/fs/cgroup/cpu.stat": "usage_usec 9\nnr_throttled 2\nthrottled_usec 1500000\n",
        "proc/stat": f"cpu  1 2 3 4 5 6 7 {2 * os.sysconf('SC_CLK_TCK')} 0 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = conditions(tmp_path)
    assert (found["throttle_count"], found["quota_throttled_seconds"], found["stolen_cpu_seconds"]) == (9, 1.5, 2.0)


def test_versions_of_absent_packages_are_none():
    found = versions(["numpy", "no-such-package-as-this"])
    assert found["python"] == platform.python_version()
    assert found["numpy"].count(".") >= 1
    assert found["no-such-package-as-this"] is None


class FakePsutil:
    """Stands for psutil: two CPUs whose user seconds are set by hand, processes with hand-set CPU seconds."""

    class Times(tuple):
        user, idle, iowait = property(lambda s: s[0]), property(lambda s: s[1]), property(lambda s: s[2])

    def __init__(self) -> None:
        self.user = [0.0, 0.0, 0.0]
        self.own = 0.0

    def cpu_times(self, *, percpu):
        assert percpu
        return [self.Times((user, 1000.0 - user, 5.0)) for user in self.user]

    def Process(self, pid=None):
        outer = self

        class Process:
            def cpu_times(self):
                return (outer.own / 2, 0.0, 99.0, 99.0)

        return Process()


def test_other_work_leaves_out_our_workers_and_cpus_we_may_not_use(monkeypatch):
    fake = FakePsutil()
    monkeypatch.setitem(__import__("sys").modules, "psutil", fake)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(environment.time, "monotonic", iter([100.0, 110.0]).__next__)
    watch = OtherWork([12345])
    assert watch.cpus == 2
    fake.user = [10.0, 10.0, 5.0]  # 15 busy seconds on ours, CPU 1 is not ours
    fake.own = 8.0  # of which this process and its worker used 8
    assert watch.cpus_busy() == pytest.approx(0.7)


def test_our_cpus_are_those_of_the_first_worker(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psutil", FakePsutil())
    monkeypatch.setattr(os, "sched_getaffinity", {0: {0, 1, 2}, 77: {1}, 78: {1}}.__getitem__, raising=False)
    assert OtherWork([77, 78]).cpus == 1
    assert OtherWork([]).cpus == 3


def test_other_work_is_never_negative(monkeypatch):
    fake = FakePsutil()
    monkeypatch.setitem(__import__("sys").modules, "psutil", fake)
    watch = OtherWork([os.getpid()])
    fake.own = 3.0
    assert watch.cpus_busy() == 0.0


@pytest.mark.parametrize(
    ("precision", "flags", "expected"),
    [
        ("auto", "fpu avx2 avx512f avx512_bf16", True),
        ("auto", "fpu avx2 amx_bf16 amx_int8", True),
        ("auto", "fpu avx2 avx512f", False),
        ("bfloat16", "fpu", True),
        ("float32", "fpu avx512_bf16", False),
    ],
)
def test_training_multiplies_in_bfloat16_where_asked_or_where_the_processor_has_it(
    tmp_path: Path, precision: str, flags: str, expected: bool
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"model name : Some CPU\nflags : {flags}\n")
    assert environment.uses_bfloat16(precision, root=tmp_path) is expected
