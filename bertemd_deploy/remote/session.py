"""`bertemd bench --device ssh://...`: send the runner folder, have it measure there, bring the record back, leave nothing.

One connection per step, each made again once or twice where it is lost: files that arrived whole are not sent again, and the
measurement goes on by itself meanwhile. Whatever happens here, the folder there is removed: by us at the end, or by the
process that watches over it, once it has heard nothing for ten minutes.
"""

from __future__ import annotations

import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.compare import CHURN, RECORD
from bertemd_deploy.console import note, progress, warn
from bertemd_deploy.errors import MeasurementError
from bertemd_deploy.files import claim_folder, write_json, write_text
from bertemd_deploy.remote.folder import RUNNER, write_runner
from bertemd_deploy.remote.received import MOST_LIST_BYTES, MOST_RECORD_BYTES, checked_lines, checked_record
from bertemd_deploy.remote.runner.keeper import INSTALL_BYTES, MARK, PATIENCE
from bertemd_deploy.remote.ssh import Address, ConnectionLost, Link, plain
from bertemd_deploy.settings import BenchSettings

if TYPE_CHECKING:
    from bertemd_deploy.devices import Device

WAITS = (3.0, 20.0)  # seconds before a lost connection is made again
BLOCK = 2**16  # bytes sent at once
MOST_LINES = 200  # of the log, kept for a message
MEGABYTE = 1e6
FULL = 2**20  # bytes; with less left over, a failure is one of space

T = TypeVar("T")


def bench_remote(
    artifact: Path,
    *,
    url: str,
    teacher: Path | None,
    out: Path,
    settings: BenchSettings,
    force: bool = False,
    device: Device | None = None,
    ssh: Sequence[str] = ("ssh",),
) -> dict[str, Any]:
    """Measure an artifact on another machine; write the record and the list of what changed, return the record.

    Args:
        artifact: an artifact folder.
        url: ssh://user@host:port; keys and known hosts are as the user's ssh configuration has them.
        teacher: Hugging Face folder whose fp32 graph is measured beside; None measures the student alone.
        out: folder for `record.json` and `churn.jsonl`.
        settings: what to measure and for how long.
        force: write into `out` even if it holds something else.
        device: what the machine is known to be, for the record and for versions to avoid.
        ssh: the program, with arguments of its own.

    Raises:
        RecipeError: `url` is no such address.
        ArtifactError: the artifact is damaged, `out` is in the way, or what came back is no record of it.
        ModelError: the teacher is incomplete or does not fit the artifact.
        MeasurementError: the device cannot be reached, lacks something, or could not measure.
    """
    link = Link(Address.parse(url), tuple(ssh))
    loaded = Artifact.load(artifact)
    claim_folder(out, marker=RECORD, force=force)
    with tempfile.TemporaryDirectory(prefix="bertemd-remote-") as scratch:
        folder = write_runner(artifact, Path(scratch) / "runner", settings=settings, device=device, teacher=teacher)
        with Visit(link, folder) as visit:
            visit.send()
            fault = visit.measure()
            text = visit.fetch(RECORD, most=MOST_RECORD_BYTES)
            changed = visit.fetch(CHURN, most=MOST_LIST_BYTES)
    if text is None:
        raise fault or MeasurementError(f"{link.address}: measured, and wrote no record. Measure again.")
    record = checked_record(text, artifact=loaded, where=str(link.address))
    lines = None if changed is None else checked_lines(changed, where=str(link.address))
    write_json(out / RECORD, record)
    if lines is None:
        (out / CHURN).unlink(missing_ok=True)  # of an earlier run
    else:
        write_text(out / CHURN, lines)
    if fault is not None:
        raise fault
    return record


