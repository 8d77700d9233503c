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
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import bertemd_deploy
from bertemd_deploy.errors import MeasurementError

COMMAND = (sys.executable, "-P", "-m", "bertemd_deploy.bench.worker")
REAP_SECONDS = 3.0
STDERR_LINES = 5
CAUSES = {
    "SIGKILL": "most often the system was out of memory; free some, or leave this model out",
    "SIGILL": "this build of the library uses instructions the processor lacks; install another version of it",
    "SIGSEGV": "a crash inside a native library; try another version of it",
}


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment of a worker: every thread pool sized, nothing fetched, this very package importable."""
    environment = dict(os.environ)
    for pool in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        environment[pool] = str(threads)
    environment["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    root = str(Path(bertemd_deploy.__file__).resolve().parents[1])
    if root not in site.getsitepackages():  # a checkout; site-packages must not come before the standard library
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


class Worker:
    """A child process running one model; a context manager that reaps it on every way out."""

    def __init__(self, name: str, *, threads: int, command: Sequence[str] = COMMAND) -> None:
        """Start the process.

        Args:
            name: what to call the model in messages.
            threads: size of its thread pools.
            command: program and arguments; it speaks the protocol of `worker`.
        """
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._doing = "starting"
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=worker_environment(threads),
                text=True,
                encoding="utf-8",
            )
        except BaseException:
            self._stderr.close()
            raise

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
            self._stderr.close()

    def send(self, command: str, **fields: Any) -> None:
        """Send a command without waiting for its answer.

        Raises:
            MeasurementError: the process has died.
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
            MeasurementError: the process has died, or answered with an error.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._death()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise MeasurementError(f"bench, {self.name}: {reply['error']}")
        return reply

    def request(self, command: str, **fields: Any) -> dict[str, Any]:
        """Send a command, wait, and return the answer.

        Raises:
            MeasurementError: the process has died, or answered with an error.
        """
        self.send(command, **fields)
        return self.receive()

    def _death(self) -> MeasurementError:
        """Return the message for a process that ended before it answered."""
        try:
            code = self._process.wait(REAP_SECONDS)
        except subprocess.TimeoutExpired:
            return MeasurementError(f"bench, {self.name}: the worker closed its output during {self._doing!r}.")
        if code < 0:
            name = signal.Signals(-code).name
            end = f"was ended by {name} ({CAUSES.get(name, 'sent from outside')})"
        else:
            end = f"ended with exit code {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()[-STDERR_LINES:]
        last = "\n  ".join(lines) or "(nothing)"
        return MeasurementError(
            f"bench, {self.name}: the worker process {end} during {self._doing!r}. Its last lines:\n  {last}"
        )
