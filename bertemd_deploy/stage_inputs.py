"""What the result of a training stage depends on, as hashes and settings: the same inputs, the same model.

A stage is skipped or continued where the inputs recorded with it are those of now. What only says how fast, how often to save
or how much memory to take is left out. Runs outlive versions: a setting that is added later stays out of the inputs while it
does nothing, and hashes that are added later are not asked of a run that was begun without them (`is_same`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bertemd_deploy.checkpoints import WEIGHTS, check_folder, find_model
from bertemd_deploy.config import Recipe
from bertemd_deploy.facts import FACTS, RANGES
from bertemd_deploy.families import family_of, sizes
from bertemd_deploy.files import sha256_file, sha256_json
from bertemd_deploy.settings import (
    DistillSettings,
    ExportSettings,
    Precision,
    QuantizeSettings,
    StudentSettings,
    TeacherSettings,
)
from bertemd_deploy.targets import resolve

_MEMORY = ("micro_batch_size", "teacher_cache_bytes")  # the same result up to rounding and dropout's draws
_AUGMENTATION = ("augmentation", "augmentation_copies", "augmentation_rate")
_QUANT_AWARE = ("quant_aware", "quant_aware_epochs")
_LATER_TEACHER: dict[str, Any] = {"keep_epoch": "best"}  # settings that came later, and what was done before them
_LATER_DISTILL: dict[str, Any] = {
    "keep_epoch": "best",
    "marginal_momentum": 0.0,
    "transported_mass": 1.0,
    "mapped_layers": "all",
    "cost_scale": "absolute",
    "dropout": None,
}
_FIRST_BETA = 0.005  # the default that the first versions recorded
_LATER_EXPORT = ("target", "vocabulary", "tokenizer_inside")
_LATER_QUANTIZE = ("max_changed", "embedding_bits", "float16_on_cpu")
_LATER = ("model_files", "initial_weights")  # inputs that earlier versions did not record


def finetune_inputs(recipe: Recipe, folder: Path, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything a fine-tuned teacher depends on; how often to save and what fits memory are not part of it.

    Args:
        recipe: its section teacher is used.
        folder: of the pretrained encoder.
        shared: hash of the data, longest input.
    """
    precision = _resolved(recipe.teacher.precision)
    settings = replace(recipe.teacher, precision=precision, checkpoint_seconds=TeacherSettings().checkpoint_seconds)
    return dict(shared) | {
        "weights": sha256_file(folder / WEIGHTS),
        "model_files": _model_files(folder),
        "teacher": _added(_without(asdict(settings), _MEMORY), _LATER_TEACHER),
    }


