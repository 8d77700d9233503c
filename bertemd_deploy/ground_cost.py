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
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
T = TypeVar("T")
Method = Literal["scores", "factored"]
Pairs = Mapping[int, Sequence[int]]  # a layer to those that its gradient is made of
# float32 elements of all layers in one block: within a CPU's last cache, few launches on an accelerator.
_BLOCK_CPU = 2**22
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
            total += _centred_sums(block.flatten(1), teachers)
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
        weights = _pair_weights(gradient)
        pairs = {at: _carrying(weights, at, heads.teachers) for at in wanted}
        chosen = ctx.method or heads.cheaper_backward(pairs)
        found = [torch.zeros_like(part, memory_format=torch.preserve_format) if need else None
                 for part, need in zip(flat, needed, strict=True)]  # fmt: skip
        fill = heads.gradients_from_scores if chosen == "scores" else heads.gradients_factored
        fill(weights, pairs, found)
        return (None, None, None, *found)


@dataclass
class _Block:
    """Some examples, or some heads of one, of all layers: each layer's query and key, (G, L, d).

    One example is cut to its L real tokens, so padding costs nothing; of several, T tokens are there and padding is 0.
    """

    examples: slice
    heads: slice
    tokens: Tensor | None  # places of the real tokens of one example; None where they are the first L
    length: int
    queries: list[Tensor]
    keys: list[Tensor]


