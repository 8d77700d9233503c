"""Limits around a process: what the kernel lets us make, what is said where it does not, and what is gone afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bertemd_deploy.bench import limits
from bertemd_deploy.bench.limits import Confined, Group, Limits, make_groups, own_group
from bertemd_deploy.errors import MeasurementError

linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups and affinity are Linux'")
pytestmark = linux

BOTH = Limits(cpu_share=0.5, memory_bytes=2**26)
MOUNT_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"


class Kernel:
    """A folder that looks like a system's control groups; what is written there stays to be read."""

    def __init__(self, root: Path, *, mounts: str = MOUNT_V2, membership: str = "0::/app/mine\n") -> None:
        self.root, self.top = root, root / "sys/fs/cgroup"
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text(f"23 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mounts}")
        (root / "proc/self/cgroup").write_text(membership)
        self.top.mkdir(parents=True)

    def group(self, path: str, *, has: str = "", gives: str = "", **files: str) -> Path:
        """Make a group of version 2: controllers it has, and those it hands down."""
        folder = self.top / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {"cgroup.procs": "", "cgroup.controllers": has, "cgroup.subtree_control": gives}.items():
            (folder / name).write_text(text)
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        return folder


@pytest.fixture(autouse=True)
def _removable(monkeypatch, tmp_path):
    """A real control group goes with its files; a folder that stands in for one has to be told."""
    rmdir = Path.rmdir
    monkeypatch.setattr(Path, "rmdir", lambda path: shutil.rmtree(path) if tmp_path in path.parents else rmdir(path))


@pytest.fixture
def system(tmp_path) -> Kernel:
    return Kernel(tmp_path)


def test_both_limits_are_kept_by_one_group_of_version_2(system):
    system.group("app", has="cpu memory", gives="")
    own = system.group("app/mine", has="cpu memory pids", gives="cpu memory")
    (group,) = make_groups(BOTH, root=system.root)
    assert group.folder.parent == own
    assert group.controllers == ("cpu", "memory")
    assert (group.folder / "cpu.max").read_text() == "50000 100000"
    assert (group.folder / "memory.max").read_text() == str(2**26)
    assert not (group.folder / "memory.swap.max").exists()  # this kernel has no such file


def test_swap_is_shut_where_there_is_some(system, monkeypatch):
    system.group("app/mine", has="memory", gives="memory")
    mkdir = Path.mkdir

    def with_swap(path: Path, *arguments, **options) -> None:
        mkdir(path, *arguments, **options)
        (path / "memory.swap.max").write_text("max")

    monkeypatch.setattr(Path, "mkdir", with_swap)
    (group,) = make_groups(Limits(memory_bytes=2**26), root=system.root)
    assert (group.folder / "memory.swap.max").read_text() == "0"


def test_a_group_with_processes_gives_nothing_down_and_the_one_above_is_taken(system):
    above = system.group("app", has="cpu memory", gives="cpu memory")
    own = system.group("app/mine", has="cpu memory")
    (own / "cgroup.subtree_control").unlink()
    (own / "cgroup.subtree_control").mkdir()  # writing fails, as it does with processes inside
    (group,) = make_groups(BOTH, root=system.root)
    assert group.folder.parent == above


def test_groups_above_are_never_changed(system):
    above = system.group("app", has="cpu memory")
    own = system.group("app/mine")
    assert make_groups(BOTH, root=system.root) == []
    assert (above / "cgroup.subtree_control").read_text() == (own / "cgroup.subtree_control").read_text() == ""


def test_the_top_group_that_this_process_is_in_is_asked_to_give_its_controllers(tmp_path):
    system = Kernel(tmp_path, membership="0::/\n")
    top = system.group("", has="cpu memory")
    (group,) = make_groups(BOTH, root=system.root)
    assert group.folder.parent == top
    assert (top / "cgroup.subtree_control").read_text() == "+cpu +memory"


@pytest.mark.parametrize("limit", [{"cpu_max": "20000 100000"}, {"memory_max": "1048576"}, {"memory_high": "9"}])
def test_no_limit_of_our_own_is_escaped(system, limit):
    system.group("app", has="cpu memory", gives="cpu memory")
    own = system.group("app/mine", has="cpu memory", **limit)
    (own / "cgroup.subtree_control").unlink()
    (own / "cgroup.subtree_control").mkdir()
    assert make_groups(BOTH, root=system.root) == []


def test_an_unlimited_group_is_no_bar(system):
    above = system.group("app", has="cpu memory", gives="cpu memory")
    system.group("app/mine", cpu_max="max 100000", memory_max="max")
    (group,) = make_groups(BOTH, root=system.root)
    assert group.folder.parent == above


def test_where_only_memory_is_delegated_only_memory_is_limited(system):
    system.group("app/mine", has="memory pids", gives="memory")
    (group,) = make_groups(BOTH, root=system.root)
    assert group.controllers == ("memory",)
    assert not (group.folder / "cpu.max").exists()


