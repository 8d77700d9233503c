"""The limits of another place put around a process: how many CPUs, what share of them, how much memory.

CPUs are limited by affinity. A CPU share and a memory limit are the kernel's work, in a control group of the process's own:

    version 2   cpu.max, memory.max and memory.swap.max = 0, in one group
    version 1   cpu.cfs_quota_us; its memory controller does not bound swap in every kernel, so memory is not limited by it

Where no such group can be had, memory is bounded by RLIMIT_DATA, which counts what is asked for and writable, touched or not
(thread stacks with it): whoever stays below it fits, whoever exceeds it may still fit into a container of that size. A CPU
share has no such substitute. What could not be limited is said in `Confined.applied`, never imitated.

The group is made below this process's own, or below the nearest one above it that hands its controllers down; never above a
group that has limits itself, which moving would escape. Python 3.9 and the standard library only: a device runs this too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bertemd_deploy.bench.memory import peak_in_status
from bertemd_deploy.errors import MeasurementError

PERIOD_US = 100_000  # of a CPU quota; the kernel's and every container runtime's default
SHELL = "/bin/sh"
# Puts itself into every group named before "--", then becomes the program after it, under the same process number.
LAUNCHER = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"'
REMOVAL_SECONDS = 2.0
SWAP = "memory.swap.max"
BOUNDS = ("cpu.max", "memory.max", "memory.high")
# How libraries say that memory was refused to them.
OUT_OF_MEMORY = re.compile(
    r"MemoryError|bad_alloc|OutOfMemory|out of memory|(?:can't|cannot|failed to|unable to) allocate|malloc failed"
    r"|memory allocation (?:still|of \d+ bytes) failed|failed to map segment|cannot map zero-fill pages"
    r"|can't start new thread|pthread_create failed|could not create a primitive",  # the last is oneDNN's, which says no more
    re.IGNORECASE,
)
_numbers = itertools.count()


@dataclass(frozen=True)
class Limits:
    """What a place has; None leaves that unlimited.

    Attributes:
        cpus: how many CPUs, at least 1.
        cpu_share: CPU time per time, such as 0.5 of one CPU.
        memory_bytes: for the whole process.
    """

    cpus: int | None = None
    cpu_share: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Group:
    """A control group that holds a process, and what it limits.

    Attributes:
        folder: in the control group's file system.
        controllers: of "cpu" and "memory".
    """

    folder: Path
    controllers: tuple[str, ...]

    @property
    def procs(self) -> Path:
        """The file that a process's number is written to."""
        return self.folder / "cgroup.procs"


