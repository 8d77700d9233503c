"""The int8 form of a graph that keeps the accuracy: tried from fastest to safest, every trial recorded.

One scale per matrix first, then one per column, then the most sensitive operators left in fp32. Judged on the evaluation
slice, sensitivity measured on the calibration slice. Torch-free.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.console import note, progress
from bertemd_deploy.errors import GateError
from bertemd_deploy.gate import keep_rejected, score
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.quantization.dynamic import operators, quantize
from bertemd_deploy.runtime import open_session, predict_logits

SENSITIVITY_EXAMPLES = 64
EXCLUSIONS = (1, 2, 4, 8)  # how many of the most sensitive operators the trials leave in fp32, in turn


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
