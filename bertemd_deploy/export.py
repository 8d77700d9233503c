"""The export stage: a student folder in, the artifact folder out, every graph checked before it is handed out.

Order: portable fp32 graph -> fused fp32 graph -> parity gate -> int8 of both -> accuracy gate -> manifest. All of it happens
in a temporary folder that is renamed at the end, so a miss leaves an artifact that was there before as it was. Which
nodes a graph has is decided in `bert_graph`, `fuse` and `quantize`; what passes, in `gate`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from bertemd_deploy.artifact import EVALUATION, GRAPHS, MANIFEST, Artifact, DataSlice, write_slices
from bertemd_deploy.bert_graph import (
    check_shapes,
    export_fp32,
    fusable_graph,
    head_kind,
    load_model,
    portable_graph,
    torch_logits,
)
from bertemd_deploy.console import note, progress
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import BertemdError, ExportError, GateError
from bertemd_deploy.files import claim_folder, move_into, new_folder, write_json, write_text
from bertemd_deploy.fuse import fuse
from bertemd_deploy.gate import (
    Reference,
    check_parity,
    discard_rejected,
    holds_only_rejected,
    keep_rejected,
    measure_parity,
    parity_reference,
    score,
)
from bertemd_deploy.handout import model_card, write_tokenizer
from bertemd_deploy.invariance import Bound, Invariance, Scales, bound_of, check_invariance, measure_invariance
from bertemd_deploy.manifest import Build, describe, describe_files
from bertemd_deploy.metrics import evaluate_metrics
from bertemd_deploy.onnx_edit import save, set_metadata
from bertemd_deploy.quantization.aware import TrainedRanges, graph_ranges
from bertemd_deploy.quantization.half import to_half
from bertemd_deploy.quantization.search import Int8Search
from bertemd_deploy.runtime import collect_logits
from bertemd_deploy.settings import ExportSettings, QuantizeSettings
from bertemd_deploy.targets import check_graph, check_judge, resolve
from bertemd_deploy.tasks import Kind
from bertemd_deploy.tokenizer_inside import check_takes_texts, read_front, write_with_tokenizer

__all__ = ["export", "export_fp32"]

_PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
_HALF_CHANGED = 0.01  # share of decisions


def export(
    student: Path,
    *,
    out: Path,
    task: Mapping[str, Any],
    labels: Sequence[str],
    max_length: int,
    evaluation: DataSlice,
    calibration: DataSlice,
    teacher: Mapping[str, Any] | None,
    reference_metrics: Mapping[str, Mapping[str, float]],
    distillation: Mapping[str, Any] | None,
    settings: ExportSettings,
    quantization: QuantizeSettings,
    vocabulary: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Artifact:
    """Write the artifact of a student and return it.

    Args:
        student: Hugging Face folder of a BERT with the task's head, and its tokenizer.
        out: artifact folder; one that is there is replaced, whole, once the new one is complete.
        task: name, kind (of `tasks.Kind`) and metrics, the gating one first; what else it says goes into the manifest.
        labels: label names by number; empty for regression and question answering.
        max_length: longest input in tokens.
        evaluation: dev examples with gold labels, which every gate judges on.
        calibration: train examples.
        teacher: name, layers and sha256, for the manifest.
        reference_metrics: metrics measured elsewhere, such as the teacher's, by model.
        distillation: how the student was made, for the manifest.
        settings: exporter, operator set and target.
        quantization: what smaller graphs are made, and what they may cost.
        vocabulary: how it was trimmed, for the manifest; None where it is whole.
        force: write into `out` though it holds something else; files there that export does not write stay.

    Raises:
        ModelError: the student folder is incomplete or does not fit `labels`.
        RecipeError: there is no such target, float16 is asked for on a CPU, or a tokenizer inside where none can be.
        ExportError: a graph could not be exported, fused or quantized, would not load on the target, or int8 graphs for it
            cannot be judged on this CPU.
        GateError: parity, accuracy or invariance missed; the graph is kept in `out` as `onnx/*.rejected.onnx`, all else
            as it was.
        ArtifactError: `out` holds something else, or cannot be written.
    """
    target = resolve(settings.target)
    if quantization.mode in ("dynamic", "static"):
        check_judge(target)
    if settings.tokenizer_inside:
        check_takes_texts(task["kind"])
    if (out / MANIFEST).exists() or holds_only_rejected(out):
        discard_rejected(out)
    claim_folder(out, marker=MANIFEST, force=force)
    discard_rejected(out)
    kind: Kind = task["kind"]
    model = load_model(student, kind=kind)
    config: Any = model.config
    slices = (evaluation, calibration)
    _check_request(config, student=student, kind=kind, labels=labels, max_length=max_length, slices=slices)
    pad_id = TextEncoder.load(student, max_length=max_length).pad_id
    foreign = _holds_other_files(out)
    with new_folder(out / ".bertemd-new" if foreign else out) as folder:
        (folder / "onnx").mkdir()
        names = {} if kind == "question-answering" else {"id2label": dict(enumerate(labels)) or {0: "LABEL_0"}}
        metadata = names | {"task": task["name"], "kind": kind, "max_length": max_length}
        build = Build(folder, out, metadata, labels, settings.opset, target, vocabulary)
        write_tokenizer(student, folder, max_length=max_length)
        write_json(folder / "config.json", _model_config(student, kind=kind, **names))
        write_slices(folder / EVALUATION, {"evaluation": evaluation, "calibration": calibration})
        front = read_front(build, evaluation, max_length=max_length) if settings.tokenizer_inside else None
        _write_fp32(build, model, settings=settings)
        reference = parity_reference(
            evaluation.examples,
            pad_id=pad_id,
            kind=kind,
            logits=lambda batch: torch_logits(model, batch),
        )
        _judge_fp32(build, reference)
        logits = _student_logits(model, evaluation, pad_id=pad_id)
        metrics = list(task["metrics"])
        build.metrics["student"] = evaluate_metrics(metrics, logits=logits, part=evaluation, label_names=labels)
        for graph in ("fp32", "fused"):
            _score(build, graph, metrics, part=evaluation, pad_id=pad_id)
        if quantization.mode in ("dynamic", "static"):
            trained = TrainedRanges.read(student) if quantization.mode == "static" else None
            _write_int8(
                build, reference, model, trained, metrics=metrics, slices=slices, pad_id=pad_id, limits=quantization
            )
        elif quantization.mode == "float16":
            _write_half(build, reference, metrics=metrics, part=evaluation, pad_id=pad_id, limits=quantization)
        _judge_invariance(build, reference.kind, part=evaluation, pad_id=pad_id, limits=quantization)
        if front is not None:
            write_with_tokenizer(build, front)
        manifest = describe(
            build,
            model,
            task=task,
            max_length=max_length,
            slices=slices,
            teacher=teacher,
            distillation=distillation,
            reference_metrics=reference_metrics,
            settings=settings,
            quantization=quantization,
        )
        write_text(folder / "README.md", model_card(manifest, graphs={name: build.path(name) for name in build.graphs}))
        manifest["files"] = describe_files(build)
        write_json(folder / MANIFEST, manifest)
    if foreign:
        move_into(out / ".bertemd-new", out, last=MANIFEST)
    return Artifact.load(out)


def _check_request(
    config: Any,
    *,
    student: Path,
    kind: Kind,
    labels: Sequence[str],
    max_length: int,
    slices: Sequence[DataSlice],
) -> None:
    outputs, wanted = int(config.num_labels), 2 if kind == "question-answering" else len(labels) or 1
    stored = [str(config.id2label[key]) for key in sorted(config.id2label, key=int)]
    unnamed = all(name.startswith("LABEL_") for name in stored)
    if outputs != wanted or (labels and not unnamed and stored != list(labels)):
        raise ExportError(
            f"{student / 'config.json'}: the student's outputs are {', '.join(stored)}; the data's labels are "
            f"{', '.join(labels) or 'one number (regression)'}. Export with the data it was trained on."
        )
    if other := sorted({part.kind for part in slices} - {kind}):
        raise ExportError(
            f"{student}: the task is {kind}, the slices are for {', '.join(other)}. Export with its data."
        )
    longest = int(config.max_position_embeddings)
    if not 1 <= max_length <= longest:
        raise ExportError(f"{student}: max_length {max_length}; the student has positions for 1 to {longest} tokens.")
    for part, name in zip(slices, ("evaluation", "calibration"), strict=True):
        if not len(part.examples):
            raise ExportError(
                f"{student}: the {name} slice is empty; the gates have nothing to judge on. Give more data."
            )
        if int(part.examples.lengths.max()) > max_length:
            raise ExportError(
                f"{student}: the {name} slice has an example of {int(part.examples.lengths.max())} tokens, "
                f"max_length is {max_length}. Tokenise the data with this max_length."
            )


def _write_fp32(build: Build, model: nn.Module, *, settings: ExportSettings) -> None:
    config: Any = model.config
    with progress("export", 2) as bar:
        build.graphs["fp32"] = portable_graph(model, exporter=settings.exporter, opset=settings.opset)
        bar.advance(detail="portable")
        fusable = fusable_graph(model, exporter=settings.exporter, opset=settings.opset)
        build.graphs["fused"], build.fused = fuse(
            fusable,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            hidden=config.hidden_size,
            opset=settings.opset,
            first_row=head_kind(model) == "sequence",
        )
        bar.advance(detail="fused")
    for graph in ("fp32", "fused"):
        set_metadata(build.graphs[graph], build.metadata)
        save(build.graphs[graph], build.path(graph))
        build.shapes = check_shapes(build.path(graph), model=model, name=build.path(graph).name)
        _check_loads(build, graph)


def _check_loads(build: Build, graph: str) -> None:
    """Hold a graph against the target's runtime, if it is of the form that is the one to use there."""
    if graph.startswith("fused") == (build.target.graph == "fused"):
        check_graph(build.target, build.graphs[graph], name=build.path(graph).name)


