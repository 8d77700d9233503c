"""Scores with positions in them are exactly what the teacher's attention softens, and what the costs compare."""

from __future__ import annotations

import math

import pytest
import torch
from test_capture import eager_copy, family_model, padded_batch

from bertemd_deploy.capture import LayerReader
from bertemd_deploy.emd import attention_cost
from bertemd_deploy.families import FAMILIES, known_inputs
from bertemd_deploy.position_scores import position_scores, with_position_scores


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mpnet"])
def test_other_families_have_no_table(family: str) -> None:
    assert position_scores(family_model(family), 9) is None


def test_with_the_table_the_softmax_gives_the_teachers_own_attention() -> None:
    model = family_model("mpnet")
    inputs = padded_batch(model.config.pad_token_id)
    given = {name: value for name, value in inputs.items() if name in known_inputs(model.config.to_dict())}
    with torch.no_grad():
        read = LayerReader(model)(inputs)
        told = eager_copy(model)(**given, output_attentions=True)
    table = position_scores(model, 9)
    assert table.shape == (2, 9, 9)
    assert table.std() > 0.1
    queries, keys = with_position_scores(read.queries, read.keys, table)
    real = inputs["attention_mask"].bool()
    for query, key, expected in zip(queries, keys, told.attentions, strict=True):
        assert query.shape == key.shape == (3, 2, 9, 8 + 9)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        found = scores.masked_fill(~real[:, None, None], -math.inf).softmax(-1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["scores", "factored"])
def test_the_cost_is_the_mean_square_of_whole_scores(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(2, 3, 2, 2, 5, 8, generator=generator).unbind(0)  # 3 layers, B 2, A 2, T 5, d 8
    own, others = torch.randn(2, 2, 2, 2, 5, 6, generator=generator).unbind(0)  # 2 layers of d 6
    table = torch.randn(2, 5, 5, generator=generator) * 3
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = attention_cost(
        *with_position_scores(list(queries), list(keys), table), list(own), list(others), mask=mask, method=method
    )
    whole = queries @ keys.transpose(-1, -2) / math.sqrt(8) + table
    student = own @ others.transpose(-1, -2) / math.sqrt(6)
    both = (mask[:, None, :, None] & mask[:, None, None, :]).expand(2, 2, 5, 5)
    for i in range(3):
        for j in range(2):
            expected = (whole[i] - student[j])[both].square().mean()
            torch.testing.assert_close(found[i, j], expected, rtol=1e-4, atol=1e-5)
