"""The two gates every graph passes before it is handed out: parity with torch, and the int8 graphs' accuracy.

Parity: on real examples, in batches that mix lengths (so padding is present) and in single rows, an fp32 graph's logits
differ from the torch student's by at most `PARITY_TOLERANCE`, with the same decisions on every example; where each token
has its own logits, on every token but padding. Accuracy: on the whole evaluation slice an int8 graph loses at most so
many points of the task's first metric. An int8 graph that loses
more is retried with one scale per column, then with its most sensitive operators left in fp32; every trial is recorded.
A miss is a `GateError` (exit 4), with the graph that missed kept under `*.rejected.onnx`. Torch-free.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.console import note, progress
from bertemd_deploy.decisions import same_decisions
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import GateError
from bertemd_deploy.files import new_file
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.quantize import operators, quantize
from bertemd_deploy.runtime import open_session, predict_logits, run_session
from bertemd_deploy.tasks import Kind

PARITY_TOLERANCE = 1e-3  # largest allowed absolute difference of a logit from torch's
PARITY_EXAMPLES = 128
PARITY_BATCH = 8
SINGLE_ROWS = 16
SENSITIVITY_EXAMPLES = 64
EXCLUSIONS = (1, 2, 4, 8)  # how many of the most sensitive operators the trials leave in fp32, in turn
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


def discard_rejected(out: Path) -> None:
    """Remove graphs that an earlier run rejected, and the folders where they were all there was."""
    for path in (out / "onnx").glob(f"*{REJECTED}"):
        path.unlink()
    for folder in (out / "onnx", out):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@dataclass(frozen=True)
class Trial:
    """One int8 setting and what it scored; `metric` None where a logit was not finite."""

    graph: str
    per_channel: bool
    excluded: list[str]
    metric: float | None
    drop_points: float | None
    passed: bool


@dataclass
class Int8Search:
    """The int8 form of one graph, tried from fastest to safest until one keeps the accuracy.

    Attributes:
        model: the fp32 graph.
        fused: fused operators rather than standard ones.
        metrics: the task's metrics, the gating one first.
        reference: that metric of the fp32 student.
        max_drop: points (0.01) that it may lose.
        evaluation: examples judged on.
        calibration: examples that the operators' sensitivity is measured on.
        pad_id: token id of padding.
        label_names: label names by number, for metrics that count by name.
        trials: what was tried so far.
    """

    model: onnx.ModelProto
    fused: bool
    metrics: Sequence[str]
    reference: float
    max_drop: float
    evaluation: DataSlice
    calibration: DataSlice
    pad_id: int
    label_names: Sequence[str] = ()
    trials: list[Trial] = field(default_factory=list)

    def run(self, path: Path, *, out: Path) -> Trial:
        """Write the first int8 graph that passes to `path`; return its trial.

        Raises:
            GateError: none passed; the best one is kept as rejected.
        """
        name = path.name
        for per_channel in (False, True):
            if self._attempt(path, per_channel=per_channel, excluded=[]):
                return self.trials[-1]
        note(f"{name}: {self._sentence(self.trials[-1])}; looking for the operators that lose it")
        ranked = self._ranked(path)
        for count in EXCLUSIONS:
            if count >= len(ranked):
                break
            if self._attempt(path, per_channel=True, excluded=ranked[:count]):
                return self.trials[-1]
        best = max(self.trials, key=lambda trial: -np.inf if trial.metric is None else trial.metric)
        self._write(path, per_channel=best.per_channel, excluded=best.excluded)
        kept = keep_rejected(path, out=out)
        tried = "; ".join(self._sentence(trial) for trial in self.trials)
        raise GateError(
            f"{name} loses too much {self.metrics[0]} against the fp32 student ({self.reference:.4f}; allowed "
            f"{self.max_drop:g} points, {len(self.evaluation)} examples). Tried {tried}. Kept as {kept.name}. "
            "Raise quantize.max_drop, or set quantize.mode to none."
        )

    def _write(self, path: Path, *, per_channel: bool, excluded: Sequence[str]) -> None:
        save(quantize(self.model, fused=self.fused, per_channel=per_channel, excluded=excluded), path)

    def _attempt(self, path: Path, *, per_channel: bool, excluded: list[str]) -> bool:
        self._write(path, per_channel=per_channel, excluded=excluded)
        found = score(path, self.metrics[:1], part=self.evaluation, pad_id=self.pad_id, label_names=self.label_names)
        metric = found[self.metrics[0]] if found else None
        drop = None if metric is None else round((self.reference - metric) * 100, 6)
        passed = drop is not None and drop <= self.max_drop
        kind = "fused-int8" if self.fused else "int8"
        self.trials.append(Trial(kind, per_channel, list(excluded), metric, drop, passed))
        return passed

    def _sentence(self, trial: Trial) -> str:
        weights = "a scale per column" if trial.per_channel else "a scale per matrix"
        kept = f" with {len(trial.excluded)} operators in fp32" if trial.excluded else ""
        found = "outputs that are not finite" if trial.metric is None else f"{trial.metric:.4f}"
        return f"{weights}{kept}: {found}"

    def _ranked(self, path: Path) -> list[str]:
        """Return the operators, the one whose return to fp32 brings the logits closest to fp32's first."""
        names = operators(self.model)
        rows = np.arange(min(SENSITIVITY_EXAMPLES, len(self.calibration.examples)))
        examples = self.calibration.examples.select(rows)
        with tempfile.TemporaryDirectory() as folder:
            original = Path(folder) / path.name
            save(self.model, original)
            expected = predict_logits(open_session(original), examples, pad_id=self.pad_id)
        errors = {}
        with progress("sensitivity", len(names)) as bar:
            for name in names:
                self._write(path, per_channel=True, excluded=[name])
                found = predict_logits(open_session(path), examples, pad_id=self.pad_id)
                error = float(np.square(found.astype(np.float64) - expected).mean())
                errors[name] = error if np.isfinite(error) else np.inf
                bar.advance(detail=name)
        return sorted(names, key=errors.__getitem__)


def score(
    path: Path, metrics: Sequence[str], *, part: DataSlice, pad_id: int, label_names: Sequence[str] = ()
) -> dict[str, float] | None:
    """Return the metrics of the graph at `path` on a slice, or None where an output is not finite."""
    logits = predict_logits(open_session(path), part.examples, pad_id=pad_id)
    if not np.isfinite(logits).all():
        return None
    return evaluate_metrics(metrics, logits=logits, part=part, label_names=label_names)
