"""What a measurement was taken on: processor, cores, memory, container limits, versions, and the state around it.

Everything is read from the running system; what it does not tell is None, never 0. No host or user name is recorded.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bertemd_deploy.runtime import cgroup_cpu_quota, cpu_limits

# Instruction sets that decide how fast a transformer runs on a CPU; Linux' spelling.
ISA_FLAGS = (
    "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_bf16", "amx_int8", "asimd", "fphp", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme", "neon", "vsx",
)  # fmt: skip
# Arm Ltd. part numbers in /proc/cpuinfo, where no model name stands.
ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72",
    0xD09: "Cortex-A73", 0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse N1", 0xD0D: "Cortex-A77",
    0xD40: "Neoverse V1", 0xD41: "Cortex-A78", 0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510",
    0xD47: "Cortex-A710", 0xD49: "Neoverse N2", 0xD4F: "Neoverse V2",
}  # fmt: skip
ARM_IMPLEMENTER = 0x41
PACKAGES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers")
NO_LIMIT = 2**60  # cgroup v1 writes a number near 2^63 for "no limit"


def parse_cpuinfo(text: str) -> tuple[str | None, list[str] | None]:
    """Return the processor's name and its instruction sets of `ISA_FLAGS`, from the text of /proc/cpuinfo.

    Either is None where the text does not tell. A big.LITTLE processor is named with all its kinds of core; its
    instruction sets are those that every core has.
    """
    fields = [
        (key.strip().lower(), value.strip()) for key, _, value in (line.partition(":") for line in text.splitlines())
    ]
    names = [value for key, value in fields if key == "model name" and value]
    parts = [value for key, value in fields if key == "cpu part"]
    implementers = {value for key, value in fields if key == "cpu implementer"}
    if parts and implementers == {hex(ARM_IMPLEMENTER)}:
        names = [ARM_PARTS.get(int(part, 16), f"Arm part {part}") for part in parts]
    flags = [set(value.split()) for key, value in fields if key in {"flags", "features"}]
    common = set.intersection(*flags) if flags else None
    return (
        " + ".join(dict.fromkeys(names)) or None,
        None if common is None else [flag for flag in ISA_FLAGS if flag in common],
    )


def _first_text(*paths: Path) -> str | None:
    """Return the stripped text of the first path that can be read and is not empty."""
    for path in paths:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = path.read_text().strip("\0 \n")
            if text:
                return text
    return None


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the container's memory limit in bytes (cgroup v2, then v1), or None where there is none."""
    text = _first_text(root / "memory.max", root / "memory" / "memory.limit_in_bytes")
    if text is None or not text.isdigit() or int(text) >= NO_LIMIT:
        return None
    return int(text)


def _processor(root: Path) -> tuple[str | None, list[str] | None]:
    text = _first_text(root / "proc/cpuinfo")
    if text is not None:
        return parse_cpuinfo(text)
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip(), None
    return platform.processor() or None, None


def instruction_sets(root: Path = Path("/")) -> list[str] | None:
    """Return this processor's instruction sets of `ISA_FLAGS`, or None where the system does not tell."""
    return _processor(root)[1]


def uses_bfloat16(precision: str, root: Path = Path("/")) -> bool:
    """Say whether training of this `precision` ("auto", "float32", "bfloat16") multiplies in bfloat16 on this processor.

    "auto" does so on x86 with AVX512-BF16 or AMX, where it is about 1.7 times as fast as float32.
    """
    if precision != "auto":
        return precision == "bfloat16"
    return bool({"avx512_bf16", "amx_bf16"} & set(instruction_sets(root) or ()))


def device(root: Path = Path("/")) -> dict[str, Any]:
    """Return the facts of this machine as a record's `device`.

    Args:
        root: where `proc` and `sys` lie.

    Returns:
        name (board or processor, cores, system; no host name), kind "measured", cpu, isa (list of str), machine,
        cores and threads (int; physical and logical), memory_bytes, governor, frequency {current_mhz, max_mhz},
        container {cpu_quota (CPUs), memory_limit_bytes}, limits {affinity, quota, physical, threads}.
    """
    import psutil

    cpu, isa = _processor(root)
    cores, threads = psutil.cpu_count(logical=False), psutil.cpu_count(logical=True)
    board = _first_text(root / "proc/device-tree/model", root / "sys/firmware/devicetree/base/model")
    limits = cpu_limits()
    policy = root / "sys/devices/system/cpu/cpu0/cpufreq"
    most = _first_text(policy / "cpuinfo_max_freq")
    return {
        "name": f"{board or cpu or platform.machine()} ({cores or threads} cores, {platform.system()} {platform.machine()})",
        "kind": "measured",
        "cpu": cpu,
        "isa": isa,
        "machine": platform.machine(),
        "cores": cores,
        "threads": threads,
        "memory_bytes": int(psutil.virtual_memory().total),
        "governor": _first_text(policy / "scaling_governor"),
        "frequency": {
            "current_mhz": _frequency(root),
            "max_mhz": int(most) / 1000 if most and most.isdigit() else None,
        },
        "container": {
            "cpu_quota": cgroup_cpu_quota(root / "sys/fs/cgroup"),
            "memory_limit_bytes": memory_limit(root / "sys/fs/cgroup"),
        },
        "limits": {
            "affinity": limits.affinity,
            "quota": limits.quota,
            "physical": limits.physical,
            "threads": limits.threads,
        },
    }


