"""The one training loop: batches, optimiser, learning rate, evaluation, checkpoints, resume.

`fit` trains whatever modules it is given with whatever objective it is given; fine-tuning and distillation are both calls of
it. It is deterministic and resumable to the bit on a CPU with the same thread and process counts: the order of batches
depends on (seed, epoch), dropout on (seed, step, part, process), and a checkpoint holds weights, optimiser, extra state and
the best score. Killed at any moment, the next call goes on from the last checkpoint, on any number of processes.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bertemd_deploy.allocator import freed_memory_kept
from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.batching import Batch, Batching
from bertemd_deploy.console import note, progress
from bertemd_deploy.errors import TrainingError, UnfinishedError
from bertemd_deploy.files import discard_partial
from bertemd_deploy.processes import Processes
from bertemd_deploy.training_device import is_out_of_memory, training_device
from bertemd_deploy.training_state import (
    ExtraState,
    NoState,
    Progress,
    append_log,
    load_best,
    resume,
    save_best,
    save_checkpoint,
    trim_log,
)

_NO_DECAY = ("bias", "LayerNorm.weight")
_ESTIMATE_AFTER = 20  # steps
_MICRO = "distill.micro_batch_size (in fine-tuning teacher.micro_batch_size)"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; names as in `config.DistillSettings`.

    Epochs before `best_from` (from 1) are not chosen as the best.
    `max_minutes` stops this call after a step, with a checkpoint; None never does.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    seed: int
    max_grad_norm: float = 1.0
    logging_steps: int = 10
    checkpoint_seconds: float = 60.0
    micro_batch_size: int | None = None
    max_minutes: float | None = None
    best_from: int = 1


@dataclass(frozen=True)
class Outcome:
    """What an objective returns of a batch after its backward pass.

    Attributes:
        loss: () this process's share of the batch's loss, without gradient; the shares of all processes add up to it.
        parts: what the loss is made of, shares likewise.
        log: what else to log, the same on every process.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    log: Callable[[], dict[str, Any]]


class Objective(Protocol):
    """Computes a batch's loss and leaves this process's share of its gradients in the parameters."""

    def __call__(self, batch: Batch) -> Outcome:
        """Run forward and backward passes over the batch's parts."""


def fit(
    model: nn.Module,
    *,
    schedule: Schedule,
    data: DataSlice,
    pad_id: int,
    objective: Objective,
    evaluate: Callable[[], Mapping[str, float]],
    metric: str,
    checkpoints: Path,
    log: Path,
    name: str,
    extra_state: ExtraState | None = None,
    processes: Processes | None = None,
) -> Progress:
    """Train `model` and leave it with the weights of its best epoch.

    Args:
        model: holds every trained parameter; in train mode during steps, in eval mode for `evaluate` and at the end.
        schedule: length, speed and seed.
        data: training examples.
        pad_id: token id of padding.
        objective: called with every batch and `model` in train mode.
        evaluate: the dev metrics of the present weights, called after every epoch, on every process.
        metric: key of `evaluate`'s result that chooses the best epoch; the earlier of equals wins.
        checkpoints: folder of this run's resumable state; a state found there is continued.
        log: JSON-lines file, one line each `schedule.logging_steps` and one each epoch.
        name: what the progress bar says.
        extra_state: carried in every checkpoint.
        processes: that share every batch; None is this one alone.

    Raises:
        TrainingError: the loss is not finite, a checkpoint cannot be read, memory is short, or another process died.
        ArtifactError: a checkpoint could not be written (full disk); the one before it is kept.
        UnfinishedError: `schedule.max_minutes` are over; a checkpoint was written.
        KeyboardInterrupt: on SIGINT or SIGTERM, after a checkpoint at the end of the step.
    """
    processes = processes or Processes()
    run = _Run(model, schedule, objective, extra_state or NoState(), checkpoints, log, name, metric, processes)
    batching = Batching(
        schedule.batch_size, schedule.micro_batch_size, schedule.seed, pad_id, processes, training_device()
    )
    steps_per_epoch = math.ceil(len(data) / schedule.batch_size)
    run.total_steps = steps_per_epoch * schedule.epochs
    run.total_tokens = int(data.examples.lengths.sum()) * schedule.epochs
    run.continue_from_checkpoint()
    done = run.done
    with freed_memory_kept(), _deferred_interrupt() as interrupted, progress(name, run.total_steps) as bar:
        bar.advance(done.step)
        while len(done.epochs) < schedule.epochs:
            skip = done.step - len(done.epochs) * steps_per_epoch
            for batch in batching.epoch(data, len(done.epochs), skip=skip):
                loss = run.step(batch, batching, data, interrupted)
                bar.advance(tokens=batch.tokens, detail="" if loss is None else f"loss {loss:.4f}")
                run.keep_or_stop()
            run.finish_epoch(evaluate)
            run.save()
            run.stop_if_told(interrupted.is_set())
    processes.wait()  # the best weights are on disk
    load_best(checkpoints, model, epoch=done.best_epoch)
    processes.wait()  # and were read by all, so that the main process may move them
    model.eval()
    return done


