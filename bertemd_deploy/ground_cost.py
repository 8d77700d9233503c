"""Sums of squared differences between every teacher and student layer, and their gradients, without autograd's memory.

`emd` calls these with lists of layers and divides by the number of real elements. With x_a the flattened map of layer a
(teacher layers first, then student layers) and G the gradient of the loss in the sums,
    S[i, j]  = |x_i|^2 + |y_j|^2 - 2 <x_i, y_j>
    dL/dy_j  = 2 sum_i G[i, j] (y_j - x_i)
so a backward pass needs the layers and G alone. Work goes in blocks that stay in the processor's cache: a block of all
layers is copied to float32, used for everything, and forgotten; nothing but the models' own outputs is kept for the backward
pass, no score map among it. Blocks are summed in float64.

Attention has two ways to the same sums, x = Q K^T with masked, scaled Q and K of one head:
    scores     builds the score maps of a block of heads                         about T^2 d operations a map
    factored   <Q1 K1^T, Q2 K2^T> = sum((Q1^T Q2) * (K1^T K2)): no map at all    about T d d' operations a pair
In its backward pass, a pair that the flow leaves out (G[i, j] = 0) costs nothing; an optimal flow has at most M + N - 1 others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
T = TypeVar("T")
Method = Literal["scores", "factored"]
# float32 elements of all layers in one block: about a core's cache on a CPU, few launches on an accelerator.
_BLOCK_CPU = 2**20
_BLOCK_DEVICE = 2**28


def hidden_sums(teacher: Sequence[Tensor], student: Sequence[Tensor], *, mask: Tensor | None) -> Tensor:
    """Return the sums of squared differences of hidden states over real tokens and width.

    Args:
        teacher: M layers, (B, T, H) each, any float dtype.
        student: N layers, (B, T, H) each.
        mask: (B, T) bool, True at real tokens; None where all are.

    Returns:
        (M, N) float32, at least 0, differentiable once in every layer.
    """
    sums: Tensor = _HiddenSums.apply(mask, len(teacher), *teacher, *student)  # type: ignore[no-untyped-call]
    return sums


def attention_sums(
    teacher: Sequence[tuple[Tensor, Tensor]],
    student: Sequence[tuple[Tensor, Tensor]],
    *,
    mask: Tensor | None,
    method: Method | None,
) -> Tensor:
    """Return the sums of squared differences of attention scores over heads and real positions.

    Args:
        teacher: M layers' (query, key), (B, A, T, d) each, before scaling by 1 / sqrt(d).
        student: N layers' (query, key), (B, A, T, d') each.
        mask: (B, T) bool, True at real tokens; None where all are.
        method: how; None takes the way with fewer operations, forward and backward each by itself.

    Returns:
        (M, N) float32, at least 0, differentiable once in every query and key.
    """
    flat = [part for pair in (*teacher, *student) for part in pair]
    sums: Tensor = _AttentionSums.apply(mask, method, len(teacher), *flat)  # type: ignore[no-untyped-call]
    return sums


def _in_float32(function: Callable[P, T]) -> Callable[P, T]:
    """Keep autocast out of a function: what it computes is summed, so it is float32."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return wrapped


class _HiddenSums(Function):
    @staticmethod
    @_in_float32
    def forward(ctx: Any, mask: Tensor | None, teachers: int, *layers: Tensor) -> Tensor:
        ctx.save_for_backward(*layers)
        ctx.mask, ctx.teachers = mask, teachers
        total = _zeros(teachers, len(layers) - teachers, like=layers[0])
        for _, block in _hidden_blocks(layers, mask):
            total += _block_sums(block.flatten(1), teachers)
        return total.clamp_(min=0.0).float()

    @staticmethod
    @once_differentiable
    @_in_float32
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layers = ctx.saved_tensors
        wanted = [at for at in range(len(layers)) if ctx.needs_input_grad[2 + at]]
        weights = _pair_weights(gradient)[wanted]
        found = {at: torch.empty_like(layers[at], memory_format=torch.contiguous_format) for at in wanted}
        for rows, block in _hidden_blocks(layers, ctx.mask):
            width = block.shape[-1]
            for at, part in zip(wanted, weights @ block.flatten(1), strict=True):
                found[at].view(-1, width)[rows] = part.view(-1, width).to(found[at].dtype)
        return (None, None, *(found.get(at) for at in range(len(layers))))


