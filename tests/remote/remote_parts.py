"""A device behind the fake ssh; a bench record as one writes it; a runner folder that writes one without measuring."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

from bertemd_deploy.settings import BenchSettings

FAKE_SSH = Path(__file__).with_name("fake_ssh.py")
URL = "ssh://pi@board"
SMALL = BenchSettings(
    sequence_lengths=(4,),
    batch_sizes=(1,),
    threads=(1,),
    rounds=2,
    seconds_per_cell=0.004,
    graphs=("fp32", "int8"),
    paced_interval_ms=0,
    idle_seconds=0,
    arena=False,
)
_IDENTITY = {"model": "student", "backend": "onnxruntime", "graph": "int8", "model_bytes": 100, "peak_rss_bytes": None}
_RECORD: dict[str, Any] = {
    "schema_version": 1,
    "device": {"name": "A board (4 cores)", "kind": "remote", "cores": 4, "threads": 4, "memory_bytes": 10**9},
    "versions": {"onnxruntime": "1.19.2"},
    "started": "2025-01-01T00:00:00+00:00",
    "settings": {},
    "conditions": {},
    "notes": [],
    "artifact": {"task": {"name": "forged"}},
    "models": [dict(_IDENTITY, name="student onnxruntime int8", metrics={"accuracy": 1.0})],
    "measurements": [
        dict(
            _IDENTITY,
            batch=1,
            sequence=4,
            threads=1,
            n=2,
            latency_ms={"p50": 1.5, "p95": 2.0, "mean": 1.5, "samples": [1.0, 2.0]},
        ),
        dict(
            _IDENTITY,
            batch=1,
            sequence="replay",
            threads=1,
            n=1,
            latency_ms={"p50": 1.0, "p95": 1.0, "mean": 1.0, "samples": [1.0]},
        ),
    ],
}
_PROGRAM = """
import json, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
print("measuring 1/2", file=sys.stderr, flush=True)
time.sleep({seconds})
print("measuring 2/2 \\033[31m", file=sys.stderr, flush=True)
for name, text in {files!r}.items():
    out.with_name(name).write_text(text)
print({said!r}, file=sys.stderr, flush=True)
sys.exit({code})
"""


def remote_record() -> dict[str, Any]:
    """Return a record of two cells."""
    return copy.deepcopy(_RECORD)


def write_stub(
    out: Path, *, files: dict[str, str] | None = None, said: str = "", code: int = 0, seconds: float = 0, extra: int = 0
) -> Path:
    """Write a runner folder whose run.py leaves `files`, says something and ends; `extra` bytes go along."""
    out.mkdir(parents=True)
    found = {"record.json": json.dumps(remote_record())} if files is None else files
    program = _PROGRAM.format(seconds=seconds, files=found, said=said, code=code)
    (out / "run.py").write_text(program)
    (out / "part").mkdir()
    (out / "part" / "weights.bin").write_bytes(bytes(extra))
    return out


def write_python(folder: Path, *options: str) -> Path:
    """Write the program `python3` into a new folder: this very Python with `options`; return the folder."""
    folder.mkdir(parents=True)
    program = folder / "python3"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {" ".join(options)} "$@"\n')
    program.chmod(0o755)
    return folder


class Device:
    """A device behind the fake ssh: what its sessions start with, and what happened."""

    def __init__(self, folder: Path) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir(parents=True)
        self._state = folder / "state"
        self._state.mkdir()
        self.python(write_python(folder / "bin"))
        self.ssh = (sys.executable, "-S", "-E", str(FAKE_SSH), str(self._state))

    def python(self, folder: Path) -> None:
        """Have the device find the programs in `folder` first."""
        path = os.pathsep.join([str(folder), "/usr/bin", "/bin"])
        self.set(environment={"PATH": path, "HOME": str(self.temporary.parent), "TMPDIR": str(self.temporary)})

    def set(self, **changes: Any) -> None:
        """Change what the device does."""
        path = self._state / "device.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | changes))

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of every connection."""
        path = self._state / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def verbs(self) -> list[str]:
        """What each connection asked for."""
        words = [call[call.index("--") + 2 :] for call in self.calls]
        return [word[2] if len(word) > 2 else "open" for word in words]

    @property
    def left(self) -> list[str]:
        """What is in the device's folder for temporary files."""
        return sorted(path.name for path in self.temporary.iterdir())
