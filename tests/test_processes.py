"""Several processes: the same run as one, a run that outlives any of them, and one voice.

The processes are forked from a server that has imported the package, so that each starts in a moment.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from bertemd_deploy.cli import app
from bertemd_deploy.errors import RecipeError, TrainingError
from bertemd_deploy.processes import Processes, join_processes

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "bertemd_deploy.distill",
        "bertemd_deploy.finetune",
        "transformers.models.bert.modeling_bert",
        "scipy.optimize",
        "ot",
    ]
)
LOSSES = {"prediction", "attention", "hidden", "embedding"}
ROOT = Path(__file__).resolve().parents[1]
Task = Callable[..., tuple[Path, Path]]


class Member:
    """One process of a run: its exit code and what it said."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.out, self.err, self.saves = (folder / f"{name}-{rank}" for name in ("out", "err", "saves"))
        self.code: int | None = None

    @property
    def said(self) -> str:
        return self.err.read_text(encoding="utf-8")

    @property
    def printed(self) -> str:
        return self.out.read_text(encoding="utf-8")


def be_member(
    member: Member, rank: int, size: int, port: int, arguments: list[str], hurt: tuple[int, int, int] | None
) -> None:
    """Run the command line as process `rank`; `hurt` is (rank, step, signal) that it sends itself in that step."""
    for path, number in ((member.out, 1), (member.err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    from bertemd_deploy import training
    from bertemd_deploy.objective import Objective

    save, step = training.save_checkpoint, Objective.__call__

    def saved(*given: Any) -> None:
        save(*given)
        with member.saves.open("a", encoding="utf-8") as handle:
            handle.write("saved\n")

    def stepped(self: Objective, batch: Any) -> Any:
        if hurt is not None and (rank, batch.number + 1) == hurt[:2]:
            os.kill(os.getpid(), hurt[2])
        return step(self, batch)

    training.save_checkpoint = saved
    Objective.__call__ = stepped  # type: ignore[method-assign]
    app(arguments)


def start(folder: Path, arguments: list[str], *, size: int, hurt: tuple[int, int, int] | None = None) -> list[Member]:
    """Run one command on `size` processes and wait for them."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    members = [Member(folder, rank) for rank in range(size)]
    started = [
        CONTEXT.Process(target=be_member, args=(member, rank, size, port, arguments, hurt))
        for rank, member in enumerate(members)
    ]
    for process in started:
        process.start()
    for process, member in zip(started, members, strict=True):
        process.join(60)
        member.code = process.exitcode
        if process.is_alive():
            process.kill()
            process.join()
    return members


def command(teacher: Path, data: Path, out: Path, **settings: Any) -> list[str]:
    plain = {"precision": "float32", "batch_size": 8, "epochs": 2, "learning_rate": 1e-3}
    plain |= {"logging_steps": 1, "checkpoint_seconds": 0}
    given = {f"distill.{key}": value for key, value in (plain | settings).items()} | {"data.max_length": 32}
    options = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    return ["distill", f"--teacher={teacher}", f"--data={data}", "--student=4L", f"--out={out}", "--json", *options]


@pytest.fixture
def task(tiny_task: Task) -> tuple[Path, Path]:
    """Return a teacher without dropout and 25 train rows: three batches of 8 and one of 1."""
    return tiny_task(train=25, dev=12, layers=6, dropout=0.0)


def logged(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "distill.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


def same_run(one: Path, other: Path) -> None:
    """Assert that two students took the same way and are the same, to rounding."""
    lines, others = logged(one), logged(other)
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, twin in zip(lines, others, strict=True):
        for key, value in line.items():
            if isinstance(value, dict):
                assert value == pytest.approx(twin[key], rel=1e-4, abs=1e-6)
            else:
                torch.testing.assert_close(torch.tensor(value), torch.tensor(twin[key]), rtol=1e-4, atol=1e-5)
    weights, twins = (load_file(folder / "model.safetensors") for folder in (one, other))
    torch.testing.assert_close(weights, twins, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mapping", "fit"), [("emd", "auto"), ("uniform", "always")])
def test_two_processes_train_as_one_and_one_of_them_speaks(
    task: tuple[Path, Path], tmp_path: Path, mapping: str, fit: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    fitting = ["--set", f"student.fit_layers={fit}"]
    (alone,) = start(tmp_path / "1", [*command(*task, one, mapping=mapping), *fitting], size=1)
    first, second = start(tmp_path / "2", [*command(*task, two, mapping=mapping), *fitting], size=2)
    assert (alone.code, first.code, second.code) == (0, 0, 0)
    same_run(one, two)
    steps = [line for line in logged(two) if "losses" in line]
    assert len(steps) == 8
    assert set(steps[0]["losses"]) == LOSSES
    assert steps[0]["attention_flow"] != steps[-1]["attention_flow"] or mapping == "uniform"
    assert first.saves.read_text().count("saved") == 8 + 2  # every step, and the end of every epoch
    assert not second.saves.exists()
    assert second.said == second.printed == ""
    assert first.said.count("student: layers fitted (cosine") == (fit == "always")
    assert first.said.splitlines()[-2].startswith("epoch 1: dev accuracy")
    record, single = json.loads(first.printed), json.loads(alone.printed)
    assert first.printed.count("\n") == 1
    assert record | {"seconds": 0} == single | {"seconds": 0}


def test_a_process_that_dies_ends_the_run_which_goes_on_with_any_number(
    task: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(tmp_path / "1", command(*task, whole), size=1)
    first, second = start(tmp_path / "2", command(*task, cut), size=2, hurt=(1, 6, signal.SIGKILL))
    assert (first.code, second.code) == (3, -signal.SIGKILL)
    assert first.printed == ""
    (message,) = [line for line in first.said.splitlines() if "error" in line]
    assert message.startswith("error: process 0 of 2: another training process ended or does not answer (")
    assert message.endswith(
        "). The last checkpoint is kept; the same command continues from it, on any number of processes."
    )
    assert "Traceback" not in first.said
    assert [path.name for path in (cut / "checkpoints").glob("step-*")] == ["step-00000005.safetensors"]
    for size in (1, 2):
        again = tmp_path / f"again-{size}"
        shutil.copytree(cut, again)
        members = start(tmp_path / f"on-{size}", command(*task, again), size=size)
        assert [member.code for member in members] == [0] * size
        assert "distill: continuing after step 5 (step-00000005.safetensors)" in members[0].said
        same_run(whole, again)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_all_stop_after_the_same_step(task: tuple[Path, Path], tmp_path: Path, number: int) -> None:
    cut = tmp_path / "cut"
    settings = {"mapping": "uniform", "checkpoint_seconds": 3600}
    first, second = start(tmp_path / "1", command(*task, cut, **settings), size=2, hurt=(1, 3, number))
    assert (first.code, second.code) == (130, 130)
    assert first.said.endswith(
        "interrupted; what is finished is kept, the same command (without --force or --from) continues\n"
    )
    assert second.said == ""
    assert [path.name for path in (cut / "checkpoints").glob("step-*")] == ["step-00000003.safetensors"]


def test_time_that_is_over_is_said_once(task: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = [*command(*task, tmp_path / "out"), "--max-minutes", "0"]
    first, second = start(tmp_path / "1", arguments, size=2)
    assert (first.code, second.code) == (3, 3)
    assert first.said.endswith(
        "error: distill: stopped after 0 minutes, as --max-minutes says, at step 1 of 8. The same command (without "
        "--force or --from) continues from here.\n"
    )
    assert second.said == ""


def test_fine_tuning_on_two_processes_is_that_on_one(task: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {"precision": "float32", "batch_size": 8, "epochs": 2}
    options = [word for key, value in settings.items() for word in ("--set", f"teacher.{key}={value}")]
    for size in (1, 2):
        arguments = ["finetune", f"--model={task[0]}", f"--data={task[1]}", f"--out={tmp_path / f'out-{size}'}"]
        members = start(tmp_path / f"{size}", [*arguments, *options, "--set", "data.max_length=32"], size=size)
        assert [member.code for member in members] == [0] * size
    weights, twins = (load_file(tmp_path / f"out-{size}" / "model.safetensors") for size in (1, 2))
    torch.testing.assert_close(weights, twins, rtol=1e-4, atol=1e-4)


def test_alone_nothing_is_exchanged() -> None:
    alone = join_processes()
    assert alone == Processes(0, 1)
    assert alone.main
    values = torch.tensor([1.0, 2.0])
    assert alone.sum(values) is values
    alone.wait()
    assert not torch.distributed.is_initialized()
    assert not Processes(1, 2).main


def test_no_thread_of_the_exchange_outlives_it() -> None:
    """One that does may abort a process that has done its work, once in a while, as it ends."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the system does not list threads")
    code = """
import os, socket
import torch, torch.distributed as dist
from bertemd_deploy import processes
with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
dist.all_reduce(torch.zeros(1))
from transformers import BertForSequenceClassification
import bertemd_deploy.distill
threads = lambda: {open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")}
print(any("gloo" in name for name in threads()))
processes._leave()
print(any("gloo" in name for name in threads()))
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.stdout.split() == ["True", "False"], answer.stderr


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("0", "0"), ("0", "two"), ("-1", "2")])
def test_variables_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, rank: str, size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(RecipeError) as raised:
        join_processes()
    assert str(raised.value) == (
        f"the environment says RANK={rank!r} of WORLD_SIZE={size!r}. Start several processes with `accelerate launch` or "
        "`torchrun`, or unset both."
    )


def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(TrainingError) as raised:
        join_processes()
    assert str(raised.value).startswith("process 0 of 2: the other training processes cannot be reached (")
    assert "MASTER_PORT" in str(raised.value).partition(". Check MASTER_ADDR and ")[0]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(TrainingError, match=r"process 3 of this machine has no GPU: there are 2\. Start at most 2 per"):
        join_processes()


@pytest.fixture
def of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Return a function that makes this process one of two, as the environment says."""

    def become(rank: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))

    return become


