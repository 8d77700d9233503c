"""The one training loop: batches, optimiser, learning rate, evaluation, checkpoints, resume.

`fit` trains whatever modules it is given with whatever step function it is given; fine-tuning and distillation are both
calls of it. It is deterministic and resumable to the bit on a CPU with the same thread count: the order of batches depends
on (seed, epoch), dropout on (seed, step), and a checkpoint holds weights, optimiser, extra state and the best score. A
checkpoint is one safetensors file, written whole; killed at any moment, the next call goes on from the last one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.console import note, progress
from bertemd_deploy.data import training_batches
from bertemd_deploy.encoding import Encoded, length_batches
from bertemd_deploy.errors import TrainingError
from bertemd_deploy.files import discard_partial, new_file, write_error

_NO_DECAY = ("bias", "LayerNorm.weight")
_STEP_SEED = 1_000_003  # a prime, so that (seed, step) pairs seldom share a dropout pattern


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; names as in `config.DistillSettings`. `bfloat16` is for matrix products only."""

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    seed: int
    max_grad_norm: float = 1.0
    logging_steps: int = 10
    checkpoint_seconds: float = 60.0
    bfloat16: bool = False


@dataclass(frozen=True)
class Step:
    """What a step function returns: the loss to minimise, and what to log of it."""

    loss: Tensor
    log: Callable[[], dict[str, Any]]


class ExtraState(Protocol):
    """State beside weights that a run carries from step to step, such as marginals."""

    def state(self) -> dict[str, Tensor]:
        """Return it as named tensors."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take it back."""


class NoState:
    """No extra state."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take nothing."""


@dataclass
class Progress:
    """Where a run stands: finished steps, the metrics of every finished epoch, and the best epoch so far (from 1)."""

    step: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    tokens: int = 0
    seconds: float = 0.0


def fit(
    model: nn.Module,
    *,
    schedule: Schedule,
    data: DataSlice,
    pad_id: int,
    step: Callable[[dict[str, Tensor], Tensor], Step],
    evaluate: Callable[[], Mapping[str, float]],
    metric: str,
    checkpoints: Path,
    log: Path,
    name: str,
    extra_state: ExtraState | None = None,
) -> Progress:
    """Train `model` and leave it with the weights of its best epoch.

    Args:
        model: holds every trained parameter; in train mode during steps, in eval mode for `evaluate` and at the end.
        schedule: length, speed and seed.
        data: training examples.
        pad_id: token id of padding.
        step: (inputs, labels) to a `Step`; called with `model` in train mode.
        evaluate: the dev metrics of the present weights, called after every epoch.
        metric: key of `evaluate`'s result that chooses the best epoch; the earlier of equals wins.
        checkpoints: folder of this run's resumable state; a state found there is continued.
        log: JSON-lines file, one line each `schedule.logging_steps` and one each epoch.
        name: what the progress bar says.
        extra_state: carried in every checkpoint.

    Raises:
        TrainingError: the loss is not finite, or a checkpoint cannot be read.
        ArtifactError: a checkpoint could not be written (full disk); the one before it is kept.
        KeyboardInterrupt: on SIGINT, after a checkpoint at the end of the step.
    """
    extra = extra_state or NoState()
    optimizer = _optimizer(model, schedule)
    steps_per_epoch = math.ceil(len(data.labels) / schedule.batch_size)
    total = steps_per_epoch * schedule.epochs
    checkpoints.mkdir(parents=True, exist_ok=True)
    discard_partial(checkpoints)
    done = _resume(checkpoints, model, optimizer, extra, name=name)
    _trim_log(log, done)
    labels = torch.from_numpy(data.labels)
    saved = started = time.monotonic()
    before = done.seconds
    with _deferred_interrupt() as interrupted, progress(name, total) as bar:
        bar.advance(done.step)
        while len(done.epochs) < schedule.epochs:
            epoch = len(done.epochs)
            within = done.step - epoch * steps_per_epoch
            batches = training_batches(
                data.examples.lengths, batch_size=schedule.batch_size, seed=schedule.seed, epoch=epoch
            )
            for rows in batches[within:]:
                inputs = to_tensors(data.examples.batch(rows, pad_id=pad_id))
                rate = learning_rate(done.step, total=total, schedule=schedule)
                result = _train_step(model, optimizer, step, inputs, labels[rows], rate, schedule, done.step)
                tokens = int(inputs["attention_mask"].sum())
                done.step += 1
                done.tokens += tokens
                done.seconds = before + time.monotonic() - started
                bar.advance(tokens=tokens, detail=f"loss {result.loss.item():.4f}")
                if done.step % schedule.logging_steps == 0 or done.step == 1:
                    speed = {"learning_rate": rate, "tokens_per_s": round(done.tokens / done.seconds, 1)}
                    line = {"step": done.step, "epoch": epoch + 1, "loss": result.loss.item()}
                    _append_log(log, line | result.log() | speed)
                if interrupted.is_set() or time.monotonic() - saved >= schedule.checkpoint_seconds:
                    _save(checkpoints, model, optimizer, extra, done)
                    saved = time.monotonic()
                if interrupted.is_set():
                    raise KeyboardInterrupt
            _finish_epoch(model, evaluate, metric, done, checkpoints, log)
            _save(checkpoints, model, optimizer, extra, done)
            saved = time.monotonic()
            if interrupted.is_set():
                raise KeyboardInterrupt
    _load_best(model, checkpoints / "best.safetensors")
    model.eval()
    return done


