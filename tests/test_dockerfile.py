"""The Dockerfile: its runtime target's own install steps, run in an empty environment, predict without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the (instruction, arguments) pairs of every build stage, continuation lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            name = rest.split()[-1]
            found[name] = []
        elif instruction and not instruction.startswith("#"):
            found[name].append((instruction, rest))
    return found


def test_both_targets_run_bertemd_as_an_ordinary_user_without_a_health_check() -> None:
    for target in ("train", "runtime"):
        instructions = dict(stages()[target])
        assert instructions["ENTRYPOINT"] == '["bertemd"]'
        assert instructions["USER"] == "10001"
        assert "HEALTHCHECK" not in instructions
    assert list(stages())[-1] == "runtime", "a plain docker build makes the small image"


def test_what_the_image_copies_is_not_ignored() -> None:
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    copied = {
        name
        for body in stages().values()
        for instruction, rest in body
        if instruction == "COPY" and not rest.startswith("--from")
        for name in rest.split()[:-1]
    }
    assert copied <= allowed
    assert all((ROOT / name).exists() for name in allowed)


@pytest.mark.network
def test_the_runtime_target_installs_and_predicts_without_torch(
    tmp_path: Path, tiny_artifact: Callable[..., Path]
) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for instruction, rest in stages()["source"]:
        for name in rest.split()[:-1] if instruction == "COPY" else ():
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, source / name)
    venv = tmp_path / "venv"
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    environment |= {"VENV": str(venv), "PATH": f"{tools}:{environment['PATH']}"}
    for instruction, rest in stages()["install-runtime"]:
        if instruction == "RUN":
            done = subprocess.run(["sh", "-c", rest], cwd=source, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
    absent = subprocess.run([venv / "bin/python", "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in absent.stderr
    artifact = tiny_artifact()
    command = [venv / "bin/bertemd", "predict", artifact, "w1 w2", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert set(json.loads(answer.stdout)["scores"]) == set(
        json.loads((artifact / "bertemd.json").read_text())["labels"]
    )
