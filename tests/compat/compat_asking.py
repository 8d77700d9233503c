"""Asking other software: where it is installed, and one process for each, from a file of questions to a file of answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = Path(os.environ.get("BERTEMD_COMPAT", ROOT / ".compat")).absolute()  # what `make compat` makes
ANSWERING = Path(__file__).resolve().parent / "answering"
LIMIT = 900  # seconds


def installed(name: str, *, program: str) -> Path:
    """Return a folder of `INSTALLED` that holds `program`; skip the test where there is none."""
    folder = INSTALLED / name
    if not (folder / program).exists():
        pytest.skip(f"{name} is not installed in {INSTALLED} (make compat)")
    return folder


def executable(*names: str) -> str:
    """Return the path of the first of these programs; skip the test where there is none."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(f"there is no {' or '.join(names)} on this machine")
    return found


def ask(
    command: list[str], request: dict[str, Any], *, work: Path, folder: Path, more: tuple[str, ...] = (), path: str = ""
) -> dict[str, Any]:
    """Run `command REQUEST ANSWER MORE...` in `folder` and return what it wrote.

    The process has an empty home, hubs switched off, and `path` for its PYTHONPATH.
    """
    work.mkdir(parents=True, exist_ok=True)
    question, answer = work / "request.json", work / "answer.json"
    question.write_text(json.dumps(request), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH")}
    quiet = {"HOME": str(work), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet |= {"PYTHONPATH": path} if path else {}
    done = subprocess.run(
        [*command, str(question), str(answer), *more],
        cwd=folder,
        env=kept | quiet,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found