def _hidden_blocks(layers: Sequence[Tensor], mask: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, (layers, rows, H) float32 block) over all tokens, padding set to 0; the block's memory is reused."""
    width = layers[0].shape[-1]
    flat = [layer.reshape(-1, width) for layer in layers]
    padding = None if mask is None else ~mask.reshape(-1, 1)
    count = len(flat[0])
    step = min(count, max(1, _block_elements(flat[0]) // (len(layers) * width)))
    memory = torch.empty(len(layers), step, width, device=flat[0].device)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        block = memory if rows.stop - start == step else torch.empty_like(memory[:, : rows.stop - start])
        for at, layer in enumerate(flat):
            block[at].copy_(layer[rows])
        if padding is not None:
            block.masked_fill_(padding[rows], 0.0)
        yield rows, block


class _AttentionSums(Function):
    @staticmethod
    @_in_float32
    def forward(ctx: Any, mask: Tensor | None, method: Method | None, teachers: int, *flat: Tensor) -> Tensor:
        ctx.save_for_backward(*flat)
        ctx.mask, ctx.method, ctx.teachers = mask, method, teachers
        heads = _Heads(flat, teachers, mask)
        chosen = method or heads.cheaper_forward()
        return (heads.sums_from_scores() if chosen == "scores" else heads.sums_factored()).clamp_(min=0.0).float()

    @staticmethod
    @once_differentiable
    @_in_float32
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat = ctx.saved_tensors
        heads = _Heads(flat, ctx.teachers, ctx.mask)
        needed = ctx.needs_input_grad[3:]
        wanted = [at for at in range(heads.layers) if needed[2 * at] or needed[2 * at + 1]]
        weights = _pair_weights(gradient).cpu()  # chooses which pairs are computed at all
        chosen = ctx.method or heads.cheaper_backward(weights, wanted)
        found = [torch.zeros_like(part, memory_format=torch.preserve_format) if need else None
                 for part, need in zip(flat, needed, strict=True)]  # fmt: skip
        fill = heads.gradients_from_scores if chosen == "scores" else heads.gradients_factored
        fill(weights, wanted, found)
        return (None, None, None, *found)


@dataclass
class _Block:
    """Some examples and heads of all layers, float32, masked; queries are scaled. G is examples x heads."""

    examples: slice
    heads: slice
    queries: list[Tensor]  # of each side: (layers, G, T, d)
    keys: list[Tensor]


class _Heads:
    """Queries and keys of M teacher and N student layers, handed out in blocks."""

    def __init__(self, flat: Sequence[Tensor], teachers: int, mask: Tensor | None) -> None:
        self.flat, self.teachers, self.mask = flat, teachers, mask
        self.layers = len(flat) // 2
        self.students = self.layers - teachers
        self.batch, self.heads, self.tokens, teacher_size = flat[0].shape
        self.sizes = (teacher_size, flat[-1].shape[-1])

    def cheaper_forward(self) -> Method:
        """Return the way with fewer multiplications for one head of one example."""
        (d, e), tokens = self.sizes, self.tokens
        wide = (self.teachers * d, self.students * e)
        scores = tokens**2 * (sum(wide) + self.teachers * self.students)
        own = self.teachers * d**2 + self.students * e**2
        return "factored" if 2 * tokens * (wide[0] * wide[1] + own) < scores else "scores"

    def cheaper_backward(self, weights: Tensor, wanted: Sequence[int]) -> Method:
        """Return the way with fewer multiplications for the pairs that `weights` (layers, layers) leaves over."""
        tokens, factored = self.tokens, 0
        for at in wanted:
            for other in torch.nonzero(weights[at]).flatten().tolist():
                factored += 4 * tokens * self._size(at) * self._size(other)
        used = torch.nonzero(weights[list(wanted)].any(0)).flatten().tolist()
        scores = tokens**2 * (sum(map(self._size, used)) + sum(2 * self._size(at) + len(used) for at in wanted))
        return "factored" if factored < scores else "scores"

    def sums_from_scores(self) -> Tensor:
        total = _zeros(self.teachers, self.students, like=self.flat[0])
        for block in self._blocks(self.layers * self.tokens**2):
            total += _block_sums(_score_maps(block).flatten(1), self.teachers)
        return total

    def sums_factored(self) -> Tensor:
        total = _zeros(self.teachers, self.students, like=self.flat[0])
        d, e = self.sizes
        for block in self._blocks(self.tokens * (self.teachers * d + self.students * e)):
            products = _gram(block.queries) * _gram(block.keys)  # (G, M d, N e)
            products = products.double().sum(0).view(self.teachers, d, self.students, e).sum((1, 3))
            x, y = (_squares(*pair) for pair in zip(block.queries, block.keys, strict=True))
            total += x[:, None] + y[None, :] - 2.0 * products
        return total

    def gradients_from_scores(self, weights: Tensor, wanted: Sequence[int], found: Sequence[Tensor | None]) -> None:
        rows = weights[list(wanted)].to(self.flat[0].device)
        for block in self._blocks(self.layers * self.tokens**2):
            maps = _score_maps(block)
            slopes = (rows @ maps.flatten(1)).view(len(wanted), *maps.shape[1:])
            for at, slope in zip(wanted, slopes, strict=True):
                query, key = self._pair(block, at)
                self._put(found, block, at, slope @ key, slope.transpose(-1, -2) @ query)

    def gradients_factored(self, weights: Tensor, wanted: Sequence[int], found: Sequence[Tensor | None]) -> None:
        d, e = self.sizes
        for block in self._blocks(self.tokens * (self.teachers * d + self.students * e)):
            for at in wanted:
                query, key = self._pair(block, at)
                slopes = [torch.zeros_like(query), torch.zeros_like(key)]
                for other in torch.nonzero(weights[at]).flatten().tolist():
                    weight = float(weights[at, other])
                    other_query, other_key = self._pair(block, other)
                    slopes[0] += weight * (other_query @ (other_key.transpose(-1, -2) @ key))
                    slopes[1] += weight * (other_key @ (other_query.transpose(-1, -2) @ query))
                self._put(found, block, at, *slopes)

    def _size(self, at: int) -> int:
        return self.sizes[0] if at < self.teachers else self.sizes[1]

    def _pair(self, block: _Block, at: int) -> tuple[Tensor, Tensor]:
        """Return the (G, T, d) query and key of one layer."""
        side, index = (0, at) if at < self.teachers else (1, at - self.teachers)
        return block.queries[side][index], block.keys[side][index]

    def _put(self, found: Sequence[Tensor | None], block: _Block, at: int, query: Tensor, key: Tensor) -> None:
        """Write the gradients of one layer's block; `query` is still in the scale of the scaled queries."""
        scale = self._size(at) ** -0.5
        for place, part in ((found[2 * at], query.mul_(scale)), (found[2 * at + 1], key)):
            if place is not None:
                part = part.view(-1, block.heads.stop - block.heads.start, *part.shape[1:])
                if self.mask is not None:
                    part.masked_fill_(~self.mask[block.examples, None, :, None], 0.0)
                place[block.examples, block.heads] = part.to(place.dtype)

    def _blocks(self, elements: int) -> Iterator[_Block]:
        """Yield every example and head once, in blocks; `elements` is what one head of one example takes in a block."""
        groups = max(1, _block_elements(self.flat[0]) // elements)
        heads = min(self.heads, groups)
        examples = min(self.batch, max(1, groups // self.heads))
        for start in range(0, self.batch, examples):
            part = slice(start, min(start + examples, self.batch))
            padding = None if self.mask is None else ~self.mask[None, part, None, :, None]
            for head in range(0, self.heads, heads):
                yield self._block(part, slice(head, min(head + heads, self.heads)), padding)

    def _block(self, examples: slice, heads: slice, padding: Tensor | None) -> _Block:
        block = _Block(examples, heads, [], [])
        split = 2 * self.teachers
        for side, size in ((self.flat[:split], self.sizes[0]), (self.flat[split:], self.sizes[1])):
            shape = (len(side), examples.stop - examples.start, heads.stop - heads.start, self.tokens, size)
            memory = torch.empty(shape, device=side[0].device)
            for at, part in enumerate(side):
                memory[at].copy_(part[examples, heads])
            if padding is not None:
                memory.masked_fill_(padding, 0.0)
            queries, keys = memory[0::2], memory[1::2]
            queries.mul_(size**-0.5)
            block.queries.append(queries.flatten(1, 2))
            block.keys.append(keys.flatten(1, 2))
        return block


def _score_maps(block: _Block) -> Tensor:
    """Return the (M + N, G, T, T) score maps of a block."""
    (x, y), groups, tokens = block.queries, block.queries[0].shape[1], block.queries[0].shape[2]
    maps = torch.empty(len(x) + len(y), groups, tokens, tokens, device=x.device)
    for query, key, place in zip(block.queries, block.keys, (maps[: len(x)], maps[len(x) :]), strict=True):
        torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(-1, -2), out=place.flatten(0, 1))
    return maps


def _block_sums(block: Tensor, teachers: int) -> Tensor:
    """Return the (M, N) float64 sums of squared differences of a (M + N, K) block; the block is overwritten.

    Subtracting one vector from every layer changes no difference and keeps the products small: less cancellation.
    """
    block -= block[:teachers].mean(0)
    x, y = block[:teachers], block[teachers:]
    squares = torch.linalg.vector_norm(block, dim=1).double().square()
    return squares[:teachers, None] + squares[None, teachers:] - 2.0 * (x @ y.T).double()


def _gram(sides: list[Tensor]) -> Tensor:
    """Return (G, M d, N e) products of all teacher columns with all student columns, summed over tokens."""
    x, y = (side.permute(1, 2, 0, 3).flatten(2) for side in sides)
    return x.transpose(-1, -2) @ y


def _squares(query: Tensor, key: Tensor) -> Tensor:
    """Return (layers,) float64 squared norms of Q K^T, from (layers, G, T, d)."""
    products: Tensor = (query.transpose(-1, -2) @ query) * (key.transpose(-1, -2) @ key)
    return products.double().sum((1, 2, 3))


def _pair_weights(gradient: Tensor) -> Tensor:
    """Return V (layers, layers) float32 with dL/dx_a = sum_b V[a, b] x_b, from the gradient (M, N) in the sums."""
    own = torch.cat([gradient.sum(1), gradient.sum(0)])
    teachers = len(gradient)
    weights = torch.diag(own)
    weights[:teachers, teachers:] = -gradient
    weights[teachers:, :teachers] = -gradient.T
    return 2.0 * weights.float()


def _zeros(rows: int, columns: int, *, like: Tensor) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64, device=like.device)


def _block_elements(like: Tensor) -> int:
    return _BLOCK_CPU if like.device.type == "cpu" else _BLOCK_DEVICE