def _judge_fp32(build: Build, reference: Reference) -> None:
    for graph in ("fp32", "fused"):
        parity = measure_parity(build.path(graph), reference)
        check_parity(parity, build.path(graph), out=build.out)
        build.parity[graph] = parity.record()


def _score(build: Build, graph: str, metrics: Sequence[str], *, part: DataSlice, pad_id: int) -> None:
    found = score(build.path(graph), metrics, part=part, pad_id=pad_id, label_names=build.labels)
    if found is None:
        raise ExportError(
            f"{GRAPHS[graph]}: an output on the evaluation slice is not finite, though all of the torch student's are. "
            "Set export.exporter to the other exporter, or update onnxruntime."
        )
    build.metrics[graph] = found


def _student_logits(model: nn.Module, part: DataSlice, *, pad_id: int) -> NDArray[np.float32]:
    with progress("student", len(part)) as bar:
        logits = collect_logits(partial(torch_logits, model), part.examples, pad_id=pad_id, done=bar.advance)
    if not np.isfinite(logits).all():
        raise ExportError(
            "the torch student gives outputs that are not finite; train it again at a lower learning rate."
        )
    return logits


def _write_int8(
    build: Build,
    reference: Reference,
    model: nn.Module,
    trained: TrainedRanges | None,
    *,
    metrics: Sequence[str],
    slices: tuple[DataSlice, DataSlice],
    pad_id: int,
    limits: QuantizeSettings,
) -> None:
    evaluation, calibration = slices
    for graph, source in (("int8", "fp32"), ("fused-int8", "fused")):
        note(f"{GRAPHS[graph]}: quantizing, {metrics[0]} may lose {limits.max_drop:g} points")
        learnt: dict[str, Any] = {}
        if trained is not None:
            ranges = graph_ranges(build.graphs[source], student=model, trained=trained)
            learnt = {"trained_ranges": ranges, "per_channel": trained.per_channel}
        search = Int8Search(
            build.graphs[source],
            fused=source == "fused",
            metrics=metrics,
            reference=build.gate_reference(metrics[0]),
            max_drop=limits.max_drop,
            evaluation=evaluation,
            calibration=calibration,
            pad_id=pad_id,
            label_names=build.labels,
            kind=reference.kind,
            target=build.target,
            embedding_bits=limits.embedding_bits,
            mode="static" if limits.mode == "static" else "dynamic",
            invariance=partial(_measure_invariance, build, reference.kind, evaluation, pad_id, limits),
            **learnt,
        )
        path = build.path(graph)
        build.chosen[graph] = search.run(path, out=build.out)
        build.trials += search.trials
        build.graphs[graph] = onnx.load_model(path)
        _check_loads(build, graph)
        build.parity[graph] = measure_parity(path, reference).record()
        _score(build, graph, metrics, part=evaluation, pad_id=pad_id)


