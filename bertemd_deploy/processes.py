"""Training on several processes that share every batch: who this one is, and sums over all of them.

`accelerate launch` and `torchrun` start the processes and say in the environment who is who; the collectives are torch's
(gloo between CPUs, NCCL between GPUs). Every process holds the whole model and a share of each batch's rows. What is summed
over all is little: two cost matrices before the flow is solved, and the gradients. Only the main process writes and speaks.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, its default arguments would keep the group that was joined
from torch import Tensor, nn

from bertemd_deploy.console import silence
from bertemd_deploy.errors import RecipeError, TrainingError
from bertemd_deploy.training_device import training_device

# The others' longest silence: a process that dies is noticed at once, one that hangs or loses its network after this.
_PATIENCE = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Processes:
    """This process's place among those that train together; alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up `tensor` over all processes, in place, and return it.

        Raises:
            TrainingError: another process died or does not answer.
        """
        if self.size > 1:
            with _collective(self):
                dist.all_reduce(tensor)
        return tensor

    def follow_main(self, module: nn.Module) -> None:
        """Give `module`'s parameters and buffers of numbers the main process's values.

        Raises:
            TrainingError: another process died or does not answer.
        """
        if self.size > 1:
            with torch.no_grad():
                for values in (*module.parameters(), *module.buffers()):
                    if values.is_floating_point():
                        values.copy_(self.sum(values.clone() if self.main else torch.zeros_like(values)))

    def wait(self) -> None:
        """Return once every process is here.

        Raises:
            TrainingError: another process died or does not answer.
        """
        self.sum(torch.zeros(1, device=training_device())).item()  # a GPU's sum returns before it is done


@contextlib.contextmanager
def _collective(processes: Processes) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"process {processes.rank} of {processes.size}: another training process ended or does not answer "
            f"({_reason(error)}). "
            "The last checkpoint is kept; the same command continues from it, on any number of processes."
        ) from error


def join_processes() -> Processes:
    """Return this process's place, from the variables that `accelerate launch` and `torchrun` set; joins them once.

    Raises:
        RecipeError: the variables do not fit together.
        TrainingError: the other processes cannot be reached.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0")
    if not size.isdigit() or not rank.isdigit() or not int(rank) < int(size):
        raise RecipeError(
            f"the environment says RANK={rank!r} of WORLD_SIZE={size!r}. Start several processes with `accelerate launch` or "
            "`torchrun`, or unset both."
        )
    processes = Processes(int(rank), int(size))
    if processes.size == 1:
        return processes
    if not processes.main:
        silence()
    if not dist.is_initialized():
        device = training_device()
        if device.type == "cuda":
            _take_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=_PATIENCE)
            atexit.register(_leave)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"process {rank} of {size}: the other training processes cannot be reached ({_reason(error)}). Check "
                "MASTER_ADDR and MASTER_PORT, or start them together with `accelerate launch`."
            ) from error
    return processes


def _reason(error: Exception) -> str:
    """Return the first sentence of torch's message, without the place in its source."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0][:160]


def _leave() -> None:
    """Close the connections and end their threads: one that runs on while Python ends aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _take_device(device: torch.device) -> None:
    """Make `device` this process's own.

    Raises:
        TrainingError: there are fewer GPUs than processes on this machine.
    """
    count = torch.cuda.device_count()
    if device.index >= count:
        raise TrainingError(
            f"process {device.index} of this machine has no GPU: there are {count}. Start at most {count} per machine, or set "
            "ACCELERATE_USE_CPU=true to train on its CPUs."
        )
    torch.cuda.set_device(device)
