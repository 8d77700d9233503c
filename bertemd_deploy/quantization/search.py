"""The int8 form of a graph that keeps the accuracy: tried from fastest to safest, every trial recorded.

Weights have a scale per column: it takes 1 to 2% more time than one per matrix, and is as a rule nearer to fp32. Features of
activations that stand out are scaled down first where that brings the logits closer to fp32's (see `smoothing`), unless
ranges were learnt in training. For dynamic int8 then a scale for each row of activations, which batch mates cannot move; then
the most sensitive operators left in fp32. A graph whose decisions depend too much on padding and batch mates is passed over
like one that loses too much. Judged on the evaluation slice; what stands out, sensitivity, and how static int8 is best
calibrated, measured on the calibration slice. Where the target's CPUs may add int8 products in 16 bits, weights that could
overflow these are judged by what such a CPU would compute as well, and safer weights are tried where that loses too much.
Torch-free.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.console import note, progress
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import GateError
from bertemd_deploy.gate import keep_rejected, score
from bertemd_deploy.invariance import Invariance
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.quantization.calibration import METHODS, Range, collect, spread
from bertemd_deploy.quantization.dynamic import operators, quantize
from bertemd_deploy.quantization.padding import copy_first_row
from bertemd_deploy.quantization.rows import quantize_rows
from bertemd_deploy.quantization.saturation import SaturationReport, predict_saturation
from bertemd_deploy.quantization.smoothing import Smoothed, smooth
from bertemd_deploy.quantization.static import activations, quantize_static
from bertemd_deploy.quantization.unsigned import unsigned
from bertemd_deploy.runtime import open_session, predict_logits
from bertemd_deploy.targets import FULL, REDUCED, TARGETS, UNSIGNED, Target, Weights, products_saturate
from bertemd_deploy.tasks import Kind

SENSITIVITY_EXAMPLES = 64
EXCLUSIONS = (1, 2, 4, 8)  # how many of the most sensitive operators the trials leave in fp32, in turn


Activations = Literal["per-tensor", "per-row", "fixed"]


class _Form(NamedTuple):
    """Where activations get their scales, and whether weights have one for each column."""

    activations: Activations
    per_channel: bool


class _Source(NamedTuple):
    """What int8 is made of: an fp32 graph, what was smoothed in it, and static ranges with the method they are of."""

    graph: onnx.ModelProto
    smoothed: Sequence[Smoothed] = ()
    method: str | None = None
    ranges: Mapping[str, Range] = MappingProxyType({})


@dataclass(frozen=True)
class Trial:
    """One int8 setting and what it scored.

    Attributes:
        graph: which of the artifact's graphs.
        per_channel: one weight scale per column.
        excluded: operators in fp32.
        metric: None where a logit was not finite.
        drop_points: points lost against the reference.
        passed: whether that is allowed.
        mode: dynamic or static.
        method: where static ranges came from: a method of `calibration`, or "training"; None for dynamic.
        activations: where their scales come from: "per-tensor", "per-row" or "fixed".
        changed_decision_share: share of the decisions that padding and batch mates change; None where that was not asked.
        weights: how they are held.
        saturating_metric: the metric on a CPU whose int8 sums saturate, predicted; None where that was not asked.
        saturated_pairs: sums of two products that saturate there, of all on the examples; None likewise.
        smoothed_activations: how many activations are divided by a factor for each feature.
    """

    graph: str
    per_channel: bool
    excluded: list[str]
    metric: float | None
    drop_points: float | None
    passed: bool
    mode: str = "dynamic"
    method: str | None = None
    activations: Activations = "per-tensor"
    changed_decision_share: float | None = None
    weights: Weights = FULL
    saturating_metric: float | None = None
    saturated_pairs: int | None = None
    smoothed_activations: int = 0

    def record(self) -> dict[str, Any]:
        """Return the manifest's entry, flat."""
        return {name: value for name, value in asdict(self).items() if name != "weights"} | asdict(self.weights)


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
        calibration: train examples that features which stand out, static ranges and the operators' sensitivity are
            measured on.
        pad_id: token id of padding.
        label_names: label names by number, for metrics that count by name.
        kind: of the task.
        target: whose weights are tried.
        embedding_bits: of the table of words, 8 or 4.
        mode: activations measured at each call, or ranges known beforehand.
        trained_ranges: static ranges learnt in training, by tensor of `model`; None calibrates.
        per_channel: one weight scale per column; else one per matrix, for ranges that were learnt so.
        invariance: measures a graph, by where its activations get their scales; None leaves that to others.
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
    kind: Kind = "classification"
    target: Target = TARGETS["x86-avx512-vnni"]
    embedding_bits: int = 8
    mode: Literal["dynamic", "static"] = "dynamic"
    trained_ranges: Mapping[str, Range] | None = None
    per_channel: bool = True
    invariance: Callable[[Path, Activations], Invariance] | None = None
    trials: list[Trial] = field(default_factory=list)
    _source: _Source = field(init=False)

    def run(self, path: Path, *, out: Path) -> Trial:
        """Write the first int8 graph that passes to `path`; return its trial.

        Raises:
            GateError: none passed; the best one is kept as rejected.
            ExportError: an activation is not finite, static int8 cannot be calibrated, or a trained range is missing.
        """
        name = path.name
        self._source = self._choose_source(path)
        for form in self._forms():
            if self._attempts(path, form, excluded=[]):
                return self.trials[-1]
        note(f"{name}: {self._sentence(self.trials[-1])}; looking for the operators that lose it")
        ranked = self._ranked(path)
        for count in EXCLUSIONS:
            if count >= len(ranked):
                break
            if self._attempts(path, self._forms()[-1], excluded=ranked[:count]):
                return self.trials[-1]
        best = max(self.trials, key=lambda trial: -np.inf if trial.metric is None else trial.metric)
        self._write(path, _Form(best.activations, best.per_channel), excluded=best.excluded, weights=best.weights)
        kept = keep_rejected(path, out=out)
        tried = "; ".join(self._sentence(trial) for trial in self.trials)
        fault = f"loses too much {self.metrics[0]} against the fp32 student"
        remedy = "Raise quantize.max_drop, or set quantize.mode to none."
        if not self._misses(best.metric) and best.saturating_metric is None and not best.saturated_pairs:
            fault = "depends too much on padding and batch mates; for comparison, the fp32 student"
            remedy = "Raise quantize.max_changed, or set quantize.mode to static or none."
        elif not self._misses(best.metric):
            fault = f"loses too much {self.metrics[0]} on CPUs without exact int8 sums, against the fp32 student"
            remedy = "Name the CPUs it is for with --target, raise quantize.max_drop, or set quantize.mode to none."
        raise GateError(
            f"{name} {fault} ({self.reference:.4f}; allowed {self.max_drop:g} points, {len(self.evaluation)} examples). "
            f"Tried {tried}. Kept as {kept.name}. {remedy}"
        )

    def _forms(self) -> list[_Form]:
        """Return what is tried in turn, fastest first."""
        if self.mode == "static":
            return [_Form("fixed", self.per_channel)]
        return [_Form("per-tensor", self.per_channel), _Form("per-row", True)]

    def _choose_source(self, path: Path) -> _Source:
        """Return what int8 is made of: with what stands out smoothed, if that keeps the logits closer to fp32's.

        Learnt ranges belong to the graph as it is; else static ranges are those of the method that keeps them closest.
        """
        if self.mode == "static" and self.trained_ranges is not None:
            return _Source(self.model, method="training", ranges=self.trained_ranges)
        examples, expected = self._fp32_logits(path)
        smoothed, found = smooth(self.model, examples=self.calibration.examples, pad_id=self.pad_id)
        sources = [*self._calibrated(self.model), *(self._calibrated(smoothed, found) if found else [])]
        errors = []
        for source in sources:
            self._source = source
            self._write(path, self._forms()[0], excluded=[])
            errors.append(self._error(path, examples, expected))
        best = sources[int(np.argmin(errors))]
        if best.smoothed:
            left = min(errors) / min(
                error for source, error in zip(sources, errors, strict=True) if not source.smoothed
            )
            count = f"{len(best.smoothed)} of {len(activations(self.model))} activations smoothed"
            note(f"{path.name}: {count}, the squared error of int8 logits falls to {left:.0%}")
        return best

    def _calibrated(self, model: onnx.ModelProto, smoothed: Sequence[Smoothed] = ()) -> list[_Source]:
        """Return a graph with no ranges, or for static int8 with those of each method."""
        if self.mode == "dynamic":
            return [_Source(model, smoothed)]
        part = self.calibration.examples
        seen = collect(model, activations(model), examples=part, pad_id=self.pad_id, count=len(part))
        return [_Source(model, smoothed, method, seen.ranges(method)) for method in METHODS]

    def _write(self, path: Path, form: _Form, *, excluded: Sequence[str], weights: Weights = FULL) -> onnx.ModelProto:
        chosen: dict[str, Any] = {
            "fused": self.fused,
            "per_channel": form.per_channel,
            "excluded": excluded,
            "reduce_range": weights.reduce_range,
            "embedding_bits": self.embedding_bits,
        }
        if self.mode == "static":
            made = quantize_static(self._source.graph, ranges=self._source.ranges, **chosen)
        elif form.activations == "per-row":
            made = quantize_rows(self._source.graph, **chosen)
        else:
            made = copy_first_row(quantize(self._source.graph, **chosen))
        if weights.weight_type == "uint8":
            made = unsigned(made)
        save(made, path)
        return made

    def _attempts(self, path: Path, form: _Form, *, excluded: list[str]) -> bool:
        """Try the target's weights in turn, the safer ones only where saturation alone stood in the way."""
        for weights in self.target.weights:
            if self._attempt(path, form, excluded=excluded, weights=weights):
                return True
            if not self.trials[-1].saturated_pairs:
                return False  # what safer weights would not bring back
        return False

    def _attempt(self, path: Path, form: _Form, *, excluded: list[str], weights: Weights) -> bool:
        made = self._write(path, form, excluded=excluded, weights=weights)
        report = self._predict(made) if weights.can_saturate and products_saturate() else None
        if report is not None:  # this very machine clips sums: what exact ones give is computed beside
            metric = self._metric(report.exact_logits)
        else:
            found = score(
                path, self.metrics[:1], part=self.evaluation, pad_id=self.pad_id, label_names=self.label_names
            )
            metric = found[self.metrics[0]] if found else None
        passed, changed, saturating, pairs = not self._misses(metric), None, None, None
        if passed and self.invariance is not None:
            invariance = self.invariance(path, form.activations)
            passed, changed = invariance.within_bound, invariance.changed_decision_share
        if passed and self.target.saturates and weights.can_saturate:
            report = report or self._predict(made)
            pairs, saturating = report.saturated, self._metric(report.logits)
            passed = not self._misses(saturating)
        self.trials.append(
            Trial(
                graph="fused-int8" if self.fused else "int8",
                per_channel=form.per_channel,
                excluded=list(excluded),
                metric=metric,
                drop_points=self._drop(metric),
                passed=passed,
                mode=self.mode,
                method=self._source.method,
                activations=form.activations,
                changed_decision_share=changed,
                weights=weights,
                saturating_metric=saturating,
                saturated_pairs=pairs,
                smoothed_activations=len(self._source.smoothed),
            )
        )
        return passed

    def _predict(self, made: onnx.ModelProto) -> SaturationReport:
        return predict_saturation(made, examples=self.evaluation.examples, pad_id=self.pad_id, kind=self.kind)

    def _metric(self, logits: NDArray[np.float32]) -> float | None:
        if not np.isfinite(logits).all():
            return None
        found = evaluate_metrics(self.metrics[:1], logits=logits, part=self.evaluation, label_names=self.label_names)
        return found[self.metrics[0]]

    def _drop(self, metric: float | None) -> float | None:
        return None if metric is None else round((self.reference - metric) * 100, 6)

    def _misses(self, metric: float | None) -> bool:
        drop = self._drop(metric)
        return drop is None or drop > self.max_drop

    def _sentence(self, trial: Trial) -> str:
        weights = "a scale per column" if trial.per_channel else "a scale per matrix"
        weights += f", ranges by {trial.method}" if trial.method else ""
        weights += ", one per row of activations" if trial.activations == "per-row" else ""
        weights += {REDUCED: ", 7 bits", UNSIGNED: ", unsigned"}.get(trial.weights, "")
        kept = f" with {len(trial.excluded)} operators in fp32" if trial.excluded else ""
        found = "outputs that are not finite" if trial.metric is None else f"{trial.metric:.4f}"
        if trial.saturated_pairs:
            clipped = trial.saturating_metric
            found += f" ({'not finite' if clipped is None else f'{clipped:.4f}'} on CPUs without exact int8 sums)"
        if trial.changed_decision_share:
            found += f", {trial.changed_decision_share:.1%} of decisions changed by padding or batch mates"
        return f"{weights}{kept}: {found}"

    def _fp32_logits(self, path: Path) -> tuple[Encoded, NDArray[np.float32]]:
        """Return some calibration examples, and the fp32 graph's logits of them."""
        part = self.calibration.examples
        examples = part.select(spread(len(part), SENSITIVITY_EXAMPLES))
        with tempfile.TemporaryDirectory() as folder:
            original = Path(folder) / path.name
            save(self.model, original)
            return examples, predict_logits(open_session(original), examples, pad_id=self.pad_id)

    def _error(self, path: Path, examples: Encoded, expected: NDArray[np.float32]) -> float:
        """Return how far the graph at `path` is from fp32's logits, as a mean square; infinite where one is not finite."""
        found = predict_logits(open_session(path), examples, pad_id=self.pad_id)
        error = float(np.square(found.astype(np.float64) - expected).mean())
        return error if np.isfinite(error) else np.inf

    def _ranked(self, path: Path) -> list[str]:
        """Return the operators, the one whose return to fp32 brings the logits closest to fp32's first."""
        names = operators(self.model)
        examples, expected = self._fp32_logits(path)
        errors = {}
        with progress("sensitivity", len(names)) as bar:
            for name in names:
                self._write(path, self._forms()[-1], excluded=[name])
                errors[name] = self._error(path, examples, expected)
                bar.advance(detail=name)
        return sorted(names, key=errors.__getitem__)