def test_a_whole_run_is_for_one_process(of_two: Callable[[int], None], task: tuple[Path, Path], tmp_path: Path) -> None:
    of_two(0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"teacher: {{model: {task[0]}}}\ndata: {{path: {task[1]}}}\nstudent: {{name: 4L}}\n")
    answer = CliRunner().invoke(app, ["run", str(recipe), f"--out={tmp_path / 'run'}"])
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: run: its stages measure and export, which is for one process.")
    assert not (tmp_path / "run").exists()


def test_a_comparison_is_for_one_process(
    of_two: Callable[[int], None], task: tuple[Path, Path], tmp_path: Path
) -> None:
    of_two(0)
    answer = CliRunner().invoke(app, [*command(*task, tmp_path / "out"), "--compare", "emd,uniform"])
    assert answer.exit_code == 2
    assert answer.stderr.endswith(
        "error: --compare: students are compared on one process; distil each by itself on several.\n"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_in_the_command_is_said_once(of_two: Callable[[int], None], rank: int) -> None:
    of_two(rank)
    answer = CliRunner().invoke(app, ["distill", "--teacher=t"])
    assert answer.exit_code == 2
    expected = "error: distill: name a RECIPE, or all of --teacher, --data and --student.\n"
    assert answer.stderr == ("" if rank else expected)
