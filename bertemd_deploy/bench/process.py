"""The parent's end of a worker: start it, ask, wait without spinning, and never leave it behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import bertemd_deploy
from bertemd_deploy.bench.limits import Confined, Limits
from bertemd_deploy.errors import MeasurementError, MemoryLimitError

# An older Python has no -P; where one measures, on a device, the current folder holds nothing that could be imported instead.
COMMAND = (sys.executable, *(("-P",) if sys.version_info >= (3, 11) else ()), "-m", "bertemd_deploy.bench.worker")
REAP_SECONDS = 3.0
STDERR_LINES = 5
CAUSES = {
    "SIGKILL": "most often the system was out of memory; free some, or leave this model out",
    "SIGILL": "this build of the library uses instructions the processor lacks; install another version of it",
    "SIGABRT": "a library gave up, for the reason below; try another version of it",
    "SIGSEGV": "a crash inside a native library; try another version of it",
}
SHORTAGES = {
    "cgroup": "the kernel ended it at the limit",
    "rlimit": "memory was refused to it; no control group could be had, and a process's own limit counts memory that is asked "
    "for, touched or not, so a container of this size may hold it all the same",
}


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment of a worker: every thread pool sized, nothing fetched, this very package importable."""
    environment = dict(os.environ)
    for pool in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        environment[pool] = str(threads)
    environment["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    environment |= {
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    root = str(Path(bertemd_deploy.__file__).resolve().parents[1])
    if root not in site.getsitepackages():  # a checkout; site-packages must not come before the standard library
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


class Worker:
    """A child process running one model; a context manager that reaps it on every way out.

    Attributes:
        name: what the model is called in messages.
        started: `time.perf_counter()` just before the process was started, its limits being made.
    """

    def __init__(
        self, name: str, *, threads: int, command: Sequence[str] = COMMAND, limits: Limits | None = None
    ) -> None:
        """Start the process.

        Args:
            name: what to call the model in messages.
            threads: size of its thread pools.
            command: program and arguments; it speaks the protocol of `worker`.
            limits: of the place it stands in for; None leaves it what this process has.

        Raises:
            MeasurementError: this process may use fewer CPUs than `limits` asks for.
        """
        self.name = name
        self._doing = "starting"
        self._environment = worker_environment(threads)
        with contextlib.ExitStack() as stack:
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            self._confined = None if limits is None else stack.enter_context(Confined(limits))
            self._process = self._open(command) if self._confined is None else self._confined.start(command, self._open)
            self._held = stack.pop_all()  # closed with the process

    def _open(self, command: Sequence[str]) -> subprocess.Popen[str]:
        self.started = time.perf_counter()
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=self._environment,
            text=True,
            encoding="utf-8",
        )

    @property
    def confinement(self) -> dict[str, str | None] | None:
        """By what each limit is kept (see `limits.Confined.applied`), or None without limits."""
        return None if self._confined is None else self._confined.applied

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def __enter__(self) -> Worker:
        """Return the worker itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the process end by itself, or end it at once after an error; wait until it is gone."""
        try:
            if kind is not None:
                self._process.kill()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):  # already dead; does not end
                self._process.stdin.close()
                self._process.wait(REAP_SECONDS)
        finally:
            self._process.kill()  # harmless once it has ended
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._held.close()

    def send(self, command: str, **fields: Any) -> None:
        """Send a command without waiting for its answer.

        Raises:
            MeasurementError: the process has died; `MemoryLimitError` where its memory limit was why.
        """
        assert self._process.stdin is not None
        self._doing = command
        try:
            self._process.stdin.write(json.dumps({"command": command, **fields}) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._death() from None

    def receive(self) -> dict[str, Any]:
        """Wait for the answer to the last command and return it.

        Raises:
            MeasurementError: the process has died, or answered with an error; `MemoryLimitError` where its memory limit
                was why.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            if shortage := self._shortage(killed=False, said=reply["error"]):
                raise shortage
            raise MeasurementError(f"bench, {self.name}: {reply['error']}")
        return reply

    def request(self, command: str, **fields: Any) -> dict[str, Any]:
        """Send a command, wait, and return the answer.

        Raises:
            MeasurementError: the process has died, or answered with an error; `MemoryLimitError` where its memory limit
                was why.
        """
        self.send(command, **fields)
        return self.receive()

    def _death(self) -> MeasurementError:
        """Return the message for a process that ended before it answered."""
        try:
            code = self._process.wait(REAP_SECONDS)
        except subprocess.TimeoutExpired:
            return MeasurementError(f"bench, {self.name}: the worker closed its output during {self._doing!r}.")
        self._stderr.seek(0)
        said = self._stderr.read().decode("utf-8", "replace").strip()
        name = signal.Signals(-code).name if code < 0 else ""
        if shortage := self._shortage(killed=name == "SIGKILL", said=said):
            return shortage
        cause = CAUSES.get(name, "sent from outside")
        end = f"was ended by {name} ({cause})" if name else f"ended with exit code {code}"
        last = "\n  ".join(said.splitlines()[-STDERR_LINES:]) or "(nothing)"
        return MeasurementError(
            f"bench, {self.name}: the worker process {end} during {self._doing!r}. Its last lines:\n  {last}"
        )

    def _shortage(self, *, killed: bool, said: str) -> MemoryLimitError | None:
        """Return the error of a process that its memory limit has made fail, or None where that is not why."""
        if self._confined is None or not self._confined.exceeded(killed=killed, said=said):
            return None
        limit = self._confined.limits.memory_bytes
        assert limit is not None
        peak = self._confined.peak_bytes(self._process.pid)
        known = "" if peak is None else f" It is known to have held {peak / 2**20:,.0f} MiB."
        return MemoryLimitError(
            f"bench, {self.name}: does not fit into {limit / 2**20:,.0f} MiB during {self._doing!r} "
            f"({SHORTAGES[str(self._confined.applied['memory'])]}).{known} Choose a smaller model or graph, smaller batches or "
            "shorter inputs, or give it more memory.",
            limit_bytes=limit,
            peak_bytes=peak,
        )
