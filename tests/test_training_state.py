"""What a run keeps and how it stops: on time, out of memory, with a parameter nobody used; and what it says of it."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import Bag, Counter, Run, StoppedError, examples, same_weights
from torch import Tensor, nn

from bertemd_deploy.errors import TrainingError, UnfinishedError
from bertemd_deploy.processes import Processes
from bertemd_deploy.training import Outcome, _Run
from bertemd_deploy.training_state import (
    NoState,
    Progress,
    best_path,
    load_best,
    resume,
    save_best,
    save_checkpoint,
    trim_log,
)

OUT_OF_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


def test_time_that_is_over_stops_after_each_step_and_the_same_call_goes_on(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    whole.fit()
    for step in range(1, 16):
        with pytest.raises(UnfinishedError) as raised:
            Run(tmp_path / "cut", max_minutes=0.0, checkpoint_seconds=3600).fit()
        assert str(raised.value) == (
            f"test: stopped after 0 minutes, as --max-minutes says, at step {step} of 15. "
            "The same command (without --force or --from) continues from here."
        )
        assert raised.value.exit_code == 3
        saved = [path.name for path in (tmp_path / "cut" / "checkpoints").glob("step-*")]
        assert saved == [f"step-{step:08d}.safetensors"]
    last = Run(tmp_path / "cut", max_minutes=0.0)
    last.fit()  # nothing is left but the last epoch's end
    assert last.steps == 0
    assert same_weights(whole.model, last.model)
    assert last.facts() == whole.facts()


def test_time_that_is_not_over_stops_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, max_minutes=60.0)
    assert run.fit().step == 15


@pytest.mark.parametrize("logging_steps", [1, 7])
def test_the_time_left_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_steps: int) -> None:
    Run(tmp_path, epochs=6, logging_steps=logging_steps).fit()
    lines = [line for line in capsys.readouterr().err.splitlines() if " left (" in line]
    assert len(lines) == 1
    assert re.fullmatch(r"test: about \d+ (s|min) left \(10 steps, [\d,]+ tokens/s\)", lines[0])
    Run(tmp_path / "short", epochs=3).fit()
    assert " left (" not in capsys.readouterr().err


def short_of_memory(monkeypatch: pytest.MonkeyPatch, *, above: int) -> list[int]:
    """Let the model fail above so many rows, as torch does; return the sizes that were tried."""
    tried: list[int] = []
    held: list[weakref.ref[Tensor]] = []
    forward = Bag.forward

    def limited(self: Bag, inputs: Mapping[str, Tensor]) -> Tensor:
        activations = torch.zeros(3)
        assert all(reference() is None for reference in held), "what failed before still holds its memory"
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > above:
            held.append(weakref.ref(activations))
            raise RuntimeError(f"{OUT_OF_MEMORY} to allocate {activations.numel()} bytes.\nmore")
        return forward(self, inputs)

    monkeypatch.setattr(Bag, "forward", limited)
    return tried


@pytest.mark.parametrize(("above", "fits"), [(7, 4), (3, 2), (1, 1)])
def test_out_of_memory_names_a_size_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: int, fits: int
) -> None:
    tried = short_of_memory(monkeypatch, above=above)
    with pytest.raises(TrainingError) as raised:
        Run(tmp_path, batch_size=9).fit()
    longest = examples().examples.lengths.max()
    text = str(raised.value)
    start = re.fullmatch(r"step 1: out of memory with 9 rows of up to (\d+) tokens at once \((.*)\)\. (Parts .*)", text)
    assert start is not None
    assert int(start[1]) <= longest
    assert start[2] == f"{OUT_OF_MEMORY} to allocate 3 bytes."[:120]
    assert start[3] == (
        f"Parts of {fits} were tried and fit: set distill.micro_batch_size (in fine-tuning teacher.micro_batch_size) to "
        f"{fits} for the same result up to rounding and dropout's draws. The command then continues."
    )
    assert tried[-1] <= fits < tried[0]
    assert Run(tmp_path, batch_size=9, micro_batch_size=fits).fit().step == 6  # and it is true


def test_out_of_memory_with_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = short_of_memory(monkeypatch, above=0)
    with pytest.raises(TrainingError, match=r"Not even one row fits\. Lower data\.max_length, or use a machine with"):
        Run(tmp_path).fit()
    assert tried == [4, 2, 1] or tried == [2, 1]  # the last batch has 2 rows, and may come first


def test_out_of_memory_in_the_middle_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoppedError):
        Run(tmp_path, checkpoint_seconds=0).fit(stop_at=6)
    short_of_memory(monkeypatch, above=1)
    with pytest.raises(TrainingError, match=r"^step 7: out of memory with \d rows"):
        Run(tmp_path).fit()
    again = Run(tmp_path, micro_batch_size=1)
    assert again.fit().step == 15
    assert again.lines()[-1]["step"] == 15


def test_of_several_processes_none_tries_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertemd_deploy.training.Processes", lambda: Pretended(0, 2))
    tried = short_of_memory(monkeypatch, above=0)
    with pytest.raises(
        TrainingError, match=r"Set distill\.micro_batch_size \(in .* teacher\.micro_batch_size\) to 1\.$"
    ):
        Run(tmp_path).fit()
    assert len(tried) == 1


@pytest.mark.parametrize("place", ["sum", "clip", "update"])
@pytest.mark.parametrize("logging_steps", [1, 100])
def test_out_of_memory_in_the_update_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, logging_steps: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{OUT_OF_MEMORY} to allocate 9 bytes.\nmore")

    target = {
        "sum": "bertemd_deploy.training._Run._sum_gradients",
        "clip": "torch.nn.utils.clip_grad_norm_",
        "update": "torch.optim.AdamW.step",
    }[place]
    monkeypatch.setattr(target, fail)
    with pytest.raises(TrainingError) as raised:
        Run(tmp_path, logging_steps=logging_steps).fit()
    text = str(raised.value)
    assert text.startswith(f"step 1: out of memory in the update of the weights ({OUT_OF_MEMORY}")
    assert "needs the same whatever the batch size. Use a smaller model, fewer processes, or" in text
    assert raised.value.exit_code == 3


def test_another_error_in_the_update_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        Run(tmp_path).fit()


class Pretended(Processes):
    """Several processes of which the others add what `others` says to every sum."""

    others: Tensor | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.others is None else tensor.add_(self.others)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("x")])
def test_any_other_error_passes_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> Tensor:
        raise error

    monkeypatch.setattr(Bag, "forward", fail)
    with pytest.raises(type(error)) as raised:
        Run(tmp_path).fit()
    assert raised.value is error


def test_another_error_while_sizes_are_tried_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Bag, inputs: Mapping[str, Tensor]) -> Tensor:
        raise RuntimeError("out of memory" if len(inputs["input_ids"]) > 1 else "a fault of ours")

    monkeypatch.setattr(Bag, "forward", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        Run(tmp_path).fit()


class Three(nn.Module):
    """A parameter used here, one used by another process, one used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.theirs, self.idle = (nn.Parameter(torch.ones(2)) for _ in range(3))


