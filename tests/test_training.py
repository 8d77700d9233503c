"""The training loop: schedule, determinism, resume to the bit, the best epoch, and what is kept when it stops."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.batching import Batch
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ArtifactError, TrainingError
from bertemd_deploy.evaluate import torch_logits
from bertemd_deploy.training import Outcome, Schedule, fit, learning_rate
from bertemd_deploy.training_state import Progress

ROWS = 18


class Bag(nn.Module):
    """Mean token embedding, dropout, one layer: small, and with a dropout whose pattern matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.LayerNorm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(8, 2)
        self.idle = nn.Linear(8, 8)  # never used: has no gradient, hence no optimiser state

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"][..., None]
        mean = (self.embedding(inputs["input_ids"]) * mask).sum(1) / mask.sum(1)
        logits: Tensor = self.classifier(self.dropout(self.LayerNorm(mean)))
        return logits


class Counter:
    """Extra state: what a run carries beside its weights."""

    def __init__(self) -> None:
        self.total = torch.zeros(1, dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.total = state["total"]


def examples() -> DataSlice:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 7, size=ROWS)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = generator.integers(1, 20, size=offsets[-1]).astype(np.int32)
    return DataSlice(Encoded(tokens, np.zeros(len(tokens), np.int8), offsets), np.arange(ROWS, dtype=np.int64) % 2)


def schedule(**changes: Any) -> Schedule:
    return Schedule(
        **(
            {
                "epochs": 3,
                "batch_size": 4,
                "learning_rate": 0.05,
                "warmup_ratio": 0.2,
                "weight_decay": 0.1,
                "seed": 7,
                "logging_steps": 1,
            }
            | changes
        )
    )


class StoppedError(Exception):
    """What a test raises inside a step to stop a run."""


