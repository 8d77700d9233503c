"""One stage of a recipe at a time: its section of settings, handed to the module that does the work."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertemd_deploy.artifact import MANIFEST
from bertemd_deploy.checkpoints import WEIGHTS, find_model
from bertemd_deploy.config import Recipe
from bertemd_deploy.data import Dataset, load_data
from bertemd_deploy.errors import ModelError, RecipeError
from bertemd_deploy.files import read_json
from bertemd_deploy.settings import DataSettings
from bertemd_deploy.stage_inputs import language_model


@dataclass(frozen=True)
class Work:
    """Where a training stage works: its output folder, its resumable state and its log."""

    out: Path
    checkpoints: Path
    log: Path


def load_recipe_data(settings: DataSettings) -> tuple[Dataset, int]:
    """Return a recipe's data set and its longest input in tokens."""
    data = load_data(
        settings.path,
        task=settings.task,
        sentence1=settings.sentence1,
        sentence2=settings.sentence2,
        label=settings.label,
        train_limit=settings.train_limit,
        doc_stride=settings.doc_stride,
    )
    return data, settings.max_length or data.task.max_length


def finetune_stage(recipe: Recipe, data: Dataset, max_length: int, work: Work, **extra: Any) -> dict[str, Any]:
    """Fine-tune the recipe's teacher into `work.out`."""
    from bertemd_deploy.finetune import finetune

    folder = find_model(recipe.teacher.model, sha256=recipe.teacher.sha256)
    return finetune(
        folder,
        data=data,
        max_length=max_length,
        settings=recipe.teacher,
        out=work.out,
        checkpoints=work.checkpoints,
        log=work.log,
        **extra,
    )


def distill_stage(
    recipe: Recipe, teacher: Path, data: Dataset, max_length: int, work: Work, **extra: Any
) -> dict[str, Any]:
    """Distil `teacher` into a student at `work.out`."""
    from bertemd_deploy.distill import distill

    return distill(
        teacher,
        data=data,
        max_length=max_length,
        student=recipe.student,
        settings=recipe.distill,
        out=work.out,
        checkpoints=work.checkpoints,
        log=work.log,
        teacher_name=_display_name(recipe.teacher.model),
        language_model=language_model(recipe),
        **extra,
    )


def _display_name(spec: str) -> str:
    """Return what a model is called on a page: a package's name, or the last part of a folder or hub id."""
    if spec.startswith("package:"):
        return spec.removeprefix("package:").partition("/")[0]
    return Path(spec).resolve().name if Path(spec).exists() else spec.rsplit("/", 1)[-1]


def export_stage(
    recipe: Recipe,
    student: Path,
    out: Path,
    *,
    data: str | None = None,
    own_data: bool = False,
    force: bool = False,
) -> Path:
    """Export and quantize `student` into the artifact folder `out`.

    Args:
        recipe: its sections export and quantize (and data, where `data` is given or `own_data`).
        student: student folder.
        out: artifact folder.
        data: data set for parity and the gate; None takes the slices the student folder carries.
        own_data: the recipe's data are those that the student was distilled with.
        force: write into a folder that holds something else.

    Raises:
        ModelError: `student` is exported or quantized already, or carries no slices and no data is given.
        RecipeError: the vocabulary is to be trimmed, and there are no texts to trim it by.
        GateError: parity, accuracy or invariance was missed.
    """
    from bertemd_deploy.export import export
    from bertemd_deploy.facts import FACTS, facts_from_data, read_student

    _check_student(student)
    if student.resolve() in (out.resolve(), *out.resolve().parents) or out.resolve() in student.resolve().parents:
        raise RecipeError(f"--out {out}: the artifact would lie with the student's own files. Choose another folder.")
    trims = recipe.export.vocabulary is not None
    loaded: Dataset | None = None
    if data is not None or (trims and own_data):
        loaded, max_length = load_recipe_data(recipe.data)
    if data is not None and loaded is not None and not (trims and (student / FACTS).is_file()):
        facts = facts_from_data(student, loaded, max_length=max_length)
    elif (student / FACTS).is_file():
        facts = read_student(student)
    else:
        find_model(str(student))
        raise ModelError(
            f"{student}: carries no {FACTS}, so there are no dev examples to check the graphs on. Add --data (and --task)."
        )
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = None
        if trims:
            if loaded is None:
                raise RecipeError(
                    "export.vocabulary: which tokens stay is read off train texts. Add --data (and --task), the student's own."
                )
            from bertemd_deploy.trimming import trim_student

            size = recipe.export.vocabulary
            trimmed = trim_student(
                student,
                facts=facts,
                data=loaded,
                size=None if size == "corpus" else size,
                max_drop=recipe.quantize.max_drop,
                out=Path(folder) / "student",
            )
            student, facts, vocabulary = trimmed.folder, trimmed.facts, trimmed.record
        artifact = export(
            student,
            out=out,
            task=facts.task,
            labels=facts.labels,
            max_length=facts.max_length,
            evaluation=facts.evaluation,
            calibration=facts.calibration,
            teacher=facts.teacher or None,
            reference_metrics=facts.metrics,
            distillation=facts.distillation or None,
            settings=recipe.export,
            quantization=recipe.quantize,
            vocabulary=vocabulary,
            force=force,
        )
    return artifact.folder


def _check_student(student: Path) -> None:
    """Refuse what is exported or quantized already, by name; other faults show where the folder is read.

    Raises:
        ModelError: an ONNX file, a folder of such files, an artifact, or a checkpoint whose weights are quantized.
    """
    wanted = "Name the student's folder (Hugging Face, safetensors), as `bertemd distill` writes it."
    if student.suffix == ".onnx":
        raise ModelError(f"{student}: an ONNX graph, which is exported already. {wanted}")
    if (student / MANIFEST).is_file():
        raise ModelError(f"{student}: an artifact, which is exported already. {wanted}")
    if not student.is_dir():
        return
    if not (student / WEIGHTS).exists() and (graphs := sorted(student.rglob("*.onnx"))):
        raise ModelError(
            f"{student}: holds {graphs[0].relative_to(student)}, which is exported already, and no {WEIGHTS}. {wanted}"
        )
    if (student / "config.json").is_file():
        method = read_json(student / "config.json", what="student's configuration").get("quantization_config")
        if method is not None:
            name = method.get("quant_method", "unnamed") if isinstance(method, dict) else method
            raise ModelError(
                f"{student / 'config.json'}: its weights are quantized already ({name}); int8 is made here from weights of "
                "full precision. Name the student as it was before."
            )


def export_record(artifact: Any) -> dict[str, Any]:
    """Return what a person wants to know of a fresh artifact: its files, metrics and parity."""
    manifest = artifact.manifest
    return {
        "artifact": str(artifact.folder),
        "metrics": manifest["metrics"],
        "bytes": {name: entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".onnx")},
        "parity": manifest["parity"],
    }