@pytest.mark.parametrize("theirs", [0.0, 5.0])
def test_gradients_are_summed_and_a_parameter_nobody_used_has_none(tmp_path: Path, theirs: float) -> None:
    """A gradient of zeros is one: AdamW decays its parameter, on every process or none."""
    model, others = Three(), Pretended(0, 2)
    schedule = Run(tmp_path).schedule
    run = _Run(model, schedule, _nothing, NoState(), tmp_path, tmp_path / "log", "test", "score", others)
    model.ours.grad = torch.tensor([1.0, 2.0])
    gradients, used, tail = [3.0, 3.0, theirs, theirs, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.25]
    order = [name for value in run.parameters for name, known in model.named_parameters() if known is value]
    assert order == ["ours", "theirs", "idle"]
    others.others = torch.tensor([*gradients, *used, *tail])
    summed = run._sum_gradients(torch.tensor([1.0, 1.0]))
    assert summed.tolist() == [1.5, 1.25]
    assert model.ours.grad.tolist() == [4.0, 5.0]
    assert model.theirs.grad is not None
    assert model.theirs.grad.tolist() == [theirs, theirs]
    assert model.idle.grad is None


def _nothing(_batch: Any) -> Outcome:
    raise AssertionError("no step is done")


def trained_once() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_checkpoint_holds_everything_and_replaces_the_one_before(tmp_path: Path) -> None:
    model, optimizer = trained_once()
    extra = Counter()
    extra.total += 4
    for step in (3, 12):
        done = Progress(step, [{"score": 0.5}], 1, 100, 2.5)
        save_checkpoint(tmp_path, model, optimizer, extra, done)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012.safetensors"]
    other, fresh, back = nn.Linear(3, 2), Counter(), Progress(12, [{"score": 0.5}], 1, 100, 2.5)
    rested = torch.optim.AdamW(other.parameters(), lr=0.1)
    assert resume(tmp_path, other, rested, fresh, name="test") == back
    assert same_weights(model, other)
    assert fresh.total.item() == 4
    for value, twin in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[value], rested.state[twin], rtol=0, atol=0)


