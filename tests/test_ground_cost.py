from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from bertemd_deploy import ground_cost
from bertemd_deploy.emd import attention_cost, hidden_cost
from bertemd_deploy.ground_cost import _carrying, _Heads, _pair_weights


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads_of(tokens: int, *, batch: int = 2, teacher_size: int = 6, student_size: int = 4) -> list[Tensor]:
    inputs = [normal(3, batch, 2, tokens, teacher_size, seed=seed) for seed in (0, 1)]
    return inputs + [normal(2, batch, 2, tokens, student_size, seed=seed) for seed in (2, 3)]


def by_plain_formula(tq: Tensor, tk: Tensor, sq: Tensor, sk: Tensor, mask: Tensor) -> Tensor:
    real = mask[:, None, :, None] & mask[:, None, None, :]
    x, y = ((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) * real).flatten(1) for q, k in ((tq, tk), (sq, sk)))
    return (x[:, None] - y[None]).square().sum(-1) / (real.sum() * tq.shape[2])


def with_gradients(compute: Any, inputs: list[Tensor], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    cost = compute(*leaves)
    return cost.detach(), list(torch.autograd.grad((cost * weights.to(cost.dtype)).sum(), leaves))


# Costs of a flow: most pairs carry nothing, as in an optimal one.
FLOW = torch.tensor([[0.3, 0.0], [0.2, 0.1], [0.0, 0.4]])


@pytest.mark.parametrize("first", range(1, 513, 64))
def test_both_ways_agree_at_every_length_up_to_512_with_padding_gradients_too(first: int) -> None:
    for tokens in range(first, min(first + 64, 513)):
        lengths = torch.tensor([[tokens], [max(1, tokens - 1 - tokens // 3)]])
        mask = torch.arange(tokens) < lengths
        inputs = heads_of(tokens)
        found = {
            method: with_gradients(functools.partial(attention_cost, mask=mask, method=method), inputs, FLOW)
            for method in ("scores", "factored", "auto")
        }
        for method in ("factored", "auto"):
            assert_close(found[method][0], found["scores"][0], rtol=1e-5, atol=1e-5)
            for left, right in zip(found[method][1], found["scores"][1], strict=True):
                assert_close(left, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("method", ["scores", "factored"])
@pytest.mark.parametrize("block", [1, 40, 500, 2**20])
def test_any_size_of_block_gives_the_plain_formula(monkeypatch: pytest.MonkeyPatch, method: Any, block: int) -> None:
    monkeypatch.setattr(ground_cost, "_BLOCK_CPU", block)
    mask = torch.arange(7) < torch.tensor([[7], [2], [5]])
    inputs = heads_of(7, batch=3)
    cost, slopes = with_gradients(lambda *given: attention_cost(*given, mask=mask, method=method), inputs, FLOW)
    expected, expected_slopes = with_gradients(
        lambda *given: by_plain_formula(*given, mask), [tensor.double() for tensor in inputs], FLOW
    )
    assert_close(cost, expected.float(), rtol=1e-5, atol=1e-6)
    for left, right in zip(slopes, expected_slopes, strict=True):
        assert_close(left, right.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_hidden_states_in_any_size_of_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(ground_cost, "_BLOCK_CPU", block)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    inputs = [normal(3, 3, 5, 8, seed=0), normal(2, 3, 5, 8, seed=1)]
    cost, slopes = with_gradients(lambda *given: hidden_cost(*given, mask=mask), inputs, FLOW)
    real = [tensor.double() for tensor in inputs]
    expected, expected_slopes = with_gradients(
        lambda x, y: (x[:, None] - y[None])[:, :, mask].square().mean((-1, -2)), real, FLOW
    )
    assert_close(cost, expected.float(), rtol=1e-5, atol=1e-6)
    for left, right in zip(slopes, expected_slopes, strict=True):
        assert_close(left, right.float(), rtol=1e-4, atol=1e-7)


def test_layers_in_bfloat16_are_summed_in_float32() -> None:
    """2,048 equal squares of 1: in bfloat16 a sum stops growing at 256."""
    teacher, student = torch.ones(1, 1, 64, 32, dtype=torch.bfloat16), torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cost = hidden_cost(teacher, student, mask=torch.ones(1, 64, dtype=torch.bool))
    assert_close(cost.detach(), torch.ones(1, 1))
    cost.sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_a_teacher_without_gradient_gets_none_and_a_student_does() -> None:
    inputs = heads_of(6)
    leaves = [tensor.requires_grad_(at > 1) for at, tensor in enumerate(inputs)]
    attention_cost(*leaves, mask=torch.ones(2, 6, dtype=torch.bool)).sum().backward()
    assert [tensor.grad is None for tensor in leaves] == [True, True, False, False]


def test_the_way_is_chosen_by_length_and_backward_by_the_pairs_that_carry_flow() -> None:
    def heads(tokens: int) -> _Heads:
        shapes = [(8, 12, tokens, 64)] * 24 + [(8, 12, tokens, 26)] * 8
        return _Heads([torch.empty(shape, device="meta") for shape in shapes], 12, None)

    assert heads(16).cheaper_forward() == "scores"
    assert heads(512).cheaper_forward() == "factored"
    one = torch.zeros(12, 4)
    one[3, 0] = 1.0
    sparse, full = (
        {at: _carrying(_pair_weights(flow), at, 12) for at in range(12, 16)} for flow in (one, torch.ones(12, 4))
    )
    assert sparse == {12: [3, 12], 13: [], 14: [], 15: []}
    assert heads(512).cheaper_backward(sparse) == "factored"
    assert heads(16).cheaper_backward(full) == "scores"


def test_on_a_device_every_pair_is_computed_rather_than_looked_for() -> None:
    weights = torch.empty(16, 16, device="meta")
    assert _carrying(weights, 12, 12) == [*range(12), 12]
    assert _carrying(weights, 3, 12) == [3, 12, 13, 14, 15]


@pytest.mark.parametrize("method", ["scores", "factored"])
def test_pairs_without_flow_change_nothing(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    compute = functools.partial(attention_cost, mask=mask, method=method)
    _, left_out = with_gradients(compute, heads_of(9), FLOW)
    monkeypatch.setattr(ground_cost, "_carrying", lambda weights, at, teachers: list(range(len(weights))))
    _, computed = with_gradients(compute, heads_of(9), FLOW)
    for left, right in zip(left_out, computed, strict=True):
        assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_no_score_map_is_kept_for_the_backward_pass() -> None:
    """What autograd keeps is the models' own queries and keys: linear in the number of tokens."""
    kept: list[int] = []
    inputs = [tensor.requires_grad_() for tensor in heads_of(96)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        attention_cost(*inputs, mask=torch.ones(2, 96, dtype=torch.bool), method="scores")
    assert sum(kept) <= sum(tensor.numel() for tensor in inputs) + 16