def test_a_cpu_share_is_kept_by_version_1_too(tmp_path):
    system = Kernel(tmp_path, mounts=MOUNT_V1, membership="3:cpu,cpuacct:/app:with:colons\n1:name=systemd:/\n")
    own = system.top / "cpu,cpuacct/app:with:colons"
    own.mkdir(parents=True)
    (group,) = make_groups(BOTH, root=system.root)
    assert group.folder.parent == own
    assert group.controllers == ("cpu",)
    assert (group.folder / "cpu.cfs_period_us").read_text() == "100000"
    assert (group.folder / "cpu.cfs_quota_us").read_text() == "50000"


def test_version_2_without_the_cpu_controller_leaves_the_share_to_version_1(tmp_path):
    system = Kernel(
        tmp_path,
        mounts=MOUNT_V1 + MOUNT_V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "),
        membership="1:cpu,cpuacct:/\n0::/\n",
    )
    system.group("unified", has="hugetlb")
    (system.top / "cpu,cpuacct").mkdir()
    (group,) = make_groups(BOTH, root=system.root)
    assert group.folder.parent.name == "cpu,cpuacct"


@pytest.mark.parametrize("wanted", [Limits(), Limits(cpus=1)])
def test_nothing_is_made_where_no_group_is_needed(system, wanted):
    own = system.group("app/mine", has="cpu memory", gives="cpu memory")
    assert make_groups(wanted, root=system.root) == []
    assert [path for path in own.iterdir() if path.is_dir()] == []


def test_a_read_only_file_system_gives_no_group(system, monkeypatch):
    system.group("app", has="cpu memory", gives="cpu memory")
    system.group("app/mine", has="cpu memory", gives="cpu memory")

    def refuse(path: Path, *arguments, **options) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert make_groups(BOTH, root=system.root) == []


def test_a_group_that_takes_no_process_is_removed_again(system, monkeypatch):
    own = system.group("app/mine", has="cpu memory", gives="cpu memory")
    monkeypatch.setattr(limits, "LAUNCHER", "exit 125")
    assert make_groups(BOTH, root=system.root) == []
    assert [path for path in own.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("mounts", "membership"),
    [
        ("", "0::/\n"),  # not mounted
        (MOUNT_V2, "0::/../outside\n"),  # beyond the container's own view
        (MOUNT_V2, "0::/gone\n"),
        (MOUNT_V2, ""),
        ("short line - cgroup2\n", "0::/\n"),
    ],
)
def test_a_group_that_cannot_be_seen_is_none(tmp_path, mounts, membership):
    assert own_group(Kernel(tmp_path, mounts=mounts, membership=membership).root, controller=None) is None


def test_a_mount_that_shows_a_part_only_is_understood(tmp_path):
    mounts = MOUNT_V2.replace("0:26 / ", "0:26 /docker/abc ")
    system = Kernel(tmp_path, mounts=mounts, membership="0::/docker/abc/app\n")
    assert own_group(system.root, controller=None) is None
    folder = system.group("app")
    assert own_group(system.root, controller=None) == folder


def test_no_files_at_all_give_nothing(tmp_path):
    assert make_groups(BOTH, root=tmp_path) == []


def confined(monkeypatch, wanted: Limits, *groups: Group, root: Path = Path("/")) -> Confined:
    monkeypatch.setattr(limits, "make_groups", lambda wanted, root: list(groups))
    return Confined(wanted, root=root)


def test_what_could_not_be_limited_is_said(monkeypatch):
    everything = Limits(cpus=1, cpu_share=0.5, memory_bytes=2**30)
    with confined(monkeypatch, everything) as found:
        assert found.applied == {"cpus": "affinity", "cpu_share": "not limited", "memory": "rlimit"}
    monkeypatch.setattr(sys, "platform", "darwin")
    with confined(monkeypatch, Limits(cpu_share=0.5, memory_bytes=2**30)) as found:
        assert found.applied == {"cpus": None, "cpu_share": "not limited", "memory": "not limited"}
        assert not found.exceeded(killed=False, said="MemoryError")
    monkeypatch.delattr(os, "sched_setaffinity")
    with confined(monkeypatch, Limits(cpus=1)) as found:
        assert found.applied == {"cpus": "not limited", "cpu_share": None, "memory": None}


def test_what_a_group_keeps_is_said(monkeypatch, tmp_path):
    (tmp_path / "group").mkdir()
    group = Group(tmp_path / "group", ("cpu", "memory"))
    with confined(monkeypatch, BOTH, group) as found:
        assert found.applied == {"cpus": None, "cpu_share": "cgroup", "memory": "cgroup"}
    assert not group.folder.exists()


def test_more_cpus_than_there_are_cannot_be_had(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3})
    with pytest.raises(MeasurementError, match=r"bench: asked for 3 CPUs, and this process may use 2\. Ask for fewer"):
        Confined(Limits(cpus=3)).__enter__()


