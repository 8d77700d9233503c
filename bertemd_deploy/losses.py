"""The parts of the distillation loss beside EMD, and their weighted total.

L = beta (theta (EMD_H + EMD_A) + L_emb) + L_pred   (method of BERT-EMD, equations 8 to 12)
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["batch", "element"]


def embedding_loss(teacher: Tensor, student: Tensor, *, mask: Tensor) -> Tensor:
    """Return L_emb = mean((W e_student - e_teacher)^2) over real tokens and teacher width, in float32.

    Args:
        teacher: (B, T, H) embedding output.
        student: (B, T, H) embedding output, already projected by W where widths differ.
        mask: (B, T) bool, True at real tokens.
    """
    return F.mse_loss(student[mask].float(), teacher[mask].float())


def prediction_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    reduction: Reduction,
) -> Tensor:
    """Return L_pred = alpha * soft cross-entropy at tau (times tau^2) + (1 - alpha) * hard-label cross-entropy.

    Args:
        teacher_logits: (B, classes).
        student_logits: (B, classes).
        labels: (B,) int64 class numbers.
        alpha: share of the soft part, in [0, 1].
        temperature: tau_kd, above 0.
        reduction: "batch" sums the soft part over classes and takes the mean over the batch; "element" takes the mean
            over batch and classes, as the released code does.
    """
    soft = teacher_logits.float().div(temperature).softmax(-1)
    terms = -soft * student_logits.float().div(temperature).log_softmax(-1)
    soft_loss = (terms.mean() if reduction == "element" else terms.sum(-1).mean()) * temperature**2
    if alpha == 1:
        return soft_loss
    return alpha * soft_loss + (1 - alpha) * F.cross_entropy(student_logits.float(), labels)


def regression_loss(teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, *, alpha: float) -> Tensor:
    """Return alpha * MSE to the teacher's output + (1 - alpha) * MSE to the label.

    Args:
        teacher_logits: (B, 1).
        student_logits: (B, 1).
        labels: (B,) float32.
        alpha: share of the teacher, in [0, 1].
    """
    loss = F.mse_loss(student_logits.float(), teacher_logits.float())
    if alpha == 1:
        return loss
    return alpha * loss + (1 - alpha) * F.mse_loss(student_logits[:, 0].float(), labels.float())


def total_loss(
    *,
    attention: Tensor | float,
    hidden: Tensor | float,
    embedding: Tensor | float,
    prediction: Tensor,
    beta: float,
    theta: float,
) -> Tensor:
    """Return beta * (theta * (EMD_H + EMD_A) + L_emb) + L_pred."""
    return beta * (theta * (hidden + attention) + embedding) + prediction
