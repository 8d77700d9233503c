"""Earth Mover's Distance from teacher layers to student layers: tensors in, tensors out, no models, no files.

Source: Li et al., BERT-EMD, EMNLP 2020, https://aclanthology.org/2020.emnlp-main.242
    C (M, N)  cost matrix; C[i, j] is the ground cost of teacher layer i against student layer j
    a, b      marginals over teacher (M,) and student (N,) layers: non-negative, each sums to 1
    F (M, N)  flow = argmin <F, C>  subject to  F 1 = a,  F^T 1 = b,  F >= 0
    EMD       <F, C>; the mass of F is 1 and F is a constant to autograd, so dEMD/dC = F

Axes: M teacher layers, N student layers, B batch, T tokens, H hidden size, A heads, d head size. Both costs are mean squared
differences over real positions; padding counts neither in the sum nor in the denominator (the released code divides by
padded sizes; on unpadded batches the two agree). No layer pair is ever visited by itself: with x_i, y_j the flattened
layers and K their number of real elements,
    C[i, j] = (|x_i|^2 + |y_j|^2 - 2 <x_i, y_j>) / K        one matrix product, accumulated in float32
For attention, <S1, S2>_F of two score maps S = Q K^T is sum((Q1^T Q2) * (K1^T K2)): d x d products and no T x T map. How the
sums are computed block by block, and their gradients, is in `ground_cost`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertemd_deploy.errors import EmdError
from bertemd_deploy.ground_cost import attention_sums, hidden_sums

Layers = Tensor | Sequence[Tensor]
AttentionMethod = Literal["auto", "scores", "factored"]
CostAttention = Literal["ratio", "softmax"]
_MASS_TOLERANCE = 1e-6
_COST_FLOOR = 1e-9  # of the largest unit cost: keeps a free layer's weight finite


def hidden_cost(teacher: Layers, student: Layers, *, mask: Tensor) -> Tensor:
    """Return C_H, the mean squared difference of every teacher and student layer's hidden states.

    C_H[i, j] = mean((h_teacher[i] - W h_student[j])^2) over real tokens and teacher width.

    Args:
        teacher: (M, B, T, H) hidden states, or a sequence of M (B, T, H).
        student: (N, B, T, H) hidden states, or a sequence, already projected by W where widths differ.
        mask: (B, T) bool, True at real tokens.

    Returns:
        (M, N) float32 costs, at least 0, differentiable once in both.

    Raises:
        EmdError: the shapes do not fit, or no token is real.
    """
    teachers, students = _layers(teacher), _layers(student)
    shapes = {tuple(layer.shape) for layer in (*teachers, *students)}
    if len(shapes) != 1 or mask.shape != teachers[0].shape[:2]:
        raise EmdError(
            f"hidden_cost: teacher {_shape(teachers)}, student {_shape(students)} and mask {tuple(mask.shape)} "
            "should agree in batch, tokens and width."
        )
    elements = _real_tokens(mask).sum() * teachers[0].shape[-1]
    return hidden_sums(teachers, students, mask=_padded(mask)) / elements


def attention_cost(
    teacher_query: Layers,
    teacher_key: Layers,
    student_query: Layers,
    student_key: Layers,
    *,
    mask: Tensor,
    method: AttentionMethod = "auto",
) -> Tensor:
    """Return C_A, the mean squared difference of every teacher and student layer's attention scores before softmax.

    C_A[i, j] = mean((s_teacher[i] - s_student[j])^2) over heads, queries and keys, s = Q K^T / sqrt(d). With equal head
    counts head meets head; with unequal ones the head means of the scores are compared.

    Args:
        teacher_query: (M, B, A, T, d) before scaling, or a sequence of M (B, A, T, d).
        teacher_key: likewise.
        student_query: (N, B, A', T, d') before scaling, or a sequence.
        student_key: likewise.
        mask: (B, T) bool, True at real tokens.
        method: "scores" builds the score maps, "factored" never does, "auto" takes the one with less arithmetic. Same
            result either way.

    Returns:
        (M, N) float32 costs, at least 0, differentiable once in all four.

    Raises:
        EmdError: the shapes do not fit, or no token is real.
    """
    teacher = list(zip(_layers(teacher_query), _layers(teacher_key), strict=True))
    student = list(zip(_layers(student_query), _layers(student_key), strict=True))
    for pairs in (teacher, student):
        shapes = {tuple(part.shape) for pair in pairs for part in pair}
        if len(shapes) != 1 or (pairs[0][0].shape[0], pairs[0][0].shape[2]) != mask.shape:
            raise EmdError(
                f"attention_cost: query {_shape([pair[0] for pair in pairs])}, key {_shape([pair[1] for pair in pairs])} "
                f"and mask {tuple(mask.shape)} do not fit."
            )
    lengths = _real_tokens(mask)
    heads = teacher[0][0].shape[1]
    if heads != student[0][0].shape[1]:
        teacher, student = ([_mean_head(*pair) for pair in pairs] for pairs in (teacher, student))
        heads = 1
    chosen = None if method == "auto" else method
    return attention_sums(teacher, student, mask=_padded(mask), method=chosen) / (lengths.square().sum() * heads)


def solve_flow(cost_matrix: Tensor, *, teacher_weights: Tensor, student_weights: Tensor, mass: float = 1.0) -> Tensor:
    """Return the cheapest flow from teacher layers to student layers (F above), solved exactly by POT and checked.

    With `mass` m below 1 the teacher offers more than is asked for, F 1 <= a / m and F^T 1 = b, the Earth Mover's Distance of
    unequal masses (Rubner et al. 2000): every student layer learns its share, teacher layers may be left alone.

    Args:
        cost_matrix: (M, N) ground costs, finite, any float dtype and device.
        teacher_weights: (M,) marginal a.
        student_weights: (N,) marginal b.
        mass: m, share of the teacher's mass that is moved, in (0, 1].

    Returns:
        (M, N) flow, float64, on the CPU, without gradient; its mass is 1.

    Raises:
        EmdError: a cost is not finite, a marginal is negative, not finite or not of mass 1, the mass is out of bounds, or
            the solver stopped short of the optimum.
    """
    cost = cost_matrix.detach().to("cpu", torch.float64).numpy()
    a = teacher_weights.detach().to("cpu", torch.float64).numpy()
    b = student_weights.detach().to("cpu", torch.float64).numpy()
    teachers, students = len(a), len(b)
    if cost.shape != (teachers, students):
        raise EmdError(f"cost matrix {cost.shape} does not fit {teachers} teacher and {students} student weights.")
    if not np.isfinite(cost).all():
        row, column = np.argwhere(~np.isfinite(cost))[0]
        raise EmdError(
            f"cost matrix {teachers}x{students}: non-finite entry at teacher layer {row}, student layer {column}. "
            "Lower distill.learning_rate or inspect hidden_states."
        )
    for side, weights in (("teacher", a), ("student", b)):
        if not np.isfinite(weights).all() or (weights < 0).any() or abs(weights.sum() - 1) > _MASS_TOLERANCE:
            raise EmdError(
                f"{side} weights should be non-negative and sum to 1, found {np.round(weights, 6).tolist()}."
            )
    if not 0 < mass <= 1:
        raise EmdError(f"the mass that is moved should be above 0 and at most 1, found {mass}.")
    a, b = a / a.sum(), b / b.sum()
    return torch.from_numpy(_exact_flow(cost, a, b) if mass == 1 else _partial_flow(cost, a, b, mass))


def emd_loss(cost_matrix: Tensor, flow: Tensor) -> Tensor:
    """Return <F, C>, a scalar whose gradient in C is F (the envelope theorem: F is the optimum, so constant).

    Args:
        cost_matrix: (M, N) costs with gradient.
        flow: (M, N) flow of mass 1, from `solve_flow` or a fixed mapping.
    """
    return (flow.to(cost_matrix.device, cost_matrix.dtype) * cost_matrix).sum()


def cost_attention(
    cost_matrix: Tensor,
    flow: Tensor,
    *,
    teacher_weights: Tensor,
    student_weights: Tensor,
    mode: CostAttention = "ratio",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the marginals of the next step: layers that are cheap to move get more weight.

    Unit costs u_i = sum_j F[i,j] C[i,j] / a_i (teacher), u_j = sum_i F[i,j] C[i,j] / b_j (student); inverse-cost scores
    r_k = (sum_l u_l) / u_k on each side. "ratio" (released code since 2021) is w = r / sum(r); "softmax" (the paper) is
    w = softmax(r / temperature). A layer of zero weight moves nothing, has no unit cost and stays at zero; a layer moved
    for nothing counts as one of nearly zero cost. In a partial flow, u_i is over the mass that layer i moved, and of a layer
    that moved none it is the least of its costs.

    Args:
        cost_matrix: (M, N) costs of this step.
        flow: (M, N) flow of this step under the two weights.
        teacher_weights: (M,) marginal a of this step.
        student_weights: (N,) marginal b of this step.
        mode: form of the update.
        temperature: T_emd, for "softmax" only.

    Returns:
        (M,) teacher and (N,) student weights, float64 on the CPU, each summing to 1.
    """
    moved, costs = flow.detach().to("cpu", torch.float64), cost_matrix.detach().to("cpu", torch.float64)
    teacher = _new_weights(moved, costs, teacher_weights.to("cpu", torch.float64), mode=mode, temperature=temperature)
    student = _new_weights(
        moved.T, costs.T, student_weights.to("cpu", torch.float64), mode=mode, temperature=temperature
    )
    return teacher, student


