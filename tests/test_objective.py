"""The objective: a batch cut into parts gives the gradients, losses and flows of the whole one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from test_capture import family_model
from tiny_student import LABELS, labelled, tiny_model
from torch import Tensor

from bertemd_deploy.artifact import DataSlice
from bertemd_deploy.batching import Batch, Batching
from bertemd_deploy.capture import LayerReader
from bertemd_deploy.errors import EmdError
from bertemd_deploy.mapping import SIDES, LayerMapping, flow_settings
from bertemd_deploy.objective import LEAST_SQUARE, Distiller, Objective
from bertemd_deploy.processes import Processes
from bertemd_deploy.settings import DistillSettings
from bertemd_deploy.tasks import Kind
from bertemd_deploy.training import Outcome

ROWS = 11


def outputs(kind: Kind) -> int:
    return 2 if kind == "question-answering" else len(LABELS[kind]) or 1


def build(kind: Kind = "classification", *, dropout: float = 0.0, **settings: Any) -> Objective:
    """Return the objective of a 4-layer teacher and a 2-layer student of the same width."""
    plain = {"beta": 0.5, "alpha": 0.7, "cost_scale": "absolute", "mapped_layers": "all", "marginal_momentum": 0.0}
    given = flow_settings(DistillSettings(**(plain | settings)), 4, 2, copied=False)
    teacher = tiny_model(outputs=outputs(kind), kind=kind, num_hidden_layers=4).requires_grad_(False)
    student = tiny_model(
        outputs=outputs(kind),
        kind=kind,
        seed=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    trained = Distiller(student, student_hidden=32, teacher_hidden=32, project=given.mapping != "none", seed=0)
    mapping = LayerMapping.of(given, 4, 2)
    trained.train()
    return Objective(teacher, trained, mapping, given, kind=kind)


def cut(data: DataSlice, micro: int | None, *, number: int = 0) -> Batch:
    batching = Batching(ROWS, micro, 3, 0, Processes(), torch.device("cpu"))
    return batching.batch(data, np.arange(len(data)), number=number)


def one_step(objective: Objective, batch: Batch) -> tuple[Outcome, dict[str, Tensor]]:
    """Return what the objective says of a batch, and the gradients it leaves."""
    objective.trained.zero_grad(set_to_none=True)
    outcome = objective(batch)
    named = objective.trained.named_parameters()
    return outcome, {name: value.grad for name, value in named if value.grad is not None}


def data_of(kind: Kind) -> DataSlice:
    return labelled(tiny_model(outputs=outputs(kind), kind=kind, num_hidden_layers=4), ROWS, kind=kind)


@pytest.mark.parametrize("kind", ["classification", "token-classification", "question-answering"])
@pytest.mark.parametrize("mapping", ["emd", "emd between intermediate layers", "uniform", "skip", "none"])
@pytest.mark.parametrize(
    ("reduction", "scale"), [("batch", "absolute"), ("element", "absolute"), ("batch", "relative")]
)
def test_parts_add_up_to_the_whole(kind: Kind, mapping: str, reduction: str, scale: str) -> None:
    data, (mapping, _, layers) = data_of(kind), mapping.partition(" between ")
    mapped = layers.removesuffix(" layers") or "all"
    settings = {"mapping": mapping, "reduction": reduction, "cost_scale": scale, "mapped_layers": mapped}
    whole, parts = (build(kind, **settings) for _ in range(2))
    for objective in (whole, parts):  # in float64, so that rounding hides nothing
        objective.teacher.double()
        objective.trained.double()
    batches = cut(data, None), cut(data, 4)
    assert [len(batch.parts) for batch in batches] == [1, 3]
    for _ in range(2):  # the second step starts from the first one's marginals
        expected, gradients = one_step(whole, batches[0])
        found, summed = one_step(parts, batches[1])
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.parts, expected.parts, rtol=1e-5, atol=1e-6)
        assert summed.keys() == gradients.keys()
        difference, size = (
            torch.cat([(summed[name] * sign - value).flatten() for name, value in gradients.items()]).norm()
            for sign in (1, 0)
        )
        assert difference < 1e-6 * size
        assert found.log().keys() == expected.log().keys()
        for name, value in expected.log().items():
            np.testing.assert_allclose(found.log()[name], value, rtol=1e-5, atol=1e-6)
    assert bool(expected.log()) is (mapping != "none")


def test_a_teacher_that_adds_positions_to_its_scores_is_compared_with_them() -> None:
    """C_A[i, j] = mean((Q_i K_i^T / sqrt(d) + P - s_j)^2) over heads and real positions."""
    words = tiny_model().config.vocab_size
    teacher = family_model("mpnet", vocabulary=words, positions=66).requires_grad_(False)
    settings = flow_settings(DistillSettings(mapping="emd"), 4, 2, copied=False)
    student = tiny_model(outputs=2, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    trained = Distiller(student, student_hidden=16, teacher_hidden=16, project=False, seed=0)
    objective = Objective(teacher, trained, LayerMapping.of(settings, 4, 2), settings, kind="classification")
    batch = cut(data_of("classification"), None)
    inputs = batch.parts[0].inputs
    with torch.no_grad():
        theirs, ours = LayerReader(teacher)(inputs), LayerReader(student)(inputs)
        costs = objective._costs(theirs, ours, batch.parts[0], batch)[0]
    mask = inputs["attention_mask"].bool()
    table = teacher.mpnet.encoder.compute_position_bias(torch.zeros(1, mask.shape[1], 1))
    assert table.std() > 0.1
    both = (mask[:, None, :, None] & mask[:, None, None, :]).expand(-1, 2, -1, -1)
    for i in range(4):
        whole = theirs.queries[i] @ theirs.keys[i].transpose(-1, -2) / 8**0.5 + table
        for j in range(2):
            own = ours.queries[j] @ ours.keys[j].transpose(-1, -2) / 8**0.5
            torch.testing.assert_close(costs[i, j], (whole - own)[both].square().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mapping", ["emd", "skip"])
def test_relative_costs_are_over_the_teacher_layers_mean_squares(monkeypatch: pytest.MonkeyPatch, mapping: str) -> None:
    """L = sum_ij F_ij C_ij / S_i, with C of the plain objective and S_i the mean square over real positions."""
    batch = cut(data_of("classification"), None)
    objective, plain = build(mapping=mapping, cost_scale="relative"), build(mapping=mapping)
    mask = batch.parts[0].inputs["attention_mask"].bool()
    teacher = plain.read_teacher(batch.parts[0].inputs)
    squares = {"hidden": [], "attention": []}
    for hidden, query, key in zip(teacher.hidden_states, teacher.queries, teacher.keys, strict=True):
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        both = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(scores)
        squares["hidden"].append(hidden[mask].square().mean())
        squares["attention"].append(scores[both].square().mean())
    given: list[Tensor] = []
    step = plain.mapping.step
    monkeypatch.setattr(plain.mapping, "step", lambda costs=None: (given.append(costs), step(costs))[1])
    plain.needs_batch_costs = True
    monkeypatch.setattr(
        plain, "_flows", lambda costs: (given.append(costs.detach()), dict.fromkeys(SIDES, costs[0] * 0))[1]
    )
    one_step(plain, batch)
    solved: list[Any] = []
    theirs = objective.mapping.step
    monkeypatch.setattr(objective.mapping, "step", lambda costs=None: (solved.append(costs), theirs(costs))[1])
    outcome, gradients = one_step(objective, batch)
    for at, side in enumerate(SIDES):
        relative = given[0][at].double() / torch.stack(squares[side])[objective.rows][:, None].double()
        flow = objective.mapping.flows[side][objective.rows][:, objective.columns]
        torch.testing.assert_close(outcome.parts[side].double(), (relative * flow).sum(), rtol=1e-4, atol=1e-6)
        if mapping == "emd":  # the flow is solved on them
            torch.testing.assert_close(solved[0][at].double(), relative, rtol=1e-4, atol=1e-6)
    assert gradients
    assert len(solved) == 1


@pytest.mark.parametrize("mapping", ["emd", "uniform"])
def test_a_teacher_layer_of_almost_nothing_does_not_outweigh_the_others(mapping: str) -> None:
    batch = cut(data_of("classification"), None)
    objective = build(mapping=mapping, cost_scale="relative")
    silence(objective, layers=[1])  # one that every mapping compares
    outcome, gradients = one_step(objective, batch)
    queries = objective.read_teacher(batch.parts[0].inputs).queries
    assert queries[1].abs().max() == 0 < queries[0].abs().max()
    assert 0 < outcome.parts["attention"] < 1 / LEAST_SQUARE
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_teacher_whose_scores_are_all_0_has_no_relative_costs() -> None:
    objective = build(mapping="emd", cost_scale="relative")
    silence(objective, layers=range(4))
    with pytest.raises(EmdError, match="the teacher's attention scores or hidden states are all 0"):
        objective(cut(data_of("classification"), None))


def silence(objective: Objective, *, layers: Iterable[int]) -> None:
    """Let these layers of the teacher score every pair of positions 0."""
    for layer in layers:
        query = objective.teacher.bert.encoder.layer[layer].attention.self.query
        query.weight.zero_()
        query.bias.zero_()


def test_uneven_parts_weigh_by_their_units() -> None:
    """Were each part's mean averaged, rows with few labelled tokens would count more: the test's data tells them apart."""
    data = data_of("token-classification")
    objective = build("token-classification", mapping="none")
    expected, _ = one_step(objective, cut(data, None))
    parts = [
        one_step(objective, cut(data.select(range(at, min(at + 4, ROWS))), None))[0].loss for at in range(0, ROWS, 4)
    ]
    assert abs(float(torch.stack(parts).mean() / expected.loss) - 1) > 1e-3


@pytest.mark.parametrize("micro", [None, 4])
def test_the_flow_s_costs_are_those_of_the_loss_under_dropout(
    monkeypatch: pytest.MonkeyPatch, micro: int | None
) -> None:
    """<F, C> of the costs that gave the flow is the loss, so both passes of a part saw the same dropout."""
    objective = build(dropout=0.3, mapping="emd")
    given: list[Tensor] = []
    step = objective.mapping.step

    def watch(costs: Tensor) -> dict[str, Tensor]:
        given.append(costs.clone())
        return step(costs)

    monkeypatch.setattr(objective.mapping, "step", watch)
    outcome, _ = one_step(objective, cut(data_of("classification"), micro))
    (costs,) = given
    flows = objective.mapping.flows
    for cost, side in zip(costs.double(), ("attention", "hidden"), strict=True):
        torch.testing.assert_close(outcome.parts[side].double(), (cost * flows[side]).sum(), rtol=1e-5, atol=0)
    again, _ = one_step(objective, cut(data_of("classification"), micro, number=1))
    assert abs(float(given[1].sum() / costs.sum()) - 1) > 1e-4  # another step, another dropout
    assert again.loss != outcome.loss


@pytest.mark.parametrize(("mapping", "passes"), [("emd", 2), ("emd-fixed", 2), ("uniform", 1), ("none", 1)])
def test_only_a_split_batch_whose_flow_is_solved_runs_twice(mapping: str, passes: int) -> None:
    objective, runs = build(mapping=mapping), []
    objective.trained.student.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    data = data_of("classification")
    one_step(objective, cut(data, None))
    assert runs == [True]
    runs.clear()
    one_step(objective, cut(data, 4))
    assert runs == [False] * 3 * (passes - 1) + [True] * 3


class Doubled(Processes):
    """Two processes of which the other has the same rows."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(2)


