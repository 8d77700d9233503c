"""Position scores: what a teacher adds to Q K^T / sqrt(d) that depends on two positions alone (MPNet), as one table.

A student's attention is a BERT's: all that its scores know of positions is in its queries and keys. So the costs compare its
scores with the teacher's whole ones, and a student that starts from the teacher's layers gets the table folded into its query
and key weights (`position_codes`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bertemd_deploy.families import family_of


def position_scores(model: nn.Module, tokens: int) -> Tensor | None:
    """Return the (A, T, T) float32 table P that every layer of `model` adds to Q K^T / sqrt(d); None where it adds none.

    Args:
        model: task model of any family.
        tokens: T.
    """
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    family = family_of(config)
    if not family.position_scores:
        return None
    encoder: Any = model.get_submodule(f"{family.prefix}.encoder")
    place = next(encoder.parameters())
    with torch.no_grad():
        table: Tensor = encoder.compute_position_bias(place.new_zeros(1, tokens, 1))[0]
    return table.float()


def with_position_scores(
    queries: Sequence[Tensor], keys: Sequence[Tensor], table: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return queries and keys of T more coordinates, whose scores are Q K^T / sqrt(d) + P exactly.

    The keys' new coordinates are one-hot positions, the queries' are rows of P; as the scores of d + T coordinates are
    divided by sqrt(d + T), the queries take that factor.

    Args:
        queries: layers of (B, A, T, d), before scaling.
        keys: layers of (B, A, T, d).
        table: P, (A, T, T).

    Returns:
        Queries and keys, layers of (B, A, T, d + T) in the dtype they came in.
    """
    rows, heads, tokens, width = queries[0].shape
    like = queries[0]
    ones = torch.eye(tokens, dtype=like.dtype, device=like.device).expand(rows, heads, -1, -1)
    shares = (table.to(like.device) * math.sqrt(width + tokens)).to(like.dtype).expand(rows, -1, -1, -1)
    factor = math.sqrt((width + tokens) / width)
    return [torch.cat([query * factor, shares], -1) for query in queries], [torch.cat([key, ones], -1) for key in keys]