class Run:
    """One training run in a folder, with ways to disturb it."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.schedule = folder, schedule(**changes)
        self.model, self.extra = Bag(), Counter()
        self.steps = 0
        self.log = folder / "log.jsonl"
        self.checkpoints = folder / "checkpoints"

    def fit(
        self,
        *,
        stop_at: int | None = None,
        loss: Callable[[int, Tensor], Tensor] = lambda _step, loss: loss,
        scores: Iterator[float] | None = None,
        metric: str = "score",
    ) -> Progress:
        def objective(batch: Batch) -> Outcome:
            assert self.model.training
            if self.steps == stop_at:
                raise StoppedError
            self.steps += 1
            total = torch.zeros(())
            for part, seed in zip(batch.parts, batch.seeds, strict=True):
                torch.manual_seed(seed)
                value = F.cross_entropy(self.model(part.inputs), part.labels, reduction="sum") / batch.units
                value = loss(self.steps, value)
                value.backward()
                total += value.detach()
            self.extra.total = self.extra.total + total.item()
            return Outcome(total, {}, lambda: {"running": self.extra.total.item()})

        def evaluate() -> dict[str, float]:
            assert not self.model.training
            return {metric: next(scores) if scores else self.extra.total.item()}

        return fit(
            self.model,
            schedule=self.schedule,
            data=examples(),
            pad_id=0,
            objective=objective,
            evaluate=evaluate,
            metric=metric,
            checkpoints=self.checkpoints,
            log=self.log,
            name="test",
            extra_state=self.extra,
        )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def facts(self) -> list[dict[str, Any]]:
        """Return the log without what depends on the clock."""
        return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in self.lines()]


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs)


def test_freed_memory_is_kept_for_the_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []

    @contextlib.contextmanager
    def kept() -> Iterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    def loss(_step: int, value: Tensor) -> Tensor:
        assert inside == [True]
        return value

    monkeypatch.setattr("bertemd_deploy.training.freed_memory_kept", kept)
    assert Run(tmp_path).fit(loss=loss).step > 1
    assert inside == [True, False]


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    plan = schedule(learning_rate=1.0, warmup_ratio=0.4)
    rates = [learning_rate(step, total=5, schedule=plan) for step in range(5)]
    assert rates == pytest.approx([1 / 2, 2 / 2, 3 / 3, 2 / 3, 1 / 3])
    assert learning_rate(0, total=4, schedule=schedule(learning_rate=1.0, warmup_ratio=0.0)) == 1.0
    assert learning_rate(3, total=4, schedule=schedule(learning_rate=1.0, warmup_ratio=1.0)) == 1.0


def test_the_logged_rate_is_the_one_used(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.fit()
    used = [line["learning_rate"] for line in run.lines() if "loss" in line]
    assert used == [learning_rate(step, total=15, schedule=run.schedule) for step in range(15)]


def test_weight_decay_spares_biases_and_layer_norms(tmp_path: Path) -> None:
    run = Run(tmp_path, weight_decay=0.9, learning_rate=0.5, warmup_ratio=0.0, epochs=1, batch_size=ROWS)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.fit(loss=lambda _step, loss: loss * 0 + sum(value.sum() for value in run.model.parameters()) * 0)
    for name, value in run.model.named_parameters():  # every gradient is zero, so decay alone moves a weight
        factor = 1.0 if name.endswith("bias") or "LayerNorm" in name else 1 - 0.5 * 0.9
        torch.testing.assert_close(value, before[name] * factor)


def test_two_runs_are_the_same_to_the_bit(tmp_path: Path) -> None:
    one, other, third = Run(tmp_path / "1"), Run(tmp_path / "2"), Run(tmp_path / "3", seed=8)
    for run in (one, other, third):
        run.fit()
    assert same_weights(one.model, other.model)
    assert one.facts() == other.facts()
    assert not same_weights(one.model, third.model)


@pytest.mark.parametrize("stop_at", [1, 4, 5, 6, 14])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path, stop_at: int) -> None:
    whole = Run(tmp_path / "whole")
    told = whole.fit()
    with pytest.raises(StoppedError):
        Run(tmp_path / "cut", checkpoint_seconds=0).fit(stop_at=stop_at)
    saved = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").glob("step-*"))
    assert saved == [f"step-{stop_at:08d}.safetensors"]
    resumed = Run(tmp_path / "cut")
    again = resumed.fit()
    assert same_weights(whole.model, resumed.model)
    assert resumed.steps == 15 - stop_at
    assert resumed.facts() == whole.facts()
    assert (again.step, again.epochs, again.best_epoch, again.tokens) == (
        told.step,
        told.epochs,
        told.best_epoch,
        told.tokens,
    )


def test_a_run_stopped_again_and_again_is_still_the_same(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    whole.fit()
    for _ in range(7):
        with pytest.raises(StoppedError):
            Run(tmp_path / "cut", checkpoint_seconds=0).fit(stop_at=2)
    resumed = Run(tmp_path / "cut")
    resumed.fit()
    assert resumed.steps == 1
    assert same_weights(whole.model, resumed.model)
    assert resumed.facts() == whole.facts()


def test_what_was_logged_after_the_checkpoint_is_not_there_twice(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole")
    whole.fit()
    with pytest.raises(StoppedError):  # the only checkpoint is that of the first epoch's end, step 5
        Run(tmp_path / "cut", checkpoint_seconds=3600).fit(stop_at=8)
    with (tmp_path / "cut" / "log.jsonl").open("a") as handle:
        handle.write('{"step": 9, "epoch": 2, "lo')  # the line a killed process was writing
    resumed = Run(tmp_path / "cut")
    resumed.fit()
    assert resumed.steps == 10
    assert [line["step"] for line in resumed.lines() if "loss" in line] == list(range(1, 16))
    assert resumed.facts() == whole.facts()


def test_an_epoch_evaluated_again_is_not_logged_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(tmp_path / "whole")
    whole.fit()
    cut = Run(tmp_path / "cut", checkpoint_seconds=0)
    with monkeypatch.context() as patch:  # killed after the first epoch's dev line, before its checkpoint
        from bertemd_deploy import training

        finish = training._Run.finish_epoch

        def finish_and_die(*arguments: Any) -> None:
            finish(*arguments)
            raise StoppedError

        patch.setattr(training._Run, "finish_epoch", finish_and_die)
        with pytest.raises(StoppedError):
            cut.fit()
    assert [line for line in cut.lines() if "dev" in line]
    resumed = Run(tmp_path / "cut")
    resumed.fit()
    assert resumed.facts() == whole.facts()
    assert same_weights(whole.model, resumed.model)


def test_a_finished_run_called_again_trains_nothing(tmp_path: Path) -> None:
    first, again = Run(tmp_path), Run(tmp_path)
    first.fit()
    again.fit()
    assert again.steps == 0
    assert same_weights(first.model, again.model)


@pytest.mark.parametrize(("scores", "best"), [((0.1, 0.9, 0.4), 2), ((0.5, 0.5, 0.5), 1), ((-0.3, -0.2, -0.1), 3)])
def test_the_best_epoch_s_weights_are_left_the_earlier_of_equals(
    tmp_path: Path, scores: tuple[float, ...], best: int
) -> None:
    run = Run(tmp_path / "run")
    seen: list[Bag] = []

    def watch() -> Iterator[float]:
        for score in scores:
            copy = Bag()
            copy.load_state_dict(run.model.state_dict())
            seen.append(copy)
            yield score

    done = run.fit(scores=watch())
    assert done.best_epoch == best
    assert [epoch["score"] for epoch in done.epochs] == list(scores)
    assert same_weights(run.model, seen[best - 1])
    assert not run.model.training
    assert [line["best_epoch"] for line in run.lines() if "dev" in line][-1] == best


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_last_checkpoint(
    tmp_path: Path, value: float
) -> None:
    run = Run(tmp_path, checkpoint_seconds=0)
    with pytest.raises(TrainingError) as raised:
        run.fit(loss=lambda step, loss: loss * value if step == 7 else loss)
    assert str(raised.value).startswith(f"step 7: the loss is {value}. Lower the learning rate")
    assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-00000006.safetensors"]
    whole, resumed = Run(tmp_path / "whole"), Run(tmp_path)
    whole.fit()
    resumed.fit()
    assert same_weights(whole.model, resumed.model)


@pytest.mark.parametrize("damage", ["truncated", "no progress", "other weights", "no extra state"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(StoppedError):
        Run(tmp_path, checkpoint_seconds=0).fit(stop_at=3)
    path = tmp_path / "checkpoints" / "step-00000003.safetensors"
    tensors = load_file(path)
    progress = {"progress": json.dumps({"step": 3})}
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "no progress":
        save_file(tensors, path)
    elif damage == "other weights":
        save_file(tensors | {"model.classifier.bias": torch.zeros(3)}, path, metadata=progress)
    else:
        save_file({name: value for name, value in tensors.items() if name != "extra.total"}, path, metadata=progress)
    with pytest.raises(TrainingError) as raised:
        Run(tmp_path).fit()
    assert str(raised.value).startswith(f"{path}: the checkpoint cannot be continued (")
    assert str(raised.value).endswith("Add --force to start over.")


@pytest.mark.parametrize("damage", ["truncated", "absent"])
def test_damaged_best_weights_are_named(tmp_path: Path, damage: str) -> None:
    Run(tmp_path).fit()
    (best,) = (tmp_path / "checkpoints").glob("best*")
    if damage == "truncated":
        best.write_bytes(best.read_bytes()[:50])
    else:
        best.unlink()
    with pytest.raises(TrainingError, match=r"best-3\.safetensors: the checkpoint cannot be continued"):
        Run(tmp_path).fit()


@pytest.mark.parametrize("at", [3, 15])
def test_an_interrupt_ends_after_a_checkpoint_and_the_next_call_goes_on(tmp_path: Path, at: int) -> None:
    def interrupt(step: int, loss: Tensor) -> Tensor:
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "cut", checkpoint_seconds=3600).fit(loss=interrupt)
    assert signal.getsignal(signal.SIGINT) is previous
    assert (tmp_path / "cut" / "checkpoints" / f"step-{at:08d}.safetensors").is_file()
    whole, resumed = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    whole.fit()
    resumed.fit()
    assert resumed.steps == 15 - at
    assert same_weights(whole.model, resumed.model)
    assert resumed.facts() == whole.facts()


def test_an_interrupt_during_the_last_evaluation_is_not_lost(tmp_path: Path) -> None:
    def scores() -> Iterator[float]:
        yield from (0.1, 0.2)
        os.kill(os.getpid(), signal.SIGINT)
        yield 0.3

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).fit(scores=scores())
    resumed = Run(tmp_path)
    assert resumed.fit().best_epoch == 3
    assert resumed.steps == 0


def test_a_second_interrupt_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []
    monkeypatch.setattr("bertemd_deploy.training.os._exit", codes.append)

    def interrupt(step: int, loss: Tensor) -> Tensor:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).fit(loss=interrupt)
    assert codes == [130]


def test_training_outside_the_main_thread_leaves_signals_alone(tmp_path: Path) -> None:
    import threading

    results: list[Progress] = []
    previous = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: results.append(Run(tmp_path).fit()))
    thread.start()
    thread.join()
    assert results[0].step == 15
    assert signal.getsignal(signal.SIGINT) is previous


def test_a_checkpoint_that_cannot_be_written_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    write = safetensors.torch.save_file

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if "step-00000004" in path.name:
            path.write_bytes(b"half")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        write(tensors, path, **options)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ArtifactError, match=r"step-00000004\.safetensors: could not be written \(.*No space left"):
        Run(tmp_path, checkpoint_seconds=0).fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003.safetensors"]
    monkeypatch.undo()
    whole, resumed = Run(tmp_path / "whole"), Run(tmp_path)
    whole.fit()
    resumed.fit()
    assert same_weights(whole.model, resumed.model)


def test_a_log_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "taken").write_text("a file, where the log's folder should be")
    run.log = tmp_path / "taken" / "log.jsonl"
    with pytest.raises(ArtifactError, match=r"taken/log\.jsonl: could not be written \(File exists\)"):
        run.fit()


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    norms = []
    run = Run(tmp_path, max_grad_norm=0.5, epochs=1)
    step = torch.optim.AdamW.step

    def watch(self: torch.optim.AdamW) -> None:
        grads = [value.grad for group in self.param_groups for value in group["params"] if value.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads])))
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watch)
        run.fit(loss=lambda _step, loss: loss * 100)
    torch.testing.assert_close(torch.stack(norms), torch.full((5,), 0.5), rtol=1e-4, atol=0)


def test_torch_logits_keep_the_rows_order(tiny_bert: Callable[..., Path]) -> None:
    from bertemd_deploy.models import load_classifier

    model = load_classifier(tiny_bert(labels=("a", "b", "c")), labels=("a", "b", "c"))
    part = examples().examples
    together = torch_logits(model, part, pad_id=0, batch_size=5)
    alone = np.concatenate([torch_logits(model, part.select([row]), pad_id=0) for row in range(ROWS)])
    assert together.shape == (ROWS, 3)
    np.testing.assert_allclose(together, alone, atol=1e-5)