def uniform_weights(layers: int) -> Tensor:
    """Return (layers,) equal weights that sum to 1, float64: the marginals at the start."""
    return torch.full((layers,), 1.0 / layers, dtype=torch.float64)


def _new_weights(flow: Tensor, costs: Tensor, weights: Tensor, *, mode: CostAttention, temperature: float) -> Tensor:
    """Return the new weights of the layers that are the rows of `flow` and `costs`."""
    active = weights > 0
    mass = flow.sum(1)
    unit = torch.where(mass > 0, (flow * costs).sum(1) / mass, costs.amin(1))[active]
    highest = unit.max()
    if not highest > 0:
        ratio = torch.full_like(unit, float(len(unit)))
    else:
        unit = unit.clamp(min=float(highest) * _COST_FLOOR)
        ratio = unit.sum() / unit
    fresh = ratio / ratio.sum() if mode == "ratio" else torch.softmax(ratio / temperature, 0)
    result = torch.zeros_like(weights)
    result[active] = fresh
    return result


def _exact_flow(cost: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT only warns of what is raised below
        flow, log = ot.emd(a, b, cost, log=True)
    if log["result_code"] != 1:
        raise EmdError(f"the flow's solver stopped short of the optimum (POT: {log['warning'] or log['result_code']}).")
    gap = max(np.abs(flow.sum(1) - a).max(), np.abs(flow.sum(0) - b).max())
    if not gap <= _MASS_TOLERANCE or (flow < 0).any():
        raise EmdError(f"the flow misses its marginals by {gap:.1e} (allowed {_MASS_TOLERANCE:.0e}).")
    return np.asarray(flow, dtype=np.float64)


def _partial_flow(
    cost: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64], mass: float
) -> NDArray[np.float64]:
    """Solve with one more student layer, which takes for nothing what is not moved."""
    padded = np.append(cost, np.zeros((len(a), 1)), axis=1)
    moved = _exact_flow(padded, a, np.append(b * mass, 1.0 - mass))[:, :-1]
    return np.asarray(moved / mass, dtype=np.float64)


