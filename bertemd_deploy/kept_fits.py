"""Kept fits: what a layer fit gave, on disk for a run that goes on after a stop and for the students that share a teacher.

A fit takes minutes on a CPU and follows from teacher, layers and rows alone: mapping and seed have no part in it. Read again
it is the same to the bit, also on a machine whose own sums would round otherwise. One file holds one fit; its name is the hash
of all that the fit follows from.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import TrainingError
from bertemd_deploy.files import discard_partial, sha256_json
from bertemd_deploy.layer_fit import Fit, fit_layers
from bertemd_deploy.teacher_cache import cache_key
from bertemd_deploy.training_state import write_tensors

_NAME = re.compile(r"[0-9a-f]{16}\.safetensors")
FORMAT = 1  # to be raised where a fit of the same inputs is to give something else


def fit_or_read(
    student: nn.Module,
    teacher: nn.Module,
    examples: Encoded,
    *,
    layers: Sequence[int],
    pad_id: int,
    max_length: int,
    folder: Path | None,
    writes: bool = True,
) -> tuple[Fit, Path | None]:
    """Do what `layer_fit.fit_layers` does, or read what it gave before.

    Args:
        student: as copied; changed in place.
        teacher: task model of any family, in eval mode.
        examples: rows of train.
        layers: for each of the student's layers the teacher's.
        pad_id: of the tokenizer.
        max_length: T, positions that a table of position scores is folded for.
        folder: of kept fits; None keeps none.
        writes: whether this process, of several that train together, keeps the fit.

    Returns:
        The fit, and the file where it was read, not made.

    Raises:
        TrainingError: as `fit_layers`, or a kept fit is damaged.
        ArtifactError: the fit could not be written (full disk); no part of it is left.
    """
    path = None
    if folder is not None:
        known = cache_key(teacher, examples, max_length=max_length, precision="float32", layers=True)
        key = sha256_json({"format": FORMAT, "teacher": known, "layers": list(layers), "pad_id": pad_id})
        path = folder / f"{key[:16]}.safetensors"
        if path.exists():
            return _read(path, student), path
    fit = fit_layers(student, teacher, examples, layers=layers, pad_id=pad_id, max_length=max_length)
    if path is not None and writes:
        write_tensors(path, dict(student.state_dict()), metadata={"cosines": json.dumps(vars(fit))})
    return fit, None


def _read(path: Path, student: nn.Module) -> Fit:
    """Load a kept fit into `student`.

    Raises:
        TrainingError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            fit = Fit(**json.loads(stored.metadata()["cosines"]))
            student.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118 - no mapping
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise TrainingError(
            f"{path}: the kept fit of the student's layers is damaged ({reason}). Remove the file; they are fitted anew."
        ) from error
    return fit


def remove_fits(folder: Path) -> None:
    """Remove the kept fits of `folder`, what a killed process left of one, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        discard_partial(folder)
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name):
                path.unlink()
        folder.rmdir()
