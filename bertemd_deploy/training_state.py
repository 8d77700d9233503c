"""What a training run keeps on disk: resumable checkpoints, the best weights so far, and the log.

A checkpoint is one safetensors file, written whole: weights, optimiser, extra state, and where the run stands. It says nothing
of the number of processes, so another number continues it. The best weights lie beside it under their epoch's number, and
those that the last checkpoint names stay until the next one is on disk: a run killed between the two writes has both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bertemd_deploy.console import note
from bertemd_deploy.errors import TrainingError
from bertemd_deploy.files import new_file, write_error

OLD_BEST = "best.safetensors"  # as earlier versions name it, whatever the epoch


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


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: ExtraState, done: Progress
) -> None:
    """Write one checkpoint, then remove the ones before it and all best weights but those that it names.

    Raises:
        ArtifactError: it could not be written (full disk); the one before it is kept.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, value in model.named_parameters():
        tensors |= {f"optimizer.{key}.{name}": item for key, item in optimizer.state.get(value, {}).items()}
    # Extra state may share memory, a file may not.
    tensors |= {f"extra.{name}": value.clone() for name, value in extra.state().items()}
    path = folder / f"step-{done.step:08d}.safetensors"
    write_tensors(path, tensors, metadata={"progress": json.dumps(vars(done))})
    for old in folder.glob("step-*.safetensors"):
        if old != path:
            old.unlink()
    best = best_path(folder, done.best_epoch)
    if best.exists():
        for old in folder.glob("best*.safetensors"):
            if old != best:
                old.unlink()


def resume(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: ExtraState, *, name: str
) -> Progress:
    """Load the newest checkpoint of `folder` into everything given; an empty folder starts from nothing.

    Raises:
        TrainingError: the checkpoint cannot be read, or is of another model.
    """
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
                optimizer.state[value] = {
                    key: tensors[f"optimizer.{key}.{parameter_name}"].to(value.device) for key in keys
                }
        extra.load_state({key[6:]: value for key, value in tensors.items() if key.startswith("extra.")})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise _damaged(found[-1], error) from error
    note(f"{name}: continuing after step {done.step:,} ({found[-1].name})")
    return done


def best_path(folder: Path, epoch: int) -> Path:
    """Return where the weights of `epoch` (from 1) are kept while it is the best."""
    return folder / f"best-{epoch}.safetensors"


def save_best(folder: Path, model: nn.Module, *, epoch: int) -> None:
    """Write the weights of the best epoch so far; the ones before stay until a checkpoint names these.

    Raises:
        ArtifactError: they could not be written.
    """
    write_tensors(best_path(folder, epoch), dict(model.state_dict()))


def load_best(folder: Path, model: nn.Module, *, epoch: int) -> None:
    """Load the weights of the best epoch; a run that an older version began may have them without a number.

    Raises:
        TrainingError: they cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = best_path(folder, epoch)
    if not path.exists() and (folder / OLD_BEST).exists():
        path = folder / OLD_BEST
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise _damaged(path, error) from error


def write_tensors(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as one safetensors file, whole or not at all.

    Raises:
        ArtifactError: the operating system refused a write.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_file(path) as partial:
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=metadata)
        except SafetensorError as error:  # how the Rust side reports a full disk
            raise OSError(str(error)) from error


def append_log(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to a JSON-lines log.

    Raises:
        ArtifactError: the operating system refused the write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
    except OSError as error:
        raise write_error(path, error) from error


def trim_log(path: Path, done: Progress) -> None:
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


def _damaged(path: Path, error: Exception) -> TrainingError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return TrainingError(f"{path}: the checkpoint cannot be continued ({reason}). Add --force to start over.")
