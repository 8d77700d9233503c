"""Position codes: a table of position scores folded into a BERT, whose attention knows only queries and keys.

codes       P ~ codes D codes^T, least squares weighted by how often the one position is real and how often the other. The
coordinates of the hidden states that the teacher's layers read least carry the codes, the norms keep them in
scale, and what the layers read there is kept on the average, in their biases. No layer loss sees the codes, and
but for weight decay training writes nothing there.
scores      a head's query and key weights become the best factors of rank d, in the metric of the layer's own inputs, of
Wq^T Wk / sqrt(d) with D added where the codes are
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bertemd_deploy.errors import TrainingError

_CODE_SHARE = 24  # one coordinate of so many carries codes
_RARE = 0.05  # least weight of a position, against one that all rows reach
_FLOOR = 1e-6  # of the inputs' second moments, against their mean


@dataclass(frozen=True)
class Codes:
    """Positions inside the hidden states.

    Attributes:
        where: (r,) coordinates that carry them.
        shares: D of each head, (A, r, r) float64, for codes as the hidden states hold them.
        scale: root mean square of a code's coordinate in the hidden states.
    """

    where: Tensor
    shares: Tensor
    scale: float


def code_coordinates(model: nn.Module) -> Tensor | None:
    """Return the coordinates of a BERT's hidden states that carry codes of positions, (r,) int64; None where there are none.

    They come from the position embedding alone: no word or token type has a part in them, no layer writes there, and no norm
    moves them. A model that is no BERT has none.
    """
    bert: Any = getattr(model, "bert", None)
    if bert is None:
        return None
    embeddings = bert.embeddings
    found = (embeddings.position_embeddings.weight != 0).any(0)
    for words in (embeddings.word_embeddings, embeddings.token_type_embeddings):
        found &= (words.weight == 0).all(0)
    for part in _writers(bert):
        found &= (part.dense.weight == 0).all(1) & (part.dense.bias == 0)
    for norm in _norms(bert):
        found &= norm.bias == 0
    where: Tensor = found.nonzero().flatten()
    return where if len(where) else None


def _writers(bert: Any) -> list[Any]:
    """Return what adds to the hidden states in the layers: parts with `dense` and `LayerNorm`."""
    return [part for layer in bert.encoder.layer for part in (layer.attention.output, layer.output)]


def _norms(bert: Any) -> list[Any]:
    return [bert.embeddings.LayerNorm, *(part.LayerNorm for part in _writers(bert))]


def place_codes(embeddings: Any, table: Tensor, *, seen: Tensor, read: Tensor, scale: float) -> Codes:
    """Write codes of the positions of `table` (A, T, T) into the position embedding, and say how they give the table back.

    The codes of all positions have one mean, 0 over their coordinates, so that a norm does not move them.

    Args:
        embeddings: of a BERT; no word keeps a part in the coordinates that carry codes.
        table: float64.
        seen: (T,) float64, how many rows reach each position.
        read: (H,) how much of each coordinate the layers read.
        scale: root mean square of a code's coordinate.

    Raises:
        TrainingError: the table is not finite.
    """
    if not torch.isfinite(table).all():
        raise not_finite()
    tokens = table.shape[-1]
    weights = (seen / seen.max()).clamp(min=_RARE)
    root = weights.sqrt()
    weighted = table * root[:, None] * root
    width = len(read)
    rank = min(tokens, max(1, width // _CODE_SHARE - 1))
    both = torch.cat([*weighted, *weighted.transpose(1, 2)], 1)
    directions = torch.linalg.eigh(both @ both.T).eigenvectors.flip(1)[:, :rank]
    plain = directions / root[:, None]
    seed = torch.Generator().manual_seed(0)
    turn = torch.randn(rank + 1, rank, generator=seed, dtype=torch.float64)
    turn = torch.linalg.qr(torch.cat([torch.ones(rank + 1, 1, dtype=torch.float64), turn], 1)).Q[:, 1:]
    codes = plain @ turn.T
    codes /= (codes.square().mean(1) * weights).sum().div(weights.sum()).sqrt()
    norms = codes.norm(dim=1)
    codes *= (norms[seen > 0].max() / norms).clamp(max=1)[:, None]  # positions that no row reaches stay in scale
    inverse = torch.linalg.pinv(codes * root[:, None])
    where = read.argsort()[: rank + 1].sort().values
    for words in (embeddings.word_embeddings, embeddings.token_type_embeddings, embeddings.position_embeddings):
        words.weight[:, where] = 0
    embeddings.position_embeddings.weight[:tokens, where] = codes.float() * scale
    return Codes(where, inverse @ weighted @ inverse.T / scale**2, scale)


def hold_codes(model: nn.Module) -> Tensor | None:
    """Keep training from writing where a BERT has codes of positions; return these coordinates, None where it has none.

    No gradient reaches what writes there or weighs them in a norm, so only weight decay moves it; how large the codes are
    in a layer still changes as far as its norm divides them by what the other coordinates have become. Attention reads codes
    with weights several times the usual: steps of the usual size would blur them, and their gradients would take up what
    `max_grad_norm` leaves to the rest. The embeddings lose their dropout, the one that codes meet.

    Weights with codes elsewhere are no longer loaded into the model: RuntimeError.
    """
    where = code_coordinates(model)
    if where is None:
        return None
    bert: Any = model.get_submodule("bert")
    embeddings = bert.embeddings
    embeddings.dropout.p = 0.0
    for words in (embeddings.word_embeddings, embeddings.token_type_embeddings, embeddings.position_embeddings):
        _hold(words.weight, (slice(None), where))
    for module in (*(part.dense for part in _writers(bert)), *_norms(bert)):
        _hold(module.weight, where)
        _hold(module.bias, where)
    model.register_load_state_dict_post_hook(_check_codes(where))  # type: ignore[no-untyped-call]
    return where


def _check_codes(where: Tensor) -> Callable[[nn.Module, Any], None]:
    """Return a hook that refuses weights whose codes are elsewhere, on any device: training would write over them."""

    def check(model: nn.Module, _keys: Any) -> None:
        found = code_coordinates(model)
        if found is not None and found.tolist() != where.tolist():
            raise RuntimeError("its student carries positions in other coordinates than the one that is trained")

    return check


def _hold(parameter: nn.Parameter, part: Any) -> None:
    def leave_out(held: Tensor) -> None:
        assert held.grad is not None
        held.grad[part] = 0

    parameter.register_post_accumulate_grad_hook(leave_out)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def stop_reading(dense: Any, where: Tensor, means: Tensor) -> None:
    """Let `dense` read nothing from the coordinates `where` any more, but have in its bias what it read on the average."""
    dense.bias += dense.weight[:, where] @ means[where]
    dense.weight[:, where] = 0


def keep_scale(norm: Any, before: Tensor, where: Tensor) -> None:
    """Let a norm of inputs `before` (n, H) leave the coordinates `where` as they are, on the average."""
    norm.weight[where] = 1 / (1 / deviation(before)).mean()
    norm.bias[where] = 0


def deviation(values: Tensor) -> Tensor:
    """Return (n,) what a norm divides the rows of (n, H) by."""
    return (values - values.mean(1, keepdim=True)).square().mean(1).sqrt().clamp(min=1e-6)


def fold_scores(attention: Any, hidden: Tensor, codes: Codes) -> None:
    """Give each head of `attention` the query and key weights whose scores on `hidden` (n, H) are nearest to the table's."""
    count, width = hidden.shape
    heads = len(codes.shares)
    size = width // heads
    inputs = torch.cat([hidden, torch.ones(count, 1)], 1)
    moments = (inputs.T @ inputs / count).double()
    if not torch.isfinite(moments).all():
        raise not_finite()
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=_FLOOR * float(values.mean())).sqrt()
    metric, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    ones = torch.zeros(width + 1, len(codes.where), dtype=torch.float64)
    ones[codes.where, torch.arange(len(codes.where))] = 1
    for head, share in enumerate(codes.shares):
        rows = slice(head * size, (head + 1) * size)
        query, key = (
            torch.cat([part.weight[rows], part.bias[rows, None]], 1).double().T
            for part in (attention.query, attention.key)
        )
        left = torch.linalg.qr(metric @ torch.cat([query / math.sqrt(size), ones], 1))
        right = torch.linalg.qr(metric @ torch.cat([key, ones @ share.T], 1))
        outer, gains, inner = torch.linalg.svd(left.R @ right.R.T)
        roots = gains[:size].sqrt() * size**0.25
        for part, found in ((attention.query, left.Q @ outer), (attention.key, right.Q @ inner.T)):
            weights = (inverse @ (found[:, :size] * roots)).T.float()
            part.weight[rows], part.bias[rows] = weights[:, :-1], weights[:, -1]


def not_finite() -> TrainingError:
    """Return the error of a teacher or student whose numbers cannot be fitted."""
    return TrainingError(
        "the student's layers cannot be fitted to the teacher's: what they compute is not finite, or above 65,504. Set "
        "student.fit_layers: never, or look for non-finite weights in the teacher."
    )
