"""Kept fits: what a layer fit gave, on disk for a run that goes on after a stop and for the students that share a start.

A fit takes minutes on a CPU and follows from the teacher, the rows and the student as it was copied (a head that starts
random is its seed's own). Read again it is the same to the bit, also on a machine whose own sums would round otherwise. One
file holds one fit; its name is the hash of all that the fit follows from.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import TrainingError
from bertemd_deploy.files import discard_partial, new_file, sha256_json
from bertemd_deploy.layer_fit import Fit, fit_layers
from bertemd_deploy.teacher_cache import rows_hash, weights_hash
from bertemd_deploy.training_state import write_tensors

# To be changed where a fit of the same inputs gives something else, or training treats it otherwise: fits and students of
# another one are made anew. Before this one, training moved the codes of positions, and had dropout on them.
FIT = "codes held"
_NO_PART = ("_name_or_path", "transformers_version")  # of the teacher's config
_NAME = re.compile(r"[0-9a-f]{16}\.safetensors")


def fit_or_read(
    student: nn.Module,
    teacher: nn.Module,
    examples: Encoded,
    *,
    layers: Sequence[int],
    pad_id: int,
    max_length: int,
    folders: Sequence[Path],
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
        folders: of kept fits: looked into in this order, and the fit is put where it is not. None keeps none.
        writes: whether this process, of several that train together, keeps the fit.

    Returns:
        The fit, and the file where it was read, not made.

    Raises:
        TrainingError: as `fit_layers`, or a kept fit is damaged.
        ArtifactError: the fit could not be written (full disk); no part of it is left.
    """
    given: dict[str, Any] = {"layers": list(layers), "pad_id": pad_id, "max_length": max_length}
    if not folders:
        return fit_layers(student, teacher, examples, **given), None
    config: dict[str, Any] = teacher.config.to_dict()  # type: ignore[union-attr, operator]
    known = {name: value for name, value in config.items() if name not in _NO_PART}
    hashes = {"teacher": weights_hash(teacher), "student": weights_hash(student), "rows": rows_hash(examples)}
    name = sha256_json({"fit": FIT, "config": repr(sorted(known.items()))} | given | hashes)[:16]
    places = [folder / f"{name}.safetensors" for folder in folders]
    found = next((place for place in places if place.exists()), None)
    fit = fit_layers(student, teacher, examples, **given) if found is None else _read(found, student)
    if writes:
        if found is None:
            write_tensors(places[0], dict(student.state_dict()), metadata={"cosines": json.dumps(vars(fit))})
        for place in places:
            if not place.exists():
                _link(found or places[0], place)
    return fit, found


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


def _link(source: Path, place: Path) -> None:
    """Give a kept fit another name, or a copy where the disk has no links.

    Raises:
        ArtifactError: it could not be written.
    """
    with new_file(place) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def remove_fits(folder: Path) -> None:
    """Remove the kept fits of `folder`, what a killed process left of one, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        discard_partial(folder)
        for path in folder.iterdir():
            if _NAME.fullmatch(path.name):
                path.unlink()
        folder.rmdir()
