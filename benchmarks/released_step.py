"""The opponent of `train_step.py`: one BERT-EMD training step the way the authors' released code computes it.

Written anew from the description of that step; no line of it is the authors'. What it keeps of theirs:
    score maps      both models run eager attention and hand out S = Q K^T / sqrt(d) + mask of every layer, (B, A, T, T)
    pair loops      for each of the M x N layer pairs by itself: scores of masked keys (values <= -1e2) of both maps are set
                    to 0, then one mean squared error, over padded sizes; likewise for hidden states, where the student's go
                    through the shared projection layer by layer
    flow            both cost matrices copied to the host each by itself, solved, and the layer weights moved by the ratio
                    rule, averaged over both sides
    the rest        embedding loss, soft cross-entropy as the mean over batch and classes, gradients clipped at norm 1,
                    float32 throughout, AdamW parameter by parameter
Where the released code is slower than it need be for reasons that are no part of the method, this is not: the solver is
POT's, and there is no projection where widths agree. `mask_once` masks each map once, outside the pairs: the same numbers
for less, as a careful reader of that code would have it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ot
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.objective import Distiller

ATTENTION = "released"  # the attention implementation both models must be built with
MASKED = -1e2
MAX_GRAD_NORM = 1.0
NO_DECAY = ("bias", "LayerNorm.weight")


def attention_with_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return the attention output (B, T, A, d) and, in place of probabilities, the masked scores (B, A, T, T)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probs = F.dropout(scores.softmax(-1), p=dropout, training=module.training)
    return (probs @ value).transpose(1, 2).contiguous(), scores


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention_with_scores)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)


class ReleasedStep:
    """Teacher and trained student with the optimizer and the layer weights of a run."""

    def __init__(
        self,
        teacher: nn.Module,
        trained: Distiller,
        *,
        beta: float,
        learning_rate: float,
        weight_decay: float,
        mask_once: bool = False,
    ) -> None:
        """Take models built with `attn_implementation=ATTENTION`; theta and both temperatures are 1, as published."""
        self.mask_once = mask_once
        self.teacher, self.trained, self.beta = teacher, trained, beta
        layers: Any = (teacher.config, trained.student.config)
        self.weights = [np.full(config.num_hidden_layers, 1 / config.num_hidden_layers) for config in layers]
        named = list(trained.named_parameters())
        groups = [
            {"params": [value for name, value in named if not name.endswith(NO_DECAY)], "weight_decay": weight_decay},
            {"params": [value for name, value in named if name.endswith(NO_DECAY)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate)

    def batch(self, data: DataSlice, rows: NDArray[np.int64], *, length: int | None = None) -> dict[str, Tensor]:
        """Return `rows` as the models' inputs, padded to `length` or the longest row."""
        arrays = data.examples.batch(rows, pad_id=0, length=length)
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, float]:
        """Train on one batch (`input_ids`, `attention_mask`, `token_type_ids`, each (B, T)); return the loss's parts."""
        self.trained.train()
        with torch.no_grad():
            teacher = self.teacher(**inputs, output_hidden_states=True, output_attentions=True)
        student = self.trained.student(**inputs, output_hidden_states=True, output_attentions=True)
        projected = [self.trained.project(hidden) for hidden in student.hidden_states]
        maps = [list(side.attentions) for side in (teacher, student)]
        if self.mask_once:
            maps = [[unmasked(scores) for scores in side] for side in maps]
        costs = pair_costs(teacher=maps[0], student=maps[1], masked=not self.mask_once)
        attention, attention_weights = self._emd(costs)
        hidden, hidden_weights = self._emd(pair_costs(teacher=list(teacher.hidden_states[1:]), student=projected[1:]))
        self.weights = [(left + right) / 2 for left, right in zip(attention_weights, hidden_weights, strict=True)]
        embedding = F.mse_loss(projected[0], teacher.hidden_states[0])
        prediction = -(teacher.logits.softmax(-1) * student.logits.log_softmax(-1)).mean()
        loss = self.beta * (attention + hidden + embedding) + prediction
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        parts = {"attention": attention, "hidden": hidden, "embedding": embedding, "prediction": prediction}
        return {name: part.item() for name, part in parts.items()}

    def _emd(self, costs: Tensor) -> tuple[Tensor, list[np.ndarray]]:
        """Return <F, C> and the next teacher and student weights that this cost matrix (M, N) asks for."""
        on_host = costs.detach().cpu().numpy().astype(np.float64)
        flow = ot.emd(*self.weights, on_host)
        moved = flow * on_host
        units = [moved.sum(1) / self.weights[0], moved.sum(0) / self.weights[1]]
        scores = [unit.sum() / unit for unit in units]
        return (torch.from_numpy(flow).float() * costs).sum(), [score / score.sum() for score in scores]


def unmasked(scores: Tensor) -> Tensor:
    """Return scores with those of masked keys at 0."""
    return torch.where(scores <= MASKED, torch.zeros_like(scores), scores)


def pair_costs(*, teacher: list[Tensor], student: list[Tensor], masked: bool = False) -> Tensor:
    """Return (M, N) mean squared differences, one pair of layers after the other, over padded sizes.

    With `masked`, the layers are score maps that still hold their mask, which every pair takes out again.
    """
    columns = []
    for mine in student:
        column = []
        for theirs in teacher:
            if masked:
                mine, theirs = unmasked(mine), unmasked(theirs)
            column.append(F.mse_loss(mine, theirs))
        columns.append(torch.stack(column))
    return torch.stack(columns, 1)
