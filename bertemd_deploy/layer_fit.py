"""Layer fit: what was copied from a teacher's layers is fitted, in closed form, to what those layers compute.

A copied layer computes on another input than in the teacher, as layers before it are missing; and where the teacher adds a
table P to its scores (`position_scores`), a BERT has no place for it. Both are mended before any training, on some thousand
tokens of train, layer by layer from the first one, each on what the fitted ones before it give:

    positions   the table is folded into queries and keys (`position_codes`)
    outputs     attention's and feed-forward's output weights move by ridge regression towards what the teacher's layer gives
                to its norms, argmin sum_t |e_t - dW a_t|^2 / s_t^2 + lambda |dW|^2, with s_t the deviation that the norm
                divides by; lambda falls for as long as rows held back gain by it, and where none does nothing moves

Where the fitted layers are no nearer to the teacher's than the copied ones, on the rows held back, they stay as copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from bertemd_deploy.encoding import Encoded, length_batches
from bertemd_deploy.families import family_of, known_inputs
from bertemd_deploy.models import output_layer
from bertemd_deploy.position_codes import (
    Codes,
    deviation,
    fold_scores,
    keep_scale,
    not_finite,
    place_codes,
    stop_reading,
)
from bertemd_deploy.position_scores import position_scores

FIT_TOKENS = 40_000
_TAUGHT_BYTES = 1 << 30  # most that the teacher's outputs may take
_TOKENS_AT_ONCE = 4096
_RIDGES = (10.0, 1.0, 0.1, 0.01, 0.001)  # lambda, over the mean of the inputs' moments
_CODE_SCALE = 2.0  # larger codes need smaller weights, which int8 rounds less, but disturb the norms
_HELD = 8  # one row of so many is held back


@dataclass(frozen=True)
class _Batch:
    """Rows of like length: the model's inputs, (B, T) each, and what is real of them, (B, T) bool.

    `held_rows` is (B,) bool: rows that are held back, as they tell how well the others were fitted.
    """

    inputs: dict[str, Tensor]
    real: Tensor
    held_rows: Tensor


@dataclass(frozen=True)
class _Taught:
    """What the teacher computes on n real tokens, in the order of the batches.

    Attributes:
        embeddings: (n, H) hidden states before the first layer.
        read: (H,) what share of the chosen layers' inputs each coordinate makes, weighted by the weights that read it.
        means: for each chosen layer two (H,): the mean of what attention reads, and of what the feed-forward part reads.
        before_norms: for each chosen layer two (n, H) float16: attention's output plus its input, feed-forward's plus its.
    """

    embeddings: Tensor
    read: Tensor
    means: list[tuple[Tensor, Tensor]]
    before_norms: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Fit:
    """How near a student's layers are to the teacher's on rows that were held back.

    Attributes:
        copied: for each layer, the mean cosine of its outputs with the teacher's as it was copied.
        fitted: and as it was fitted, without the coordinates that carry positions.
    """

    copied: list[float]
    fitted: list[float]

    @property
    def helps(self) -> bool:
        """Whether the mean over the layers is higher for the fit."""
        return sum(self.fitted) > sum(self.copied)


def fit_layers(
    student: nn.Module, teacher: nn.Module, examples: Encoded, *, layers: Sequence[int], pad_id: int, max_length: int
) -> Fit:
    """Fit the layers of a student that was copied from `teacher`, in place; where that does not help they stay as copied.

    Args:
        student: a BERT of the teacher's width on the CPU, in eval mode, its layer j copied from the teacher's `layers[j]`.
        teacher: task model of any family, in eval mode, on any device.
        examples: rows of train; evenly spaced ones that hold about `FIT_TOKENS` tokens are used, fewer for a large teacher.
        layers: for each of the student's layers the teacher's.
        pad_id: of the tokenizer.
        max_length: T, positions that a table of position scores is folded for.

    Raises:
        TrainingError: what the teacher or the student computes is not finite.
    """
    bert: Any = student.get_submodule("bert")
    most = min(FIT_TOKENS, _TAUGHT_BYTES // (2 * 2 * bert.config.hidden_size * len(layers)))
    batches = _batches(examples, most=most, pad_id=pad_id)
    before = {name: values.clone() for name, values in student.state_dict().items()}
    with torch.no_grad():
        taught = _run_teacher(teacher, batches, layers)
        copied = _cosines(bert, batches, taught)
        table = position_scores(teacher, max_length)
        codes = None if table is None else _begin_codes(bert.embeddings, table.cpu().double(), batches, taught)
        found = Fit(copied, _fit_each(bert, batches, taught, codes))
        if codes is not None:
            head = output_layer(student) if bert.pooler is None else bert.pooler.dense
            head.weight[:, codes.where] = 0
    if not found.helps:
        student.load_state_dict(before)
    return found


def _cosines(bert: Any, batches: Sequence[_Batch], taught: _Taught) -> list[float]:
    """Return the mean cosine of each layer's outputs with the teacher's on the rows held back."""
    outputs: list[list[Tensor]] = [[] for _ in taught.before_norms]
    for batch in batches:
        if batch.held_rows.any():
            mask, named = batch.real[batch.held_rows], _named(bert, batch)
            inputs = {name: values[batch.held_rows] for name, values in named.items()}
            hidden = bert(**inputs, attention_mask=mask.long(), output_hidden_states=True).hidden_states[1:]
            for values, found in zip(hidden, outputs, strict=True):
                found.append(values[mask])
    held = _held(batches).nonzero().flatten()
    norms = [layer.output.LayerNorm for layer in bert.encoder.layer]  # still the teacher's
    theirs = [norm(before[held].float()) for norm, (_, before) in zip(norms, taught.before_norms, strict=True)]
    return [
        float(cosine_similarity(torch.cat(ours), aim, dim=-1).mean()) for ours, aim in zip(outputs, theirs, strict=True)
    ]


def _fit_each(bert: Any, batches: Sequence[_Batch], taught: _Taught, codes: Codes | None) -> list[float]:
    """Fit layer after layer; return the mean cosine of each one's outputs with the teacher's on the rows held back."""
    held = _held(batches)
    kept = torch.ones(bert.config.hidden_size, dtype=torch.bool)
    if codes is not None:
        kept[codes.where] = False
    hidden = _real([bert.embeddings(**_named(bert, batch)) for batch in batches], batches)
    cosines = []
    for layer, (at_attention, at_output), (read, read_inside) in zip(
        bert.encoder.layer, taught.before_norms, taught.means, strict=True
    ):
        theirs = layer.output.LayerNorm(at_output[held].float())  # still the teacher's norm
        attention, part = layer.attention.self, layer.attention.output
        if codes is not None:
            for reader in (attention.query, attention.key, attention.value):
                stop_reading(reader, codes.where, read)
            stop_reading(layer.intermediate.dense, codes.where, read_inside)
            fold_scores(attention, hidden, codes)
        context = _attend(attention, hidden, batches)
        hidden = _fit_output(part, nn.Identity(), context, hidden, at_attention, held, codes)
        hidden = _fit_output(layer.output, layer.intermediate, hidden, hidden, at_output, held, codes)
        cosines.append(float(cosine_similarity(hidden[held][:, kept], theirs[:, kept], dim=-1).mean()))
    return cosines


def _held(batches: Sequence[_Batch]) -> Tensor:
    """Return (n,) bool: the real tokens of the rows held back."""
    return torch.cat([batch.held_rows[:, None].expand_as(batch.real)[batch.real] for batch in batches])


def _blocks(tokens: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tokens, _TOKENS_AT_ONCE)


def _batches(examples: Encoded, *, most: int, pad_id: int) -> list[_Batch]:
    """Return evenly spaced rows that hold about `most` tokens, in batches of like length."""
    count = max(1, min(len(examples), len(examples) * most // max(1, int(examples.lengths.sum()))))
    chosen = examples.select(np.linspace(0, len(examples) - 1, count).round().astype(np.int64))
    every = min(_HELD, count)
    found = []
    for rows in length_batches(chosen.lengths, batch_size=max(1, _TOKENS_AT_ONCE // int(chosen.lengths.max()))):
        inputs = {name: torch.from_numpy(values) for name, values in chosen.batch(rows, pad_id=pad_id).items()}
        held_rows = torch.from_numpy(rows % every == every - 1)
        found.append(_Batch(inputs, inputs["attention_mask"].bool(), held_rows))
    return found


def _named(bert: Any, batch: _Batch) -> dict[str, Tensor]:
    known = known_inputs(bert.config.to_dict())
    return {name: batch.inputs[name] for name in ("input_ids", "token_type_ids") if name in known}


def _real(padded: Sequence[Tensor], batches: Sequence[_Batch]) -> Tensor:
    """Return (n, H): the real tokens of (B, T, H) each."""
    return torch.cat([values[batch.real] for values, batch in zip(padded, batches, strict=True)])


def _run_teacher(teacher: nn.Module, batches: Sequence[_Batch], layers: Sequence[int]) -> _Taught:
    config: dict[str, Any] = teacher.config.to_dict()  # type: ignore[union-attr, operator]
    family, known = family_of(config), known_inputs(config)
    device = next(teacher.parameters()).device
    stack: Any = teacher.get_submodule(f"{family.prefix}.{family.layers}")
    chunked = [(each, each.chunk_size_feed_forward) for each in stack if hasattr(each, "chunk_size_feed_forward")]
    for each, _ in chunked:
        each.chunk_size_feed_forward = 0  # the same outputs, for all tokens at once
    query, key, value, _, attention_norm, inner, _, output_norm = family.parts
    squares: dict[tuple[int, str], Tensor] = {}
    sums: dict[tuple[int, str], Tensor] = {}
    before: dict[tuple[int, str], list[Tensor]] = {}
    embeddings: list[Tensor] = []
    real: Tensor

    def hook(layer: int, part: str, use: Callable[[tuple[int, str], Tensor], None]) -> Any:
        module = stack[layer].get_submodule(part)
        return module.register_forward_pre_hook(lambda _module, inputs: use((layer, part), inputs[0][real].float()))

    def keep(name: tuple[int, str], values: Tensor) -> None:
        before.setdefault(name, []).append(values.half().cpu())

    def add(name: tuple[int, str], values: Tensor) -> None:
        squares[name] = squares.get(name, 0.0) + values.square().sum(0).cpu()
        sums[name] = sums.get(name, 0.0) + values.sum(0).cpu()

    hooks = [hook(layer, norm, keep) for layer in layers for norm in (attention_norm, output_norm)]
    hooks += [hook(layer, part, add) for layer in layers for part in (value, inner)]
    try:
        for batch in batches:
            real = batch.real.to(device)
            given = {name: values.to(device) for name, values in batch.inputs.items() if name in known}
            embeddings.append(teacher(**given, output_hidden_states=True).hidden_states[0][real].float().cpu())
    finally:
        for each, chunk in chunked:
            each.chunk_size_feed_forward = chunk
        for each in hooks:
            each.remove()
    read = torch.zeros_like(embeddings[0][0])
    for layer in layers:
        for first, parts in ((value, (query, key, value)), (inner, (inner,))):
            weights = [stack[layer].get_submodule(part).weight.float().square().sum(0).cpu() for part in parts]
            share = squares[layer, first] * torch.stack(weights).sum(0)
            read += share / share.sum()
    norms = [[torch.cat(before.pop((layer, norm))) for norm in (attention_norm, output_norm)] for layer in layers]
    count = sum(len(some) for some in embeddings)
    means = [(sums[layer, value] / count, sums[layer, inner] / count) for layer in layers]
    return _Taught(torch.cat(embeddings), read, means, [(first, second) for first, second in norms])


def _begin_codes(embeddings: Any, table: Tensor, batches: Sequence[_Batch], taught: _Taught) -> Codes:
    """Put codes for `table` (A, T, T) into the embeddings, `_CODE_SCALE` times as large as the teacher's embeddings are."""
    seen = torch.zeros(table.shape[-1], dtype=torch.float64)
    for batch in batches:
        seen[: batch.real.shape[1]] += batch.real.sum(0)
    scale = _CODE_SCALE * float(taught.embeddings.square().mean().sqrt())
    codes = place_codes(embeddings, table, seen=seen, read=taught.read, scale=scale)
    summed = [
        embeddings.word_embeddings(batch.inputs["input_ids"])
        + embeddings.token_type_embeddings(batch.inputs["token_type_ids"])
        + embeddings.position_embeddings.weight[: batch.real.shape[1]]
        for batch in batches
    ]
    keep_scale(embeddings.LayerNorm, _real(summed, batches), codes.where)
    return codes


