"""The parts of the distillation loss beside EMD, and their weighted total.

L = beta (theta (EMD_H + EMD_A) + L_emb) + L_pred   (method of BERT-EMD, equations 8 to 12)
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bertemd_deploy.artifact import NOT_SCORED
from bertemd_deploy.tasks import Kind

Reduction = Literal["batch", "element"]


def prediction_losses(
    kind: Kind,
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    reduction: Reduction,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the prediction loss of each unit, alpha * soft * tau^2 + (1 - alpha) * hard; L_pred is their mean.

    Units are the rows of the batch, or for tokens those with a label, in order. The soft part, from the teacher's
    distribution at temperature tau to the student's:

        classification, token-classification  -sum_c softmax(t / tau)_c log softmax(s / tau)_c
        question-answering                    the same over the row's real positions, mean of start and end
        multilabel                            sum over labels of the binary cross-entropy to sigmoid(t / tau)
        regression                            (s - t)^2, without a temperature

    The hard part is the same to the label: cross-entropy, binary cross-entropy, or squared error.

    Args:
        kind: of the task.
        teacher_logits: (B, outputs), (B, T, labels) or (B, T, 2).
        student_logits: as the teacher's.
        labels: of the batch, as `DataSlice.batch` gives them.
        alpha: share of the soft part, in [0, 1].
        temperature: tau_kd, above 0.
        reduction: "batch" sums over classes; "element" divides the soft part by their number (of question answering:
            the row's real positions; of several labels: both parts), as the released code does.
        mask: (B, T) bool, True at real tokens; needed for question answering.

    Returns:
        (units,) float32.
    """
    teacher, student = teacher_logits.float(), student_logits.float()
    if kind == "regression":
        soft, hard = (student - teacher)[:, 0].square(), (student[:, 0] - labels.float()).square()
        return alpha * soft + (1 - alpha) * hard
    if kind == "multilabel":
        target = alpha * temperature**2 * _binary(student / temperature, (teacher / temperature).sigmoid())
        terms = target + (1 - alpha) * _binary(student, labels.float())
        return terms.mean(-1) if reduction == "element" else terms.sum(-1)
    if kind == "question-answering":
        teacher, student = (_over_positions(logits, mask) for logits in (teacher, student))
        labels = labels.reshape(-1)
    elif kind == "token-classification":
        scored = labels != NOT_SCORED
        teacher, student, labels = teacher[scored], student[scored], labels[scored]
    probabilities = (teacher / temperature).softmax(-1)
    terms = -probabilities * (student / temperature).log_softmax(-1).masked_fill(teacher.isneginf(), 0.0)
    units = terms.sum(-1)
    if reduction == "element":
        units = units / (~teacher.isneginf()).sum(-1)
    units = alpha * temperature**2 * units
    if alpha < 1:
        units = units + (1 - alpha) * F.cross_entropy(student, labels, reduction="none")
    return units.view(-1, 2).mean(-1) if kind == "question-answering" else units


def supervised_losses(kind: Kind, logits: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the loss of each unit against its label, as in fine-tuning; units as in `prediction_losses`.

    Cross-entropy; squared error for regression; the mean binary cross-entropy over the labels for multilabel; the mean of
    start and end cross-entropies for question answering.

    Args:
        kind: of the task.
        logits: (B, outputs), (B, T, labels) or (B, T, 2).
        labels: of the batch, as `DataSlice.batch` gives them.
        mask: (B, T) bool, True at real tokens; needed for question answering.

    Returns:
        (units,) float32.
    """
    logits = logits.float()
    if kind == "regression":
        return (logits[:, 0] - labels.float()).square()
    if kind == "multilabel":
        return _binary(logits, labels.float()).mean(-1)
    if kind == "question-answering":
        losses = F.cross_entropy(_over_positions(logits, mask), labels.reshape(-1), reduction="none")
        return losses.view(-1, 2).mean(-1)
    if kind == "token-classification":
        scored = labels != NOT_SCORED
        logits, labels = logits[scored], labels[scored]
    return F.cross_entropy(logits, labels, reduction="none")


def total_loss(
    *,
    prediction: Tensor,
    attention: Tensor | float = 0.0,
    hidden: Tensor | float = 0.0,
    embedding: Tensor | float = 0.0,
    beta: float,
    theta: float,
) -> Tensor:
    """Return beta * (theta * (EMD_H + EMD_A) + L_emb) + L_pred; parts that are not given are 0."""
    return beta * (theta * (hidden + attention) + embedding) + prediction


def _binary(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def _over_positions(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return start and end logits (B, T, 2) as two rows (2 B, T) per row, minus infinity at padding."""
    if mask is None:
        raise TypeError("question answering needs the mask of real tokens")
    return logits.masked_fill(~mask[..., None], -torch.inf).transpose(1, 2).flatten(0, 1)
