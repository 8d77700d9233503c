"""ONNX Runtime sessions, opened in one place: threads, graph level, inputs and outputs by name.

Threads come from what this process may really use: the affinity mask, the container's CPU quota and the physical cores,
whichever is least. ONNX Runtime's own default sizes its pool from the host and is wrong in a container.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.encoding import Encoded, length_batches
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.tasks import Kind

if TYPE_CHECKING:
    import onnxruntime

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT_NAME = "logits"
SPAN_OUTPUTS = ("start_logits", "end_logits")  # of question answering, which has no "logits"
BATCH_SIZE = 32  # rows run together


@dataclass(frozen=True)
class CpuLimits:
    """How many CPUs this process may use, each bound by itself; `quota` in whole CPUs, None where there is none."""

    affinity: int
    quota: float | None
    physical: int

    @property
    def threads(self) -> int:
        """The threads worth starting: the least bound, at least 1."""
        bounds = [self.affinity, self.physical] + ([math.ceil(self.quota)] if self.quota else [])
        return max(1, min(bounds))


def cgroup_cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the container's CPU quota in CPUs (cgroup v2, then v1), or None where no quota is set."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 else None


def cpu_limits() -> CpuLimits:
    """Return the bounds on this process's CPUs: affinity mask, container quota, physical cores."""
    import psutil

    logical = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    return CpuLimits(affinity, cgroup_cpu_quota(), psutil.cpu_count(logical=False) or logical)


def open_session(
    path: Path, *, threads: int | None = None, optimize: bool = True, spinning: bool = False, arena: bool = True
) -> onnxruntime.InferenceSession:
    """Open an ONNX file for CPU inference.

    Args:
        path: the graph.
        threads: intra-op threads; None takes `cpu_limits().threads`.
        optimize: let ONNX Runtime rewrite the graph in memory (its full level); False runs it node by node as written.
        spinning: let the threads of a finished call go on looking for work, as ONNX Runtime does by default, for up to
            seconds: the next call may start sooner, but an idle model takes CPU time from its neighbours.
        arena: keep freed memory for the next call; without it memory is given back after each, which takes time.

    Raises:
        ArtifactError: the file is missing, truncated or not loadable by this ONNX Runtime.
    """
    # Read when the library is first imported, which would else write files into the home folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such graph.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cpu_limits().threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "0" if spinning else "1")
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = arena  # plans one block per shape of input, and keeps it
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises plain C++ exceptions of many types
        raise ArtifactError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load this file "
            f"({str(error).strip().splitlines()[0][:200]}). Export it again, or update onnxruntime."
        ) from error


def check_session(session: onnxruntime.InferenceSession, *, kind: Kind, path: Path) -> None:
    """Refuse a graph whose inputs or outputs are not those of a kind of task.

    Args:
        session: the opened graph.
        kind: of the task.
        path: the graph's file, for the message.

    Raises:
        ArtifactError: it wants an input that there is none of, or lacks an output, or one has other dimensions.
    """
    wanted = dict.fromkeys(SPAN_OUTPUTS, 2) if kind == "question-answering" else {OUTPUT_NAME: logit_rank(kind)}
    found = {node.name: len(node.shape) for node in session.get_outputs()}
    inputs = [node.name for node in session.get_inputs()]
    if set(inputs) <= set(INPUT_NAMES) and all(found.get(name) in (rank, 0) for name, rank in wanted.items()):
        return  # no dimensions at all: the graph does not say, and what it answers is checked when it runs
    raise ArtifactError(
        f"{path}: its inputs are {', '.join(inputs)}, its outputs {_ranked(found)}; {kind} needs inputs among "
        f"{', '.join(INPUT_NAMES)} and {_ranked(wanted)}. Export the student again."
    )


def logit_rank(kind: Kind) -> int:
    """Return the number of dimensions of a batch's logits, as `run_session` gives them."""
    return 3 if kind in ("token-classification", "question-answering") else 2


def _ranked(outputs: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of {rank} dimensions" for name, rank in outputs.items())


def run_session(session: onnxruntime.InferenceSession, inputs: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    """Return the float32 logits of one batch, feeding exactly the inputs the graph declares.

    (batch, outputs); (batch, sequence, labels) of token classification; (batch, sequence, 2), start and end, of question
    answering.
    """
    feed = {node.name: inputs[node.name] for node in session.get_inputs()}
    names = [node.name for node in session.get_outputs()]
    if OUTPUT_NAME in names:
        (logits,) = session.run([OUTPUT_NAME], feed)
        return np.asarray(logits, dtype=np.float32)
    return np.stack(session.run(list(SPAN_OUTPUTS), feed), axis=-1).astype(np.float32, copy=False)


def predict_logits(
    session: onnxruntime.InferenceSession, examples: Encoded, *, pad_id: int, batch_size: int = BATCH_SIZE
) -> NDArray[np.float32]:
    """Return the float32 logits of all `examples`, in their order; shapes as `collect_logits` gives them.

    Raises:
        ValueError: no examples.
    """
    return collect_logits(partial(run_session, session), examples, pad_id=pad_id, batch_size=batch_size)


def collect_logits(
    run: Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]],
    examples: Encoded,
    *,
    pad_id: int,
    batch_size: int = BATCH_SIZE,
    done: Callable[[int], None] = lambda rows: None,
) -> NDArray[np.float32]:
    """Return a model's logits of all `examples`, in their order, run in batches of like length.

    Args:
        run: the model on one padded batch: (B, outputs) logits, or (B, T, outputs) of a model that reads every token.
        examples: what to run.
        pad_id: token id of padding.
        batch_size: rows run together.
        done: called with the number of rows of each batch.

    Returns:
        (n, outputs) float32; of a model that reads every token ragged as the tokens are, (sum of lengths, outputs),
        without padding.

    Raises:
        ValueError: no examples.
    """
    logits: NDArray[np.float32] | None = None
    for rows in length_batches(examples.lengths, batch_size=batch_size):
        part = run(examples.batch(rows, pad_id=pad_id))
        if logits is None:
            units = len(examples) if part.ndim == 2 else len(examples.tokens)
            logits = np.empty((units, part.shape[-1]), dtype=np.float32)
        if part.ndim == 2:
            logits[rows] = part
        else:
            for row, values in zip(rows, part, strict=True):
                start, stop = examples.offsets[row], examples.offsets[row + 1]
                logits[start:stop] = values[: stop - start]
        done(len(rows))
    if logits is None:
        raise ValueError("no examples")
    return logits
