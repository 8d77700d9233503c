"""The two gates every graph passes before it is handed out: parity with torch, and the int8 graphs' accuracy.

Parity: on real examples, in batches that mix lengths (so padding is present) and in single rows, an fp32 graph's logits
differ from the torch student's by at most `PARITY_TOLERANCE`, with the same decisions on every example; where each token
has its own logits, on every token but padding. Accuracy: on the whole evaluation slice an int8 graph loses at most so
many points of the task's first metric; which int8 forms are tried is in `quantization.search`.
A miss is a `GateError` (exit 4), with the graph that missed kept under `*.rejected.onnx`. Torch-free.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.decisions import same_decisions
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import GateError
from bertemd_deploy.files import new_file
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.runtime import open_session, predict_logits, run_session
from bertemd_deploy.tasks import Kind

PARITY_TOLERANCE = 1e-3  # largest allowed absolute difference of a logit from torch's
PARITY_EXAMPLES = 128
PARITY_BATCH = 8
SINGLE_ROWS = 16
REJECTED = ".rejected.onnx"

Logits = NDArray[np.float32]
Inputs = dict[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Reference:
    """The torch student's padded logits on the batches that parity is judged on, in batch order."""

    batches: list[Inputs]
    logits: list[Logits]
    kind: Kind


@dataclass(frozen=True)
class Parity:
    """How far one graph is from torch.

    Attributes:
        max_abs_logit_difference: largest difference; None where a logit is not finite.
        decision_agreement: share of inputs with the same decision, for token classification of tokens; None for
            regression.
        inputs: inputs compared, single rows included.
        beyond_tolerance: inputs over the tolerance or with another decision; what an fp32 graph may not have.
        single_rows: inputs that ran alone.
        shapes: distinct [batch, sequence] that ran.
    """

    max_abs_logit_difference: float | None
    decision_agreement: float | None
    inputs: int
    beyond_tolerance: int
    single_rows: int
    shapes: list[list[int]]

    def record(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        return asdict(self)


def parity_reference(examples: Encoded, *, pad_id: int, kind: Kind, logits: Callable[[Inputs], Logits]) -> Reference:
    """Return batches of mixed lengths and single rows, with what `logits` (the torch student) says to each.

    Args:
        examples: evaluation examples; up to `PARITY_EXAMPLES` are used, evenly spaced by length.
        pad_id: token id of padding.
        kind: of the task; says which decisions are compared too.
        logits: the torch student on one padded batch.
    """
    order = np.argsort(examples.lengths, kind="stable")
    rows = order[np.unique(np.linspace(0, len(order) - 1, min(PARITY_EXAMPLES, len(order))).round().astype(np.int64))]
    count = max(1, len(rows) // PARITY_BATCH)
    groups = [rows[start::count] for start in range(count)]  # each takes short and long rows alike
    groups += [
        rows[[at]] for at in np.unique(np.linspace(0, len(rows) - 1, min(SINGLE_ROWS, len(rows))).astype(np.int64))
    ]
    batches = [examples.batch(group, pad_id=pad_id) for group in groups]
    return Reference(batches, [logits(batch) for batch in batches], kind)


def measure_parity(path: Path, reference: Reference) -> Parity:
    """Run the graph at `path` on the reference batches and compare."""
    session = open_session(path)
    found = np.concatenate([_unpadded(run_session(session, batch), batch) for batch in reference.batches])
    pairs = zip(reference.logits, reference.batches, strict=True)
    expected = np.concatenate([_unpadded(logits, batch) for logits, batch in pairs])
    lengths = np.concatenate([batch["attention_mask"].sum(axis=-1) for batch in reference.batches])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    differences = np.abs(found - expected).max(axis=-1)
    differences[~np.isfinite(differences)] = np.inf
    same = np.ones(len(found), dtype=bool)
    if reference.kind != "regression":
        same = same_decisions(reference.kind, expected=expected, found=found, offsets=starts)
    agreement = None if reference.kind == "regression" else float(same.mean())
    if len(found) != len(lengths):  # a logit per token
        differences = np.maximum.reduceat(differences, starts[:-1])
    if len(same) != len(lengths):
        same = np.logical_and.reduceat(same, starts[:-1])
    largest = float(differences.max())
    shapes = sorted({batch["input_ids"].shape for batch in reference.batches})
    return Parity(
        max_abs_logit_difference=largest if np.isfinite(largest) else None,
        decision_agreement=agreement,
        inputs=len(lengths),
        beyond_tolerance=int(((differences > PARITY_TOLERANCE) | ~same).sum()),
        single_rows=sum(len(batch["input_ids"]) == 1 for batch in reference.batches),
        shapes=[list(shape) for shape in shapes],
    )


def _unpadded(logits: Logits, batch: Inputs) -> Logits:
    """Return (B, outputs) logits as they are, and those of tokens (B, T, outputs) without padding, as one list of tokens."""
    return logits if logits.ndim == 2 else logits[batch["attention_mask"].astype(bool)]


def check_parity(parity: Parity, path: Path, *, out: Path) -> None:
    """Let an fp32 graph pass, or keep it as rejected.

    Args:
        parity: what was measured.
        path: the graph.
        out: the artifact folder that the user asked for.

    Raises:
        GateError: a logit is off by more than `PARITY_TOLERANCE`, or a decision differs.
    """
    if not parity.beyond_tolerance:
        return
    largest = parity.max_abs_logit_difference
    kept = keep_rejected(path, out=out)
    found = "not finite" if largest is None else f"{largest:.1e}"
    agreement = "" if parity.decision_agreement is None else f", same decision on {parity.decision_agreement:.1%}"
    raise GateError(
        f"{path.name} differs from the torch student by {found} on logits (allowed {PARITY_TOLERANCE:.1e}, "
        f"{parity.beyond_tolerance} of {parity.inputs} inputs{agreement}). Kept as {kept.name}. "
        "Set export.exporter to the other exporter, or update onnxruntime."
    )


def keep_rejected(path: Path, *, out: Path) -> Path:
    """Copy a graph that missed a gate beside where it would have gone; return the copy."""
    kept = out / "onnx" / (path.name.removesuffix(".onnx") + REJECTED)
    with new_file(kept) as partial:
        shutil.copyfile(path, partial)
    return kept


def holds_only_rejected(out: Path) -> bool:
    """Say whether a folder holds graphs that an earlier run rejected, and nothing else."""
    files = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else []
    return bool(files) and all(path.parent == out / "onnx" and path.name.endswith(REJECTED) for path in files)


def discard_rejected(out: Path) -> None:
    """Remove graphs that an earlier run rejected, and the folders where they were all there was."""
    for path in (out / "onnx").glob(f"*{REJECTED}"):
        path.unlink()
    for folder in (out / "onnx", out):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def score(
    path: Path, metrics: Sequence[str], *, part: DataSlice, pad_id: int, label_names: Sequence[str] = ()
) -> dict[str, float] | None:
    """Return the metrics of the graph at `path` on a slice, or None where an output is not finite."""
    logits = predict_logits(open_session(path), part.examples, pad_id=pad_id)
    if not np.isfinite(logits).all():
        return None
    return evaluate_metrics(metrics, logits=logits, part=part, label_names=label_names)
