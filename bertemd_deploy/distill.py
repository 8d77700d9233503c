"""Distillation: a teacher, a student, the EMD between their layers, and the one training loop.

The teacher is evaluated first, by label name, and refused if it has nothing to teach. The student folder that comes out is
a Hugging Face folder (safetensors) with the slices and facts that export needs beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bertemd_deploy.artifact import DataSlice, write_slices
from bertemd_deploy.checkpoints import WEIGHTS, checked_encoder, label_order
from bertemd_deploy.console import note, warn
from bertemd_deploy.data import Dataset, calibration_rows
from bertemd_deploy.encoding import Encoded, TextEncoder
from bertemd_deploy.evaluate import check_teacher, dev_metrics, torch_logits
from bertemd_deploy.facts import CALIBRATION_ROWS, FACTS, SLICES, task_facts
from bertemd_deploy.families import sizes as teacher_sizes
from bertemd_deploy.files import discard_partial, new_file, sha256_file, write_json
from bertemd_deploy.kernels import quicken
from bertemd_deploy.mapping import LayerMapping, flow_settings
from bertemd_deploy.models import load_classifier, reorder_outputs, save_model, set_labels
from bertemd_deploy.objective import Distiller, Objective
from bertemd_deploy.position_codes import hold_codes
from bertemd_deploy.processes import join_processes
from bertemd_deploy.settings import DistillSettings, StudentSettings
from bertemd_deploy.students import build_student, copies_layers, fits_layers, student_shape
from bertemd_deploy.tasks import Kind
from bertemd_deploy.teacher_cache import CachedTeacher, cache_key
from bertemd_deploy.training import Schedule, fit
from bertemd_deploy.training_device import keep_products_in_bfloat16, training_device, trains_in_bfloat16

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
    max_minutes: float | None = None,
    language_model: Path | None = None,
    fits: Path | None = None,
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
        max_minutes: stop after so long, to be continued; None never stops.
        language_model: checkpoint whose masked-LM head writes augmented rows; None takes the teacher's.
        fits: folder of kept fits (`kept_fits`) for students that share one, beside the student's own in `checkpoints`.

    Returns:
        The record: metrics of teacher and student, layers, steps, best epoch.

    Raises:
        ModelError: teacher or student do not fit the data or each other, or the teacher is refused.
        EmdError: a cost is not finite or the flow cannot be solved.
        TrainingError: the loss is not finite, memory is short, another process died, or a kept fit is damaged.
        ArtifactError: the disk refused a write.
        UnfinishedError: `max_minutes` are over.
    """
    processes = join_processes()
    encoder = checked_encoder(teacher_folder, max_length=max_length)
    kind = data.task.kind
    order = label_order(teacher_folder, data.labels, kind=kind)
    teacher = load_classifier(teacher_folder, labels=data.labels, kind=kind)
    reorder_outputs(teacher, order)
    set_labels(teacher, data.labels, kind=kind)
    train, dev = data.splits["train"].encode(encoder), data.splits["dev"].encode(encoder)
    if settings.augmentation != "none":
        from bertemd_deploy.augmentation import augment

        train = augment(
            train,
            kind=kind,
            method=settings.augmentation,
            copies=settings.augmentation_copies,
            rate=settings.augmentation_rate,
            seed=settings.seed,
            encoder=encoder,
            teacher_folder=language_model or teacher_folder,
        )
    own_fits = checkpoints / "fits"
    if processes.main:
        discard_partial(own_fits)
    device = training_device()
    teacher.to(device).requires_grad_(False)
    teacher_logits = torch_logits(teacher, dev.examples, pad_id=encoder.pad_id, processes=processes)
    teacher_metrics = check_teacher(teacher_logits, dev, task=data.task, names=data.labels, where=str(teacher_folder))
    note("teacher: dev " + " ".join(f"{name} {value:.4f}" for name, value in teacher_metrics.items()))
    trained, sizes, start = _make_student(
        teacher,
        encoder,
        train.examples,
        student=student,
        settings=settings,
        kind=kind,
        fits=[own_fits] if fits is None else [own_fits, fits],
        keeps_fits=processes.main,
    )
    copied = copies_layers(student, teacher.config.to_dict())  # type: ignore[union-attr, operator]
    depths = sizes["teacher_layers"], sizes["student_layers"]
    settings = flow_settings(settings, *depths, copied=copied)
    mapping = LayerMapping.of(settings, *depths)
    note(f"student: {depths[1]} of {depths[0]} layers, from {start}; mapping {mapping.told}")
    trained.to(device)
    processes.follow_main(trained)
    quicken(trained.student)
    first_aware = settings.epochs - settings.quant_aware_epochs + 1
    aware = None
    if settings.quant_aware:
        from bertemd_deploy.quantization.aware import prepare

        aware = prepare(trained.student, first_step=(first_aware - 1) * math.ceil(len(train) / settings.batch_size))
    bfloat16 = trains_in_bfloat16(settings.precision)
    if bfloat16:
        keep_products_in_bfloat16(teacher)
    objective = Objective(teacher, trained, mapping, settings, kind=kind, bfloat16=bfloat16, processes=processes)
    objective.aware = aware
    cached = _teacher_cache(objective, checkpoints / "teacher-cache", train, max_length=max_length, settings=settings)
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
            settings.micro_batch_size,
            max_minutes,
            best_from=settings.epochs if settings.keep_epoch == "last" else first_aware if aware is not None else 1,
        ),
        data=train,
        pad_id=encoder.pad_id,
        objective=objective,
        evaluate=lambda: dev_metrics(
            trained.student, dev, task=data.task, pad_id=encoder.pad_id, names=data.labels, processes=processes
        ),
        metric=data.task.metrics[0],
        checkpoints=checkpoints,
        log=log,
        name="distill",
        extra_state=mapping,
        processes=processes,
    )
    if cached is not None:
        cached.close(remove=processes.main)
    ranges = None if aware is None else aware.trained()
    if aware is not None:
        aware.release()
    metrics = {"teacher": teacher_metrics, "student": done.epochs[done.best_epoch - 1]}
    summary = summarise(log) | sizes | {
        "mapping": settings.mapping,
        "transported_mass": mapping.mass if mapping.solves else None,
        "mapped_layers": settings.mapped_layers if mapping.solves else None,
        "epochs": settings.epochs,
        "best_epoch": done.best_epoch,
        "steps": done.step,
        "tokens": done.tokens,
        "seconds": round(done.seconds, 3),
        "seed": settings.seed,
        "precision": "bfloat16" if bfloat16 else "float32",
        "train_rows": len(train.labels),
        "start": start,
    }  # fmt: skip
    calibration = calibration_rows(data.splits["train"], rows=CALIBRATION_ROWS).encode(encoder)
    facts = {
        "schema_version": 1,
        "task": task_facts(data),
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
        if ranges is not None:
            ranges.write(folder)
        if beside is not None:
            beside(folder, record)

    processes.wait()  # the others have read what is about to be replaced
    if processes.main:
        save_model(trained.student.cpu(), out, tokenizer_from=teacher_folder, beside=write_beside)
    processes.wait()
    return record


def _teacher_cache(
    objective: Objective, folder: Path, train: DataSlice, *, max_length: int, settings: DistillSettings
) -> CachedTeacher | None:
    """Put a cache before the objective's teacher, where the settings allow one any space."""
    if not settings.teacher_cache_bytes:
        return None
    steps = math.ceil(len(train) / settings.batch_size)
    share = math.ceil(settings.batch_size / objective.processes.size)
    split = settings.micro_batch_size is not None and settings.micro_batch_size < share
    calls = 2 if split and objective.needs_batch_costs else 1
    cached = CachedTeacher(
        objective.teacher_tensors,
        folder=folder,
        key=cache_key(
            objective.teacher,
            train.examples,
            max_length=max_length,
            precision="bfloat16" if objective.bfloat16 else "float32",
            layers=objective.layers,
        ),
        examples=train.examples,
        budget=settings.teacher_cache_bytes,
        passes=lambda: calls * (settings.epochs - objective.number // steps),
        leader=objective.processes.main,
        processes=objective.processes.size,
    )
    objective.cache = cached
    return cached


def _make_student(
    teacher: nn.Module,
    encoder: TextEncoder,
    examples: Encoded,
    *,
    student: StudentSettings,
    settings: DistillSettings,
    kind: Kind,
    fits: Sequence[Path] = (),
    keeps_fits: bool = True,
) -> tuple[Distiller, dict[str, int], str]:
    """Return the module to train, the two layer counts, and where the student's weights come from."""
    source: dict[str, Any] = teacher.config.to_dict()  # type: ignore[union-attr, operator]
    theirs, shape = teacher_sizes(source), student_shape(student, source)
    model, told = build_student(
        teacher,
        shape=shape,
        init=student.init,
        init_layers=student.init_layers,
        seed=settings.seed,
        encoder=encoder,
        kind=kind,
        dropout=settings.dropout,
        examples=examples if fits_layers(student.fit_layers, source) else None,
        fits=fits,
        keeps_fits=keeps_fits,
    )
    widths = {"student_hidden": int(shape.hidden or 0), "teacher_hidden": theirs.hidden}
    needed = settings.hidden_projection or widths["student_hidden"] != widths["teacher_hidden"]
    trained = Distiller(
        model,
        **widths,
        project=needed and settings.mapping != "none",
        seed=settings.seed,
        left_out=hold_codes(model),
    )
    if shape.heads != theirs.heads and settings.mapping != "none":
        warn(
            f"heads differ (teacher {theirs.heads}, student {shape.heads}): "
            "the mean of the attention scores over heads is compared"
        )
    return trained, {"teacher_layers": theirs.layers, "student_layers": shape.layers}, told


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
