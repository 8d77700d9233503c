"""What a finished student of the GLUE grids is: its metrics and its fidelity to the teacher, in PyTorch and as each graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.artifact import Artifact, DataSlice
from bertemd_deploy.checkpoints import checked_encoder, label_order
from bertemd_deploy.evaluate import torch_logits
from bertemd_deploy.facts import read_student
from bertemd_deploy.metrics import decisions, evaluate_metrics
from bertemd_deploy.models import load_classifier, reorder_outputs
from bertemd_deploy.runtime import open_session, predict_logits

Logits = NDArray[np.float32]
_DIGITS = 5  # of a row's divergence
_BY_ROW = ("torch", "int8")  # what pairs of students are compared in


def model_logits(folder: Path, part: DataSlice, *, labels: tuple[str, ...], max_length: int) -> Logits:
    """Return a classifier's outputs (n, labels) over a slice, in PyTorch and float32, in the order of `labels`."""
    model = load_classifier(folder, labels=labels, kind="classification")
    reorder_outputs(model, label_order(folder, labels, kind="classification"))
    return torch_logits(model, part.examples, pad_id=checked_encoder(folder, max_length=max_length).pad_id)


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """Return log softmax over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def divergences(teacher: Logits, student: Logits) -> NDArray[np.float64]:
    """Return (n,) KL(teacher || student) = sum_c p_c (log p_c - log q_c) of the predictions, in nats."""
    theirs, ours = log_probabilities(teacher), log_probabilities(student)
    found: NDArray[np.float64] = (np.exp(theirs) * (theirs - ours)).sum(-1)
    return found


def compare(
    teacher: Logits, student: Logits, part: DataSlice, *, metrics: list[str], labels: tuple[str, ...], by_row: bool
) -> dict[str, Any]:
    """Return metrics and fidelity; `by_row` also what pairs are made of: right or not, as the teacher or not, divergence."""
    chosen, rows = decisions(student), divergences(teacher, student)
    same = chosen == decisions(teacher)
    found = {
        "metrics": evaluate_metrics(metrics, logits=student, part=part, label_names=labels),
        "agreement": float(same.mean()),
        "kl": float(rows.mean()),
    }
    if by_row:
        found |= {"right": _bits(chosen == part.labels), "agrees": _bits(same)}
        found["kls"] = [round(float(row), _DIGITS) for row in rows]
    return found


def measure(student: Path, artifact: Path | None, teacher: Path) -> dict[str, Any]:
    """Return `compare` of the student in PyTorch ("torch") and of each of an artifact's graphs with the teacher, and sizes."""
    facts = read_student(student)
    part, labels, metrics = facts.evaluation, facts.labels, list(facts.task["metrics"])
    reference = model_logits(teacher, part, labels=labels, max_length=facts.max_length)
    pad_id = checked_encoder(student, max_length=facts.max_length).pad_id
    outputs = {"torch": model_logits(student, part, labels=labels, max_length=facts.max_length)}
    sizes = {
        "torch": (student / "model.safetensors").stat().st_size,
        "teacher": (teacher / "model.safetensors").stat().st_size,
    }
    opened = None if artifact is None else Artifact.load(artifact)
    for graph in [] if opened is None else opened.graphs():
        path = opened.graph(graph)[1]
        outputs[graph] = predict_logits(open_session(path, threads=1), part.examples, pad_id=pad_id)
        sizes[graph] = path.stat().st_size
    right = _bits(decisions(reference) == part.labels)
    return {
        "dev_rows": len(part),
        "teacher": {
            "metrics": evaluate_metrics(metrics, logits=reference, part=part, label_names=labels),
            "right": right,
        },
        "bytes": sizes,
        "models": {
            name: compare(
                reference,
                logits,
                part,
                metrics=metrics,
                labels=labels,
                by_row=artifact is not None and name in _BY_ROW,
            )
            for name, logits in outputs.items()
        },
    }


def _bits(flags: NDArray[np.bool_]) -> str:
    return "".join("01"[int(flag)] for flag in flags)
