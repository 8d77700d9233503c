from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bertemd_deploy.losses import (
    prediction_losses,
    supervised_losses,
    total_loss,
)
from bertemd_deploy.tasks import Kind

# softmax of the teacher: (3/4, 1/4); log-softmax of the student: (-log 2, -log 2) and (-log 5, log 4/5)
TEACHER = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
STUDENT = torch.tensor([[0.0, 0.0], [0.0, math.log(4)]])
LABELS = torch.tensor([0, 1])
ROWS = (math.log(2), 0.75 * math.log(5) - 0.25 * math.log(4 / 5))


def soft(reduction, temperature=1.0, alpha=1.0):
    """L_pred of two rows of two classes."""
    return prediction_losses(
        "classification", TEACHER, STUDENT, LABELS, alpha=alpha, temperature=temperature, reduction=reduction
    ).mean()


def test_soft_cross_entropy_by_hand():
    assert_close(soft("batch"), torch.tensor(sum(ROWS) / 2))
    assert_close(soft("element"), torch.tensor(sum(ROWS) / 4))


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_element_reduction_is_batch_reduction_over_classes(classes):
    teacher, student = torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(5, dtype=torch.int64)

    def loss(reduction):
        return prediction_losses(
            "classification", teacher, student, labels, alpha=1.0, temperature=3.0, reduction=reduction
        ).mean()

    assert_close(loss("element") * classes, loss("batch"))


def test_temperature_softens_both_sides_and_is_paid_back_squared():
    terms = -(TEACHER / 2).softmax(-1) * (STUDENT / 2).log_softmax(-1)
    assert_close(soft("batch", temperature=2.0), 4 * terms.sum(-1).mean())


def test_alpha_shares_between_teacher_and_labels():
    hard = torch.tensor((math.log(2) - math.log(4 / 5)) / 2)
    assert_close(soft("batch", alpha=0.0), hard)
    assert_close(soft("batch", alpha=0.25), 0.25 * soft("batch") + 0.75 * hard)


def test_total_loss_by_hand():
    parts = {"attention": torch.tensor(1.0), "hidden": torch.tensor(2.0), "embedding": torch.tensor(4.0)}
    loss = total_loss(**parts, prediction=torch.tensor(8.0), beta=0.5, theta=0.25)
    assert_close(loss, torch.tensor(0.5 * (0.25 * 3 + 4) + 8))


def test_total_loss_without_layer_losses_is_the_prediction():
    prediction = F.mse_loss(TEACHER, STUDENT)
    assert_close(total_loss(prediction=prediction, beta=1, theta=1), prediction)
    assert_close(
        total_loss(attention=0.0, hidden=0.0, embedding=0.0, prediction=prediction, beta=1, theta=1), prediction
    )


# ---- the loss of each unit, by kind of task


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def units(kind, teacher, student, labels, *, alpha=0.3, temperature=2.0, reduction="batch", mask=None):
    return prediction_losses(
        kind, teacher, student, labels, alpha=alpha, temperature=temperature, reduction=reduction, mask=mask
    )


def soft_and_hard(teacher, student, label, *, alpha, temperature):
    """The loss of one unit with its logits (classes,), written out."""
    p = [math.exp(t / temperature) for t in teacher.tolist()]
    q = [math.exp(s / temperature) for s in student.tolist()]
    soft = -sum(one / sum(p) * math.log(other / sum(q)) for one, other in zip(p, q, strict=True))
    hard = -(student[label] - student.exp().sum().log()).item()
    return alpha * temperature**2 * soft + (1 - alpha) * hard


def test_classification_units_are_the_rows():
    teacher, student, labels = seeded(4, 3), seeded(4, 3, seed=1), torch.tensor([0, 2, 1, 1])
    found = units("classification", teacher, student, labels)
    expected = [
        soft_and_hard(*row, int(label), alpha=0.3, temperature=2.0)
        for *row, label in zip(teacher, student, labels, strict=True)
    ]
    assert_close(found, torch.tensor(expected))
    soft, hard = (units("classification", teacher, student, labels, alpha=alpha) for alpha in (1.0, 0.0))
    by_element = units("classification", teacher, student, labels, reduction="element")
    assert_close(by_element, 0.3 * soft / 3 + 0.7 * hard)


def test_token_units_are_the_tokens_with_a_label():
    teacher, student = seeded(2, 4, 3), seeded(2, 4, 3, seed=1)
    labels = torch.tensor([[-100, 2, 0, -100], [-100, 1, -100, -100]])
    found = units("token-classification", teacher, student, labels)
    expected = [
        soft_and_hard(teacher[at], student[at], int(labels[at]), alpha=0.3, temperature=2.0)
        for at in ((0, 1), (0, 2), (1, 1))
    ]
    assert_close(found, torch.tensor(expected))
    scored = labels != -100
    assert_close(
        supervised_losses("token-classification", student, labels).mean(),
        F.cross_entropy(student.transpose(1, 2), labels, ignore_index=-100),
    )
    assert_close(found, units("classification", teacher[scored], student[scored], labels[scored]))


def test_a_batch_without_labels_has_no_units():
    labels = torch.full((2, 4), -100)
    assert units("token-classification", seeded(2, 4, 3), seeded(2, 4, 3), labels).shape == (0,)
    assert supervised_losses("token-classification", seeded(2, 4, 3), labels).shape == (0,)


