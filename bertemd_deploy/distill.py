"""Distillation: a teacher, a student, the EMD between their layers, and the one training loop.

The teacher is evaluated first, by label name, and refused if it has nothing to teach. The student folder that comes out is
a Hugging Face folder (safetensors) with the slices and facts that export needs beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from bertemd_deploy.artifact import write_slices
from bertemd_deploy.bench.environment import uses_bfloat16
from bertemd_deploy.checkpoints import WEIGHTS, checked_encoder, find_model, label_order
from bertemd_deploy.config import DistillSettings, StudentSettings
from bertemd_deploy.console import note, warn
from bertemd_deploy.data import Dataset, calibration_rows
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.evaluate import check_teacher, dev_metrics
from bertemd_deploy.facts import CALIBRATION_ROWS, FACTS, SLICES
from bertemd_deploy.files import new_file, sha256_file, write_json
from bertemd_deploy.mapping import LayerMapping
from bertemd_deploy.models import load_classifier, reorder_outputs, save_model, set_labels
from bertemd_deploy.objective import Distiller, Objective
from bertemd_deploy.students import build_student, check_same_tokens, student_shape
from bertemd_deploy.training import Schedule, fit, torch_logits

_MARGINAL_POINTS = 200


def distill(
    teacher_folder: Path,
    *,
    data: Dataset,
    max_length: int,
    student: StudentSettings,
    settings: DistillSettings,
    out: Path,
    checkpoints: Path,
    log: Path,
    teacher_name: str,
    beside: Callable[[Path, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Distil the teacher into a student and save it to `out`.

    Args:
        teacher_folder: fine-tuned Hugging Face classifier.
        data: train and dev splits.
        max_length: longest input in tokens.
        student: the student's shape and start.
        settings: mapping, loss weights, schedule.
        out: student folder: Hugging Face files, `bertemd_student.json`, `eval.npz`.
        checkpoints: resumable state; continued when present.
        teacher_name: what the teacher is called in the artifact.
        beside: called with the new student folder before it appears, and the record, to write more files into it.
        log: `distill.jsonl`: losses, flows, marginals, learning rate, tokens/s of every logging step.

    Returns:
        The record: metrics of teacher and student, layers, steps, best epoch.

    Raises:
        ModelError: teacher or student do not fit the data or each other, or the teacher is refused.
        EmdError: a cost is not finite or the flow cannot be solved.
        TrainingError: the loss is not finite.
    """
    encoder = checked_encoder(teacher_folder, max_length=max_length)
    order = label_order(teacher_folder, data.labels)
    teacher = load_classifier(teacher_folder, labels=data.labels)
    reorder_outputs(teacher, order)
    set_labels(teacher, data.labels)
    train, dev = data.splits["train"].encode(encoder), data.splits["dev"].encode(encoder)
    teacher_logits = torch_logits(teacher, dev.examples, pad_id=encoder.pad_id)
    teacher_metrics = check_teacher(
        teacher_logits, dev.labels, task=data.task, names=data.labels, where=str(teacher_folder)
    )
    note("teacher: dev " + " ".join(f"{name} {value:.4f}" for name, value in teacher_metrics.items()))
    trained, sizes, start = _make_student(teacher, encoder, student=student, settings=settings)
    note(
        f"student: {sizes['student_layers']} of {sizes['teacher_layers']} layers, from {start}; mapping {settings.mapping}"
    )
    mapping = LayerMapping(
        settings.mapping,
        sizes["teacher_layers"],
        sizes["student_layers"],
        mode=settings.cost_attention,
        temperature=settings.emd_temperature,
        separate=settings.separate_marginals,
    )
    done = fit(
        trained,
        schedule=Schedule(
            settings.epochs,
            settings.batch_size,
            settings.learning_rate,
            settings.warmup_ratio,
            settings.weight_decay,
            settings.seed,
            settings.max_grad_norm,
            settings.logging_steps,
            settings.checkpoint_seconds,
            uses_bfloat16(settings.precision),
        ),
        data=train,
        pad_id=encoder.pad_id,
        step=Objective(teacher, trained, mapping, settings, regression=data.task.kind == "regression"),
        evaluate=lambda: dev_metrics(trained.student, dev, task=data.task, pad_id=encoder.pad_id),
        metric=data.task.metrics[0],
        checkpoints=checkpoints,
        log=log,
        name="distill",
        extra_state=mapping,
    )
    metrics = {"teacher": teacher_metrics, "student": done.epochs[done.best_epoch - 1]}
    summary = summarise(log) | sizes | {
        "mapping": settings.mapping,
        "epochs": settings.epochs,
        "best_epoch": done.best_epoch,
        "steps": done.step,
        "seed": settings.seed,
        "precision": "bfloat16" if uses_bfloat16(settings.precision) else "float32",
        "train_rows": len(train.labels),
        "start": start,
    }  # fmt: skip
    calibration = calibration_rows(data.splits["train"], rows=CALIBRATION_ROWS).encode(encoder)
    facts = {
        "schema_version": 1,
        "task": {"name": data.task.name, "kind": data.task.kind, "metrics": list(data.task.metrics)},
        "labels": list(data.labels),
        "max_length": max_length,
        "teacher": {
            "name": teacher_name,
            "layers": sizes["teacher_layers"],
            "sha256": sha256_file(teacher_folder / WEIGHTS),
        },
        "metrics": metrics,
        "distillation": summary,
    }

    record = {"metrics": metrics} | {key: value for key, value in summary.items() if not isinstance(value, dict | list)}

    def write_beside(folder: Path) -> None:
        with new_file(folder / SLICES) as partial:
            write_slices(partial, {"evaluation": dev, "calibration": calibration})
        write_json(folder / FACTS, facts)
        if beside is not None:
            beside(folder, record)

    save_model(trained.student, out, tokenizer_from=teacher_folder, beside=write_beside)
    return record


