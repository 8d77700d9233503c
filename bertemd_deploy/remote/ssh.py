"""One command at a time on another machine, by the system's own ssh: its configuration, keys and known hosts are the user's.

Nothing of the user's settings is overridden but what a program without a terminal needs: no questions, a limit on how long a
silent connection lasts, no forwarding. Host keys are checked as the user has it; a password is never asked for.

In: words without any character that a shell could read as more than itself, and bytes for standard input. Out: the answers of
`runner/keeper.py`, which are data from outside: bounded in size, one line of JSON each.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from bertemd_deploy.errors import BertemdError, MeasurementError, RecipeError
from bertemd_deploy.remote.runner.keeper import MARK

OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "20",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
    "RemoteCommand": "none",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
}
BEAT_SECONDS = 5.0
LOST = 255  # ssh's own exit code
NOT_FOUND = 127  # the shell's
MOST_BYTES = 64 * 2**20  # of all answers to one command
MOST_WORD = 300  # characters of a foreign text in a message
_URL = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9]+)?\])(?::(?P<port>[0-9]{1,5}))?/?"
)
_WORD = re.compile(r"[A-Za-z0-9._/+@=-]+")
# What ssh says, in lower case, and what it means.
_REASONS = (
    (
        "host key verification failed",
        "its host key is not among the known hosts, or has changed. Connect once by hand ({by_hand}), compare the key's "
        "fingerprint with the device's, and accept it.",
    ),
    ("no matching host key", "it offers no kind of host key that ssh here accepts. Update the older of the two."),
    (
        "permission denied",
        "it accepts none of your keys. Measuring asks for no password: put a key there with ssh-copy-id, load it with "
        "ssh-add, or name the user in the address.",
    ),
    ("could not resolve", "there is no host of that name. Check the address, or give its number."),
    ("connection refused", "nothing listens there. Check the port, and that an ssh server runs on the device."),
    ("no route to host", "no way leads there. Check that it is switched on and in this network."),
    ("network is unreachable", "no way leads there. Check that it is switched on and in this network."),
    ("timed out", "it does not answer. Check that it is switched on and in this network."),
    ("bad configuration option", "ssh refuses its configuration. Correct it, and check with {by_hand}."),
)


class ConnectionLost(MeasurementError):  # noqa: N818 - it is what happened, not what is wrong
    """A connection could not be made, or ended before the command did."""


@dataclass(frozen=True)
class Address:
    """Where a device is; what is None is as the user's ssh configuration has it."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read ssh://user@host:port, of which user and port may be left out.

        Raises:
            RecipeError: it is not such an address.
        """
        found = _URL.fullmatch(url)
        port = int(found["port"]) if found and found["port"] else None
        if found is None or (port is not None and not 1 <= port <= 65535):
            shown = re.sub(r":[^@/]*@", ":…@", url)  # a password, which is nobody's business
            raise RecipeError(
                f"{shown!r} is no address of a device. Write ssh://user@host or ssh://user@host:port; keys and everything "
                "else are as ~/.ssh/config says."
            )
        return cls(found["host"].strip("[]"), found["user"], port)

    def __str__(self) -> str:
        """Return the address as it was given."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")

    def arguments(self) -> list[str]:
        """Return ssh's arguments that name it."""
        port = ["-p", str(self.port)] if self.port else []
        user = ["-l", self.user] if self.user else []
        return [*port, *user, "--", self.host]


