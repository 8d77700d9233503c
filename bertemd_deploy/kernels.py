"""What training on a CPU computes in another way than torch: dropout, and short inputs' attention in bfloat16.

torch draws one random number per element to drop it, which takes a quarter of a small student's step; here it is 16 random
bits an element, from the same generator, so p is rounded to 1 / 65,536. Without dropout, attention is the library's own, but
for bfloat16 with a gradient and up to 128 tokens: there the backward pass of torch's fused kernel takes longer than plain
products and a softmax do (`benchmarks/train_parts.py`), and the scores they hold are small.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ATTENTION = "bertemd"
# Families whose attention is transformers' interface and adds nothing to the scores.
PLAIN = ("bert", "roberta", "electra", "distilbert")
_WORD = 2**16
_SHORT = 128  # tokens up to which scores of bfloat16 inputs are held, B * A * T * T of them a layer


def quicken(model: nn.Module) -> None:
    """Give a model on a CPU this dropout; a family whose attention is its own keeps it there."""
    if next(model.parameters()).device.type != "cpu":
        return
    config: Any = model.config
    if config.model_type in PLAIN:
        _register()
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))


class Dropout(nn.Module):
    """`torch.nn.Dropout` with p to 16 bits."""

    def __init__(self, p: float) -> None:
        """Drop each element with probability `p`, in [0, 1]."""
        super().__init__()
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `inputs` with elements dropped and the others divided by 1 - p in training; as they are otherwise."""
        if not self.training or round(self.p * _WORD) == 0:
            return inputs
        dropped: Tensor = _Dropped.apply(inputs, *keep_mask(inputs.shape, self.p))  # type: ignore[no-untyped-call]
        return dropped


def keep_mask(shape: torch.Size | tuple[int, ...], p: float) -> tuple[Tensor, float]:
    """Return a bool mask, False with probability `p` rounded to 16 bits, from torch's generator, and 1 / (1 - p)."""
    threshold = round(p * _WORD)
    count = torch.Size(shape).numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count].view(shape)
    return bits >= threshold - _WORD // 2, _WORD / (_WORD - threshold) if threshold < _WORD else 0.0


class _Dropped(Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return inputs * keep * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return gradient * keep * ctx.scale, None, None


@functools.cache
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention output (B, T, A, d) for queries, keys and values (B, A, T, d), as transformers asks it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    drops = module.training and round(dropout * _WORD) > 0
    plain = query.dtype == torch.bfloat16 and query.requires_grad and query.shape[2] <= _SHORT
    known = not getattr(module, "is_causal", False) and (attention_mask is None or attention_mask.dtype == torch.bool)
    if not (drops or (plain and known)):
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **others
        )[0]
        return output, None
    return plain_attention(query, key, value, attention_mask, dropout=dropout if drops else 0.0, scaling=scaling), None


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) V with its T x T scores held in memory.

    Under autocast scores and probabilities are rounded to bfloat16; a fused kernel keeps them in float32.

    Args:
        query: (B, A, T, d).
        key: (B, A, T, d).
        value: (B, A, T, d).
        mask: bool, of a shape that fits (B, A, T, T); False is not looked at. None looks at all.
        dropout: probability with which a weight is dropped.
        scaling: of the scores, in the place of 1 / sqrt(d).

    Returns:
        (B, T, A, d).
    """
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1)
    if dropout:
        probs = _Dropped.apply(probs, *keep_mask(probs.shape, dropout))  # type: ignore[no-untyped-call]
    return (probs @ value).transpose(1, 2).contiguous()