@pytest.mark.parametrize(
    ("events", "killed", "exceeded"),
    [
        ("low 0\nhigh 0\nmax 812\noom 1\noom_kill 1\n", True, True),
        ("max 0\noom 0\noom_kill 1\n", True, False),  # the whole machine was out of memory
        ("max 812\noom 0\noom_kill 0\n", True, False),  # somebody else's SIGKILL
        ("max 812\noom 1\noom_kill 1\n", False, False),
        ("", True, False),
    ],
)
def test_a_kill_at_the_groups_limit_is_told_from_others(monkeypatch, tmp_path, events, killed, exceeded):
    group = Group(tmp_path / "group", ("memory",))
    group.folder.mkdir()
    (group.folder / "memory.events").write_text(events)
    (group.folder / "memory.peak").write_text("67108864\n")
    with confined(monkeypatch, Limits(memory_bytes=2**26), group) as found:
        assert found.exceeded(killed=killed, said="std::bad_alloc") is exceeded
        assert found.peak_bytes(1) == 2**26
        (group.folder / "memory.peak").unlink()
        assert found.peak_bytes(1) is None


@pytest.mark.parametrize(
    "said",
    [
        "MemoryError",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 400. MiB for an array",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "Non-zero status code returned while running MatMul node: Failed to allocate memory for requested buffer of size 9",
        "RuntimeError: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
        "OpenBLAS error: Memory allocation still failed after 10 retries, giving up.",
        "ImportError: libx.so: failed to map segment from shared object",
        "ImportError: onnxruntime_pybind11_state.so: cannot map zero-fill pages",
        "memory allocation of 728 bytes failed\nstack backtrace:",
        "RuntimeError: can't start new thread",
        "RuntimeError: could not create a primitive",
        "OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_refused_memory_is_recognised_by_what_libraries_say(monkeypatch, said):
    with confined(monkeypatch, Limits(memory_bytes=2**26)) as found:
        assert found.exceeded(killed=False, said=f"Traceback\n{said}\n")
        assert not found.exceeded(killed=True, said=said)
        assert not found.exceeded(killed=False, said="KeyError: 'logits'")
    with confined(monkeypatch, Limits(cpus=1)) as found:
        assert not found.exceeded(killed=False, said=said)


def test_a_group_that_stays_is_an_error_that_names_it(monkeypatch, tmp_path):
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(limits, "REMOVAL_SECONDS", 0.0)
    group = Group(tmp_path / "group", ("memory",))
    group.folder.mkdir()
    found = confined(monkeypatch, Limits(memory_bytes=2**26), group).__enter__()
    monkeypatch.setattr(Path, "rmdir", busy)
    with pytest.raises(
        MeasurementError, match=r"group: this control group cannot be removed \(Device or resource busy\)"
    ):
        found.__exit__(None, None, None)


def test_what_is_left_in_a_group_is_ended(monkeypatch, tmp_path):
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    group = Group(tmp_path / "group", ("memory",))
    group.folder.mkdir()
    group.procs.write_text(f"{left.pid}\n")
    remove = shutil.rmtree

    def held(path: Path) -> None:
        if left.poll() is None:
            raise OSError(errno.EBUSY, "Device or resource busy")
        remove(path)

    found = confined(monkeypatch, Limits(memory_bytes=2**26), group).__enter__()
    monkeypatch.setattr(Path, "rmdir", held)
    found.__exit__(None, None, None)
    assert left.wait() == -9
    assert not group.folder.exists()


def test_the_launcher_becomes_the_program_in_every_group(tmp_path):
    files = [tmp_path / "one with blanks", tmp_path / "two"]
    program = [sys.executable, "-c", "import os, sys; print(os.getpid(), *sys.argv[1:])", "--", "$HOME", "a b"]
    command = [limits.SHELL, "-c", limits.LAUNCHER, "sh", *map(str, files), "--", *program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.communicate()[0].split()
    assert output == [str(process.pid), "--", "$HOME", "a", "b"]
    assert [path.read_text().strip() for path in files] == [str(process.pid)] * 2


def test_the_launcher_stops_where_a_group_refuses(tmp_path):
    command = [limits.SHELL, "-c", limits.LAUNCHER, "sh", str(tmp_path / "no/such"), "--", "echo", "started"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (125, "")


def test_a_start_that_fails_leaves_this_thread_its_cpus(monkeypatch):
    before = os.sched_getaffinity(0)

    def fail(command) -> subprocess.Popen[str]:
        raise FileNotFoundError("no such program")

    with confined(monkeypatch, Limits(cpus=1)) as found, pytest.raises(FileNotFoundError):
        found.start(["nothing"], fail)
    assert os.sched_getaffinity(0) == before


def test_a_process_that_cannot_be_limited_is_not_left_running(monkeypatch):
    started = []

    def fail(pid: int, limit: int) -> None:
        raise PermissionError("not allowed")

    def begin(command) -> subprocess.Popen[str]:
        started.append(subprocess.Popen(command, text=True))
        return started[0]

    monkeypatch.setattr(limits, "_limit_data", fail)
    with confined(monkeypatch, Limits(memory_bytes=2**26)) as found, pytest.raises(PermissionError):
        found.start([sys.executable, "-c", "import time; time.sleep(600)"], begin)
    assert started[0].returncode == -9