def distill_inputs(recipe: Recipe, teacher: Path, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything a student depends on; how often to log or save and what fits memory or disk are not part of it.

    Args:
        recipe: its sections student and distill are used, and teacher.model where its masked-LM head augments.
        teacher: its folder.
        shared: hash of the data, longest input.

    Raises:
        ModelError: a checkpoint that the student starts from is not found.
        RecipeError: the student's sizes or layers do not fit the teacher.
    """
    from bertemd_deploy.mapping import flow_settings
    from bertemd_deploy.students import copies_layers, student_shape

    plain = DistillSettings()
    settings = replace(
        recipe.distill,
        precision=_resolved(recipe.distill.precision),
        logging_steps=plain.logging_steps,
        checkpoint_seconds=plain.checkpoint_seconds,
    )
    unused = _MEMORY + (_AUGMENTATION if settings.augmentation == "none" else ())
    unused += () if settings.quant_aware else _QUANT_AWARE
    unused += () if settings.mapping == "emd" else ("marginal_momentum",)
    unused += () if settings.mapping in ("emd", "emd-fixed") else ("transported_mass", "mapped_layers")
    unused += ("cost_scale",) if settings.mapping == "none" else ()
    if settings.mapping == "none" and settings.beta == plain.beta:
        settings = replace(settings, beta=_FIRST_BETA)  # it does nothing
    config = check_folder(teacher)
    layers, copied = student_shape(recipe.student, config).layers, copies_layers(recipe.student, config)
    settings = flow_settings(settings, sizes(config).layers, layers, copied=copied)
    inputs = dict(shared) | {
        "teacher": sha256_file(teacher / WEIGHTS),
        "model_files": _model_files(teacher),
        "student": _student(recipe.student, config),
        "distill": _added(_without(asdict(settings), unused), _LATER_DISTILL),
    }
    if settings.mapping != "none" and family_of(config).position_scores:
        inputs["scores"] = "whole"  # before, those of the content were compared
    if (start := _start(recipe.student)) is not None:
        inputs["initial_weights"] = {WEIGHTS: sha256_file(start / WEIGHTS)} | _model_files(start)
    if (model := language_model(recipe)) is not None:
        inputs["language_model"] = sha256_file(model / WEIGHTS)
    return inputs


def bench_inputs(recipe: Recipe) -> dict[str, Any]:
    """Return what measurements depend on beside the models: the section bench, and what its file of devices says."""
    settings = recipe.bench
    if settings.device_file is None:
        return asdict(settings)
    return asdict(settings) | {"device_file": sha256_file(Path(settings.device_file))}


def export_inputs(recipe: Recipe, student: Path) -> dict[str, Any]:
    """Return everything an artifact depends on.

    Args:
        recipe: its sections export and quantize are used.
        student: its folder.

    Raises:
        RecipeError: there is no such target.
    """
    settings = replace(recipe.export, target=resolve(recipe.export.target).name)
    inputs = {
        "weights": sha256_file(student / WEIGHTS),
        "facts": sha256_file(student / FACTS),
        "model_files": _model_files(student),
        "export": _unless_default(settings, _LATER_EXPORT),
        "quantize": _unless_default(recipe.quantize, _LATER_QUANTIZE),
    }
    if (student / RANGES).is_file():
        inputs["ranges"] = sha256_file(student / RANGES)
    return inputs


def language_model(recipe: Recipe) -> Path | None:
    """Return the checkpoint whose masked-LM head augments: the recipe's, which may be the encoder before fine-tuning."""
    return find_model(recipe.teacher.model) if recipe.distill.augmentation == "mlm" else None


def is_same(recorded: Any, inputs: Mapping[str, Any]) -> bool:
    """Say whether a recorded hash is that of `inputs`, in today's form or in that of earlier versions."""
    return recorded in (sha256_json(dict(inputs)), sha256_json(_without(inputs, _LATER)))


def changed_inputs(before: Any, after: Mapping[str, Any], prefix: str = "") -> str:
    """Name the inputs that differ."""
    if not isinstance(before, dict):
        return prefix or "unknown"
    names = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old == new or (key in _LATER and key not in before):
            continue
        nested = isinstance(new, dict) and isinstance(old, dict)
        names.append(changed_inputs(old, dict(new or {}), f"{prefix}{key}.") if nested else f"{prefix}{key}")
    return ", ".join(names)


def _unless_default(settings: ExportSettings | QuantizeSettings, names: tuple[str, ...]) -> dict[str, Any]:
    """Return settings without those of `names` that are as if they had never been added."""
    plain = asdict(type(settings)())
    found = asdict(settings)
    return {key: value for key, value in found.items() if key not in names or value != plain[key]}


def _added(values: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those of `later` that do what was done before there were any."""
    return {key: value for key, value in values.items() if key not in later or value != later[key]}


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _model_files(folder: Path) -> dict[str, str]:
    """Return the hashes of what a model folder says beside its weights: labels, dropout, activations; the tokenizer."""
    names = ("config.json", "tokenizer.json")
    return {name: sha256_file(folder / name) for name in names if (folder / name).is_file()}


def _student(settings: StudentSettings, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Return the student's settings, with `fit_layers` where layers are fitted, `init_layers` where they are not even ones."""
    from bertemd_deploy.kept_fits import FIT
    from bertemd_deploy.students import fits_layers, start_name, uneven_layers

    values = _without(asdict(settings), ("fit_layers", "init_layers"))
    layers = uneven_layers(settings, teacher)
    if layers is not None:
        values["init_layers"] = [layer + 1 for layer in layers]
    if start_name(settings) == "teacher" and fits_layers(settings.fit_layers, teacher):
        values["fit_layers"] = FIT
    return values


def _start(settings: StudentSettings) -> Path | None:
    """Return the folder of the checkpoint that the student starts from; None where it starts from none."""
    from bertemd_deploy.students import start_name

    start = start_name(settings)
    return None if start in ("teacher", "random") else find_model(start)


def _resolved(precision: Precision) -> Precision:
    """Return what "auto" is on this machine: another precision gives another model."""
    from bertemd_deploy.training_device import trains_in_bfloat16

    return "bfloat16" if trains_in_bfloat16(precision) else "float32"
