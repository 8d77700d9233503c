"""The distillation objective: what one training step computes, and the trained side it computes it on.

A batch may come in parts, on one process or several. Each part's costs are weighted by its share of the batch's real
positions, so that they add up to the costs of the whole batch; a flow is solved on that sum, once, and is the same everywhere.
With one part a single pass does. With more, every part runs twice where a mapping solves or costs are relative: once without
gradients for the costs, and, the flow known, once more with them, under the same dropout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bertemd_deploy.batching import Batch, Part
from bertemd_deploy.capture import LayerOutputs, LayerReader
from bertemd_deploy.emd import attention_cost, emd_loss, hidden_cost
from bertemd_deploy.errors import EmdError
from bertemd_deploy.families import known_inputs
from bertemd_deploy.losses import prediction_losses, total_loss
from bertemd_deploy.mapping import SIDES, LayerMapping
from bertemd_deploy.models import output_logits
from bertemd_deploy.position_scores import position_scores, with_position_scores
from bertemd_deploy.processes import Processes
from bertemd_deploy.settings import DistillSettings
from bertemd_deploy.tasks import Kind
from bertemd_deploy.training import Outcome
from bertemd_deploy.training_device import matrix_precision

if TYPE_CHECKING:
    from bertemd_deploy.quantization.aware import QuantAware

LEAST_SQUARE = 1e-4  # of a side's largest mean square, that a relative cost is divided by


class TeacherCache(Protocol):
    """Keeps what the teacher computes of each row."""

    @property
    def refused(self) -> bool:
        """Whether it will never keep anything."""

    def __call__(self, rows: NDArray[np.int64], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the teacher's tensors of a batch, as `Objective.teacher_tensors` does."""


class Distiller(nn.Module):
    """The trained side: the student and, where widths differ or it is asked for, the projection W."""

    def __init__(
        self,
        student: nn.Module,
        *,
        student_hidden: int,
        teacher_hidden: int,
        project: bool,
        seed: int,
        left_out: Tensor | None = None,
    ) -> None:
        """Take the student, with a projection W where it is asked for.

        Args:
            student: the task model.
            student_hidden: its width.
            teacher_hidden: the teacher's.
            project: add W (H_student x H_teacher, shared by all layers and the embedding; identity at equal width).
            seed: of W.
            left_out: coordinates of the student's hidden states that count as 0 in every cost, so that no layer loss reaches
                them; what the teacher has there adds the same to all costs of a teacher layer. None compares all.
        """
        super().__init__()
        compared = None
        if left_out is not None:
            compared = torch.ones(student_hidden)
            compared[left_out] = 0
        self.compared: Tensor | None
        self.register_buffer("compared", compared, persistent=False)
        self.student = student
        self.projection: nn.Linear | None = None
        if project:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.projection = nn.Linear(student_hidden, teacher_hidden, bias=False)
            if student_hidden == teacher_hidden:
                nn.init.eye_(self.projection.weight)

    def project(self, hidden: Tensor) -> Tensor:
        """Return W h, or h where there is no W; coordinates that are left out are 0, and nothing is learnt from them."""
        if self.compared is not None:
            hidden = hidden * self.compared.to(hidden.dtype)
        return hidden if self.projection is None else self.projection(hidden)