def _write_half(
    build: Build,
    reference: Reference,
    *,
    metrics: Sequence[str],
    part: DataSlice,
    pad_id: int,
    limits: QuantizeSettings,
) -> None:
    graph, path = "fp16", build.path("fp16")
    build.graphs[graph] = to_half(build.graphs["fp32"], device="cpu", force=limits.float16_on_cpu)
    save(build.graphs[graph], path)
    _check_loads(build, graph)
    build.parity[graph] = measure_parity(path, reference).record()
    _score(build, graph, metrics, part=part, pad_id=pad_id)
    before, after = build.gate_reference(metrics[0]), build.metrics[graph][metrics[0]]
    if (before - after) * 100 > limits.max_drop:
        kept = keep_rejected(path, out=build.out)
        raise GateError(
            f"{path.name} loses too much {metrics[0]} against the fp32 student ({after:.4f} against {before:.4f}; allowed "
            f"{limits.max_drop:g} points). Kept as {kept.name}. Raise quantize.max_drop, or set quantize.mode to none."
        )


def _judge_invariance(build: Build, kind: Kind, *, part: DataSlice, pad_id: int, limits: QuantizeSettings) -> None:
    for graph in build.graphs:
        scales: Scales = build.chosen[graph].activations if graph in build.chosen else "float"
        path = build.path(graph)
        found = _measure_invariance(build, kind, part, pad_id, limits, path, scales)
        check_invariance(found, path, out=build.out)
        build.invariance[graph] = found.record()


