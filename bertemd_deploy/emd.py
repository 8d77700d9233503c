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
For attention, <S1, S2>_F of two score maps S = Q K^T is sum((Q1^T Q2) * (K1^T K2)): d x d products and no T x T map.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertemd_deploy.errors import EmdError

AttentionMethod = Literal["auto", "scores", "factored"]
CostAttention = Literal["ratio", "softmax"]
_MASS_TOLERANCE = 1e-6
_COST_FLOOR = 1e-9  # of the largest unit cost: keeps a free layer's weight finite


def hidden_cost(teacher: Tensor, student: Tensor, *, mask: Tensor) -> Tensor:
    """Return C_H, the mean squared difference of every teacher and student layer's hidden states.

    C_H[i, j] = mean((h_teacher[i] - W h_student[j])^2) over real tokens and teacher width.

    Args:
        teacher: (M, B, T, H) hidden states.
        student: (N, B, T, H) hidden states, already projected by W where widths differ.
        mask: (B, T) bool, True at real tokens.

    Returns:
        (M, N) float32 costs, at least 0, differentiable in both.

    Raises:
        EmdError: the shapes do not fit, or no token is real.
    """
    if teacher.shape[1:] != student.shape[1:] or mask.shape != teacher.shape[1:3]:
        raise EmdError(
            f"hidden_cost: teacher {tuple(teacher.shape)}, student {tuple(student.shape)} and mask {tuple(mask.shape)} "
            "should agree in batch, tokens and width."
        )
    _check_mask(mask)
    elements = _real(int(mask.sum())) * teacher.shape[-1]
    x = teacher[:, mask].flatten(1)
    y = student[:, mask].flatten(1)
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float(), y.float()
        # Subtracting one vector from every layer changes no difference and keeps the products small: less cancellation.
        centre = x.detach().mean(0)
        x, y = x - centre, y - centre
        return _squared_distances(x @ y.T, x.square().sum(1), y.square().sum(1)) / elements


def attention_cost(
    teacher_query: Tensor,
    teacher_key: Tensor,
    student_query: Tensor,
    student_key: Tensor,
    *,
    mask: Tensor,
    method: AttentionMethod = "auto",
) -> Tensor:
    """Return C_A, the mean squared difference of every teacher and student layer's attention scores before softmax.

    C_A[i, j] = mean((s_teacher[i] - s_student[j])^2) over heads, queries and keys, s = Q K^T / sqrt(d). With equal head
    counts head meets head; with unequal ones the head means of the scores are compared.

    Args:
        teacher_query: (M, B, A, T, d) before scaling.
        teacher_key: (M, B, A, T, d).
        student_query: (N, B, A', T, d') before scaling.
        student_key: (N, B, A', T, d').
        mask: (B, T) bool, True at real tokens.
        method: "scores" builds the score maps, "factored" never does, "auto" takes the one with less arithmetic. Same
            result either way.

    Returns:
        (M, N) float32 costs, at least 0, differentiable in all four.

    Raises:
        EmdError: the shapes do not fit, or no token is real.
    """
    if teacher_query.shape[1] != student_query.shape[1] or teacher_query.shape[3] != student_query.shape[3]:
        raise EmdError(
            f"attention_cost: teacher {tuple(teacher_query.shape)} and student {tuple(student_query.shape)} "
            "should agree in batch and tokens."
        )
    with torch.autocast(teacher_query.device.type, enabled=False):
        teacher = _scaled_heads(teacher_query, teacher_key, mask)
        student = _scaled_heads(student_query, student_key, mask)
        if teacher[0].shape[2] != student[0].shape[2]:
            teacher, student = _mean_head(*teacher), _mean_head(*student)
        if method == "auto":
            method = _cheaper_method(teacher[0].shape, student[0].shape)
        compute = _cost_from_scores if method == "scores" else _cost_factored
        lengths = mask.sum(1)
        elements = _real(int(lengths.square().sum())) * teacher[0].shape[2]
        return compute(teacher, student) / elements