class Objective:
    """One training step: both forward passes, the costs, the flows, the total loss and its gradients."""

    def __init__(
        self,
        teacher: nn.Module,
        trained: Distiller,
        mapping: LayerMapping,
        settings: DistillSettings,
        *,
        kind: Kind,
        bfloat16: bool = False,
        processes: Processes | None = None,
    ) -> None:
        """Hook both models, unless the mapping compares no layers.

        Args:
            teacher: frozen, in eval mode, on the training device.
            trained: the student with its projection, on the training device.
            mapping: the flows' source; its state moves with every batch.
            settings: weights of the loss.
            kind: of the task.
            bfloat16: matrix products in bfloat16; costs and losses stay float32.
            processes: that share every batch.
        """
        self.trained, self.mapping, self.settings, self.kind = trained, mapping, settings, kind
        self.bfloat16, self.processes = bfloat16, processes or Processes()
        self.layers = settings.mapping != "none"
        self.teacher = teacher
        self.rows, self.columns = (mapping.rows, mapping.columns) if self.layers else ([], [])
        self.relative = settings.cost_scale == "relative"
        self.needs_batch_costs = self.layers and (mapping.solves or self.relative)
        self.read_teacher = LayerReader(teacher) if self.layers else None
        self.read_student = LayerReader(trained.student) if self.layers else None
        self.device = next(trained.parameters()).device
        self.number = 0  # of the batch at hand
        self._table: Tensor | None = None
        self._longest = 0  # tokens that the table is for
        self.cache: TeacherCache | None = None  # used instead of running the teacher, where it is set
        self.aware: QuantAware | None = None  # the trained student's, where it is prepared for int8

    def __call__(self, batch: Batch) -> Outcome:
        """Run the batch's parts and leave this process's share of the gradients in the parameters."""
        self.number = batch.number
        if self.aware is not None:
            self.aware.begin(batch.number)
        flows = None
        if self.needs_batch_costs and batch.split:
            flows = self._flows(
                sum((self._costs_only(part, seed, batch) for part, seed in _seeded(batch)), self._zero())
            )
        total = torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        for part, seed in _seeded(batch):
            torch.manual_seed(seed)
            with matrix_precision(self.device, bfloat16=self.bfloat16):
                teacher, student = self._teacher(part), self._student(part)
                losses = {"prediction": self._prediction(teacher, student, part) / batch.units}
                if self.layers:
                    costs = self._costs(teacher, student, part, batch)
                    flows = flows or self._flows(costs)
                    losses |= self._layer_losses(costs, flows, teacher, student, part, batch)
            loss = total_loss(**losses, beta=self.settings.beta, theta=self.settings.theta)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total += loss.detach()
            sums = {name: sums.get(name, 0.0) + value.detach() for name, value in losses.items()}
        if self.layers and flows is None:
            self._flows(self._zero())  # no row of this batch is ours, but the others wait for our share of the costs
        if self.aware is not None:
            self.aware.finish(self.processes)
        names = ("prediction", *SIDES, "embedding") if self.layers else ("prediction",)
        parts = {name: sums.get(name, torch.zeros_like(total)) for name in names}
        return Outcome(total, parts, self.mapping.log if self.layers else dict)

    def teacher_tensors(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the teacher computes of a batch, by name, as a cache keeps it: layers stacked, no gradient."""
        found = self._run_teacher(inputs)
        if not self.layers:
            return {"logits": found.logits}
        layers = {name: torch.stack(list(getattr(found, name))) for name in ("hidden_states", "queries", "keys")}
        return {"logits": found.logits, "embedding": found.embeddings[0], **layers}

    def _teacher(self, part: Part) -> LayerOutputs:
        if self.cache is not None and self.cache.refused:
            self.cache = None
        if self.cache is None:
            return self._run_teacher(part.inputs)
        kept = self.cache(part.rows, part.inputs)
        if not self.layers:
            return LayerOutputs(kept["logits"], (), (), (), ())
        layers = (list(kept[name]) for name in ("hidden_states", "queries", "keys"))
        return LayerOutputs(kept["logits"], [kept["embedding"]], *layers)

    def _run_teacher(self, inputs: dict[str, Tensor]) -> LayerOutputs:
        with torch.no_grad(), matrix_precision(self.device, bfloat16=self.bfloat16):
            return self.read_teacher(inputs) if self.read_teacher is not None else _logits_only(self.teacher, inputs)

    def _student(self, part: Part) -> LayerOutputs:
        if self.read_student is not None:
            return self.read_student(part.inputs)
        return _logits_only(self.trained.student, part.inputs)

    def _costs_only(self, part: Part, seed: int, batch: Batch) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad(), matrix_precision(self.device, bfloat16=self.bfloat16):
            return self._costs(self._teacher(part), self._student(part), part, batch)

    def _costs(self, teacher: LayerOutputs, student: LayerOutputs, part: Part, batch: Batch) -> Tensor:
        """Return the part's (2, rows, columns) share of the attention and hidden costs.

        With relative costs a further column holds the teacher layers' mean squares: their cost against a layer of zeros.
        """
        mask = part.inputs["attention_mask"].bool()
        chosen = [
            [layers[row] for row in self.rows] for layers in (teacher.queries, teacher.keys, teacher.hidden_states)
        ]
        if (table := self._position_scores(mask.shape[1])) is not None:
            chosen[0], chosen[1] = with_position_scores(chosen[0], chosen[1], table)
        queries, keys = ([layers[column] for column in self.columns] for layers in (student.queries, student.keys))
        projected = [self.trained.project(student.hidden_states[column]) for column in self.columns]
        if self.relative:
            for layers in (queries, keys, projected):
                layers.append(torch.zeros_like(layers[0]))
        attention = attention_cost(chosen[0], chosen[1], queries, keys, mask=mask)
        hidden = hidden_cost(chosen[2], projected, mask=mask)
        return torch.stack([attention * (part.squares / batch.squares), hidden * (part.tokens / batch.tokens)])

    def _position_scores(self, tokens: int) -> Tensor | None:
        """Return what the teacher adds to the scores of its content, (A, T, T), cut from that of the longest batch so far."""
        if tokens > self._longest:
            self._table, self._longest = position_scores(self.teacher, tokens), tokens
        return None if self._table is None else self._table[:, :tokens, :tokens]

    def _flows(self, costs: Tensor) -> dict[str, Tensor]:
        """Return the weights (rows, columns) of the step's costs, by side, from this process's share of the costs.

        They are the flows; where costs are relative, sum_ij F_ij C_ij / S_i, the flows over the teacher layers' mean squares,
        which count as at least `LEAST_SQUARE` of the side's largest: a layer of almost nothing would outweigh all others.

        Raises:
            EmdError: a cost is not finite, a flow cannot be solved, or all of the teacher's squares are 0.
        """
        if not self.needs_batch_costs:
            return self._chosen(self.mapping.step())
        # A copy is summed: the part's own costs are still to be weighed.
        costs = self.processes.sum(costs.detach().clone())
        if not self.relative:
            return self._chosen(self.mapping.step(costs))
        squares = costs[..., -1:]
        largest = squares.amax(1, keepdim=True)
        if bool((largest == 0).any()):
            raise EmdError(
                "the teacher's attention scores or hidden states are all 0: no cost can be relative to them. "
                "If the teacher is as it should be, set distill.cost_scale to absolute."
            )
        squares = squares.maximum(LEAST_SQUARE * largest)
        flows = self._chosen(self.mapping.step(costs[..., :-1] / squares if self.mapping.solves else None))
        return {
            side: flows[side] / square.to("cpu", torch.float64) for side, square in zip(SIDES, squares, strict=True)
        }

    def _chosen(self, flows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {side: flow[self.rows][:, self.columns] for side, flow in flows.items()}

    def _zero(self) -> Tensor:
        columns = len(self.columns) + (1 if self.relative else 0)
        return torch.zeros(2, len(self.rows), columns, device=self.device)

    def _layer_losses(
        self,
        costs: Tensor,
        flows: dict[str, Tensor],
        teacher: LayerOutputs,
        student: LayerOutputs,
        part: Part,
        batch: Batch,
    ) -> dict[str, Tensor]:
        costs = costs[..., : len(self.columns)]
        found = {side: emd_loss(cost, flows[side]) for side, cost in zip(SIDES, costs, strict=True)}
        mask = part.inputs["attention_mask"].bool()
        # L_emb = mean((W e_student - e_teacher)^2): the cost of one layer against one.
        embedding = hidden_cost(teacher.embeddings, [self.trained.project(e) for e in student.embeddings], mask=mask)
        return found | {"embedding": embedding[0, 0] * (part.tokens / batch.tokens)}

    def _prediction(self, teacher: LayerOutputs, student: LayerOutputs, part: Part) -> Tensor:
        return prediction_losses(
            self.kind,
            teacher.logits,
            student.logits,
            part.labels,
            alpha=self.settings.alpha,
            temperature=self.settings.temperature,
            reduction=self.settings.reduction,
            mask=part.inputs["attention_mask"].bool(),
        ).sum()


def _seeded(batch: Batch) -> list[tuple[Part, int]]:
    return list(zip(batch.parts, batch.seeds, strict=True))


def _logits_only(model: nn.Module, inputs: dict[str, Tensor]) -> LayerOutputs:
    known = known_inputs(model.config.to_dict())  # type: ignore[union-attr, operator]
    output = model(**{name: value for name, value in inputs.items() if name in known})
    return LayerOutputs(output_logits(output), (), (), (), ())