def _measure_invariance(
    build: Build, kind: Kind, part: DataSlice, pad_id: int, limits: QuantizeSettings, path: Path, scales: Scales
) -> Invariance:
    bound = bound_of(scales, max_changed=limits.max_changed)
    if path == build.path("fp16"):  # sums in 11 bits: logits may move, and a close decision with them
        bound = Bound("float", max_abs_logit_difference=None, changed_decision_share=_HALF_CHANGED)
    return measure_invariance(
        path,
        examples=part.examples,
        pad_id=pad_id,
        kind=kind,
        max_length=int(build.metadata["max_length"]),
        bound=bound,
    )


def _model_config(student: Path, *, kind: Kind, id2label: Mapping[int, str] | None = None) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((student / "config.json").read_text(encoding="utf-8"))
    if kind in _PROBLEM_TYPES:
        config["problem_type"] = _PROBLEM_TYPES[kind]  # what tells other tools to take a softmax, a sigmoid, or neither
    if id2label is None:
        return config
    names = {str(number): name for number, name in id2label.items()}
    return config | {"id2label": names, "label2id": {name: number for number, name in id2label.items()}}


def _holds_other_files(out: Path) -> bool:
    """Say whether a folder holds files that no manifest in it names."""
    named = {MANIFEST}
    if (out / MANIFEST).is_file():
        with contextlib.suppress(BertemdError):  # of a damaged manifest every file is kept
            named |= set(Artifact.load(out).manifest["files"])
    return any(path.is_file() and path.relative_to(out).as_posix() not in named for path in out.rglob("*"))
