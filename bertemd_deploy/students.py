"""Students: their sizes by name, and where their weights start.

Every weight that should be loaded is loaded, or it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bertemd_deploy.checkpoints import WEIGHTS, find_model
from bertemd_deploy.config import StudentSettings
from bertemd_deploy.console import warn
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import ModelError, RecipeError
from bertemd_deploy.mapping import even_layers


@dataclass(frozen=True)
class Shape:
    """A student's sizes and where a student of this name starts; None takes the teacher's size."""

    layers: int
    hidden: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    start: str = "teacher"


STUDENTS: dict[str, Shape] = {
    "4L-312": Shape(4, 312, 12, 1200, "huawei-noah/TinyBERT_General_4L_312D"),
    "6L-768": Shape(6, 768, 12, 3072),
    "4L": Shape(4),
    "6L": Shape(6),
}


def student_shape(settings: StudentSettings, teacher: Mapping[str, Any]) -> Shape:
    """Return the student's sizes with the teacher's filled in, from the settings and the teacher's config.

    Raises:
        RecipeError: unknown name, or sizes that do not fit together or exceed the teacher's layers.
    """
    if settings.name is None:
        shape = Shape(settings.layers or 0, settings.hidden, settings.heads, settings.intermediate)
    elif settings.name in STUDENTS:
        shape = STUDENTS[settings.name]
    else:
        raise RecipeError(f"student.name: unknown {settings.name!r}; known: {', '.join(STUDENTS)}, or give the sizes.")
    hidden = shape.hidden or int(teacher["hidden_size"])
    heads = shape.heads or int(teacher["num_attention_heads"])
    shape = Shape(
        shape.layers,
        hidden,
        heads,
        shape.intermediate or (int(teacher["intermediate_size"]) if hidden == teacher["hidden_size"] else 4 * hidden),
        shape.start,
    )
    if shape.layers > int(teacher["num_hidden_layers"]):
        raise RecipeError(
            f"student: {shape.layers} layers, the teacher has {teacher['num_hidden_layers']}; a student is not deeper."
        )
    if hidden % heads:
        raise RecipeError(f"student: hidden {hidden} is not a multiple of heads {heads}.")
    return shape


def build_student(teacher: nn.Module, *, shape: Shape, init: str, seed: int) -> tuple[nn.Module, str]:
    """Return the student in eval mode and a sentence on where its weights come from.

    Args:
        teacher: the teacher's classifier, whose config (vocabulary, labels) the student shares.
        shape: full sizes, from `student_shape`.
        init: "auto" takes `shape.start`; "teacher", "random", or a checkpoint.
        seed: of the random weights.

    Raises:
        ModelError: the teacher's width differs where layers should be copied, or a checkpoint does not fit.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    source: Any = teacher.config
    start = shape.start if init == "auto" else init
    fields = source.to_dict() | {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
    }
    fields.pop("_name_or_path", None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: Any = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]  # transformers is untyped
        student: nn.Module = built.float()
    if start == "random":
        warn(
            "the student starts from RANDOM weights: expect far lower accuracy than from a checkpoint or teacher layers"
        )
        return student.eval(), "random weights"
    if start == "teacher":
        same = (shape.hidden, shape.heads, shape.intermediate)
        if same != (source.hidden_size, source.num_attention_heads, source.intermediate_size):
            raise ModelError(
                f"student: sizes {same} (hidden, heads, intermediate) differ from the teacher's "
                f"{(source.hidden_size, source.num_attention_heads, source.intermediate_size)}, so its layers cannot be "
                "copied. Set student.init to a checkpoint, or to random."
            )
        layers = even_layers(source.num_hidden_layers, shape.layers)
        _copy_weights(student, teacher.state_dict(), layers=layers, where="the teacher")
        return student.eval(), f"teacher layers {', '.join(str(at + 1) for at in layers)}"
    folder = find_model(start)
    stored = _encoder_weights(folder)
    _copy_weights(student, stored, layers=list(range(shape.layers)), where=str(folder), head=False)
    return student.eval(), f"checkpoint {start}"


def _encoder_weights(folder: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by the classifier's names (with the `bert.` prefix)."""
    from safetensors.torch import load_file

    stored = load_file(folder / WEIGHTS)
    return {
        name if name.startswith(("bert.", "classifier.")) else f"bert.{name}": value for name, value in stored.items()
    }


def _copy_weights(
    student: nn.Module, stored: Mapping[str, Tensor], *, layers: Sequence[int], where: str, head: bool = True
) -> None:
    """Fill every weight of `student` from `stored`, layer j from `layers[j]`; none but the head may be left random."""
    mine = student.state_dict()
    absent = []
    for name, value in mine.items():
        source = name
        if name.startswith("bert.encoder.layer."):
            at, rest = name.removeprefix("bert.encoder.layer.").split(".", 1)
            source = f"bert.encoder.layer.{layers[int(at)]}.{rest}"
        given = stored.get(source)
        if given is not None and given.shape == value.shape:
            value.copy_(given)
        elif head or not name.startswith(("classifier.", "bert.pooler.")):
            absent.append(
                f"{source} ({'missing' if given is None else f'{tuple(given.shape)} for {tuple(value.shape)}'})"
            )
    if absent:
        raise ModelError(
            f"student: {len(absent)} weight(s) cannot be loaded from {where} and would be left random: "
            f"{', '.join(absent[:3])}{', …' if len(absent) > 3 else ''}. Choose a checkpoint of the student's sizes."
        )


def check_same_tokens(folder: Path, encoder: TextEncoder) -> None:
    """Refuse a student checkpoint whose tokenizer gives other ids than the teacher's."""
    mine = TextEncoder.load(folder, max_length=encoder.max_length).vocabulary()
    theirs = encoder.vocabulary()
    if mine != theirs:
        different = sum(mine.get(token) != at for token, at in theirs.items())
        raise ModelError(
            f"{folder}: its tokenizer is another than the teacher's ({different:,} of {len(theirs):,} tokens have another id "
            "or are absent), so hidden states do not compare. Start from teacher layers, or from a checkpoint that shares "
            "the teacher's vocabulary."
        )
