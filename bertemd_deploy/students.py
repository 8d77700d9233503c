"""Students: their sizes by name, and where their weights start. A student is a BERT, whatever its teacher is.

Layers come from the teacher or from a checkpoint, of any family (`inherit`); a checkpoint's word embedding is put in the
order of the teacher's tokenizer, which the student shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bertemd_deploy.checkpoints import check_folder, find_model
from bertemd_deploy.console import note, warn
from bertemd_deploy.encoding import Encoded, TextEncoder
from bertemd_deploy.errors import ModelError, RecipeError
from bertemd_deploy.families import adds_bias, family_of, feed_forward_activation, norm_epsilon, positions, sizes
from bertemd_deploy.inherit import fill, stored_weights
from bertemd_deploy.kept_fits import fit_or_read
from bertemd_deploy.mapping import even_layers
from bertemd_deploy.models import auto_class, read_config
from bertemd_deploy.position_codes import code_coordinates
from bertemd_deploy.settings import STUDENT_NAMES, FitLayers, InitLayers, StudentSettings
from bertemd_deploy.tasks import Kind
from bertemd_deploy.vocabulary import match_rows

_SHARED = ("vocab_size", "id2label", "label2id", "problem_type", "initializer_range")


@dataclass(frozen=True)
class Shape:
    """A student's sizes and where a student of this name starts; None takes the teacher's size."""

    layers: int
    hidden: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    start: str = "teacher"


_SHAPES = (
    Shape(4, 312, 12, 1200, "huawei-noah/TinyBERT_General_4L_312D"),
    Shape(6, 768, 12, 3072),
    Shape(4),
    Shape(6),
)
STUDENTS: dict[str, Shape] = dict(zip(STUDENT_NAMES, _SHAPES, strict=True))


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
    theirs = sizes(teacher)
    hidden = shape.hidden or theirs.hidden
    heads = shape.heads or theirs.heads
    shape = Shape(
        shape.layers,
        hidden,
        heads,
        shape.intermediate or (theirs.intermediate if hidden == theirs.hidden else 4 * hidden),
        shape.start,
    )
    if shape.layers > theirs.layers:
        raise RecipeError(f"student: {shape.layers} layers, the teacher has {theirs.layers}; a student is not deeper.")
    if hidden % heads:
        raise RecipeError(f"student: hidden {hidden} is not a multiple of heads {heads}.")
    return shape


def fits_layers(setting: FitLayers, teacher: Mapping[str, Any]) -> bool:
    """Say whether layers copied from a teacher of this config are fitted: with "auto" where it has scores of positions."""
    return setting == "always" or (setting == "auto" and family_of(teacher).position_scores)


def start_name(settings: StudentSettings) -> str:
    """Return where the student's weights start: "teacher", "random", or a checkpoint."""
    if settings.init != "auto":
        return settings.init
    return STUDENTS[settings.name].start if settings.name in STUDENTS else "teacher"


def copies_layers(settings: StudentSettings, teacher: Mapping[str, Any]) -> bool:
    """Say whether a student's layers are copies that give what the teacher's give.

    They are not fitted, not from elsewhere, and nothing in the teacher's attention is lost in a BERT's layers.
    """
    copied = start_name(settings) == "teacher" and not fits_layers(settings.fit_layers, teacher)
    return copied and not adds_bias(teacher)


def uneven_layers(settings: StudentSettings, teacher: Mapping[str, Any]) -> list[int] | None:
    """Return which layers a student is copied from, 0-based, where they are not evenly spaced ones; else None.

    Raises:
        RecipeError: as `student_shape`, or `init_layers` names layers that are not there, or too many or few.
        ModelError: a checkpoint whose layers are named is not found.
    """
    start = start_name(settings)
    rule = layer_rule(settings.init_layers, start, teacher)
    if rule == "even":
        return None
    count = student_shape(settings, teacher).layers
    of, source = ("the teacher", teacher) if start == "teacher" else (start, check_folder(find_model(start)))
    deep = sizes(source).layers
    layers = pick_layers(rule, deep, count, of=of)
    return None if layers == even_layers(deep, count) else layers


def layer_rule(setting: InitLayers, start: str, teacher: Mapping[str, Any]) -> InitLayers:
    """Return what `student.init_layers` comes to for a start ("teacher", "random", a checkpoint), "auto" resolved."""
    if setting != "auto":
        return setting
    return "first" if start == "teacher" and family_of(teacher).position_scores else "even"


