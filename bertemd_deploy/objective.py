"""The distillation objective: what one training step computes, and the trained side it computes it on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bertemd_deploy.capture import LayerReader
from bertemd_deploy.config import DistillSettings
from bertemd_deploy.emd import attention_cost, hidden_cost
from bertemd_deploy.losses import embedding_loss, prediction_loss, regression_loss, total_loss
from bertemd_deploy.mapping import LayerMapping
from bertemd_deploy.training import Step


class Distiller(nn.Module):
    """The trained side: the student and, where widths differ or it is asked for, the projection W."""

    def __init__(
        self, student: nn.Module, *, student_hidden: int, teacher_hidden: int, project: bool, seed: int
    ) -> None:
        """With `project`, add W (H_student x H_teacher, shared by all layers and the embedding; identity at equal width)."""
        super().__init__()
        self.student = student
        self.projection: nn.Linear | None = None
        if project:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.projection = nn.Linear(student_hidden, teacher_hidden, bias=False)
            if student_hidden == teacher_hidden:
                nn.init.eye_(self.projection.weight)

    def project(self, hidden: Tensor) -> Tensor:
        """Return W h, or h where there is no W; in float32 also under autocast, since costs are made of it."""
        if self.projection is None:
            return hidden
        with torch.autocast(hidden.device.type, enabled=False):
            projected: Tensor = self.projection(hidden.float())
        return projected


class Objective:
    """One training step: both forward passes, the costs, the flows, the total loss."""

    def __init__(
        self,
        teacher: nn.Module,
        trained: Distiller,
        mapping: LayerMapping,
        settings: DistillSettings,
        *,
        regression: bool,
    ) -> None:
        """Hook both models, unless the mapping compares no layers."""
        self.trained, self.mapping, self.settings, self.regression = trained, mapping, settings, regression
        self.layers = settings.mapping != "none"
        self.teacher = teacher
        self.read_teacher = LayerReader(teacher) if self.layers else None
        self.read_student = LayerReader(trained.student) if self.layers else None

    def __call__(self, inputs: dict[str, Tensor], labels: Tensor) -> Step:
        """Run both models on one batch and return the total loss."""
        parts: dict[str, Tensor] = {}
        if self.read_teacher is None or self.read_student is None:
            with torch.no_grad():
                teacher_logits = self.teacher(**inputs).logits
            student_logits = self.trained.student(**inputs).logits
        else:
            mask = inputs["attention_mask"].bool()
            with torch.no_grad():
                teacher = self.read_teacher(inputs)
            student = self.read_student(inputs)
            parts["attention"], parts["hidden"] = self.mapping.losses(
                attention_cost(teacher.queries, teacher.keys, student.queries, student.keys, mask=mask),
                hidden_cost(teacher.hidden_states, self.trained.project(student.hidden_states), mask=mask),
            )
            parts["embedding"] = embedding_loss(teacher.embedding, self.trained.project(student.embedding), mask=mask)
            teacher_logits, student_logits = teacher.logits, student.logits
        prediction = self._prediction(teacher_logits, student_logits, labels)
        loss = total_loss(
            attention=parts.get("attention", 0.0),
            hidden=parts.get("hidden", 0.0),
            embedding=parts.get("embedding", 0.0),
            prediction=prediction,
            beta=self.settings.beta,
            theta=self.settings.theta,
        )
        losses = {name: part.item() for name, part in (parts | {"prediction": prediction}).items()}
        layers = self.mapping.log if self.layers else dict
        return Step(loss, lambda: {"losses": losses} | layers())

    def _prediction(self, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        if self.regression:
            return regression_loss(teacher, student, labels, alpha=self.settings.alpha)
        return prediction_loss(
            teacher,
            student,
            labels,
            alpha=self.settings.alpha,
            temperature=self.settings.temperature,
            reduction=self.settings.reduction,
        )
