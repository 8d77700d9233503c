"""The artifact's manifest: what one export has found out, told in one JSON file (its fields: README, "The artifact")."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from bertemd_deploy.artifact import GRAPHS, SCHEMA_VERSION, DataSlice
from bertemd_deploy.bench.environment import versions
from bertemd_deploy.compatibility import oldest_onnxruntime
from bertemd_deploy.errors import ExportError
from bertemd_deploy.files import sha256_file
from bertemd_deploy.gate import PARITY_TOLERANCE
from bertemd_deploy.onnx_edit import histogram
from bertemd_deploy.quantization.dynamic import ACTIVATION_TYPE, operators
from bertemd_deploy.quantization.search import Trial
from bertemd_deploy.settings import ExportSettings, QuantizeSettings
from bertemd_deploy.sizes import component_sizes, stored_twice
from bertemd_deploy.targets import Target, requirements

WITH_TOKENIZER = "onnx/model_with_tokenizer.onnx"
EXTENSIONS = "onnxruntime_extensions"
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "tokenizers")


@dataclass
class Build:
    """What one export has found out so far, by graph; the manifest is made of it."""

    folder: Path
    out: Path
    metadata: dict[str, Any]
    labels: Sequence[str]
    opset: int
    target: Target
    vocabulary: Mapping[str, Any] | None
    shapes: list[list[int]] = field(default_factory=list)
    graphs: dict[str, onnx.ModelProto] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    invariance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen: dict[str, Trial] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    with_tokenizer: tuple[str, onnx.ModelProto] | None = None  # the graph that takes texts, and which one it is behind

    def path(self, graph: str) -> Path:
        """Return where a graph is being written."""
        return self.folder / GRAPHS[graph]

    def gate_reference(self, metric: str) -> float:
        """Return what smaller graphs are held against: the metric of the student, before its vocabulary was trimmed."""
        whole = self.metrics["student"] if self.vocabulary is None else self.vocabulary["metrics"]["full"]
        return float(whole[metric])


def describe(
    build: Build,
    model: nn.Module,
    *,
    task: Mapping[str, Any],
    max_length: int,
    slices: Sequence[DataSlice],
    teacher: Mapping[str, Any] | None,
    distillation: Mapping[str, Any] | None,
    reference_metrics: Mapping[str, Mapping[str, float]],
    settings: ExportSettings,
    quantization: QuantizeSettings,
) -> dict[str, Any]:
    """Return the manifest but for its files; arguments as of `export`, `model` being the student."""
    config: Any = model.config
    return {
        "schema_version": SCHEMA_VERSION,
        "task": dict(task) | _no_answer(slices),
        "labels": list(build.labels),
        "max_length": max_length,
        "student": {
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "heads": config.num_attention_heads,
            "intermediate": config.intermediate_size,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        },
        "teacher": dict(teacher) if teacher is not None else None,
        "distillation": dict(distillation) if distillation is not None else None,
        "vocabulary": dict(build.vocabulary) if build.vocabulary is not None else None,
        "export": {**asdict(settings), "shapes": build.shapes},
        "parity": {"max_abs_logit_difference_allowed": PARITY_TOLERANCE, "graphs": build.parity},
        "invariance": build.invariance,
        "metrics": {name: dict(values) for name, values in reference_metrics.items()} | build.metrics,
        "quantization": _quantization(build, quantization),
        "requires": _requires(build),
        "versions": versions(PACKAGES),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _no_answer(slices: Sequence[DataSlice]) -> dict[str, bool]:
    """Return the manifest's word on whether a context may hold no answer, of questions: in training or in evaluation."""
    found = [part.gold.unanswerable for part in slices if part.gold is not None]
    return {"no_answer": any(found)} if found else {}


def _requires(build: Build) -> dict[str, Any]:
    """Return what the graphs need of a CPU and of ONNX Runtime, by graph."""
    weights = {graph: trial.weights for graph, trial in build.chosen.items()}
    harmless = [graph for graph, trial in build.chosen.items() if trial.saturating_metric is not None]
    releases = {graph: oldest_onnxruntime(model) for graph, model in build.graphs.items()}
    found = requirements(build.target, weights=weights, harmless=harmless) | {"onnxruntime": releases}
    if build.with_tokenizer is not None:
        graph, _ = build.with_tokenizer
        found["with_tokenizer"] = {"graph": graph, EXTENSIONS: versions([EXTENSIONS])[EXTENSIONS]}
    return found


def _quantization(build: Build, settings: QuantizeSettings) -> dict[str, Any]:
    """Return the manifest's entry; what may differ between the graphs is keyed by graph."""
    chosen = build.chosen
    found = {graph: operators(build.graphs["fused" if graph == "fused-int8" else "fp32"]) for graph in chosen}
    return {
        **asdict(settings),
        "activation_type": ACTIVATION_TYPE,
        "weight_type": {graph: trial.weights.weight_type for graph, trial in chosen.items()},
        "reduce_range": {graph: trial.weights.reduce_range for graph, trial in chosen.items()},
        "per_channel": {graph: trial.per_channel for graph, trial in chosen.items()},
        "activations": {graph: trial.activations for graph, trial in chosen.items()},
        "smoothed_activations": {graph: trial.smoothed_activations for graph, trial in chosen.items()},
        **({"method": {graph: trial.method for graph, trial in chosen.items()}} if settings.mode == "static" else {}),
        "operators": {
            graph: [name for name in found[graph] if name not in trial.excluded] for graph, trial in chosen.items()
        },
        "excluded": {graph: trial.excluded for graph, trial in chosen.items()},
        "trials": [trial.record() for trial in build.trials],
    }


def describe_files(build: Build) -> dict[str, Any]:
    """Return the manifest's entry for every file in the folder: hash, size, and of graphs what they are made of.

    Raises:
        ExportError: a graph holds a constant twice.
    """
    names = {GRAPHS[name]: name for name in build.graphs}
    graphs = {GRAPHS[name]: graph for name, graph in build.graphs.items()}
    if build.with_tokenizer is not None:
        graphs[WITH_TOKENIZER] = build.with_tokenizer[1]
    entries: dict[str, Any] = {}
    for path in sorted(path for path in build.folder.rglob("*") if path.is_file()):
        name = path.relative_to(build.folder).as_posix()
        entries[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        if name in graphs:
            graph = graphs[name]
            entries[name] |= {
                "opset": build.opset,
                "ir_version": graph.ir_version,
                "operators": histogram(graph),
                "fused": build.fused if names.get(name, "").startswith("fused") else None,
            }
        if name in names:
            if twice := stored_twice(graph):
                raise ExportError(
                    f"{name}: {' and '.join(twice[0])} are stored twice. Set export.exporter to the other one."
                )
            entries[name]["components"] = component_sizes(path)
    return entries


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, or None where it is installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