def test_a_kill_between_the_best_weights_and_their_checkpoint_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third epoch looks best, its weights are written, and the process dies; done again, it does not look so."""
    whole = Run(tmp_path / "whole")
    whole.fit(scores=iter([0.1, 0.5, 0.4]))
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:

        def save_or_die(folder: Path, *given: Any) -> None:
            if len(given[-1].epochs) == 3:
                raise StoppedError
            save_checkpoint(folder, *given)

        patch.setattr("bertemd_deploy.training.save_checkpoint", save_or_die)
        with pytest.raises(StoppedError):
            Run(cut, checkpoint_seconds=3600).fit(scores=iter([0.1, 0.5, 0.9]))
    assert names(cut / "checkpoints") == ["best-2.safetensors", "best-3.safetensors", "step-00000010.safetensors"]
    resumed = Run(cut)
    assert resumed.fit(scores=iter([0.4])).best_epoch == 2
    assert same_weights(whole.model, resumed.model)
    assert names(cut / "checkpoints") == ["best-2.safetensors", "step-00000015.safetensors"]


def test_best_weights_of_an_earlier_version_are_taken_until_there_are_better_ones(tmp_path: Path) -> None:
    whole, old = Run(tmp_path / "whole"), tmp_path / "old"
    whole.fit(scores=iter([0.1, 0.5, 0.4]))
    with pytest.raises(StoppedError):
        Run(old, checkpoint_seconds=0).fit(scores=iter([0.1, 0.5]), stop_at=11)
    (old / "checkpoints" / "best-2.safetensors").rename(old / "checkpoints" / "best.safetensors")
    resumed = Run(old)
    resumed.fit(scores=iter([0.4]))
    assert names(old / "checkpoints") == ["best.safetensors", "step-00000015.safetensors"]
    assert same_weights(whole.model, resumed.model)
    model, optimizer = trained_once()
    save_best(old / "checkpoints", model, epoch=3)
    save_checkpoint(old / "checkpoints", model, optimizer, NoState(), Progress(20, [{}] * 3, 3))
    assert names(old / "checkpoints") == ["best-3.safetensors", "step-00000020.safetensors"]
    other = nn.Linear(3, 2)
    load_best(old / "checkpoints", other, epoch=3)
    assert same_weights(model, other)
    assert best_path(old, 12) == old / "best-12.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_empty_folder_starts_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = trained_once()
    before = [value.clone() for value in model.parameters()]
    assert resume(tmp_path, model, optimizer, NoState(), name="test") == Progress()
    assert all(torch.equal(value, old) for value, old in zip(model.parameters(), before, strict=True))
    assert capsys.readouterr().err == ""


def test_extra_state_that_shares_memory_is_kept(tmp_path: Path) -> None:
    class Shared(NoState):
        def state(self) -> dict[str, Tensor]:
            value = torch.arange(3.0)
            return {"one": value, "other": value}

    save_checkpoint(tmp_path, *trained_once(), Shared(), Progress(1))
    kept = load_file(tmp_path / "step-00000001.safetensors")
    assert kept["extra.one"].tolist() == kept["extra.other"].tolist() == [0.0, 1.0, 2.0]


def test_a_log_is_kept_up_to_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    trim_log(log, Progress())  # none yet
    assert not log.exists()
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "epoch": 1, "dev": {}}, {"step": 3, "loss": 1.0}, {"step": 4}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5')
    trim_log(log, Progress(3, [{}]))
    assert [json.loads(line) for line in log.read_text().splitlines()] == lines[:3]
    trim_log(log, Progress(2))  # killed between the epoch's line and its checkpoint
    assert [json.loads(line) for line in log.read_text().splitlines()] == lines[:1]
