"""The table of teacher families: what each BERT-like architecture calls its sizes, its layers' parts and its heads.

A family is an encoder of transformer layers with separate query and key projections. The table is all that the code knows
about them: capture hooks the projections it names, students take weights by it, checkpoints check heads and positions by
it. A student is always a BERT. In: configs as dictionaries, weight names. Out: sizes, names, refusals. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bertemd_deploy.errors import ModelError
from bertemd_deploy.tasks import Kind

BERT_PARTS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)


@dataclass(frozen=True)
class Sizes:
    """What layers and their shapes are called everywhere here."""

    layers: int
    hidden: int
    heads: int
    intermediate: int


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: its name in config.json.
        prefix: attribute of a task model that holds the encoder; also the prefix of the encoder's weight names.
        layers: path of the list of layers inside the encoder.
        parts: the family's names of `BERT_PARTS`, in that order.
        fields: config fields of layers, hidden, heads, intermediate.
        sdpa: transformers offers the fast kernel for it.
        types: the model takes `token_type_ids`; RoBERTa takes them only where it has more than one type.
        offset: positions start after the padding token's id rather than at 0.
        dense: head of sequence classification: the linear map before the last one.
        output: the last linear map of that head.
        activation: between the two; BERT's is tanh.
        bias: what the family adds to Q K^T beside the mask, in words; empty where there is nothing.
        position_scores: that bias depends on two positions alone and is the same in every layer.
    """

    model_type: str
    prefix: str
    layers: str = "encoder.layer"
    parts: tuple[str, ...] = BERT_PARTS
    fields: tuple[str, str, str, str] = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
    )
    sdpa: bool = True
    types: bool = True
    offset: bool = False
    dense: str = "classifier.dense"
    output: str = "classifier.out_proj"
    bias: str = ""
    position_scores: bool = False
    activation: str = "tanh"

    @property
    def query(self) -> str:
        """The query projection in a layer."""
        return self.parts[0]

    @property
    def key(self) -> str:
        """The key projection in a layer."""
        return self.parts[1]


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bert", "bert", dense="bert.pooler.dense", output="classifier"),
        Family("roberta", "roberta", offset=True),
        Family("electra", "electra", activation="gelu"),
        Family(
            "mpnet",
            "mpnet",
            parts=(
                "attention.attn.q",
                "attention.attn.k",
                "attention.attn.v",
                "attention.attn.o",
                "attention.LayerNorm",
                *BERT_PARTS[5:],
            ),
            sdpa=False,
            types=False,
            offset=True,
            bias="a learned bias by relative position",
            position_scores=True,
        ),
        Family(
            "distilbert",
            "distilbert",
            layers="transformer.layer",
            parts=(
                "attention.q_lin",
                "attention.k_lin",
                "attention.v_lin",
                "attention.out_lin",
                "sa_layer_norm",
                "ffn.lin1",
                "ffn.lin2",
                "output_layer_norm",
            ),
            fields=("n_layers", "dim", "n_heads", "hidden_dim"),
            types=False,
            dense="pre_classifier",
            output="classifier",
            activation="relu",
        ),
        Family(
            "deberta-v2",
            "deberta",
            parts=(
                "attention.self.query_proj",
                "attention.self.key_proj",
                "attention.self.value_proj",
                *BERT_PARTS[3:],
            ),
            sdpa=False,
            dense="pooler.dense",
            output="classifier",
            bias="content-to-position and position-to-content terms",
        ),
    )
}


def family_of(config: Mapping[str, Any], *, where: str = "the model") -> Family:
    """Return the family that a config belongs to.

    Raises:
        ModelError: it is not in the table, or it is an architecture whose attention is not read as an encoder's.
    """
    found = config.get("model_type")
    family = FAMILIES.get(found) if isinstance(found, str) else None
    if family is None:
        raise ModelError(
            f"{where}: model_type is {found!r}; supported: {', '.join(FAMILIES)}. Others have no separate query and key "
            "projection in every layer, or were not tried; fine-tune a teacher of a supported family."
        )
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise ModelError(
            f"{where}: position_embedding_type is {positions!r}; only absolute positions are supported for {found}."
        )
    if config.get("is_decoder"):
        raise ModelError(f"{where}: is_decoder is true; a decoder sees no later tokens. Use an encoder.")
    return family