class Confined:
    """Limits for one process: made on entering, taken away on leaving, when the process has ended.

    Attributes:
        limits: what was asked for.
        applied: by what each of `cpus`, `cpu_share` and `memory` is kept, from entering on: "affinity", "cgroup", "rlimit",
            "not limited"; None where none was asked for.
    """

    def __init__(self, limits: Limits, *, root: Path = Path("/")) -> None:
        """Take the limits; `root` is where `proc` and `sys` lie."""
        self.limits = limits
        self.applied: dict[str, str | None] = {}
        self._root = root
        self._groups: list[Group] = []
        self._cpus: tuple[int, ...] = ()

    def __enter__(self) -> Confined:
        """Make the control groups that can be had.

        Raises:
            MeasurementError: this process may use fewer CPUs than are asked for.
        """
        if self.limits.cpus is not None and hasattr(os, "sched_setaffinity"):
            mine = sorted(os.sched_getaffinity(0))
            if len(mine) < self.limits.cpus:
                raise MeasurementError(
                    f"bench: asked for {self.limits.cpus} CPUs, and this process may use {len(mine)}. Ask for fewer, or "
                    "run it where there are more."
                )
            self._cpus = tuple(mine[: self.limits.cpus])
        self._groups = make_groups(self.limits, root=self._root)
        kept = {controller for group in self._groups for controller in group.controllers}
        substitute = "rlimit" if sys.platform == "linux" else "not limited"
        cpus = "affinity" if self._cpus else "not limited"
        share = "cgroup" if "cpu" in kept else "not limited"
        memory = "cgroup" if "memory" in kept else substitute
        self.applied = {
            "cpus": None if self.limits.cpus is None else cpus,
            "cpu_share": None if self.limits.cpu_share is None else share,
            "memory": None if self.limits.memory_bytes is None else memory,
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the control groups, ending what is still in them."""
        with contextlib.ExitStack() as stack:
            for group in self._groups:
                stack.callback(_remove, group)  # every one, even if another cannot be removed
        self._groups = []

    def start(
        self, command: Sequence[str], open_process: Callable[[Sequence[str]], subprocess.Popen[str]]
    ) -> subprocess.Popen[str]:
        """Start a command within the limits.

        Args:
            command: program and arguments.
            open_process: starts what it is given, as `subprocess.Popen` does.
        """
        if self._groups:
            names = [str(group.procs) for group in self._groups]
            command = [SHELL, "-c", LAUNCHER, "sh", *names, "--", *command]
        with self._affinity():
            process = open_process(command)
        if self.applied["memory"] == "rlimit" and self.limits.memory_bytes is not None:
            try:
                _limit_data(process.pid, self.limits.memory_bytes)
            except BaseException:
                process.kill()
                process.wait()
                raise
        return process

    def exceeded(self, *, killed: bool, said: str) -> bool:
        """Say whether the process failed for want of memory.

        Args:
            killed: it was ended by SIGKILL.
            said: what it wrote last: its error answer, or its stderr.
        """
        if self.applied["memory"] == "cgroup":
            return killed and any(_killed_in(group) for group in self._groups)
        return self.applied["memory"] == "rlimit" and not killed and OUT_OF_MEMORY.search(said) is not None

    def peak_bytes(self, pid: int) -> int | None:
        """Return the most memory the control group has held, or the process while it lives; None where none tells."""
        for group in self._groups:
            if "memory" in group.controllers:
                text = _text(group.folder / "memory.peak")  # since Linux 5.19
                return int(text) if text.isdigit() else None
        return peak_in_status(_text(self._root / "proc" / str(pid) / "status"))

    @contextlib.contextmanager
    def _affinity(self) -> Iterator[None]:
        """Keep this thread, and so what it starts, to the chosen CPUs for a while."""
        if not self._cpus:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cpus)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def _limit_data(pid: int, limit: int) -> None:
    """Bound the writable memory that a process may ask for from now on; what it holds already counts."""
    import resource

    with contextlib.suppress(ProcessLookupError):  # it has ended, and its stderr tells why
        _, most = resource.prlimit(pid, resource.RLIMIT_DATA)
        bound = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.prlimit(pid, resource.RLIMIT_DATA, (bound, bound))


def make_groups(limits: Limits, *, root: Path = Path("/")) -> list[Group]:
    """Make the control groups that keep a CPU share and a memory limit, as far as this system lets us.

    Args:
        limits: only `cpu_share` and `memory_bytes` matter.
        root: where `proc` and `sys` lie.

    Returns:
        New groups, each proven to take a process of ours; none where nothing can be limited.
    """
    files = {}
    if limits.cpu_share is not None:
        files["cpu"] = {"cpu.max": f"{round(limits.cpu_share * PERIOD_US)} {PERIOD_US}"}
    if limits.memory_bytes is not None:
        files["memory"] = {"memory.max": str(limits.memory_bytes), SWAP: "0"}
    groups = []
    own = own_group(root, controller=None)
    if own is not None:
        wanted = [tuple(files)] + ([(name,) for name in reversed(list(files))] if len(files) > 1 else [])
        for controllers in filter(None, wanted):
            settings = {name: value for controller in controllers for name, value in files[controller].items()}
            group = _first_group(_parents(own, controllers), settings, controllers)
            if group is not None:
                groups.append(group)
                break
    if limits.cpu_share is not None and not any("cpu" in group.controllers for group in groups):
        own = own_group(root, controller="cpu")
        quota = {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": files["cpu"]["cpu.max"].split()[0]}
        group = None if own is None else _first_group([own], quota, ("cpu",))
        groups += [] if group is None else [group]
    return groups


def own_group(root: Path, *, controller: str | None) -> Path | None:
    """Return the folder of the control group this process is in, or None where it cannot be seen.

    Args:
        root: where `proc` and `sys` lie.
        controller: of version 1; None is version 2.
    """
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] != ("cgroup" if controller else "cgroup2"):
            continue
        if controller and controller not in kind[2].split(","):
            continue
        shown, mounted = fields[3], root / fields[4].lstrip("/")
        for entry in _text(root / "proc/self/cgroup").splitlines():
            _, names, path = entry.split(":", 2)  # the path may hold colons
            if (controller in names.split(",")) if controller else not names:
                inside = os.path.relpath(path, shown)
                folder = mounted / inside
                return None if inside.startswith("..") or not folder.is_dir() else folder
    return None


def _parents(own: Path, controllers: Sequence[str]) -> Iterator[Path]:
    """Yield groups of version 2 below which one with these controllers can be made, the nearest first."""
    folder = own
    while (folder / "cgroup.procs").is_file():
        if set(controllers) <= set(_text(folder / "cgroup.controllers").split()):
            control = folder / "cgroup.subtree_control"
            missing = set(controllers) - set(_text(control).split())
            # Only our own group is changed: a kernel refuses it where processes are in it and it is not the root.
            if missing and folder == own and _write(control, " ".join(f"+{name}" for name in sorted(missing))):
                missing = set()
            if not missing:
                yield folder
        if any(_text(folder / name).split()[:1] not in ([], ["max"]) for name in BOUNDS):
            return  # going up from here would escape a limit
        folder = folder.parent


def _first_group(
    parents: Iterator[Path] | list[Path], files: dict[str, str], controllers: tuple[str, ...]
) -> Group | None:
    """Return a new group below the first parent that allows one, or None."""
    for parent in parents:
        group = Group(parent / f"bertemd-{os.getpid()}-{next(_numbers)}", controllers)
        try:
            group.folder.mkdir()
        except OSError:
            continue
        # A kernel without swap accounting has no file for it; nothing else may be left out.
        present = [name for name in files if name != SWAP or (group.folder / name).exists()]
        if all(_write(group.folder / name, files[name]) for name in present) and _takes(group):
            return group
        _remove(group)
    return None


def _takes(group: Group) -> bool:
    """Say whether a process of ours may move into a group."""
    try:
        trial = [SHELL, "-c", LAUNCHER, "sh", str(group.procs), "--", SHELL, "-c", ":"]
        return subprocess.run(trial, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _killed_in(group: Group) -> bool:
    """Say whether a process of a group was ended because the group was at its limit, rather than the whole machine."""
    events = dict(line.split(" ", 1) for line in _text(group.folder / "memory.events").splitlines())
    return all(int(events.get(name, 0)) > 0 for name in ("oom", "oom_kill"))


def _remove(group: Group) -> None:
    """Remove a group, ending what is still in it: its members are descendants of our own process."""
    ends = time.monotonic() + REMOVAL_SECONDS
    while True:
        try:
            group.folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > ends:
                raise MeasurementError(
                    f"{group.folder}: this control group cannot be removed ({error.strerror}). Remove it with: rmdir "
                    f"{group.folder}"
                ) from error
        for pid in _text(group.procs).split():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)


def _text(path: Path) -> str:
    """Return a file's text without blanks at its ends, empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _write(path: Path, text: str) -> bool:
    """Write to a file of a control group and say whether the kernel took it."""
    try:
        with path.open("w") as handle:
            handle.write(text)
    except OSError:
        return False
    return True
