"""Which teacher layers a student layer learns from: one switch, one state, every mapping on the same footing.

A mapping turns the two cost matrices of a step into flows of mass 1, so that equal `beta` is equal total weight for all:
    none       no layer loss, the prediction loss only
    uniform    student layer j from teacher layer floor(j M / N)                    (TinyBERT)
    skip       the same without the last layer, which the prediction loss serves    (PKD-skip)
    last       student layers 1..N-1 from the teacher layers just below its last    (PKD-last)
    emd-fixed  the optimal flow under uniform marginals
    emd        the optimal flow under marginals that follow cost attention
Marginals are state of the training run: saved in every checkpoint, logged, never global.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bertemd_deploy.emd import CostAttention, cost_attention, solve_flow, uniform_weights
from bertemd_deploy.errors import EmdError, RecipeError
from bertemd_deploy.settings import DistillSettings, Mapping

SIDES = ("attention", "hidden")


@dataclass
class LayerMapping:
    """The flows' source and state for M teacher and N student layers.

    Attributes:
        kind: name of the mapping.
        teacher_layers: M.
        student_layers: N.
        mode: form of cost attention (`emd` only).
        temperature: T_emd.
        separate: keep attention and hidden marginals apart.
        momentum: share of the marginals that a step keeps, w' = momentum w + (1 - momentum) cost_attention(w).
        mass: share of the teacher's mass that a flow moves, see `emd.solve_flow`.
        intermediate: leave both models' last layers out of the flows of `emd` and `emd-fixed`, as `skip` does.
        marginals: "attention" and "hidden" to (teacher (M,), student (N,)) weights of the next step, float64; (M - 1,) and
            (N - 1,) where the last layers are left out.
        flows: flows of the last step, (M, N) float64.
    """

    kind: Mapping
    teacher_layers: int
    student_layers: int
    mode: CostAttention = "ratio"
    temperature: float = 1.0
    separate: bool = False
    momentum: float = 0.0
    mass: float = 1.0
    intermediate: bool = False
    marginals: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    flows: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start from uniform marginals.

        Raises:
            RecipeError: the mapping leaves a one-layer student nothing to learn.
        """
        if self.kind in ("skip", "last") and self.student_layers < 2:
            raise RecipeError(f"distill.mapping: {self.kind} needs a student of at least 2 layers.")
        if self.left_out and self.student_layers < 2:
            raise RecipeError("distill.mapped_layers: intermediate needs a student of at least 2 layers.")
        start = (
            uniform_weights(self.teacher_layers - self.left_out),
            uniform_weights(self.student_layers - self.left_out),
        )
        self.marginals = dict.fromkeys(SIDES, start)

    @classmethod
    def of(cls, settings: DistillSettings, teacher_layers: int, student_layers: int) -> LayerMapping:
        """Return the mapping that the settings ask for, with uniform marginals.

        Args:
            settings: of the distillation, with nothing left open (`flow_settings`).
            teacher_layers: M.
            student_layers: N.

        Raises:
            RecipeError: it leaves a one-layer student nothing to learn.
            ValueError: transported_mass or mapped_layers is left open.
        """
        if settings.transported_mass is None or settings.mapped_layers == "auto":
            raise ValueError("transported_mass or mapped_layers is left open; see flow_settings")
        return cls(
            settings.mapping,
            teacher_layers,
            student_layers,
            mode=settings.cost_attention,
            temperature=settings.emd_temperature,
            separate=settings.separate_marginals,
            momentum=settings.marginal_momentum,
            mass=settings.transported_mass,
            intermediate=settings.mapped_layers == "intermediate",
        )

    @property
    def solves(self) -> bool:
        """Whether the flows depend on the costs of the whole batch."""
        return self.kind in ("emd", "emd-fixed")

    @property
    def left_out(self) -> int:
        """How many of either model's layers, from the last, no flow reaches: 1 where flows are solved between the others."""
        return int(self.intermediate and self.solves)

    @property
    def told(self) -> str:
        """The mapping in words."""
        parts = [f"{self.mass:.3g} of the mass"] if self.mass < 1 else []
        parts += ["the last layers left out"] if self.left_out else []
        return f"{self.kind} ({', '.join(parts)})" if self.solves and parts else self.kind

    @property
    def rows(self) -> list[int]:
        """The teacher layers that are compared at all: every one, or those a one-to-one mapping names."""
        if self.solves:
            return list(range(self.teacher_layers - self.left_out))
        used = fixed_flow(self.kind, self.teacher_layers, self.student_layers).any(1)
        return [int(row) for row in torch.nonzero(used).flatten()]

    @property
    def columns(self) -> list[int]:
        """The student layers that are compared at all."""
        left_out = self.left_out if self.solves else int(self.kind in ("skip", "last"))
        return list(range(self.student_layers - left_out))

    def step(self, costs: Tensor | None = None) -> dict[str, Tensor]:
        """Return the flows of one step by side, (M, N) float64 of mass 1, and move the marginals on.

        Args:
            costs: (2, rows, columns) attention and hidden costs of the whole batch, for mappings that solve; detached.

        Raises:
            EmdError: a cost is not finite or the flow cannot be solved.
        """
        if not self.solves:
            self.flows = dict.fromkeys(SIDES, fixed_flow(self.kind, self.teacher_layers, self.student_layers))
            return self.flows
        if costs is None:
            raise EmdError(f"distill.mapping {self.kind}: a flow cannot be solved without costs.")
        on_host = dict(zip(SIDES, costs.detach().to("cpu", torch.float64), strict=True))  # one copy for both matrices
        used = self.marginals
        self.flows = {
            side: solve_flow(
                on_host[side], teacher_weights=used[side][0], student_weights=used[side][1], mass=self.mass
            )
            for side in SIDES
        }
        if self.kind == "emd":
            self.marginals = self._next_marginals(on_host)
        if self.left_out:
            self.flows = {side: nn.functional.pad(flow, (0, 1, 0, 1)) for side, flow in self.flows.items()}
        return self.flows

    def _next_marginals(self, costs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        fresh = {
            side: cost_attention(
                costs[side],
                self.flows[side],
                teacher_weights=self.marginals[side][0],
                student_weights=self.marginals[side][1],
                mode=self.mode,
                temperature=self.temperature,
            )
            for side in SIDES
        }
        if not self.separate:
            teacher, student = ((left + right) / 2 for left, right in zip(*fresh.values(), strict=True))
            fresh = dict.fromkeys(SIDES, (teacher, student))
        kept = self.momentum
        return {
            side: (kept * before[0] + (1 - kept) * fresh[side][0], kept * before[1] + (1 - kept) * fresh[side][1])
            for side, before in self.marginals.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return the marginals as named tensors for a checkpoint."""
        return {
            f"{side}_{name}": weights
            for side, pair in self.marginals.items()
            for name, weights in zip(("teacher", "student"), pair, strict=True)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the marginals back from a checkpoint."""
        self.marginals = {side: (state[f"{side}_teacher"], state[f"{side}_student"]) for side in SIDES}

    def log(self) -> dict[str, Any]:
        """Return the last step's flows and the marginals that follow from them, as plain lists."""
        flows = {f"{side}_flow": flow.tolist() for side, flow in self.flows.items()}
        return flows | {name: weights.tolist() for name, weights in self.state().items()}


def flow_settings(
    settings: DistillSettings, teacher_layers: int, student_layers: int, *, copied: bool
) -> DistillSettings:
    """Return the settings with `mapped_layers` and `transported_mass` as they come to for M teacher and N student layers.

    A layer that was copied resembles the one it was copied from from the start, so that most is learnt from that one: of M'
    and N' layers in the flow, a mass of N' / M' lets every student layer take its share from one of them. Other students
    have no such layer, and learn from all.

    Args:
        settings: of the distillation.
        teacher_layers: M.
        student_layers: N.
        copied: whether the student's layers are copies that resemble the teacher's, see `students.copies_layers`.
    """
    mapped, mass = settings.mapped_layers, settings.transported_mass
    if mapped == "auto":
        mapped = "intermediate" if copied and student_layers > 1 else "all"
    if mass is None:
        left_out = int(mapped == "intermediate")
        pairs = (student_layers - left_out) / max(teacher_layers - left_out, 1)
        mass = min(pairs, 1.0) if copied and pairs > 0 else 1.0
    return replace(settings, mapped_layers=mapped, transported_mass=mass)


def even_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Return the evenly spaced teacher layers, 0-based: student layer j (from 1) goes with teacher layer floor(j M / N)."""
    return [(j * teacher_layers) // student_layers - 1 for j in range(1, student_layers + 1)]


def fixed_flow(kind: Mapping, teacher_layers: int, student_layers: int) -> Tensor:
    """Return the (M, N) flow of mass 1 of a one-to-one mapping: `uniform`, `skip` or `last`."""
    pairs = list(zip(even_layers(teacher_layers, student_layers), range(student_layers), strict=True))
    if kind == "skip":
        pairs = pairs[:-1]
    elif kind == "last":
        pairs = [(teacher_layers - student_layers + at, at) for at in range(student_layers - 1)]
    flow = torch.zeros(teacher_layers, student_layers, dtype=torch.float64)
    for teacher, student in pairs:
        flow[teacher, student] = 1.0 / len(pairs)
    return flow