def test_multilabel_units_sum_over_the_labels():
    teacher, student = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.0, 3.0]])
    labels = torch.tensor([[1.0, 0.0]])

    def binary(target, logit):
        probability = 1 / (1 + math.exp(-logit))
        return -(target * math.log(probability) + (1 - target) * math.log(1 - probability))

    soft = binary(1 / (1 + math.exp(-1.0)), 0.0) + binary(1 / (1 + math.exp(0.5)), 1.5)
    hard = binary(1, 0.0) + binary(0, 3.0)
    found = units("multilabel", teacher, student, labels)
    assert_close(found, torch.tensor([0.3 * 4 * soft + 0.7 * hard]))
    assert_close(units("multilabel", teacher, student, labels, reduction="element"), found / 2)
    assert_close(supervised_losses("multilabel", student, labels), torch.tensor([hard / 2]))


def test_regression_units_are_squared_errors():
    teacher, student = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    labels = torch.tensor([2.0, 4.0])
    for alpha, expected in ((1.0, [1.0, 4.0]), (0.0, [4.0, 0.0]), (0.25, [0.25 + 3, 1.0])):
        assert_close(units("regression", teacher, student, labels, alpha=alpha), torch.tensor(expected))
    assert_close(supervised_losses("regression", student, labels), torch.tensor([4.0, 0.0]))


def test_answer_units_are_the_means_of_start_and_end_over_real_positions():
    teacher, student = seeded(2, 5, 2), seeded(2, 5, 2, seed=1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    labels = torch.tensor([[1, 4], [0, 2]])
    found = units("question-answering", teacher, student, labels, mask=mask)
    expected = []
    for row, length in ((0, 5), (1, 3)):
        ends = [
            soft_and_hard(
                teacher[row, :length, end],
                student[row, :length, end],
                int(labels[row, end]),
                alpha=0.3,
                temperature=2.0,
            )
            for end in (0, 1)
        ]
        expected.append(sum(ends) / 2)
    assert_close(found, torch.tensor(expected))
    by_element = units("question-answering", teacher, student, labels, mask=mask, alpha=1.0, reduction="element")
    whole = units("question-answering", teacher, student, labels, mask=mask, alpha=1.0)
    assert_close(by_element * torch.tensor([5.0, 3.0]), whole)
    hard = units("question-answering", teacher, student, labels, mask=mask, alpha=0.0)
    assert_close(supervised_losses("question-answering", student, labels, mask=mask), hard)


def test_padding_changes_no_answers_loss_and_gets_no_gradient():
    teacher, student = seeded(1, 3, 2), seeded(1, 3, 2, seed=1)
    labels, mask = torch.tensor([[1, 2]]), torch.ones(1, 3, dtype=torch.bool)
    alone = units("question-answering", teacher, student, labels, mask=mask)
    padded = torch.cat([student, torch.full((1, 2, 2), 50.0)], 1).requires_grad_()
    longer = torch.cat([teacher, torch.full((1, 2, 2), 60.0)], 1)
    loss = units("question-answering", longer, padded, labels, mask=F.pad(mask, (0, 2)))
    assert_close(loss, alone)
    loss.sum().backward()
    assert torch.isfinite(padded.grad).all()
    assert_close(padded.grad[:, 3:], torch.zeros(1, 2, 2))
    assert (padded.grad[:, :3] != 0).all()


def test_answers_without_a_mask_are_our_mistake():
    with pytest.raises(TypeError, match="needs the mask of real tokens"):
        supervised_losses("question-answering", seeded(1, 3, 2), torch.tensor([[0, 0]]))


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("reduction", ["batch", "element"])
def test_gradients_agree_with_differences(kind, reduction):
    """Central differences in float32: coarse, but of every entry."""
    shape, labels = {
        "classification": ((3, 4), torch.tensor([0, 3, 1])),
        "regression": ((3, 1), torch.tensor([0.5, -1.0, 2.0])),
        "multilabel": ((3, 4), torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])),
        "token-classification": ((2, 3, 4), torch.tensor([[-100, 2, 0], [-100, 1, -100]])),
        "question-answering": ((2, 3, 2), torch.tensor([[1, 2], [0, 0]])),
    }[kind]
    mask = torch.tensor([[True] * 3, [True, True, False]])
    teacher, student = seeded(*shape), seeded(*shape, seed=1).requires_grad_()

    def loss(logits):
        return units(kind, teacher, logits, labels, reduction=reduction, mask=mask).sum()

    loss(student).backward()
    for at in range(student.numel()):
        step = torch.zeros(student.numel()).index_fill_(0, torch.tensor([at]), 1e-2).view(shape)
        with torch.no_grad():
            difference = (loss(student + step) - loss(student - step)) / 2e-2
        torch.testing.assert_close(student.grad.flatten()[at], difference, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", ["classification", "multilabel", "token-classification", "question-answering"])
def test_a_student_like_its_teacher_has_nothing_to_learn_from_it(kind):
    shape = (2, 3, 2) if kind in ("token-classification", "question-answering") else (2, 3)
    labels = {
        "classification": torch.tensor([0, 1]),
        "multilabel": torch.zeros(2, 3),
        "token-classification": torch.zeros(2, 3, dtype=torch.int64),
        "question-answering": torch.zeros(2, 2, dtype=torch.int64),
    }[kind]
    teacher = seeded(*shape)
    student = teacher.clone().requires_grad_()
    units(kind, teacher, student, labels, alpha=1.0, mask=torch.ones(2, 3, dtype=torch.bool)).sum().backward()
    assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)


def test_unit_losses_are_float32_for_low_precision_logits():
    low = [tensor.bfloat16() for tensor in (TEACHER, STUDENT)]
    assert units("classification", *low, LABELS).dtype == torch.float32
    assert units("multilabel", *low, F.one_hot(LABELS).float()).dtype == torch.float32
    assert units("regression", low[0][:, :1], low[1][:, :1], LABELS.float()).dtype == torch.float32
    assert supervised_losses("classification", low[0], LABELS).dtype == torch.float32