class _Heads:
    """Queries and keys of M teacher and N student layers, handed out in blocks.

    Products of bfloat16 queries and keys are bfloat16, as in the models' own attention; what is summed of them is float32.
    """

    def __init__(self, flat: Sequence[Tensor], teachers: int, mask: Tensor | None) -> None:
        self.flat, self.teachers, self.mask = flat, teachers, mask
        self.layers = len(flat) // 2
        self.students = self.layers - teachers
        self.batch, self.heads, self.tokens, teacher_size = flat[0].shape
        self.sizes = (teacher_size, flat[-1].shape[-1])
        self.coarse = all(part.dtype == torch.bfloat16 for part in flat)

    def cheaper_forward(self) -> Method:
        """Return the way with fewer multiplications for one head of one example."""
        (d, e), tokens = self.sizes, self.tokens
        wide = (self.teachers * d, self.students * e)
        scores = tokens**2 * (sum(wide) + self.teachers * self.students)
        own = self.teachers * d**2 + self.students * e**2
        return "factored" if 2 * tokens * (wide[0] * wide[1] + own) < scores else "scores"

    def cheaper_backward(self, pairs: Pairs) -> Method:
        """Return the way with fewer multiplications for the layers that each layer's gradient is made of."""
        tokens, used = self.tokens, _union(pairs)
        factored = sum(
            4 * tokens * self._size(at) * self._size(other) for at, others in pairs.items() for other in others
        )
        scores = tokens**2 * (sum(map(self._size, used)) + sum(2 * self._size(at) + len(used) for at in pairs))
        return "factored" if factored < scores else "scores"

    def sums_from_scores(self) -> Tensor:
        total = _zeros(self.teachers, self.students, like=self.flat[0])
        scales, maps = self._scales(range(self.layers)), _Memory()
        for block in self._blocks(self.layers * self.tokens**2):
            found = self._score_maps(block, range(self.layers), maps)
            if self.coarse:
                total += _block_sums(found, self.teachers, scales=scales)
            else:
                total += _centred_sums(found.mul_(scales[:, None]), self.teachers)
        return total

    def sums_factored(self) -> Tensor:
        total = _zeros(self.teachers, self.students, like=self.flat[0])
        (d, e), split = self.sizes, self.teachers
        for block in self._blocks(self.tokens * (self.teachers * d + self.students * e)):
            queries, keys = self._scaled(block)
            products = _gram(queries[:split], queries[split:]) * _gram(keys[:split], keys[split:])  # (G, M d, N e)
            products = products.double().sum(0).view(self.teachers, d, self.students, e).sum((1, 3))
            squares = torch.stack([_square(query, key) for query, key in zip(queries, keys, strict=True)])
            total += squares[:split, None] + squares[None, split:] - 2.0 * products
        return total

    def gradients_from_scores(self, weights: Tensor, pairs: Pairs, found: Sequence[Tensor | None]) -> None:
        used, wanted = _union(pairs), list(pairs)
        # The maps are unscaled: their scales, and those of the gradients in queries and keys, go into the weights.
        rows = weights[wanted][:, used] * self._scales(used)
        rows *= self._scales(wanted)[:, None]
        maps, sums = _Memory(), _Memory()
        for block in self._blocks(self.layers * self.tokens**2):
            products = self._score_maps(block, used, maps)
            slopes = torch.mm(rows, products, out=sums.take((len(wanted), products.shape[1]), like=products))
            slopes = slopes.view(len(wanted), -1, block.length, block.length).to(block.queries[0].dtype)
            for at, slope in zip(wanted, slopes, strict=True):
                query, key = block.queries[at], block.keys[at]
                self._put(found, block, at, torch.bmm(slope, key), torch.bmm(slope.transpose(-1, -2), query))

    def gradients_factored(self, weights: Tensor, pairs: Pairs, found: Sequence[Tensor | None]) -> None:
        d, e = self.sizes
        for block in self._blocks(self.tokens * (self.teachers * d + self.students * e)):
            queries, keys = self._scaled(block)
            for at, others in pairs.items():
                query, key = queries[at], keys[at]
                slopes = [torch.zeros_like(query), torch.zeros_like(key)]
                for other in others:
                    weight = weights[at, other]
                    slopes[0] += weight * (queries[other] @ (keys[other].transpose(-1, -2) @ key))
                    slopes[1] += weight * (keys[other] @ (queries[other].transpose(-1, -2) @ query))
                # Scaled queries hold 1 / sqrt(d): the gradient in the key has its share of it already.
                self._put(found, block, at, slopes[0] * self._size(at) ** -0.5, slopes[1])

    def _size(self, at: int) -> int:
        return self.sizes[0] if at < self.teachers else self.sizes[1]

    def _scales(self, layers: Sequence[int]) -> Tensor:
        """Return 1 / sqrt(d) of some layers, float32."""
        return torch.tensor([self._size(at) ** -0.5 for at in layers], device=self.flat[0].device)

    def _score_maps(self, block: _Block, layers: Sequence[int], memory: _Memory) -> Tensor:
        """Return (layers, G L^2) float32 unscaled score maps of a block; the next block's take their place."""
        shape = (len(layers), block.queries[0].shape[0], block.length, block.length)
        maps = memory.take(shape, like=block.queries[0])
        for place, at in zip(maps, layers, strict=True):
            torch.bmm(block.queries[at], block.keys[at].transpose(-1, -2), out=place)
        if self.coarse:
            maps = memory.take(shape, like=self.flat[0], dtype=torch.float32).copy_(maps)
        return maps.flatten(1)

    def _scaled(self, block: _Block) -> tuple[list[Tensor], list[Tensor]]:
        """Return float32 queries, scaled by 1 / sqrt(d), and keys of a block."""
        queries = [query.float() * self._size(at) ** -0.5 for at, query in enumerate(block.queries)]
        return queries, [key.float() for key in block.keys]

    def _put(self, found: Sequence[Tensor | None], block: _Block, at: int, query: Tensor, key: Tensor) -> None:
        """Write one layer's gradients of a block."""
        for place, part in ((found[2 * at], query), (found[2 * at + 1], key)):
            if place is None:
                continue
            part = part.to(place.dtype)
            if block.examples.stop - block.examples.start > 1:
                place[block.examples] = part.view(-1, self.heads, self.tokens, part.shape[-1])
            elif block.tokens is None:
                place[block.examples.start, block.heads, : block.length] = part
            else:
                place[block.examples.start, block.heads, block.tokens] = part

    def _blocks(self, elements: int) -> Iterator[_Block]:
        """Yield every example and head once, in blocks; `elements` is what one head of one example takes in a block."""
        groups = max(1, _block_elements(self.flat[0]) // elements)
        if groups >= 2 * self.heads or self.flat[0].device.type != "cpu":  # counting tokens would wait for a device
            step = max(1, groups // self.heads)
            for start in range(0, self.batch, step):
                yield self._several(slice(start, min(start + step, self.batch)))
            return
        step = -(-self.heads // -(-self.heads // groups))  # as many blocks as needed, of like size
        for example in range(self.batch):
            for start in range(0, self.heads, step):
                yield self._one(example, slice(start, min(start + step, self.heads)))

    def _one(self, example: int, heads: slice) -> _Block:
        """Return heads of one example, without padding and, where its real tokens are the first, without a copy."""
        tokens, length = None, self.tokens
        if self.mask is not None:
            tokens = torch.nonzero(self.mask[example]).flatten()
            length = len(tokens)
            if bool((tokens == torch.arange(length, device=tokens.device)).all()):
                tokens = None
        cut = [part[example, heads, :length] if tokens is None else part[example, heads, tokens] for part in self.flat]
        cut = cut if self.coarse else [part.float() for part in cut]
        return _Block(slice(example, example + 1), heads, tokens, length, cut[0::2], cut[1::2])

    def _several(self, examples: slice) -> _Block:
        padding = None if self.mask is None else ~self.mask[examples, None, :, None]
        cut = []
        for part in self.flat:
            rows = part[examples] if self.coarse else part[examples].float()
            cut.append((rows if padding is None else rows.masked_fill(padding, 0.0)).flatten(0, 1))
        return _Block(examples, slice(0, self.heads), None, self.tokens, cut[0::2], cut[1::2])


class _Memory:
    """Memory for one block's maps that the next block's use again: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def take(self, shape: Sequence[int], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return uninitialised memory of a shape; what was taken before in this dtype is lost."""
        dtype, count = dtype or like.dtype, math.prod(shape)
        if dtype not in self._held or len(self._held[dtype]) < count:
            self._held[dtype] = torch.empty(count, dtype=dtype, device=like.device)
        return self._held[dtype][:count].view(*shape)


def _block_sums(block: Tensor, teachers: int, *, scales: Tensor) -> Tensor:
    """Return the (M, N) float64 sums of squared differences of a (M + N, K) block whose rows have yet to be scaled."""
    squares: Tensor = (torch.linalg.vector_norm(block, dim=1) * scales).double().square()
    products: Tensor = (block[:teachers] @ block[teachers:].T) * scales[:teachers, None] * scales[teachers:]
    return squares[:teachers, None] + squares[None, teachers:] - 2.0 * products.double()


def _centred_sums(block: Tensor, teachers: int) -> Tensor:
    """Return the same of scaled rows, after subtracting one vector from all: no difference changes, less cancellation.

    The block is overwritten.
    """
    block -= block[:teachers].mean(0)
    return _block_sums(block, teachers, scales=torch.ones(len(block), device=block.device))


def _gram(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Return (G, M d, N e) products of all teacher columns with all student columns, summed over tokens."""
    return torch.cat(list(teacher), -1).transpose(-1, -2) @ torch.cat(list(student), -1)


def _square(query: Tensor, key: Tensor) -> Tensor:
    """Return () float64, the squared norm of Q K^T over all G, from (G, L, d)."""
    products: Tensor = (query.transpose(-1, -2) @ query) * (key.transpose(-1, -2) @ key)
    return products.double().sum()


def _pair_weights(gradient: Tensor) -> Tensor:
    """Return V (layers, layers) float32 with dL/dx_a = sum_b V[a, b] x_b, from the gradient (M, N) in the sums."""
    own = torch.cat([gradient.sum(1), gradient.sum(0)])
    teachers = len(gradient)
    weights = torch.diag(own)
    weights[:teachers, teachers:] = -gradient
    weights[teachers:, :teachers] = -gradient.T
    return 2.0 * weights.float()


def _carrying(weights: Tensor, at: int, teachers: int) -> list[int]:
    """Return the layers that layer `at`'s gradient is made of: on a CPU those of weight, else all that may have some.

    Looking at an accelerator's numbers would wait for it.
    """
    if weights.device.type == "cpu":
        return [int(other) for other in torch.nonzero(weights[at]).flatten()]
    layers = range(len(weights))
    return [other for other in layers if other == at or (other < teachers) != (at < teachers)]


def _union(pairs: Pairs) -> list[int]:
    return sorted({other for others in pairs.values() for other in others})


def _zeros(rows: int, columns: int, *, like: Tensor) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64, device=like.device)


def _block_elements(like: Tensor) -> int:
    return _BLOCK_CPU if like.device.type == "cpu" else _BLOCK_DEVICE
