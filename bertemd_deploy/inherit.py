"""A BERT's weights taken from a model of any family: each from its counterpart, exact wherever a BERT can say the same.

What the families' embeddings and layers compute is BERT's, but for these, each of which is made exact, told, or refused:

    positions from an offset (RoBERTa, MPNet)      the rows that tokens read, from row 0
    no token types, or one for all tokens          zeros, or that one for each of BERT's types
    a bias-free projection of the embeddings       multiplied into each table (DeBERTa: LayerNorm comes after it)
    LayerNorm before a projection (small ELECTRA)  refused: no BERT embedding computes it
    scores divided by more than sqrt(d) (DeBERTa)  the factor goes into the query projection
    a table of position scores (MPNet)             folded into queries and keys (`position_codes`), or left out, and told
    other position terms, a convolution            left out, and told
    another activation in the head                 the head starts random, and that is told

Every encoder weight comes from somewhere, or it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bertemd_deploy.checkpoints import WEIGHTS, check_folder, damaged_weights
from bertemd_deploy.console import note
from bertemd_deploy.errors import ModelError
from bertemd_deploy.families import (
    BERT_PARTS,
    family_of,
    head_activation,
    head_parts,
    left_out,
    position_offset,
    score_factor,
)
from bertemd_deploy.tasks import Kind

_LAYER, _EMBEDDINGS, _POOLER = "bert.encoder.layer.", "bert.embeddings.", "bert.pooler.dense."
_SHOWN = 3


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by a task model's names: the encoder's with its prefix, LayerNorms in today's names.

    Raises:
        ModelError: the weights file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    prefix = f"{family_of(check_folder(folder)).prefix}."
    try:
        loaded = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise damaged_weights(folder, error) from error
    stored = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): value
        for name, value in loaded.items()
    }
    bare = not any(name.startswith(prefix) for name in stored)
    return {f"{prefix}{name}": value for name, value in stored.items()} if bare else stored


def fill(
    student: nn.Module,
    stored: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    layers: Sequence[int],
    kind: Kind,
    where: str,
    whole: bool,
    folded: bool,
) -> None:
    """Fill the weights of `student`, a BERT, from a model's, layer j from `layers[j]`; none but the head may stay random.

    Args:
        student: with random weights, which are overwritten in place.
        stored: the other model's weights by a task model's names.
        config: its config, defaults filled in.
        layers: for each of the student's layers the one it comes from.
        kind: of the task.
        where: the other model, for messages.
        whole: the other model has a trained head, which must be taken over where its function is BERT's.
        folded: a table of position scores will be folded into the student, so it is not left out.

    Raises:
        ModelError: a weight is missing or of another shape, or a BERT cannot compute what the embeddings do.
    """
    family = family_of(config)
    if f"{family.prefix}.embeddings_project.weight" in stored:
        raise ModelError(
            f"student: the embeddings of {where} are normalised before they are projected to the hidden size "
            f"({family.model_type} with embedding_size {config.get('embedding_size')}), which no BERT computes. Set "
            "student.init to a checkpoint, or to random."
        )
    lacking, fresh = [], []
    same_head = kind in ("token-classification", "question-answering") or head_activation(config) == "tanh"
    for name, value in student.state_dict().items():
        source = _counterpart(name, config, layers=layers, kind=kind)
        head = not name.startswith((_LAYER, _EMBEDDINGS))
        given = None if head and not same_head else _given(name, source, stored, config, like=value)
        if given is not None and given.shape == value.shape:
            value.copy_(given)
        elif head and (not whole or not same_head):
            fresh.append(name)
        else:
            lacking.append(
                f"{source} ({'missing' if given is None else f'{tuple(given.shape)} for {tuple(value.shape)}'})"
            )
    if lacking:
        raise ModelError(
            f"student: {len(lacking)} weight(s) cannot be loaded from {where} and would be left random: "
            f"{', '.join(lacking[:_SHOWN])}{', …' if len(lacking) > _SHOWN else ''}. Choose a checkpoint of the student's "
            "sizes."
        )
    if fresh:
        why = (
            f"it has none that fits ({', '.join(fresh)})"
            if same_head
            else f"its own uses {head_activation(config)}, a BERT's tanh"
        )
        note(f"student: the head starts random; {where} cannot give it: {why}")
    if parts := left_out(config, folded=folded):
        note(f"student: {where} is of the family {family.model_type}; a BERT has no place for {' nor '.join(parts)}")


def _counterpart(name: str, config: Mapping[str, Any], *, layers: Sequence[int], kind: Kind) -> str:
    """Return what another family calls the weight `name` of a BERT."""
    family = family_of(config)
    if name.startswith(_LAYER):
        at, _, rest = name.removeprefix(_LAYER).partition(".")
        part, _, leaf = rest.rpartition(".")
        return f"{family.prefix}.{family.layers}.{layers[int(at)]}.{family.parts[BERT_PARTS.index(part)]}.{leaf}"
    if name.startswith(_EMBEDDINGS):
        return f"{family.prefix}.{name.removeprefix('bert.')}"
    dense, output = head_parts(config, kind)[0], head_parts(config, kind)[-1]
    return f"{dense if name.startswith(_POOLER) else output}.{name.rpartition('.')[2]}"


def _given(
    name: str, source: str, stored: Mapping[str, Tensor], config: Mapping[str, Any], *, like: Tensor
) -> Tensor | None:
    """Return the value of a BERT's weight `name` that computes what `source` did, or None where that is missing."""
    given = stored.get(source)
    if name.startswith(_LAYER):
        factor = score_factor(config) if ".attention.self.query." in name else 1.0
        return given if given is None or factor == 1 else given * factor
    if name == f"{_EMBEDDINGS}token_type_embeddings.weight":
        if given is None and not int(config.get("type_vocab_size") or 0):
            return like.new_zeros(like.shape)
        given = given if given is None or len(given) != 1 else given.expand(len(like), -1)
    elif name == f"{_EMBEDDINGS}position_embeddings.weight":
        if given is None and config.get("position_biased_input") is False:
            return like.new_zeros(like.shape)
        start = position_offset(config)
        given = None if given is None else given[start : start + len(like)]
    project = stored.get(f"{family_of(config).prefix}.embeddings.embed_proj.weight")
    if given is not None and project is not None and name.endswith("_embeddings.weight"):
        given = given @ project.T
    return given