def _layers(layers: Layers) -> list[Tensor]:
    return list(layers)


def _shape(layers: list[Tensor]) -> tuple[int, ...]:
    return (len(layers), *layers[0].shape)


def _real_tokens(mask: Tensor) -> Tensor:
    """Return (B,) counts of real tokens."""
    if mask.dtype != torch.bool:  # ones and zeros would pick rows 1 and 0 instead of masking
        raise EmdError(f"the mask should be bool, found {mask.dtype}. Pass attention_mask.bool().")
    # On an accelerator asking would wait for it; the quotient is not a number there, which solve_flow reports.
    if mask.device.type == "cpu" and not mask.any():
        raise EmdError("the mask marks no real token; a cost over nothing is not defined.")
    return mask.sum(1)


def _padded(mask: Tensor) -> Tensor | None:
    """Return the mask, or None where it is known that nothing is padded."""
    return None if mask.device.type == "cpu" and bool(mask.all()) else mask


def _mean_head(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return one head whose scores are the mean over heads, each scaled by its own 1 / sqrt(d).

    mean_a Q_a K_a^T / sqrt(d) = [Q_1 .. Q_A] [K_1 .. K_A]^T / (A sqrt(d)), and the one head of size A d is scaled by
    1 / sqrt(A d), so the queries are divided by sqrt(A).
    """
    heads = query.shape[1]
    return query.transpose(1, 2).flatten(2)[:, None].float() / math.sqrt(heads), key.transpose(1, 2).flatten(2)[:, None]
