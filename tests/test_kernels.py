"""Training kernels for CPUs: what they compute is torch's own, up to rounding and the draws of dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

from bertemd_deploy.kernels import Dropout, _attention, keep_mask


class Layer(nn.Module):
    """What transformers' attention asks of the module that calls it."""

    is_causal = False


def inputs(tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return queries, keys and values (3, 4, T, 8) with gradients, and a mask whose last row is half padding."""
    generator = torch.Generator().manual_seed(tokens)
    arrays = [torch.randn(3, 4, tokens, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    mask = torch.ones(3, 1, tokens, tokens, dtype=torch.bool)
    mask[2, :, :, tokens // 2 :] = False
    return arrays, mask


def attend(
    arrays: list[Tensor],
    mask: Tensor | None,
    *,
    training: bool = True,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of the sum of its squares."""
    output, _ = _attention(Layer().train(training), *arrays, mask, dropout, scaling)
    gradients = torch.autograd.grad(output.float().square().sum(), arrays)
    return output, *gradients


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every call of the library's attention."""
    calls: list[int] = []
    own = sdpa_attention.sdpa_attention_forward

    def forward(module: nn.Module, query: Tensor, *rest: Any, **others: Any) -> Any:
        calls.append(query.shape[2])
        return own(module, query, *rest, **others)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", forward)
    return calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [2, 17, 128])
def test_short_bfloat16_attention_is_the_librarys(monkeypatch: pytest.MonkeyPatch, tokens: int, training: bool) -> None:
    arrays, mask = inputs(tokens, torch.bfloat16)
    calls = counted(monkeypatch)
    ours = attend(arrays, mask, training=training)
    assert calls == []
    exact = [array.detach().double().requires_grad_() for array in arrays]
    theirs = attend(exact, mask)
    assert calls == [tokens]
    for found, expected in zip(ours, theirs, strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        assert found.dtype == torch.bfloat16
        assert error < 0.02  # a bfloat16 holds 8 bits


def test_scaling_is_as_asked() -> None:
    arrays, _ = inputs(17, torch.bfloat16)
    exact = torch.nn.functional.scaled_dot_product_attention(*(array.double() for array in arrays), scale=0.9)
    found = attend(arrays, None, scaling=0.9)[0].transpose(1, 2)
    assert (found - exact).norm() / exact.norm() < 0.02


def test_a_row_of_padding_alone_stays_finite() -> None:
    arrays, mask = inputs(10, torch.bfloat16)
    mask[1] = False
    assert all(bool(values.isfinite().all()) for values in attend(arrays, mask))


def test_attention_that_is_not_plain_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, mask = inputs(17, torch.bfloat16)
    calls = counted(monkeypatch)
    attend(arrays, torch.zeros(mask.shape, dtype=torch.bfloat16))  # added to the scores
    causal = Layer()
    causal.is_causal = True
    _attention(causal, *arrays, None)
    assert calls == [17, 17]


def test_padding_gets_no_weight() -> None:
    arrays, mask = inputs(10, torch.bfloat16)
    _, _, keys, values = attend(arrays, mask)
    assert not keys[2, :, 5:].any()
    assert not values[2, :, 5:].any()
    assert values[1, :, 5:].all()


@pytest.mark.parametrize(("tokens", "dtype"), [(129, torch.bfloat16), (17, torch.float32)])
def test_other_attention_is_left_to_the_library(
    monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype
) -> None:
    calls = counted(monkeypatch)
    attend(*inputs(tokens, dtype))
    assert calls == [tokens]


def test_without_gradients_attention_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, mask = inputs(17, torch.bfloat16)
    calls = counted(monkeypatch)
    _attention(Layer(), *(array.detach() for array in arrays), mask)
    assert calls == [17]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_dropout_drops_in_training_only(dtype: torch.dtype) -> None:
    arrays, mask = inputs(40, dtype)
    torch.manual_seed(0)
    first = attend(arrays, mask, dropout=0.5)[0]
    again = attend(arrays, mask, dropout=0.5)[0]
    torch.manual_seed(0)
    same = attend(arrays, mask, dropout=0.5)[0]
    assert torch.equal(first, same)
    assert not torch.equal(first, again)
    torch.testing.assert_close(
        attend(arrays, mask, training=False, dropout=0.5)[0], attend(arrays, mask)[0], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_dropout_keeps_the_mean(p: float) -> None:
    torch.manual_seed(3)
    keep, scale = keep_mask((200, 1000), p)
    assert (keep * scale).mean().item() == pytest.approx(1 if p < 1 else 0, abs=0.03)
    assert scale == pytest.approx(1 / (1 - p) if p < 1 else 0, rel=1e-3)
    layer = Dropout(p).train()
    ones = torch.ones(200, 1000, requires_grad=True)
    dropped = layer(ones)
    dropped.sum().backward()
    assert ones.grad is not None
    assert torch.equal(ones.grad, dropped.detach())
    assert layer.eval()(ones) is ones
