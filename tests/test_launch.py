"""Where accelerate starts one process for several: how many are read from its command line, and started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bertemd_deploy import launch
from bertemd_deploy.console import silenced
from bertemd_deploy.errors import RecipeError
from bertemd_deploy.launch import launch_processes, read_option, stands_for_several

ACCELERATE = ["python", "/bin/accelerate", "launch"]
ARGUMENTS = ["distill", "recipe.yaml", "--out", "a folder"]
ROOT = Path(__file__).resolve().parents[1]


class ReplacedError(Exception):
    """What stands for a process that became another."""


@pytest.fixture
def under(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Return a function that puts this process under a launcher; its answer fills with what the process becomes."""

    def start(command: list[str], **environment: str) -> list[Any]:
        became: list[Any] = []

        def become(*given: Any) -> None:
            became.extend(given)
            raise ReplacedError

        for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["bertemd", *ARGUMENTS])
        monkeypatch.setattr(launch, "_parents_command", lambda: [*command, "-m", "bertemd_deploy", *ARGUMENTS])
        monkeypatch.setattr(os, "execve", become)
        return became

    return start


ALONE = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}


@pytest.mark.parametrize(
    "words", [["--num_processes", "3"], ["--num-processes", "3"], ["--num_processes=3"], ["--num-processes=3"]]
)
def test_several_processes_are_started(
    under: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    became = under([*ACCELERATE, *words, "--cpu"], KMP_AFFINITY="compact", OMP_NUM_THREADS="4", **ALONE)
    with pytest.raises(ReplacedError):
        launch_processes()
    program, command, environment = became
    assert program == command[0] == sys.executable
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    assert command[1:] == [*torchrun, "-m", "bertemd_deploy", *ARGUMENTS]
    assert environment == {name: value for name, value in os.environ.items() if name != "KMP_AFFINITY"}
    assert capsys.readouterr().err == (
        "accelerate started one process on CPUs, not 3; starting 3 through torchrun (OMP_NUM_THREADS=4 each)\n"
    )


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--num_processes", "2"], {}),
        (["--num_processes", "2"], ALONE | {"ACCELERATE_USE_CPU": "False"}),
        (["--num_processes", "2"], {"ACCELERATE_USE_CPU": "True"}),
        (["--num_processes", "2"], ALONE | {"WORLD_SIZE": "2", "RANK": "0"}),
        (["--num_processes", "1"], ALONE),
    ],
)
def test_all_else_is_left_as_it_is(
    under: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    environment: dict[str, str],
) -> None:
    became = under([*ACCELERATE, *words], **environment)
    launch_processes()
    assert became == []
    assert capsys.readouterr().err == ""
    assert not silenced()
    assert stands_for_several() is (environment == ALONE)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["bash", "-c", "env"],
            "accelerate started one process on CPUs, and how many were asked for (--num_processes) is not on its command "
            "line. Type instead: torchrun --standalone --nproc_per_node N -m bertemd_deploy distill recipe.yaml --out "
            "'a folder'",
        ),
        (
            [*ACCELERATE, "--num_machines=2", "--num_processes=4"],
            "accelerate starts one process per machine on CPUs. Type on each of the 2 instead: torchrun --nnodes 2 "
            "--node_rank I --master_addr HOST --nproc_per_node N -m bertemd_deploy distill recipe.yaml --out 'a folder'",
        ),
    ],
)
def test_what_cannot_be_started_is_told(under: Callable[..., list[Any]], command: list[str], expected: str) -> None:
    became = under(command, **ALONE)
    with pytest.raises(RecipeError) as raised:
        launch_processes()
    assert str(raised.value) == expected
    assert became == []


def test_options_are_read_as_accelerate_reads_them() -> None:
    assert read_option(["--num_processes", "2", "--num_processes=3"], "num_processes") == 3
    assert read_option(["--num_processes"], "num_processes") is None
    assert read_option(["--num_processes", "many"], "num_processes") is None
    assert read_option(["num_processes", "2"], "num_processes") is None
    assert read_option([], "num_processes") is None


def test_the_scripts_own_words_are_not_the_launchers(
    under: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    under(ACCELERATE, **ALONE)
    own = [*ARGUMENTS, "--num_processes", "5"]
    monkeypatch.setattr(sys, "argv", ["bertemd", *own])
    monkeypatch.setattr(launch, "_parents_command", lambda: [*ACCELERATE, "-m", "bertemd_deploy", *own])
    with pytest.raises(RecipeError, match="how many were asked for"):
        launch_processes()


def test_the_parents_command_line_is_read() -> None:
    code = "from bertemd_deploy.launch import _parents_command; import json; print(json.dumps(_parents_command()))"
    outer = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    given = [sys.executable, "-c", outer, code]
    answer = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)[1:] == given[1:]


def test_accelerate_on_cpus_trains_on_two_processes(
    tiny_task: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    teacher, data = tiny_task(train=20, dev=8, dropout=0.0)
    out = tmp_path / "student"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    options = [f"--teacher={teacher}", f"--data={data}", "--student=4L", f"--out={out}", "--epochs=1", "--json"]
    settings = ["--set", "data.max_length=32", "--set", "distill.precision=float32", "--set", "distill.batch_size=8"]
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "MASTER_ADDR")}
    answer = subprocess.run(
        [*launcher, "-m", "bertemd_deploy", "distill", *options, *settings],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("\n") == 1
    assert json.loads(answer.stdout)["steps"] == 3
    assert answer.stderr.count("starting 2 through torchrun") == 1
    assert answer.stderr.count("teacher: dev accuracy") == 1
    assert (out / "model.safetensors").is_file()