def _attend(attention: Any, hidden: Tensor, batches: Sequence[_Batch]) -> Tensor:
    """Return (n, H): what the heads of `attention` gather from `hidden` (n, H), before the output weights."""
    found, start = [], 0
    for batch in batches:
        count, tokens = batch.real.shape
        padded = hidden.new_zeros(count, tokens, hidden.shape[1])
        stop = start + int(batch.real.sum())
        padded[batch.real] = hidden[start:stop]
        query, key, value = (
            part(padded).view(count, tokens, attention.num_attention_heads, -1).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        )
        gathered = scaled_dot_product_attention(query, key, value, attn_mask=batch.real[:, None, None])
        found.append(gathered.transpose(1, 2).flatten(2)[batch.real])
        start = stop
    return torch.cat(found)


def _fit_output(
    output: Any,
    inner: Callable[[Tensor], Tensor],
    source: Tensor,
    beside: Tensor,
    wanted: Tensor,
    held: Tensor,
    codes: Codes | None,
) -> Tensor:
    """Move the weights of `output.dense` so that what the norm is given is nearest to `wanted`; return what the norm gives.

    Args:
        output: a layer's part with `dense` and `LayerNorm`.
        inner: gives the inputs (.., d) of `dense`, made of `source` a block at a time, as there may be many.
        source: (n, H).
        beside: (n, H), added before the norm.
        wanted: (n, H), what the teacher's norm is given.
        held: (n,) bool, tokens that choose lambda.
        codes: coordinates that no output touches.
    """
    if codes is not None:
        output.dense.weight[codes.where] = 0
        output.dense.bias[codes.where] = 0

    def pair(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs with a 1, (rows, d + 1), and what is missing, (rows, H), both over the deviation."""
        inputs = inner(source[rows])
        aim = wanted[rows].float()
        weights = 1 / deviation(aim)[:, None]
        missing = (aim - output.dense(inputs) - beside[rows]) * weights
        if codes is not None:
            missing[:, codes.where] = 0
        return torch.cat([inputs, torch.ones(len(inputs), 1)], 1) * weights, missing

    given, missing = pair(held.nonzero().flatten())
    width = given.shape[1]
    moments, products = (torch.zeros(width, size, dtype=torch.float64) for size in (width, missing.shape[1]))
    for rows in _blocks((~held).nonzero().flatten()):
        inputs, left = pair(rows)
        moments += inputs.T @ inputs
        products += inputs.T @ left
    if not all(torch.isfinite(values).all() for values in (moments, products, given, missing)):
        raise not_finite()
    moved = _ridge_regression(moments, products, lambda change: missing - given @ change)
    if moved is not None:
        output.dense.weight += moved[:-1].T
        output.dense.bias += moved[-1]
    before = torch.cat([output.dense(inner(some)) for some in _blocks(source)]) + beside
    if codes is not None:
        keep_scale(output.LayerNorm, before, codes.where)
    normed: Tensor = output.LayerNorm(before)
    return normed


def _ridge_regression(moments: Tensor, products: Tensor, residuals: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return the (d, H) change whose `residuals` are least, over lambda from much to little; None where none helps.

    Args:
        moments: (d, d) float64 of the inputs.
        products: (d, H) float64 of inputs and what is missing.
        residuals: what is still missing on the rows held back.
    """
    if not moments.any():  # no row is left to be fitted
        return None
    best, least = None, float(residuals(torch.zeros_like(products).float()).square().sum())
    for ridge in _RIDGES:
        more = ridge * float(moments.diagonal().mean()) * torch.eye(len(moments), dtype=torch.float64)
        moved = torch.cholesky_solve(products, torch.linalg.cholesky(moments + more)).float()
        error = float(residuals(moved).square().sum())
        if not error < least:
            break
        best, least = moved, error
    return best