@dataclass(frozen=True)
class Link:
    """A way to run commands at an address; `ssh` is the program with arguments of its own."""

    address: Address
    ssh: tuple[str, ...] = ("ssh",)

    def call(
        self, words: Sequence[str], *, feed: Iterable[bytes] = (), heard: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Run a command there and return its last answer.

        Args:
            words: program and arguments.
            feed: bytes for its standard input.
            heard: called with every answer that holds a part of a log, at once. With it, standard input stays open as long
                as the command runs and a newline goes there every few seconds, to show that we are here.

        Raises:
            ConnectionLost: the connection could not be made, or ended first.
            MeasurementError: there is no ssh here, no python3 there, the command failed, or its answers are not usable.
        """
        if odd := [word for word in words if not _WORD.fullmatch(word)]:
            raise MeasurementError(
                f"{self.address}: it names a folder {plain(odd[0])!r}, of characters that a shell reads. Set TMPDIR there."
            )
        command = [*self.ssh, "-T", *(f"-o{name}={value}" for name, value in OPTIONS.items())]
        command += [*self.address.arguments(), *words]
        with tempfile.TemporaryFile() as stderr:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
                )
            except FileNotFoundError:
                raise MeasurementError(
                    f"{command[0]} is not installed on this machine. Install OpenSSH's client, or carry the folder of "
                    "`bertemd bundle` to the device."
                ) from None
            feeder = _Feeder(process.stdin, feed, beats=heard is not None)
            try:
                last = _answers(process.stdout, heard, address=self.address)
                process.wait()
            finally:
                process.kill()  # harmless once it has ended
                process.wait()
                feeder.end()
                assert process.stdout is not None
                process.stdout.close()
            stderr.seek(0)
            said = stderr.read(MOST_BYTES).decode("utf-8", "replace")
        if process.returncode == LOST:
            raise self._lost(said)
        if last is None or process.returncode:
            raise self._failed(process.returncode, said)
        return last

    def _lost(self, said: str) -> ConnectionLost:
        """Return what it means that ssh gave up, by what it said."""
        by_hand = " ".join(["ssh", *self.address.arguments()]).replace("-- ", "")
        lower = said.lower()
        for phrase, meaning in _REASONS:
            if phrase in lower:
                return ConnectionLost(f"{self.address} cannot be reached: {meaning.format(by_hand=by_hand)}")
        lines = plain(said).splitlines() or ["ssh said nothing"]
        return ConnectionLost(f"{self.address}: the connection ended ({lines[-1]}). Try it by hand: {by_hand}")

    def _failed(self, code: int, said: str) -> MeasurementError:
        """Return what it means that a command failed or answered nothing."""
        lines = plain(said).splitlines() or ["it said nothing"]
        if code == NOT_FOUND:
            return MeasurementError(
                f"{self.address}: there is no python3. Install Python 3.9 or newer there, where a command without a "
                f"terminal finds it ({lines[-1]})."
            )
        return MeasurementError(
            f"{self.address}: the command there ended with exit code {code} and without an answer. Its last line: {lines[-1]}"
        )


class _Feeder:
    """Writes to a command's standard input from a thread of its own, so that its answers are read meanwhile."""

    def __init__(self, stream: IO[bytes] | None, feed: Iterable[bytes], *, beats: bool) -> None:
        """Begin to write `feed`, then, with `beats`, a newline every few seconds."""
        assert stream is not None
        self._stream = stream
        self._feed = feed
        self._beats = beats
        self._ended = threading.Event()
        self._fault: BertemdError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # A broken pipe: the command ended, and its answer or exit code tells why.
        with contextlib.suppress(BrokenPipeError), self._stream:
            try:
                for block in self._feed:
                    if self._ended.is_set():
                        return
                    self._stream.write(block)
            except BertemdError as error:  # of the feed, such as a file that cannot be read: for the caller's thread
                self._fault = error
                return
            self._stream.flush()
            while self._beats and not self._ended.wait(BEAT_SECONDS):
                self._stream.write(b"\n")
                self._stream.flush()

    def end(self) -> None:
        """Wait for the last write; raise what the feed raised."""
        self._ended.set()
        self._thread.join()
        if self._fault is not None:
            raise self._fault


def _answers(
    stream: IO[bytes] | None, heard: Callable[[dict[str, Any]], None] | None, *, address: Address
) -> dict[str, Any] | None:
    """Return the last answer on `stream`; hand parts of a log to `heard`."""
    assert stream is not None
    last: dict[str, Any] | None = None
    left = MOST_BYTES
    while line := stream.readline(left + 1):
        left -= len(line)
        if left < 0:
            raise MeasurementError(f"{address}: it answers with more than {MOST_BYTES:,} bytes; refused.")
        if not line.startswith(MARK.encode()):
            continue  # of a login script
        try:
            answer = json.loads(line[len(MARK) :])
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise MeasurementError(f"{address}: its answer cannot be read: {plain(repr(line[:80]))}.")
        if heard is not None and "log" in answer:
            heard(answer)
        else:
            last = answer
    return last


def plain(text: object) -> str:
    """Return a foreign text without control characters, lines kept, cut to its last 300 characters."""
    lines = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in str(text)).strip()
    return lines if len(lines) <= MOST_WORD else "…" + lines[1 - MOST_WORD :]