def _train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[dict[str, Tensor], Tensor], Step],
    inputs: dict[str, Tensor],
    labels: Tensor,
    rate: float,
    schedule: Schedule,
    number: int,
) -> Step:
    model.train()
    torch.manual_seed(schedule.seed * _STEP_SEED + number)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
        result = step(inputs, labels)
    if not torch.isfinite(result.loss):
        raise TrainingError(
            f"step {number + 1}: the loss is {result.loss.item()}. Lower the learning rate (distill.learning_rate or "
            "teacher.learning_rate), or look for broken weights in the model it started from."
        )
    optimizer.zero_grad(set_to_none=True)
    result.loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if schedule.max_grad_norm:
        nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
    optimizer.step()
    return result


def _finish_epoch(
    model: nn.Module,
    evaluate: Callable[[], Mapping[str, float]],
    metric: str,
    done: Progress,
    checkpoints: Path,
    log: Path,
) -> None:
    model.eval()
    metrics = dict(evaluate())
    done.epochs.append(metrics)
    best = done.epochs[done.best_epoch - 1][metric] if done.best_epoch else -math.inf
    if metrics[metric] > best:
        done.best_epoch = len(done.epochs)
        _write_tensors(checkpoints / "best.safetensors", dict(model.state_dict()))
    _append_log(log, {"step": done.step, "epoch": len(done.epochs), "dev": metrics, "best_epoch": done.best_epoch})
    shown = " ".join(f"{key} {value:.4f}" for key, value in metrics.items())
    note(f"epoch {len(done.epochs)}: dev {shown}{' (best so far)' if done.best_epoch == len(done.epochs) else ''}")


def learning_rate(step: int, *, total: int, schedule: Schedule) -> float:
    """Return the rate of a step (from 0): linear warm-up over `warmup_ratio` of `total`, then linear decay to 0."""
    warmup = math.ceil(total * schedule.warmup_ratio)
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    return schedule.learning_rate * (total - step) / max(1, total - warmup)


def to_tensors(inputs: Mapping[str, NDArray[np.int64]]) -> dict[str, Tensor]:
    """Return a batch's arrays as tensors sharing their memory."""
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def torch_logits(model: nn.Module, examples: Encoded, *, pad_id: int, batch_size: int = 64) -> NDArray[np.float32]:
    """Return (n, outputs) float32 logits of all `examples`, in their order, run in batches of like length."""
    logits = np.empty((len(examples), int(model.config.num_labels)), dtype=np.float32)  # type: ignore[union-attr, arg-type]
    with torch.inference_mode(), progress("evaluate", len(examples)) as bar:
        for rows in length_batches(examples.lengths, batch_size=batch_size):
            inputs = to_tensors(examples.batch(rows, pad_id=pad_id))
            logits[rows] = model(**inputs).logits.float().numpy()
            bar.advance(len(rows), tokens=int(inputs["attention_mask"].sum()))
    return logits


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    plain = [value for name, value in named if name.endswith(_NO_DECAY)]
    decayed = [value for name, value in named if not name.endswith(_NO_DECAY)]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)


def _save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: ExtraState, done: Progress) -> None:
    """Write one checkpoint, then remove the ones before it."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, value in model.named_parameters():
        tensors |= {f"optimizer.{key}.{name}": item for key, item in optimizer.state.get(value, {}).items()}
    tensors |= {
        f"extra.{name}": value.clone() for name, value in extra.state().items()
    }  # may share memory, a file may not
    path = folder / f"step-{done.step:08d}.safetensors"
    _write_tensors(path, tensors, metadata={"progress": json.dumps(vars(done))})
    for old in folder.glob("step-*.safetensors"):
        if old != path:
            old.unlink()


def _resume(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: ExtraState, *, name: str
) -> Progress:
    """Load the newest checkpoint of `folder` into everything given; an empty folder starts from nothing."""
    from safetensors import SafetensorError, safe_open

    found = sorted(folder.glob("step-*.safetensors"))
    if not found:
        return Progress()
    try:
        with safe_open(found[-1], framework="pt") as stored:
            done = Progress(**json.loads(stored.metadata()["progress"]))
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - no mapping
        model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
        for parameter_name, value in model.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            if any(f"optimizer.{key}.{parameter_name}" in tensors for key in keys):  # no gradient, no state
                optimizer.state[value] = {key: tensors[f"optimizer.{key}.{parameter_name}"] for key in keys}
        extra.load_state({key[6:]: value for key, value in tensors.items() if key.startswith("extra.")})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise _damaged(found[-1], error) from error
    note(f"{name}: continuing after step {done.step:,} ({found[-1].name})")
    return done


def _write_tensors(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_file(path) as partial:
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=metadata)
        except SafetensorError as error:  # how the Rust side reports a full disk
            raise OSError(str(error)) from error


def _load_best(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> TrainingError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return TrainingError(f"{path}: the checkpoint cannot be continued ({reason}). Add --force to start over.")


def _append_log(path: Path, line: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
    except OSError as error:
        raise write_error(path, error) from error


def _trim_log(path: Path, done: Progress) -> None:
    """Keep a log's lines up to where `done` stands: what a killed run logged after its last checkpoint is done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            again = entry["epoch"] > len(done.epochs) if "dev" in entry else entry["step"] > done.step
            if not again:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break  # the line being written when the process was killed
    with new_file(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first SIGINT into an event that the loop sees between steps; a second one ends the process at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(_number: int, _frame: Any) -> None:
        if event.is_set():
            os._exit(130)
        event.set()
        note("stopping after this step; the state is kept (interrupt again to stop at once)")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