def _make_student(
    teacher: nn.Module, encoder: TextEncoder, *, student: StudentSettings, settings: DistillSettings
) -> tuple[Distiller, dict[str, int], str]:
    """Return the module to train, the two layer counts, and where the student's weights come from."""
    source: Any = teacher.config
    shape = student_shape(student, source.to_dict())
    start = shape.start if student.init == "auto" else student.init
    if start not in ("teacher", "random"):
        check_same_tokens(find_model(start), encoder)
    model, told = build_student(teacher, shape=shape, init=student.init, seed=settings.seed)
    widths = {"student_hidden": int(shape.hidden or 0), "teacher_hidden": int(source.hidden_size)}
    needed = settings.hidden_projection or widths["student_hidden"] != widths["teacher_hidden"]
    trained = Distiller(model, **widths, project=needed and settings.mapping != "none", seed=settings.seed)
    if shape.heads != source.num_attention_heads and settings.mapping != "none":
        warn(
            f"heads differ (teacher {source.num_attention_heads}, student {shape.heads}): "
            "the mean of the attention scores over heads is compared"
        )
    return trained, {"teacher_layers": int(source.num_hidden_layers), "student_layers": shape.layers}, told


def summarise(log: Path) -> dict[str, Any]:
    """Return what a report shows of `distill.jsonl`: first and last flows, and thinned marginals and losses."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "losses" in line]
    thinned = steps[:: max(1, len(steps) // _MARGINAL_POINTS)]
    flows = ("step", "attention_flow", "hidden_flow")
    weights = ("step", "attention_teacher", "attention_student", "hidden_teacher", "hidden_student")
    summary: dict[str, Any] = {
        "losses": [{"step": line["step"], "total": line["loss"]} | line["losses"] for line in thinned],
        "dev": [{"epoch": line["epoch"]} | line["dev"] for line in lines if "dev" in line],
        "first": None,
        "last": None,
        "marginals": [],
    }
    if steps and "attention_flow" in steps[0]:
        summary["first"] = {key: steps[0][key] for key in flows}
        summary["last"] = {key: steps[-1][key] for key in flows}
        summary["marginals"] = [{key: line[key] for key in weights} for line in thinned]
    return summary
