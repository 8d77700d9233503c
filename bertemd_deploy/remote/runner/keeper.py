"""On the device, for one remote measurement: a temporary folder, a process that watches over it, and answers for the other end.

`open_folder` is called once, by a program that arrives on standard input; it makes the folder, puts this file there and
leaves the watching process behind. Every further connection runs `python3 FOLDER/keeper.py VERB`:

    have                  which files are there whole, by size
    receive               a tar stream on standard input becomes files
    start                 begin to measure (once)
    follow OFFSET         the log from there on, until measuring has ended
    fetch NAME MOST       a file that came out, at most so many bytes
    stop                  end everything and remove the folder

An answer is one line of JSON behind `MARK`, for login scripts may print too. The other end shows that it is there by what it
sends: data, or a newline now and then. After `PATIENCE` without a sign, as after `stop`, the watching process ends what it
started and removes the folder, so a lost connection leaves nothing behind. One measurement runs at a time.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "bertemd-keeper: "
PATIENCE = 600.0  # seconds
INSTALL_BYTES = 300 * 2**20  # numpy and onnxruntime, unpacked, with room for their wheels
BLOCK = 2**16
BACK = "back"  # folder of what came out
PART = ".part"
ONLY_ONE = "\0bertemd-keeper"  # Linux's abstract sockets: a name that only one process can have, and that is no file


def answer(**fields: Any) -> None:
    """Print one answer."""
    print(MARK + json.dumps(fields), flush=True)


def open_folder(source: str, needed: int) -> None:
    """Make the folder and the process that watches over it; answer with its path.

    Args:
        source: the text of this file.
        needed: bytes that will be sent.
    """
    try:
        lock = only_one()
    except OSError:
        answer(fault="busy")
        return
    if importlib.util.find_spec("onnxruntime") is None:
        needed += INSTALL_BYTES
    free = {place: shutil.disk_usage(place).free for place in places()}
    place = next((place for place, room in free.items() if room >= needed), None)
    if place is None:
        most = max(free, key=lambda place: free[place], default=None)
        answer(fault="space", place=most, free=free.get(most, 0) if most else 0, needed=needed)
        return
    folder = Path(tempfile.mkdtemp(prefix="bertemd-", dir=place))
    (folder / "keeper.py").write_text(source, encoding="utf-8")
    (folder / "beat").touch()
    number = os.fork()
    if number == 0:
        try:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            with open(os.devnull, "r+b") as nothing:  # noqa: PTH123 - as a descriptor
                for standard in (0, 1, 2):
                    os.dup2(nothing.fileno(), standard)
            keep(folder)
        finally:
            os._exit(0)
    (folder / "pid").write_text(str(number))
    answer(
        folder=str(folder),
        python=platform.python_version(),
        machine=platform.machine(),
        onnxruntime=importlib.util.find_spec("onnxruntime") is not None,
    )
    lock.close()  # the watching process has its own copy


def only_one() -> socket.socket:
    """Return what only one process on this machine can hold; where the system has no such thing, nothing is held.

    Raises:
        OSError: another process holds it.
    """
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if sys.platform.startswith("linux"):
        try:
            held.bind(ONLY_ONE)
        except OSError as error:
            held.close()
            if error.errno == errno.EADDRINUSE:
                raise
    return held


def places() -> list[str]:
    """Return the folders for temporary files that can be written: where TMPDIR says, else on disk before in memory."""
    named = os.environ.get("TMPDIR")
    found = [named] if named else ["/var/tmp", tempfile.gettempdir()]
    return [place for place in found if os.access(place, os.W_OK | os.X_OK)]


def beat(folder: Path) -> None:
    """Note that the other end was there just now; takes no space."""
    with contextlib.suppress(FileNotFoundError):  # the folder was removed meanwhile
        os.utime(folder / "beat")


def keep(folder: Path, *, patience: float = PATIENCE, tick: float = 0.25) -> None:
    """Watch over `folder`: start the measurement when asked, note its end, remove everything when it is time.

    Args:
        folder: what `open_folder` made.
        patience: seconds without a sign of the other end after which it is taken to be gone.
        tick: seconds between two looks.
    """
    child: subprocess.Popen[bytes] | None = None
    sign, heard = 0, time.monotonic()
    try:
        while not (folder / "stop").exists() and time.monotonic() - heard <= patience:
            time.sleep(tick)
            found = (folder / "beat").stat().st_mtime_ns  # compared only: the clock of a device may jump
            if found != sign:
                sign, heard = found, time.monotonic()
            if child is None and (folder / "start").exists():
                child = begin(folder)
            elif child is not None and child.poll() is not None and (folder / "start").exists():
                (folder / "start").replace(folder / f"done{child.returncode}")  # a full disk cannot prevent a rename
    finally:
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        shutil.rmtree(folder, ignore_errors=True)


def begin(folder: Path) -> subprocess.Popen[bytes]:
    """Start measuring, in a process group of its own."""
    (folder / BACK).mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "run.py", "--out", str(Path(BACK) / "record.json")],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"),
            start_new_session=True,
        )
    with contextlib.suppress(OSError):  # a full disk; it serves only where the watching process is killed
        (folder / "child").write_text(str(child.pid))
    return child


def process_in(path: Path) -> int | None:
    """Return the number of the process that a file names, or None where it has ended."""
    try:
        number = int(path.read_text())
    except (OSError, ValueError):
        return None
    return number if runs(number) else None


def watcher(folder: Path) -> int | None:
    """Return the number of the process that watches over `folder`, or None where it has ended."""
    return process_in(folder / "pid")


def runs(number: int) -> bool:
    """Say whether a process runs; one that has ended and was not waited for does not."""
    try:
        os.kill(number, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def have(folder: Path) -> None:
    """Answer with the size of every file that is there whole."""
    beat(folder)
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != PART)
    answer(files={path.relative_to(folder).as_posix(): path.stat().st_size for path in found})


def receive(folder: Path) -> None:
    """Write the files of a tar stream, each under another name until it is whole."""
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
            for member in archive:
                path = folder / member.name
                if not member.isfile() or ".." in path.parts or Path(member.name).is_absolute():
                    answer(fault="name")
                    return
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(path.name + PART)
                stream = archive.extractfile(member)
                assert stream is not None
                with part.open("wb") as file:
                    while block := stream.read(BLOCK):
                        file.write(block)
                        beat(folder)
                part.replace(path)
    except tarfile.ReadError:
        answer(fault="cut")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        answer(fault="full", place=str(folder.parent), free=shutil.disk_usage(folder).free)
    else:
        answer(received=True)


def start(folder: Path) -> None:
    """Ask the watching process to begin."""
    beat(folder)
    if watcher(folder) is None:
        answer(fault="gone")
        return
    (folder / "start").touch()
    answer(started=True)


def follow(folder: Path, offset: int) -> None:
    """Answer with the log from `offset` on as it grows, then with the exit code."""
    while True:
        ended = next(folder.glob("done*"), None)  # looked for before the last lines are read
        chunk = b""
        with contextlib.suppress(FileNotFoundError), (folder / "log").open("rb") as log:
            log.seek(offset)
            chunk = log.read(BLOCK)
        if chunk:
            offset += len(chunk)
            answer(log=chunk.decode("utf-8", "replace"), offset=offset)
            continue
        if ended is not None:
            answer(done=int(ended.name[4:]), free=shutil.disk_usage(folder).free)
            return
        if watcher(folder) is None:
            answer(fault="gone")
            return
        if select.select([0], [], [], 0.5)[0]:
            if not os.read(0, BLOCK):
                return  # the other end has left
            beat(folder)


def fetch(folder: Path, name: str, most: int) -> None:
    """Answer with the text of a file that came out; None where there is none."""
    beat(folder)
    path = folder / BACK / name
    if not path.is_file():
        answer(text=None)
    elif path.stat().st_size > most:
        answer(fault="large", bytes=path.stat().st_size)
    else:
        answer(text=path.read_text(encoding="utf-8"))


def stop(folder: Path, *, seconds: float = 15.0) -> None:
    """Have everything ended and removed, and wait for it."""
    number = watcher(folder)
    child = process_in(folder / "child") if number is None else None
    if child is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    (folder / "stop").touch()
    until = time.monotonic() + seconds
    while number is not None and runs(number) and time.monotonic() < until:
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)
    answer(gone=not folder.exists())


def main(arguments: list[str], folder: Path) -> None:
    """Do what one connection asks."""
    verb, rest = arguments[0], arguments[1:]
    if verb == "follow":
        follow(folder, int(rest[0]))
    elif verb == "fetch":
        fetch(folder, rest[0], int(rest[1]))
    else:
        verbs: dict[str, Callable[[Path], None]] = {"have": have, "receive": receive, "start": start, "stop": stop}
        verbs[verb](folder)


if __name__ == "__main__":
    main(sys.argv[1:], Path(__file__).resolve().parent)