def pick_layers(rule: InitLayers, deep: int, count: int, *, of: str) -> list[int]:
    """Return which of `deep` layers a student of `count` layers starts from, 0-based.

    Raises:
        RecipeError: a list of other than `count` layers, not in rising order, or of layers that `of` does not have.
    """
    if rule == "first":
        return list(range(count))
    if isinstance(rule, str):
        return even_layers(deep, count)
    if len(rule) != count or list(rule) != sorted(set(rule)) or rule[0] < 1 or rule[-1] > deep:
        raise RecipeError(
            f"student.init_layers: found {list(rule)}, allowed: {count} different layers of 1 to {deep} of {of}, in rising "
            "order."
        )
    return [layer - 1 for layer in rule]


def build_student(
    teacher: nn.Module,
    *,
    shape: Shape,
    init: str,
    init_layers: InitLayers = "auto",
    seed: int,
    encoder: TextEncoder,
    kind: Kind = "classification",
    examples: Encoded | None = None,
    fits: Sequence[Path] = (),
    keeps_fits: bool = True,
    dropout: float | None = None,
) -> tuple[nn.Module, str]:
    """Return the student, a BERT in eval mode, and a sentence on where its weights come from.

    Args:
        teacher: the teacher's task model of any family, whose vocabulary and labels the student shares.
        shape: full sizes, from `student_shape`.
        init: "auto" takes `shape.start`; "teacher", "random", or a checkpoint of any family.
        init_layers: which layers are copied, see `StudentSettings`.
        seed: of the random weights.
        encoder: the teacher's tokenizer, which is the student's.
        kind: of the task; decides which head the student has.
        examples: rows of train on which layers copied from the teacher are fitted (`layer_fit`); None leaves them as copied.
        fits: folders of kept fits, where one of the same teacher, rows and copied layers is read in the place of a new one.
        keeps_fits: whether the fit is put where it is not.
        dropout: of hidden states and attention; None takes the teacher's two.

    Raises:
        TrainingError: what the teacher computes is not finite, so nothing can be fitted to it; or a kept fit is damaged.
        ArtifactError: the fit could not be written.
        ModelError: the teacher's sizes differ where layers should be copied, or it has parts that no BERT can hold, or a
            checkpoint does not fit, or layers should be fitted to those of a teacher that carry positions themselves.
        RecipeError: `init_layers` names layers that are not there, or too many or few.
    """
    source: dict[str, Any] = teacher.config.to_dict()  # type: ignore[union-attr, operator]
    theirs = sizes(source)
    start = shape.start if init == "auto" else init
    rule = layer_rule(init_layers, start, source)
    if start == "teacher":
        same, teacher_s = (
            (shape.hidden, shape.heads, shape.intermediate),
            (theirs.hidden, theirs.heads, theirs.intermediate),
        )
        if same != teacher_s:
            raise ModelError(
                f"student: sizes {same} (hidden, heads, intermediate) differ from the teacher's {teacher_s}, so its layers "
                "cannot be copied. Set student.init to a checkpoint, or to random."
            )
        layers = pick_layers(rule, theirs.layers, shape.layers, of="the teacher")
        student = _empty_student(source, source, shape=shape, seed=seed, encoder=encoder, kind=kind, dropout=dropout)
        fitted = examples is not None
        if fitted and code_coordinates(teacher) is not None:
            raise ModelError(
                "student.fit_layers is always, but the teacher's layers were fitted themselves to another's, and a second fit "
                "would lose the positions that they carry. Leave it at auto."
            )
        fill(
            student,
            teacher.state_dict(),
            source,
            layers=layers,
            kind=kind,
            where="the teacher",
            whole=True,
            folded=fitted,
        )
        told = f"teacher layers {_numbers(layers)}"
        if examples is None:
            return student, told
        fit, kept = fit_or_read(
            student,
            teacher,
            examples,
            layers=layers,
            pad_id=encoder.pad_id,
            max_length=encoder.max_length,
            folders=fits,
            writes=keeps_fits,
        )
        if kept is not None:
            note(f"student: the fit of its layers is read from {kept}")
        before, after = (" ".join(f"{value:.3f}" for value in values) for values in (fit.copied, fit.fitted))
        cosines = f"cosine to what the teacher's compute {after}, as copied {before}"
        if not fit.helps:
            note(f"student: layers stay as copied, as fitting them gained nothing on rows held back ({cosines})")
            if family_of(source).position_scores:
                note(f"student: it lacks what its teacher has, {family_of(source).bias}")
            return student, told
        note(f"student: layers fitted ({cosines})")
        return student, f"{told}, fitted"
    if start == "random":
        warn(
            "the student starts from RANDOM weights: expect far lower accuracy than from a checkpoint or teacher layers"
        )
        return _empty_student(
            source, source, shape=shape, seed=seed, encoder=encoder, kind=kind, dropout=dropout
        ), "random weights"
    folder = find_model(start)
    config: dict[str, Any] = read_config(folder).to_dict()
    given = sizes(config)
    if given.heads != shape.heads:
        raise ModelError(
            f"{folder}: its layers have {given.heads} attention heads, the student's {shape.heads}; the same weights cut "
            f"into other heads compute something else. Set student.heads: {given.heads} (with the other sizes, in place of "
            "student.name), or choose another checkpoint."
        )
    deep = given.layers
    layers = list(range(shape.layers))
    if deep > shape.layers or not isinstance(rule, str):
        layers = pick_layers(rule, deep, shape.layers, of=str(folder))
    student = _empty_student(source, config, shape=shape, seed=seed, encoder=encoder, kind=kind, dropout=dropout)
    stored = stored_weights(folder)
    _match_words(stored, folder, config, encoder=encoder, rows=int(source["vocab_size"]))
    fill(student, stored, config, layers=layers, kind=kind, where=str(folder), whole=False, folded=False)
    return student, f"checkpoint {start}" + (f" (layers {_numbers(layers)})" if deep > shape.layers else "")