class _Run:
    """One call of `fit`: the optimiser, where the run stands, and the clock."""

    total_steps = 0
    total_tokens = 0

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        objective: Objective,
        extra: ExtraState,
        checkpoints: Path,
        log: Path,
        name: str,
        metric: str,
        processes: Processes,
    ) -> None:
        self.model, self.schedule, self.objective, self.extra = model, schedule, objective, extra
        self.checkpoints, self.log, self.name, self.metric, self.processes = checkpoints, log, name, metric, processes
        self.parameters = [value for value in model.parameters() if value.requires_grad]
        self.optimizer = make_optimizer(model, schedule)
        self.done = Progress()
        self.told_to_stop = False
        self.time_is_over = False
        self.estimated = False
        self.unseen: Tensor | float = 0.0  # sum of the losses that were not looked at since the last that was

    def continue_from_checkpoint(self) -> None:
        if self.processes.main:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            discard_partial(self.checkpoints)
        self.processes.wait()
        self.done = resume(self.checkpoints, self.model, self.optimizer, self.extra, name=self.name)
        if self.processes.main:
            trim_log(self.log, self.done)
        self.processes.wait()  # nobody reads what another is about to replace
        self.saved = self.started = time.monotonic()
        self.before = (self.done.step, self.done.tokens, self.done.seconds)

    def step(self, batch: Batch, batching: Batching, data: DataSlice, interrupted: threading.Event) -> float | None:
        """Do one update; return the loss where it was looked at (always on a CPU, at logging steps on a GPU)."""
        done, schedule = self.done, self.schedule
        rate = learning_rate(done.step, total=self.total_steps, schedule=schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        outcome: Outcome | None = None
        try:
            outcome = self.objective(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = _first_line(error)
        if outcome is None:  # only now is the error gone, and with it what the step had allocated
            raise self._out_of_memory(batch, batching, data, message)
        now = time.monotonic()
        over = schedule.max_minutes is not None and now - self.started >= schedule.max_minutes * 60
        flags = torch.tensor([float(interrupted.is_set()), float(over)], device=outcome.loss.device)
        shares = torch.stack([outcome.loss, *outcome.parts.values()]).float()
        with self._update_of(batch):
            totals = self._sum_gradients(torch.cat([flags, shares]))
            if schedule.max_grad_norm:
                nn.utils.clip_grad_norm_(self.parameters, schedule.max_grad_norm, foreach=True)
        done.step += 1
        done.tokens += batch.tokens
        done.seconds = self.before[2] + now - self.started
        logs = done.step % schedule.logging_steps == 0 or done.step == 1
        if not logs and totals.device.type != "cpu":  # looking would wait for the device
            with self._update_of(batch):
                self.optimizer.step()
            self.unseen = self.unseen + totals[2]
            alone = self.processes.size == 1  # several stop together, at a step where all see that one was told to
            self.told_to_stop, self.time_is_over = alone and interrupted.is_set(), alone and over
            return None
        stop, time_over, loss, *parts = totals.tolist()
        self._check_finite(loss)
        with self._update_of(batch):
            self.optimizer.step()
        self.told_to_stop, self.time_is_over = stop > 0, time_over > 0
        if logs and self.processes.main:
            losses = {"losses": dict(zip(outcome.parts, parts, strict=True))} if parts else {}
            speed = {"learning_rate": rate, "tokens_per_s": round(done.tokens / max(done.seconds, 1e-9), 1)}
            line = {"step": done.step, "epoch": len(done.epochs) + 1, "loss": loss}
            append_log(self.log, line | losses | outcome.log() | speed)
        if not self.estimated and done.step - self.before[0] >= _ESTIMATE_AFTER:
            self._estimate()
        return float(loss)

    @contextlib.contextmanager
    def _update_of(self, batch: Batch) -> Iterator[None]:
        """Tell what to do where the gradients' sum or the optimiser (at its first step) finds no memory.

        Raises:
            TrainingError: memory is short.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"step {batch.number + 1}: out of memory in the update of the weights ({_first_line(error)}), which needs "
                "the same whatever the batch size. Use a smaller model, fewer processes, or a machine with more memory. The "
                "last checkpoint is kept."
            ) from error

    def _check_finite(self, loss: float) -> None:
        total = loss + float(self.unseen)
        self.unseen = 0.0
        if not math.isfinite(total):
            raise TrainingError(
                f"step {self.done.step}: the loss is {total}. Lower the learning rate (distill.learning_rate or "
                "teacher.learning_rate), or look for broken weights in the model it started from."
            )

    def _sum_gradients(self, tail: Tensor) -> Tensor:
        """Add up every parameter's gradient and `tail` over the processes, in one exchange; return the summed tail."""
        if self.processes.size == 1:
            return tail
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        used = torch.tensor([float(p.grad is not None) for p in self.parameters], device=tail.device)
        flat = self.processes.sum(torch.cat([*(gradient.reshape(-1) for gradient in gradients), used, tail]))
        sizes = [*(gradient.numel() for gradient in gradients), len(used), len(tail)]
        *parts, used, tail = torch.split(flat, sizes)
        absent = [at for at, parameter in enumerate(self.parameters) if parameter.grad is None]
        unused = {at for at, users in zip(absent, used[absent].tolist(), strict=True) if not users} if absent else set()
        for at, (parameter, part) in enumerate(zip(self.parameters, parts, strict=True)):
            if at not in unused:  # a parameter that no process used stays without a gradient
                parameter.grad = part.view_as(parameter)
        return tail

    def keep_or_stop(self) -> None:
        """Write a checkpoint where one is due; stop where that was asked for."""
        if not (self.told_to_stop or self.time_is_over):
            if time.monotonic() - self.saved >= self.schedule.checkpoint_seconds:
                self.save()
            return
        self.save()
        self.stop_if_told(self.told_to_stop)

    def stop_if_told(self, interrupted: bool) -> None:
        if self.processes.sum(torch.tensor(float(interrupted), device=training_device())).item():
            raise KeyboardInterrupt
        if self.time_is_over:
            raise UnfinishedError(
                f"{self.name}: stopped after {self.schedule.max_minutes:g} minutes, as --max-minutes says, at step "
                f"{self.done.step:,} of {self.total_steps:,}. The same command (without --force or --from) continues "
                "from here."
            )

    def finish_epoch(self, evaluate: Callable[[], Mapping[str, float]]) -> None:
        done, metric = self.done, self.metric
        self.model.eval()
        metrics = dict(evaluate())
        done.epochs.append(metrics)
        best = done.epochs[done.best_epoch - 1][metric] if done.best_epoch else -math.inf
        if len(done.epochs) >= self.schedule.best_from and metrics[metric] > best:
            done.best_epoch = len(done.epochs)
        best_counts = self.schedule.best_from < self.schedule.epochs or self.schedule.epochs == 1
        if self.processes.main:
            if done.best_epoch == len(done.epochs):
                save_best(self.checkpoints, self.model, epoch=done.best_epoch)
            line = {"step": done.step, "epoch": len(done.epochs), "dev": metrics, "best_epoch": done.best_epoch}
            append_log(self.log, line)
        shown = " ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        kept = "" if done.best_epoch != len(done.epochs) else " (best so far)" if best_counts else " (kept)"
        note(f"epoch {len(done.epochs)}: dev {shown}{kept}")

    def save(self) -> None:
        if self.processes.main:
            self._check_finite(0.0)
            save_checkpoint(self.checkpoints, self.model, self.optimizer, self.extra, self.done)
        self.saved = time.monotonic()

    def _estimate(self) -> None:
        self.estimated = True
        tokens = self.done.tokens - self.before[1]
        speed = tokens / max(time.monotonic() - self.started, 1e-9)
        minutes = (self.total_tokens - self.done.tokens) / speed / 60
        left = f"{minutes:.0f} min" if minutes >= 2 else f"{minutes * 60:.0f} s"
        note(f"{self.name}: about {left} left ({self.total_steps - self.done.step:,} steps, {speed:,.0f} tokens/s)")

    def _out_of_memory(self, batch: Batch, batching: Batching, data: DataSlice, message: str) -> TrainingError:
        """Return the error, with the largest part that was seen to fit where this process can try by itself."""
        rows = [row for part in batch.parts for row in part.rows]
        size = max(len(part.rows) for part in batch.parts)
        where = (
            f"step {batch.number + 1}: out of memory with {size} rows of up to {_longest(batch)} tokens at once "
            f"({message}). "
        )
        if self.processes.size > 1:
            return TrainingError(f"{where}Set {_MICRO} to {max(1, size // 2)}.")
        while size > 1:
            size //= 2
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            smaller = replace(batching, micro_batch_size=size)
            try:
                self.objective(smaller.batch(data, torch.tensor(rows).numpy(), number=batch.number))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                continue
            return TrainingError(
                f"{where}Parts of {size} were tried and fit: set {_MICRO} to {size} for the same result up to rounding and "
                "dropout's draws. The command then continues."
            )
        return TrainingError(f"{where}Not even one row fits. Lower data.max_length, or use a machine with more memory.")


def _longest(batch: Batch) -> int:
    return max(part.inputs["input_ids"].shape[1] for part in batch.parts)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def learning_rate(step: int, *, total: int, schedule: Schedule) -> float:
    """Return the rate of a step (from 0): linear warm-up over `warmup_ratio` of `total`, then linear decay to 0."""
    warmup = math.ceil(total * schedule.warmup_ratio)
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    return schedule.learning_rate * (total - step) / max(1, total - warmup)


def make_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Return AdamW in one fused kernel; weight decay spares biases and LayerNorm."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    plain = [value for name, value in named if name.endswith(_NO_DECAY)]
    decayed = [value for name, value in named if not name.endswith(_NO_DECAY)]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event that the loop sees between steps; a second ends the process at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, _frame: Any) -> None:
        if event.is_set():
            os._exit(128 + number)
        event.set()
        note("stopping after this step; the state is kept (interrupt again to stop at once)")

    # SIGTERM is how schedulers and containers end a process, and torchrun the others when one of them died.
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
