"""Several processes where `accelerate launch` starts one: on CPUs.

accelerate's launcher for CPUs starts a single process whatever --num_processes says, unless it goes through mpirun. Training
that was asked to share the work would quietly take N times as long. So a training command that finds itself alone under it
reads N from the launcher's command line and becomes torch's launcher with the same arguments. What `torchrun` or accelerate's
launcher for GPUs started is left as it is.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from bertemd_deploy.console import note, silence
from bertemd_deploy.errors import RecipeError

_MODULE = "bertemd_deploy"


def launch_processes() -> None:
    """Become torch's launcher where accelerate was asked for several processes and started one; else do nothing.

    Of processes that were started together, all but the first are silenced.

    Raises:
        RecipeError: how many processes were asked for cannot be told, or they are to be on several machines.
    """
    if "WORLD_SIZE" in os.environ:
        if os.environ.get("RANK", "0") != "0":
            silence()
        return
    if not stands_for_several():
        return
    arguments = sys.argv[1:]
    command = _parents_command()
    if command and command[len(command) - len(arguments) :] == arguments:
        command = command[: len(command) - len(arguments)]
    machines, count = read_option(command, "num_machines"), read_option(command, "num_processes")
    typed = shlex.join(["-m", _MODULE, *arguments])
    if machines is not None and machines > 1:
        raise RecipeError(
            f"accelerate starts one process per machine on CPUs. Type on each of the {machines} instead: "
            f"torchrun --nnodes {machines} --node_rank I --master_addr HOST --nproc_per_node N {typed}"
        )
    if count is None:
        raise RecipeError(
            "accelerate started one process on CPUs, and how many were asked for (--num_processes) is not on its command "
            f"line. Type instead: torchrun --standalone --nproc_per_node N {typed}"
        )
    if count > 1:
        _become_torchrun(count, arguments)


def stands_for_several() -> bool:
    """Say whether accelerate was asked for several processes on CPUs and started this one alone."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    # accelerate names an address for more than one process only
    return "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ and on_cpu


def read_option(command: Sequence[str], name: str) -> int | None:
    """Return the number that a command line gives as --`name` N or --`name`=N; the last one, None without any.

    Args:
        command: the words of the command line.
        name: of the option, with underscores; dashes are the same.
    """
    found = None
    for at, word in enumerate(command):
        option, equals, value = word.partition("=")
        if option.replace("-", "_") != f"__{name}":
            continue
        if not equals:
            value = command[at + 1] if at + 1 < len(command) else ""
        found = int(value) if value.isdigit() else None
    return found


def _parents_command() -> list[str]:
    """Return the words of the command line that started this process, or nothing where the system does not tell."""
    import psutil

    try:
        parent = psutil.Process().parent()
        return [] if parent is None else list(parent.cmdline())
    except psutil.Error:
        return []


def _become_torchrun(count: int, arguments: Sequence[str]) -> None:
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    note(
        f"accelerate started one process on CPUs, not {count}; starting {count} through torchrun "
        f"(OMP_NUM_THREADS={threads} each)"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # accelerate's affinity is for one process: it would put the threads of all of them on the same cores.
    environment = {name: value for name, value in os.environ.items() if name != "KMP_AFFINITY"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", _MODULE]
    os.execve(sys.executable, [sys.executable, *launcher, *arguments], environment)
