"""Capture: what the layers of a model compute in one forward pass, read through hooks; the fast `sdpa` kernel stays.

`LayerOutputs` holds logits, hidden states (index 0 is the embedding), and the queries and keys from which attention scores
before the softmax come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerOutputs:
    """One forward pass; L layers.

    Attributes:
        logits: (B, outputs).
        embedding: (B, T, H), `hidden_states[0]`.
        hidden_states: (L, B, T, H), the layers' outputs.
        queries: (L, B, A, T, d) before scaling.
        keys: (L, B, A, T, d).
    """

    logits: Tensor
    embedding: Tensor
    hidden_states: Tensor
    queries: Tensor
    keys: Tensor


class LayerReader:
    """Runs a BERT classifier and keeps what its layers computed, through hooks on the query and key projections."""

    def __init__(self, model: nn.Module) -> None:
        """Hook `model`; hooks stay for the reader's life."""
        self.model = model
        self._queries: list[Tensor] = []
        self._keys: list[Tensor] = []
        encoder: Any = model.bert.encoder  # type: ignore[union-attr]
        self._heads = int(model.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
        for layer in encoder.layer:
            layer.attention.self.query.register_forward_hook(self._keep(self._queries))
            layer.attention.self.key.register_forward_hook(self._keep(self._keys))

    def _keep(self, store: list[Tensor]) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            batch, tokens, width = output.shape
            store.append(output.view(batch, tokens, self._heads, width // self._heads).transpose(1, 2))

        return hook

    def __call__(self, inputs: Mapping[str, Tensor]) -> LayerOutputs:
        """Run one batch (`input_ids`, `attention_mask`, `token_type_ids`, each (B, T) int64)."""
        self._queries.clear()
        self._keys.clear()
        output = self.model(**inputs, output_hidden_states=True)
        hidden = output.hidden_states
        return LayerOutputs(
            output.logits, hidden[0], torch.stack(hidden[1:]), torch.stack(self._queries), torch.stack(self._keys)
        )
