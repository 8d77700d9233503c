from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bertemd_deploy.losses import embedding_loss, prediction_loss, regression_loss, total_loss

# softmax of the teacher: (3/4, 1/4); log-softmax of the student: (-log 2, -log 2) and (-log 5, log 4/5)
TEACHER = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
STUDENT = torch.tensor([[0.0, 0.0], [0.0, math.log(4)]])
LABELS = torch.tensor([0, 1])
ROWS = (math.log(2), 0.75 * math.log(5) - 0.25 * math.log(4 / 5))


def soft(reduction, temperature=1.0, alpha=1.0):
    return prediction_loss(TEACHER, STUDENT, LABELS, alpha=alpha, temperature=temperature, reduction=reduction)


def test_soft_cross_entropy_by_hand():
    assert_close(soft("batch"), torch.tensor(sum(ROWS) / 2))
    assert_close(soft("element"), torch.tensor(sum(ROWS) / 4))


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_element_reduction_is_batch_reduction_over_classes(classes):
    teacher, student = torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(5, dtype=torch.int64)

    def loss(reduction):
        return prediction_loss(teacher, student, labels, alpha=1.0, temperature=3.0, reduction=reduction)

    assert_close(loss("element") * classes, loss("batch"))


def test_temperature_softens_both_sides_and_is_paid_back_squared():
    terms = -(TEACHER / 2).softmax(-1) * (STUDENT / 2).log_softmax(-1)
    assert_close(soft("batch", temperature=2.0), 4 * terms.sum(-1).mean())


def test_alpha_shares_between_teacher_and_labels():
    hard = torch.tensor((math.log(2) - math.log(4 / 5)) / 2)
    assert_close(soft("batch", alpha=0.0), hard)
    assert_close(soft("batch", alpha=0.25), 0.25 * soft("batch") + 0.75 * hard)


def test_gradient_vanishes_where_student_equals_teacher():
    student = TEACHER.clone().requires_grad_()
    prediction_loss(TEACHER, student, LABELS, alpha=1.0, temperature=2.0, reduction="batch").backward()
    assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)


def test_embedding_loss_counts_real_tokens_only():
    teacher = torch.tensor([[[1.0, 2.0], [7.0, 7.0]]])
    student = torch.tensor([[[0.0, 0.0], [-9.0, 9.0]]], dtype=torch.bfloat16)
    loss = embedding_loss(teacher, student, mask=torch.tensor([[True, False]]))
    assert_close(loss, torch.tensor(2.5))


def test_regression_loss_by_hand():
    teacher, student, labels = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]]), torch.tensor([2.0, 4.0])
    assert_close(regression_loss(teacher, student, labels, alpha=1.0), torch.tensor(2.5))
    assert_close(regression_loss(teacher, student, labels, alpha=0.0), torch.tensor(2.0))
    assert_close(regression_loss(teacher, student, labels, alpha=0.5), torch.tensor(2.25))


def test_losses_are_float32_for_low_precision_logits():
    low = [tensor.bfloat16() for tensor in (TEACHER, STUDENT)]
    assert prediction_loss(*low, LABELS, alpha=0.5, temperature=1.0, reduction="batch").dtype == torch.float32
    assert regression_loss(low[0][:, :1], low[1][:, :1], LABELS.float(), alpha=0.5).dtype == torch.float32


def test_total_loss_by_hand():
    parts = {"attention": torch.tensor(1.0), "hidden": torch.tensor(2.0), "embedding": torch.tensor(4.0)}
    loss = total_loss(**parts, prediction=torch.tensor(8.0), beta=0.5, theta=0.25)
    assert_close(loss, torch.tensor(0.5 * (0.25 * 3 + 4) + 8))


def test_total_loss_without_layer_losses_is_the_prediction():
    prediction = F.mse_loss(TEACHER, STUDENT)
    assert_close(
        total_loss(attention=0.0, hidden=0.0, embedding=0.0, prediction=prediction, beta=1, theta=1), prediction
    )
