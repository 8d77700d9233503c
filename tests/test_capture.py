"""What is read from a model's layers is what an eager copy of it computes, for every family."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from tiny_family import CASES, tiny_model

from bertemd_deploy.capture import LayerReader
from bertemd_deploy.errors import ModelError
from bertemd_deploy.families import FAMILIES, known_inputs
from bertemd_deploy.tasks import Kind


def padded_batch(pad: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 28, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    types = (torch.arange(9) >= 3).long().expand(3, 9) * mask
    return {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask, "token_type_ids": types}


def family_model(family: str, **changes: Any) -> Any:
    return tiny_model(family, pad=1 if FAMILIES[family].offset else 0, **(CASES[family] | changes))


def eager_copy(model: Any) -> Any:
    eager = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    return eager


def position_terms(model: Any, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return what the family adds to the scores beside the mask, (L, B, A, T, T), from the model's own functions."""
    layers, batch, heads, tokens, _ = queries.shape
    if model.config.model_type == "mpnet":
        return model.mpnet.encoder.compute_position_bias(torch.zeros(batch, tokens, 1))[None]
    if not getattr(model.config, "relative_attention", False):
        return torch.zeros(())
    encoder = model.deberta.encoder
    relative = encoder.get_rel_pos(torch.zeros(batch, tokens, 1))
    return torch.stack(
        [
            encoder.layer[at]
            .attention.self.disentangled_attention_bias(
                queries[at].flatten(0, 1), keys[at].flatten(0, 1), relative, encoder.get_rel_embedding(), 3
            )
            .view(batch, heads, tokens, tokens)
            for at in range(layers)
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_outputs_are_what_an_eager_copy_computes(family: str) -> None:
    model = family_model(family)
    eager = eager_copy(model)
    inputs = padded_batch(model.config.pad_token_id)
    given = {name: value for name, value in inputs.items() if name in known_inputs(model.config.to_dict())}
    with torch.no_grad():
        read = LayerReader(model)(inputs)
        told = eager(**given, output_attentions=True, output_hidden_states=True)
        factor = math.sqrt(3) if family == "deberta-v2" else 1
        queries, keys, hidden = (torch.stack(list(part)) for part in (read.queries, read.keys, read.hidden_states))
        terms = position_terms(eager, queries * factor, keys)
    assert model.config._attn_implementation == ("sdpa" if FAMILIES[family].sdpa else "eager")
    assert queries.shape == keys.shape == (4, 3, 2, 9, 8)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(8) + terms
    hidden_away = inputs["attention_mask"][None, :, None, None, :] == 0
    probs = scores.masked_fill(hidden_away, -math.inf).softmax(-1)
    real = inputs["attention_mask"].bool()
    rows = real[None, :, None, :, None].expand_as(probs)  # DeBERTa hides everything from padded queries
    torch.testing.assert_close(probs[rows], torch.stack(told.attentions)[rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read.logits, told.logits)
    torch.testing.assert_close(read.embeddings[0], told.hidden_states[0])
    torch.testing.assert_close(hidden[:, real], torch.stack(told.hidden_states[1:])[:, real])


def test_deberta_without_position_terms_is_plain_attention() -> None:
    changes = {"relative_attention": False, "pos_att_type": None, "position_biased_input": True, "share_att_key": False}
    model = tiny_model("deberta-v2", **changes)
    inputs = padded_batch()
    with torch.no_grad():
        read = LayerReader(model)(inputs)
        told = model(inputs["input_ids"], inputs["attention_mask"], output_attentions=True)
    scores = torch.stack(list(read.queries)) @ torch.stack(list(read.keys)).transpose(-1, -2) / math.sqrt(8)
    hidden_away = inputs["attention_mask"][None, :, None, None, :] == 0
    probs = scores.masked_fill(hidden_away, -math.inf).softmax(-1)
    torch.testing.assert_close(probs[:, 0], torch.stack(told.attentions)[:, 0])


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("mpnet", ""),  # its table is added where the scores are compared
        ("deberta-v2", "deberta-v2 adds content-to-position and position-to-content terms to its attention scores"),
        ("roberta", ""),
    ],
)
def test_which_part_is_compared_is_said_once(family: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = family_model(family)
    reader = LayerReader(model)
    with torch.no_grad():
        reader(padded_batch(1))
        reader(padded_batch(1))
    said = capsys.readouterr().err
    assert said.startswith(told)
    assert said.count("\n") == bool(told)


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_over_tokens_give_their_logits(family: str, kind: Kind) -> None:
    model = family_model(family, kind=kind)
    inputs = padded_batch(model.config.pad_token_id)
    with torch.no_grad():
        read = LayerReader(model)(inputs)
    assert read.logits.shape == (3, 9, 2)
    assert [tuple(hidden.shape) for hidden in read.hidden_states] == [(3, 9, 16)] * 4


def test_a_second_batch_does_not_see_the_first() -> None:
    read = LayerReader(family_model("bert"))
    inputs = padded_batch()
    with torch.no_grad():
        first = read(inputs)
        read({name: value[:, :5] for name, value in inputs.items()})
        again = read(inputs)
    assert len(again.queries) == len(again.keys) == 4
    for one, other in zip(again.queries, first.queries, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_nothing_is_kept_between_calls() -> None:
    model = family_model("bert")
    reader = LayerReader(model)
    outputs = reader(padded_batch())
    assert outputs.queries[0].requires_grad
    graph = weakref.ref(outputs.queries[0])
    del outputs
    gc.collect()
    assert graph() is None
    model(**padded_batch())  # by someone else, past the reader
    assert reader._queries is reader._keys is None
    with pytest.raises(IndexError):
        reader({"input_ids": torch.full((1, 2), 10_000), "attention_mask": torch.ones(1, 2).long()})
    assert reader._queries is reader._keys is None


def test_a_model_outside_the_table_is_refused() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(vocab_size=40, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(
        ModelError, match="model_type is 'albert'; supported: bert, roberta, electra, mpnet, distilbert"
    ):
        LayerReader(AlbertForSequenceClassification(config))
