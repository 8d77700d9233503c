"""Capture: what the layers of a model compute in one forward pass, read through hooks; the fast `sdpa` kernel stays.

`LayerOutputs` holds logits, hidden states (index 0 is the embedding), and the queries and keys from which attention scores
before the softmax come. Which projections those are is `families`' table. What a family adds to Q K^T is not read here: a
table of positions comes from `position_scores`; of terms that have content in them only Q K^T is compared, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bertemd_deploy.console import note
from bertemd_deploy.families import compared_part, family_of, known_inputs, score_factor, sizes
from bertemd_deploy.models import output_logits


@dataclass(frozen=True)
class LayerOutputs:
    """One forward pass; L layers.

    Attributes:
        logits: (B, outputs), or (B, T, outputs) for heads over tokens.
        embeddings: one (B, T, H), transformers' `hidden_states[0]`; empty where no layer is compared.
        hidden_states: L of (B, T, H), the layers' outputs.
        queries: L of (B, A, T, d) before scaling: Q K^T / sqrt(d) is the content part of the scores before the softmax.
        keys: L of (B, A, T, d).
    """

    logits: Tensor
    embeddings: Sequence[Tensor]
    hidden_states: Sequence[Tensor]
    queries: Sequence[Tensor]
    keys: Sequence[Tensor]


class LayerReader:
    """Runs a task model of any family and keeps what its layers computed, through hooks on two projections per layer.

    Between calls the hooks keep nothing, whoever runs the model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hook `model`; hooks stay for the model's life.

        Raises:
            ModelError: the model's family is not in the table.
        """
        self.model = model
        config: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
        family = family_of(config)
        self._known = known_inputs(config)
        self._heads = sizes(config).heads
        self._factor = score_factor(config)
        self._queries: list[Tensor] | None = None
        self._keys: list[Tensor] | None = None
        layers: Any = model.get_submodule(f"{family.prefix}.{family.layers}")
        for at, layer in enumerate(layers):
            layer.get_submodule(family.query).register_forward_hook(self._keep("_queries", at))
            layer.get_submodule(family.key).register_forward_hook(self._keep("_keys", at))
        if told := compared_part(config):
            note(told)

    def _keep(self, name: str, layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            store = getattr(self, name)
            # A layer's first call is for its tokens; DeBERTa may call the projection again for its position table.
            if store is not None and len(store) == layer:
                store.append(output.view(*output.shape[:-1], self._heads, -1).transpose(1, 2))

        return hook

    def __call__(self, inputs: Mapping[str, Tensor]) -> LayerOutputs:
        """Run one batch (`input_ids`, `attention_mask`, `token_type_ids`, each (B, T) int64)."""
        self._queries, self._keys = [], []
        try:
            given = {name: value for name, value in inputs.items() if name in self._known}
            output = self.model(**given, output_hidden_states=True)
            queries, keys = self._queries, self._keys
        finally:
            self._queries = self._keys = None
        hidden = output.hidden_states
        return LayerOutputs(
            output_logits(output),
            hidden[:1],
            hidden[1:],
            queries if self._factor == 1 else [query * self._factor for query in queries],
            keys,
        )