def _numbers(layers: Sequence[int]) -> str:
    return ", ".join(str(at + 1) for at in layers)


def _empty_student(
    teacher: Mapping[str, Any],
    weights: Mapping[str, Any],
    *,
    shape: Shape,
    seed: int,
    encoder: TextEncoder,
    kind: Kind,
    dropout: float | None,
) -> nn.Module:
    """Return a BERT with random weights: the teacher's vocabulary and labels, the functions that `weights` are made for.

    Args:
        teacher: the teacher's config.
        weights: config of the model whose weights the student gets.
        shape: full sizes.
        seed: of the random weights.
        encoder: the teacher's tokenizer.
        kind: of the task.
        dropout: of hidden states and attention; None takes the teacher's two.

    Raises:
        ModelError: the texts may be longer than the positions that `weights` has.
    """
    from transformers import BertConfig

    rows = min(positions(teacher), positions(weights))
    if encoder.max_length > rows:
        raise ModelError(
            f"student: data.max_length is {encoder.max_length}, the checkpoint it starts from has {rows} positions. "
            "Lower it, or choose another checkpoint."
        )
    own = dict(teacher) if teacher["model_type"] == "bert" else {"pad_token_id": encoder.pad_id}
    for name in ("_name_or_path", "model_type", "architectures"):
        own.pop(name, None)
    fields = own | {name: teacher[name] for name in _SHARED if teacher.get(name) is not None} | {
        "hidden_dropout_prob": teacher.get("hidden_dropout_prob", teacher.get("dropout", 0.1)),
        "attention_probs_dropout_prob": teacher.get("attention_probs_dropout_prob", teacher.get("attention_dropout", 0.1)),
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "hidden_act": feed_forward_activation(weights),
        "layer_norm_eps": norm_epsilon(weights),
        "max_position_embeddings": rows,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: Any = auto_class(kind).from_config(BertConfig(**fields), attn_implementation="sdpa")
        student: nn.Module = built.float()
    if dropout is not None:
        _set_dropout(student, dropout)
    return student.eval()


def _set_dropout(student: nn.Module, share: float) -> None:
    config: Any = student.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = share
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = share


def _match_words(
    stored: dict[str, Tensor], folder: Path, config: Mapping[str, Any], *, encoder: TextEncoder, rows: int
) -> None:
    """Order the rows of a checkpoint's word embedding as the teacher's tokenizer numbers its tokens."""
    name = f"{family_of(config).prefix}.embeddings.word_embeddings.weight"
    words = stored.get(name)
    mine, theirs = TextEncoder.load(folder, max_length=encoder.max_length).vocabulary(), encoder.vocabulary()
    if words is None or (mine == theirs and len(words) == rows):
        return  # what is missing is named when the student is filled
    if max(mine.values()) >= len(words):
        raise ModelError(
            f"{folder}: its tokenizer has ids up to {max(mine.values())}, its word embedding {len(words)} rows; tokenizer "
            "and weights belong to different models."
        )
    order, matched = match_rows(theirs, mine, rows=rows, where=str(folder))
    others = "" if matched == len(theirs) else "; the others start as its unknown token"
    stored[name] = words[torch.from_numpy(order)]
    note(
        f"student: {matched:,} of the teacher's {len(theirs):,} tokens ({matched / len(theirs):.2%}) have a word embedding "
        f"in {folder}, matched by text{others}"
    )