def sizes(config: Mapping[str, Any]) -> Sizes:
    """Return layers, hidden, heads and intermediate of a config of any family.

    Raises:
        ModelError: the family is unknown, or the config lacks a size.
    """
    family = family_of(config)
    absent = [name for name in family.fields if config.get(name) is None]
    if absent:
        raise ModelError(f"the model's config lacks {', '.join(absent)}, which a {family.model_type} needs.")
    return Sizes(*(int(config[name]) for name in family.fields))


def position_offset(config: Mapping[str, Any]) -> int:
    """Return the row of the position table that the first token reads."""
    if not family_of(config).offset:
        return 0
    pad = config.get("pad_token_id")
    return (1 if pad is None or config["model_type"] == "mpnet" else int(pad)) + 1  # MPNet's code has the 1 built in


def positions(config: Mapping[str, Any]) -> int:
    """Return how many tokens a row may have: the position table without the rows that no token reads."""
    return int(config.get("max_position_embeddings") or 512) - position_offset(config)


def known_inputs(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the inputs that the model is given: without `token_type_ids` where it tells no types apart."""
    default = 0 if config.get("model_type") == "deberta-v2" else 2
    count = config.get("type_vocab_size")
    typed = family_of(config).types and int(default if count is None else count) > 1
    return frozenset(("input_ids", "attention_mask", *(("token_type_ids",) if typed else ())))


def position_terms(config: Mapping[str, Any]) -> list[str]:
    """Return DeBERTa's position terms (c2p, p2c) that share the scale of its scores."""
    if config.get("model_type") != "deberta-v2":
        return []
    stored = config.get("pos_att_type") or []
    named = stored.lower().split("|") if isinstance(stored, str) else stored
    return [term for term in ("c2p", "p2c") if term in {str(name).strip() for name in named}]


def score_factor(config: Mapping[str, Any]) -> float:
    """Return f where the content part of the scores before the softmax is f * Q K^T / sqrt(d).

    1 but for DeBERTa, which divides by sqrt(d * (1 + its position terms)).
    """
    return float((1 + len(position_terms(config))) ** -0.5)


def compared_part(config: Mapping[str, Any]) -> str:
    """Return a sentence on which part of the scores is compared, or "" where it is all there is beside the mask."""
    family = family_of(config)
    if family.position_scores or not adds_bias(config):
        return ""
    return (
        f"{family.model_type} adds {family.bias} to its attention scores; the part compared with the student is "
        "content to content, Q K^T"
    )


def head_parts(config: Mapping[str, Any], kind: Kind) -> tuple[str, ...]:
    """Return the modules of the head for a kind of task, the last one the linear map that gives the outputs."""
    if kind == "question-answering":
        return ("qa_outputs",)
    if kind == "token-classification":
        return ("classifier",)
    family = family_of(config)
    return (family.dense, family.output)


def head_activation(config: Mapping[str, Any]) -> str:
    """Return the activation between the two linear maps of the sequence-classification head."""
    family = family_of(config)
    if family.model_type == "deberta-v2":
        return str(config.get("pooler_hidden_act") or "gelu")
    return family.activation


def feed_forward_activation(config: Mapping[str, Any]) -> str:
    """Return the activation inside the layers, as transformers names it."""
    return str(config.get("activation" if config.get("model_type") == "distilbert" else "hidden_act") or "gelu")


def norm_epsilon(config: Mapping[str, Any]) -> float:
    """Return the epsilon of the layer norms; DistilBERT's is built into its code."""
    return 1e-12 if config.get("model_type") == "distilbert" else float(config.get("layer_norm_eps") or 1e-12)


def adds_bias(config: Mapping[str, Any]) -> bool:
    """Say whether the model adds something to Q K^T beside the mask, for which a BERT's layers have no place."""
    return bool(family_of(config).bias) and (
        config["model_type"] != "deberta-v2" or bool(config.get("relative_attention"))
    )


def left_out(config: Mapping[str, Any], *, folded: bool = False) -> list[str]:
    """Return, in words, what of this model a BERT's layers have no place for; `folded` position scores have one."""
    family = family_of(config)
    parts = [family.bias] if adds_bias(config) and not (folded and family.position_scores) else []
    if config.get("model_type") == "deberta-v2":
        if config.get("position_biased_input") is False:
            parts.append("the absence of absolute positions (the student's start at zero)")
        if int(config.get("conv_kernel_size") or 0) > 0:
            parts.append("the convolution after its first layer")
    return parts