class Visit:
    """A folder on the device for as long as the context lasts."""

    def __init__(self, link: Link, folder: Path) -> None:
        """Take the runner folder that is to be sent."""
        self._link = link
        self._folder = folder
        self._sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self._there = ""
        self._lines: list[str] = []

    @property
    def address(self) -> Address:
        """Where the device is."""
        return self._link.address

    def __enter__(self) -> Visit:
        """Make the folder there.

        Raises:
            MeasurementError: it cannot be reached, has no Python that is new enough, no space, is measuring already, or
                answers with no folder.
        """
        needed = sum(self._sizes.values())
        note(f"{self.address}: connecting")
        found = self._link.call(("python3", "-"), feed=[opening(needed)])
        fault = found.get("fault")
        if fault == "python":
            raise MeasurementError(
                f"{self.address}: python3 there is {plain(found.get('version'))}; measuring needs 3.9 or newer. Install one "
                "and put it first on the PATH of commands without a terminal."
            )
        if fault == "busy":
            raise MeasurementError(
                f"{self.address}: another measurement is running there, and two at once would disturb each other. Wait for "
                "its end and measure again."
            )
        if fault == "space":
            raise self._no_space(found, needed=_number(found.get("needed")))
        folder = found.get("folder")
        if not isinstance(folder, str) or not folder.startswith("/"):
            raise MeasurementError(
                f"{self.address}: its answer cannot be used: it should name the folder that it made, as a path from the "
                f"root, found {plain(repr(folder))}. See by hand that python3 there is Python and measure again."
            )
        self._there = folder
        note(
            f"{self.address}: {plain(found.get('machine'))}, Python {plain(found.get('python'))}, "
            + ("with" if found.get("onnxruntime") else "without")
            + " onnxruntime"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have everything there ended and removed."""
        try:
            gone = self._ask("stop").get("gone") is True
        except MeasurementError:
            gone = False
        if not gone:
            warn(
                f"{self.address}: the folder {plain(self._there)} could not be removed now; it is removed there by itself "
                f"{PATIENCE / 60:.0f} minutes after the last sign from here."
            )

    def send(self) -> None:
        """Send every file that is not there whole.

        Raises:
            MeasurementError: the connection was lost again and again, or there is no space.
        """
        self._again("sending", self._send)

    def _send(self) -> None:
        there = self._ask("have").get("files")
        there = there if isinstance(there, dict) else {}
        left = {name: size for name, size in self._sizes.items() if there.get(name) != size}
        total = sum(left.values())
        if not left:
            return
        note(f"{self.address}: sending {total / MEGABYTE:.1f} MB")
        with progress("sending", total) as bar, closing(tar_stream(self._folder, left, sent=bar.advance)) as feed:
            found = self._ask("receive", feed=feed)
        fault = found.get("fault")
        if fault == "full":
            raise self._no_space(found, needed=total)
        if fault is not None:
            raise ConnectionLost(f"{self.address}: the files did not arrive whole.")

    def measure(self) -> MeasurementError | None:
        """Measure there, showing what it says meanwhile; return its failure, or None.

        Raises:
            MeasurementError: the connection was lost again and again, or the watching process there was ended.
        """
        self._again("starting", lambda: self._checked(self._ask("start")))
        place = {"offset": 0}

        def heard(answer: dict[str, Any]) -> None:
            place["offset"] = _number(answer.get("offset"))
            for line in str(answer["log"]).splitlines():
                self._lines = [*self._lines[1 - MOST_LINES :], plain(line)]
                note(f"{self.address}: {plain(line)}")

        def follow() -> dict[str, Any]:
            return self._checked(self._ask("follow", str(place["offset"]), heard=heard))

        found = self._again("measuring", follow)
        if "done" not in found:
            raise ConnectionLost(f"{self.address}: the connection ended while measuring. Measure again.")
        if found["done"] == 0:
            return None
        if _number(found.get("free")) < FULL:
            return self._no_space(found | {"place": self._there}, needed=INSTALL_BYTES)
        errors = [line for line in self._lines if line.startswith("error: ")]
        said = errors[-1].removeprefix("error: ") if errors else " / ".join(self._lines[-3:]) or "it said nothing"
        return MeasurementError(f"{self.address}: {said}")

    def fetch(self, name: str, *, most: int) -> str | None:
        """Return the text of a file that came out, or None where there is none.

        Raises:
            MeasurementError: it is of more than `most` bytes, or the connection was lost again and again.
        """
        found = self._again("fetching", lambda: self._ask("fetch", name, str(most)))
        if found.get("fault") == "large":
            raise MeasurementError(
                f"{self.address}: {name} has {_number(found.get('bytes')):,} bytes there, allowed are {most:,}. Measure "
                "fewer cells (bench.sequence_lengths, bench.batch_sizes, bench.rounds)."
            )
        text = found.get("text")
        return text if isinstance(text, str) else None

    def _ask(
        self, *words: str, feed: Iterator[bytes] | None = None, heard: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        command = ("python3", f"{self._there}/keeper.py", *words)
        return self._link.call(command, feed=() if feed is None else feed, heard=heard)

    def _again(self, doing: str, step: Callable[[], T]) -> T:
        """Return what `step` returns, trying again where the connection is lost."""
        for wait in WAITS:
            try:
                return step()
            except ConnectionLost as error:
                warn(f"{self.address}: connection lost while {doing} ({error}); trying again in {wait:.0f} s")
                time.sleep(wait)
        return step()

    def _checked(self, found: dict[str, Any]) -> dict[str, Any]:
        if found.get("fault") == "gone":
            raise MeasurementError(
                f"{self.address}: the process that watches over the measurement there was ended from outside, such as by a "
                "restart, by memory running out, or by a system that ends what a user leaves running (`loginctl "
                "enable-linger` keeps it). Measure again."
            )
        return found

    def _no_space(self, found: dict[str, Any], *, needed: int) -> MeasurementError:
        return MeasurementError(
            f"{self.address}: no space in {plain(found.get('place'))}: {_number(found.get('free')) / MEGABYTE:.0f} MB are "
            f"free, {needed / MEGABYTE:.0f} MB are needed. Free some, or set TMPDIR there to a folder on a larger disk."
        )


def _number(value: object) -> int:
    """Return a whole number that came from outside, or 0."""
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0


def opening(needed: int) -> bytes:
    """Return the program that opens a folder for `needed` bytes: any Python reads it, and 3.9 or newer goes on."""
    source = (RUNNER / "keeper.py").read_text(encoding="utf-8")
    return f"""
import json, sys
if sys.version_info < (3, 9):
    print({MARK!r} + json.dumps({{"fault": "python", "version": ".".join(map(str, sys.version_info[:3]))}}))
    sys.exit(0)
source = {source!a}
scope = {{"__name__": "keeper"}}
exec(compile(source, "keeper.py", "exec"), scope)
scope["open_folder"](source, {needed})
""".encode("ascii")


def tar_stream(folder: Path, sizes: dict[str, int], *, sent: Callable[[int], None]) -> Generator[bytes, None, None]:
    """Yield files as one tar archive, block by block.

    Args:
        folder: where they are.
        sizes: their names below it, and bytes.
        sent: called with the bytes of every block of a file.
    """
    for name, size in sizes.items():
        header = tarfile.TarInfo(name)
        header.size, header.mode = size, 0o644
        yield header.tobuf(tarfile.PAX_FORMAT)
        with (folder / name).open("rb") as file:
            while block := file.read(BLOCK):
                yield block
                sent(len(block))
        yield b"\0" * (-size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)