def test_a_process_s_own_share_of_the_loss_stays_its_own() -> None:
    """What is summed for the flow is a copy: the share of each process is added up once, after the backward pass."""
    alone, shared = build(mapping="emd"), build(mapping="emd")
    shared.processes = Doubled(0, 2)
    batch = cut(data_of("classification"), None)
    expected, found = one_step(alone, batch)[0], one_step(shared, batch)[0]
    torch.testing.assert_close(found.parts, expected.parts)


@pytest.mark.parametrize("mapping", ["emd", "uniform", "none"])
def test_a_process_without_rows_takes_part_with_nothing(mapping: str) -> None:
    objective = build(mapping=mapping)
    sums: list[Tensor] = []

    class Others(Processes):
        def sum(self, tensor: Tensor) -> Tensor:
            sums.append(tensor.clone())
            return tensor.add_(1.0)

    objective.processes = Others(1, 2)
    batching = Batching(ROWS, None, 3, 0, Processes(1, 2), torch.device("cpu"))
    batch = batching.batch(data_of("classification"), np.array([0]), number=0)
    assert batch.parts == ()
    outcome, gradients = one_step(objective, batch)
    assert gradients == {}
    assert float(outcome.loss) == 0.0
    names = {"prediction"} if mapping == "none" else {"prediction", "attention", "hidden", "embedding"}
    assert outcome.parts.keys() == names
    assert all(float(value) == 0.0 for value in outcome.parts.values())
    assert len(sums) == (mapping == "emd")
    assert all(not value.any() for value in sums)
    assert bool(outcome.log()) is (mapping != "none")


class Refusing:
    """A cache that was refused: stands for one whose decision fell at an earlier step."""

    refused = True

    def __call__(self, rows: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("a refused cache is not asked")


def test_a_refused_cache_is_put_aside() -> None:
    objective, plain = build(), build()
    batch = cut(data_of("classification"), None)
    expected, _ = one_step(plain, batch)
    objective.cache = Refusing()
    found, _ = one_step(objective, batch)
    assert objective.cache is None
    assert found.loss == expected.loss