def solve_flow(cost_matrix: Tensor, *, teacher_weights: Tensor, student_weights: Tensor) -> Tensor:
    """Return the cheapest flow from teacher layers to student layers (F above), solved exactly by POT and checked.

    Args:
        cost_matrix: (M, N) ground costs, finite, any float dtype and device.
        teacher_weights: (M,) marginal a.
        student_weights: (N,) marginal b.

    Returns:
        (M, N) flow, float64, on the CPU, without gradient; its mass is 1.

    Raises:
        EmdError: a cost is not finite, a marginal is negative, not finite or not of mass 1, or the solver stopped short
            of the optimum.
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
    return torch.from_numpy(_exact_flow(cost, a / a.sum(), b / b.sum()))


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
    for nothing counts as one of nearly zero cost.

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
    moved = flow.detach().to("cpu", torch.float64) * cost_matrix.detach().to("cpu", torch.float64)
    teacher = _new_weights(moved.sum(1), teacher_weights.to("cpu", torch.float64), mode=mode, temperature=temperature)
    student = _new_weights(moved.sum(0), student_weights.to("cpu", torch.float64), mode=mode, temperature=temperature)
    return teacher, student


def uniform_weights(layers: int) -> Tensor:
    """Return (layers,) equal weights that sum to 1, float64: the marginals at the start."""
    return torch.full((layers,), 1.0 / layers, dtype=torch.float64)


def _new_weights(moved: Tensor, weights: Tensor, *, mode: CostAttention, temperature: float) -> Tensor:
    active = weights > 0
    unit = moved[active] / weights[active]
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


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:  # ones and zeros would pick rows 1 and 0 instead of masking
        raise EmdError(f"the mask should be bool, found {mask.dtype}. Pass attention_mask.bool().")


def _real(count: int) -> int:
    if count == 0:
        raise EmdError("the mask marks no real token; a cost over nothing is not defined.")
    return count


def _squared_distances(products: Tensor, teacher_squares: Tensor, student_squares: Tensor) -> Tensor:
    """Return (M, N) |x|^2 + |y|^2 - 2 <x, y>, clamped at 0 where cancellation left a tiny negative."""
    return (teacher_squares[:, None] + student_squares[None, :] - 2.0 * products).clamp(min=0.0)


def _scaled_heads(query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return masked float32 queries (divided by sqrt(d)) and keys: padded positions give scores of 0."""
    if query.shape != key.shape or mask.shape != (query.shape[1], query.shape[3]):
        raise EmdError(
            f"attention_cost: query {tuple(query.shape)}, key {tuple(key.shape)} and mask {tuple(mask.shape)} do not fit."
        )
    _check_mask(mask)
    real = mask[None, :, None, :, None]
    scale = 1.0 / math.sqrt(query.shape[-1])
    return query.float().masked_fill(~real, 0.0) * scale, key.float().masked_fill(~real, 0.0)


def _mean_head(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return one head whose scores are the mean over heads: mean_a Q_a K_a^T = [Q_1 .. Q_A] [K_1 .. K_A]^T / A."""
    layers, batch, heads, tokens, size = query.shape
    shape = (layers, batch, 1, tokens, heads * size)
    return query.transpose(2, 3).reshape(shape) / heads, key.transpose(2, 3).reshape(shape)


def _cheaper_method(teacher: torch.Size, student: torch.Size) -> AttentionMethod:
    """Return the method with fewer multiplications for one head of one example."""
    (teachers, _, _, tokens, teacher_size), (students, _, _, _, student_size) = teacher, student
    wide_teacher, wide_student = teachers * teacher_size, students * student_size
    scores = tokens**2 * (wide_teacher + wide_student + teachers * students)
    own = teachers * teacher_size**2 + students * student_size**2
    factored = 2 * tokens * (wide_teacher * wide_student + own)
    return "factored" if factored < scores else "scores"


def _cost_from_scores(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> Tensor:
    x = (teacher[0] @ teacher[1].transpose(-1, -2)).flatten(1)
    y = (student[0] @ student[1].transpose(-1, -2)).flatten(1)
    centre = x.detach().mean(0)
    x, y = x - centre, y - centre
    return _squared_distances(x @ y.T, x.square().sum(1), y.square().sum(1))


def _cost_factored(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> Tensor:
    products = _factored_products(teacher, student)
    return _squared_distances(products, _factored_squares(*teacher), _factored_squares(*student))


def _factored_products(teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor]) -> Tensor:
    """Return (M, N) inner products of score maps, one batched d x d product for queries and one for keys."""
    (teachers, _, _, _, size), (students, _, _, _, other) = teacher[0].shape, student[0].shape

    def gram(left: Tensor, right: Tensor) -> Tensor:
        # (B, A, M d, T) @ (B, A, T, N d')
        return left.permute(1, 2, 0, 4, 3).flatten(2, 3) @ right.permute(1, 2, 3, 0, 4).flatten(3, 4)

    both = (gram(teacher[0], student[0]) * gram(teacher[1], student[1])).sum((0, 1))
    return both.view(teachers, size, students, other).sum((1, 3))


def _factored_squares(query: Tensor, key: Tensor) -> Tensor:
    """Return (layers,) squared norms of the score maps."""
    return ((query.transpose(-1, -2) @ query) * (key.transpose(-1, -2) @ key)).sum((1, 2, 3, 4))