def _frequency(root: Path) -> float | None:
    """Return the present clock of the fastest core in MHz: the others may be asleep."""
    cpus = root / "sys/devices/system/cpu"
    kilohertz = [text for path in cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq") if (text := _first_text(path))]
    clocks = [int(text) / 1000 for text in kilohertz if text.isdigit()]
    if not clocks:
        found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _first_text(root / "proc/cpuinfo") or "", re.MULTILINE)
        clocks = [float(text) for text in found]
    return max(clocks, default=None)


def _throttle_count(root: Path) -> int | None:
    """Return how often the kernel has seen a core or its package throttled for heat since boot."""
    counters = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    readings = [text for text in map(_first_text, counters) if text and text.isdigit()]
    return sum(map(int, readings)) if readings else None


def _quota_throttled_seconds(root: Path) -> float | None:
    """Return for how long the container's CPU quota (cgroup v2) has held its processes back."""
    found = re.search(r"^throttled_usec (\d+)$", _first_text(root / "sys/fs/cgroup/cpu.stat") or "", re.MULTILINE)
    return int(found[1]) / 1e6 if found else None


def _stolen_cpu_seconds(root: Path) -> float | None:
    """Return the CPU seconds since boot that the host of a virtual machine gave to other guests."""
    fields = (_first_text(root / "proc/stat") or "").partition("\n")[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 and fields[8].isdigit() else None


def conditions(root: Path = Path("/")) -> dict[str, Any]:
    """Return what may disturb a measurement, to be taken before, during and after it.

    Args:
        root: where `proc` and `sys` lie.

    Returns:
        load_1m (mean number of running processes), frequency_mhz (the fastest core's), temperature_celsius (the hottest
        sensor's), throttled (a Raspberry Pi's under-voltage and throttling bits as text), and counters since boot:
        throttle_count, stolen_cpu_seconds (by other guests of a virtual machine's host), quota_throttled_seconds.
    """
    try:
        load: float | None = os.getloadavg()[0]
    except (OSError, AttributeError):
        load = None
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
    readings = [text for text in map(_first_text, zones) if text and text.lstrip("-").isdigit()]
    return {
        "load_1m": load,
        "frequency_mhz": _frequency(root),
        "temperature_celsius": max(int(text) / 1000 for text in readings) if readings else None,
        "throttled": _first_text(root / "sys/devices/platform/soc/soc:firmware/get_throttled"),
        "throttle_count": _throttle_count(root),
        "stolen_cpu_seconds": _stolen_cpu_seconds(root),
        "quota_throttled_seconds": _quota_throttled_seconds(root),
    }


class OtherWork:
    """How many of our CPUs are kept busy by programs that are not ours, from its creation on.

    Ours are those that the first worker may run on: its limits may leave it fewer than this process has.
    """

    def __init__(self, workers: Sequence[int]) -> None:
        """Take the process numbers of our workers; this process is ours as well."""
        import psutil

        self._processes = [psutil.Process(), *map(psutil.Process, workers)]
        pid = workers[0] if workers else 0
        self._mine = sorted(os.sched_getaffinity(pid)) if hasattr(os, "sched_getaffinity") else None
        self._started = time.monotonic()
        self._before = self._busy_seconds()

    @property
    def cpus(self) -> int:
        """How many CPUs are ours."""
        return len(self._mine) if self._mine is not None else os.cpu_count() or 1

    def _busy_seconds(self) -> float:
        """Return the CPU seconds that others have used on our CPUs, up to a constant."""
        import psutil

        per_cpu = psutil.cpu_times(percpu=True)
        chosen = per_cpu if self._mine is None else [per_cpu[cpu] for cpu in self._mine if cpu < len(per_cpu)]
        idle_fields = ("idle", "iowait", "guest", "guest_nice")  # guests are counted in user and nice already
        busy = sum(sum(cpu) - sum(getattr(cpu, name, 0.0) for name in idle_fields) for cpu in chosen)
        return float(busy - sum(sum(process.cpu_times()[:2]) for process in self._processes))

    def cpus_busy(self) -> float:
        """Return the mean number of CPUs others have kept busy, never below 0."""
        return max(0.0, (self._busy_seconds() - self._before) / max(time.monotonic() - self._started, 1e-9))


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Return the versions of bertemd, Python, the system and `packages`; None for a package that is not installed.

    Nothing is imported: the versions are those of the installed distributions.
    """
    from bertemd_deploy import __version__

    found: dict[str, str | None] = {
        "bertemd": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
