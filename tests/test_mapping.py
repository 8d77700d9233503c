from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from bertemd_deploy.emd import cost_attention, emd_loss, solve_flow, uniform_weights
from bertemd_deploy.errors import EmdError, RecipeError
from bertemd_deploy.mapping import SIDES, LayerMapping, even_layers, fixed_flow, flow_settings
from bertemd_deploy.settings import MAPPINGS, DistillSettings

ATTENTION = torch.tensor([[1.0, 3.0], [2.0, 1.0], [4.0, 0.5]])
HIDDEN = torch.tensor([[2.0, 1.0], [1.0, 5.0], [3.0, 3.0]])


def pairs(flow: torch.Tensor) -> list[tuple[int, int]]:
    return [(int(row), int(column)) for row, column in flow.nonzero()]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("uniform", [(2, 0), (5, 1), (8, 2), (11, 3)]),
        ("skip", [(2, 0), (5, 1), (8, 2)]),
        ("last", [(8, 0), (9, 1), (10, 2)]),
    ],
)
def test_fixed_flow_of_four_from_twelve(kind, expected):
    flow = fixed_flow(kind, 12, 4)
    assert pairs(flow) == expected
    assert_close(flow.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert_close(flow[flow > 0], torch.full((len(expected),), 1 / len(expected), dtype=torch.float64))


@pytest.mark.parametrize(
    ("teachers", "students", "expected"),
    [(12, 6, [1, 3, 5, 7, 9, 11]), (12, 4, [2, 5, 8, 11]), (6, 4, [0, 2, 3, 5]), (3, 3, [0, 1, 2]), (5, 1, [4])],
)
def test_even_layers(teachers, students, expected):
    assert even_layers(teachers, students) == expected


@pytest.mark.parametrize("kind", ["skip", "last"])
def test_mapping_that_leaves_one_layer_nothing(kind):
    with pytest.raises(RecipeError, match=rf"distill\.mapping: {kind} needs a student of at least 2 layers"):
        LayerMapping(kind, 4, 1)


@pytest.mark.parametrize("kind", [kind for kind in MAPPINGS if kind != "none"])
def test_losses_are_the_flows_costs_with_the_flows_gradient(kind):
    mapping = LayerMapping(kind, 3, 2)
    attention, hidden = ATTENTION.clone().requires_grad_(), HIDDEN.clone().requires_grad_()
    flows = mapping.step(torch.stack([attention, hidden]))
    losses = [emd_loss(cost, flows[side]) for side, cost in zip(SIDES, (attention, hidden), strict=True)]
    sum(losses).backward()
    for loss, cost, side in zip(losses, (attention, hidden), SIDES, strict=True):
        flow = mapping.flows[side]
        assert_close(flow.sum(), torch.tensor(1.0, dtype=torch.float64))
        assert_close(loss.detach(), (flow.float() * cost.detach()).sum())
        assert_close(cost.grad, flow.float())


@pytest.mark.parametrize("kind", ["uniform", "skip", "last", "emd-fixed"])
def test_only_emd_moves_the_marginals(kind):
    mapping = LayerMapping(kind, 3, 2)
    mapping.step(torch.stack([ATTENTION, HIDDEN]))
    for side in SIDES:
        assert_close(mapping.marginals[side], (uniform_weights(3), uniform_weights(2)))


def test_emd_fixed_solves_under_uniform_marginals():
    mapping = LayerMapping("emd-fixed", 3, 2)
    mapping.step(torch.stack([ATTENTION, HIDDEN]))
    for side, cost in zip(SIDES, (ATTENTION, HIDDEN), strict=True):
        expected = solve_flow(cost, teacher_weights=uniform_weights(3), student_weights=uniform_weights(2))
        assert_close(mapping.flows[side], expected)


@pytest.mark.parametrize("mode", ["ratio", "softmax"])
@pytest.mark.parametrize("separate", [True, False])
def test_emd_carries_its_marginals_from_step_to_step(mode, separate):
    mapping = LayerMapping("emd", 3, 2, mode=mode, temperature=2.0, separate=separate)
    expected = {side: (uniform_weights(3), uniform_weights(2)) for side in SIDES}
    for factor in (1.0, 2.0, 0.5):
        costs = {"attention": ATTENTION * factor, "hidden": HIDDEN / factor}
        mapping.step(torch.stack([costs["attention"], costs["hidden"]]))
        fresh = {}
        for side in SIDES:
            a, b = expected[side]
            flow = solve_flow(costs[side], teacher_weights=a, student_weights=b)
            assert_close(mapping.flows[side], flow)
            fresh[side] = cost_attention(
                costs[side], flow, teacher_weights=a, student_weights=b, mode=mode, temperature=2.0
            )
        if not separate:
            mean = tuple((left + right) / 2 for left, right in zip(fresh["attention"], fresh["hidden"], strict=True))
            fresh = dict.fromkeys(SIDES, mean)
        expected = fresh
        assert mapping.marginals.keys() == expected.keys()
        for side in SIDES:
            assert_close(mapping.marginals[side], expected[side])
    same = torch.equal(mapping.marginals["attention"][0], mapping.marginals["hidden"][0])
    assert same is not separate


# Teacher layers 0 and 2 are student layers 0 and 1; layer 1 resembles either a little. The same costs at every step.
ALIGNED = torch.tensor([[0.02, 9.0], [4.0, 4.0], [9.0, 0.05]])


def _weights_over_steps(momentum: float, steps: int = 200) -> list[torch.Tensor]:
    mapping = LayerMapping("emd", 3, 2, momentum=momentum)
    found = []
    for _ in range(steps):
        mapping.step(torch.stack([ALIGNED, ALIGNED]))
        found.append(mapping.marginals["hidden"][0])
    return found


def test_momentum_ends_the_swing_of_replaced_marginals():
    """Replaced marginals overshoot: a cheap layer gets nearly all mass, which makes it dear, and so on, step by step."""
    swinging, calm = _weights_over_steps(0.0), _weights_over_steps(0.9)
    assert (swinging[-1] - swinging[-2]).abs().max() > 0.9
    assert (calm[-1] - calm[-2]).abs().max() < 0.06
    assert calm[-1][1] < calm[-1][[0, 2]].min()  # the layer that no student layer resembles weighs least


@pytest.mark.parametrize("separate", [True, False])
def test_momentum_keeps_its_share_of_the_marginals(separate):
    plain = LayerMapping("emd", 3, 2, separate=separate)
    damped = LayerMapping("emd", 3, 2, separate=separate, momentum=0.75)
    costs = torch.stack([ATTENTION, HIDDEN])
    plain.step(costs)
    damped.step(costs)
    for side in SIDES:
        for fresh, kept, start in zip(
            plain.marginals[side], damped.marginals[side], (uniform_weights(3), uniform_weights(2)), strict=True
        ):
            assert_close(kept, 0.75 * start + 0.25 * fresh)


def test_a_mass_below_one_leaves_dear_layers_alone():
    mapping = LayerMapping("emd-fixed", 3, 2, mass=0.6)
    mapping.step(torch.stack([ALIGNED, ALIGNED]))
    for flow in mapping.flows.values():
        assert pairs(flow) == [(0, 0), (2, 1)]
        assert_close(flow.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["emd", "emd-fixed"])
def test_intermediate_layers_alone_are_mapped_as_a_smaller_pair_of_models_would_be(kind):
    mapping, smaller = LayerMapping(kind, 4, 3, intermediate=True), LayerMapping(kind, 3, 2)
    assert (mapping.rows, mapping.columns) == ([0, 1, 2], [0, 1])
    for _ in range(3):
        mapping.step(torch.stack([ATTENTION, HIDDEN]))
        smaller.step(torch.stack([ATTENTION, HIDDEN]))
    for side in SIDES:
        assert_close(mapping.flows[side][:3, :2], smaller.flows[side], rtol=0, atol=0)
        assert mapping.flows[side].shape == (4, 3)
        assert mapping.flows[side][3].sum() == mapping.flows[side][:, 2].sum() == 0
        assert_close(mapping.marginals[side], smaller.marginals[side], rtol=0, atol=0)


def test_other_mappings_do_not_care_for_intermediate_layers():
    for kind in ("uniform", "skip", "last"):
        mapping, plain = LayerMapping(kind, 4, 3, intermediate=True), LayerMapping(kind, 4, 3)
        assert (mapping.rows, mapping.columns) == (plain.rows, plain.columns)
        assert mapping.columns == ([0, 1, 2] if kind == "uniform" else [0, 1])
        assert_close(mapping.step(), plain.step(), rtol=0, atol=0)


def test_intermediate_layers_need_two_layers():
    with pytest.raises(RecipeError, match="intermediate needs a student of at least 2 layers"):
        LayerMapping("emd", 4, 1, intermediate=True)


@pytest.mark.parametrize(
    ("teachers", "students", "copied", "expected"),
    [
        (12, 6, True, ("intermediate", 5 / 11)),
        (6, 4, True, ("intermediate", 0.6)),
        (4, 4, True, ("intermediate", 1.0)),
        (12, 1, True, ("all", 1 / 12)),
        (1, 1, True, ("all", 1.0)),
        (12, 6, False, ("all", 1.0)),
        (12, 1, False, ("all", 1.0)),
    ],
)
def test_flow_settings_left_to_the_start_of_the_student(teachers, students, copied, expected):
    settings = flow_settings(DistillSettings(), teachers, students, copied=copied)
    assert (settings.mapped_layers, settings.transported_mass) == expected
    mapping = LayerMapping.of(settings, teachers, students)
    assert (mapping.left_out, mapping.mass) == (int(expected[0] == "intermediate"), expected[1])


def test_flow_settings_that_are_given_stay():
    given = DistillSettings(mapped_layers="all", transported_mass=0.3)
    assert flow_settings(given, 12, 6, copied=True) == given
    assert flow_settings(DistillSettings(mapped_layers="all"), 12, 6, copied=True).transported_mass == 0.5
    assert flow_settings(DistillSettings(mapped_layers="intermediate"), 12, 6, copied=False).transported_mass == 1.0


@pytest.mark.parametrize("given", [{"transported_mass": 1.0}, {"mapped_layers": "all"}])
def test_settings_left_open_make_no_mapping(given):
    with pytest.raises(ValueError, match="left open"):
        LayerMapping.of(DistillSettings(**given), 12, 6)


@pytest.mark.parametrize(
    ("kind", "copied", "told"),
    [
        ("emd", True, "emd (0.455 of the mass, the last layers left out)"),
        ("emd-fixed", True, "emd-fixed (0.455 of the mass, the last layers left out)"),
        ("emd", False, "emd"),
        ("uniform", True, "uniform"),
    ],
)
def test_mapping_in_words(kind, copied, told):
    settings = flow_settings(DistillSettings(mapping=kind), 12, 6, copied=copied)
    assert LayerMapping.of(settings, 12, 6).told == told


def test_with_the_mass_of_the_student_s_layers_each_learns_from_the_nearest_alone():
    costs = torch.full((2, 6, 4), 1.0)
    for student, teacher in enumerate((0, 2, 3)):
        costs[:, teacher, student] = 0.1
    mapping = LayerMapping.of(flow_settings(DistillSettings(mapping="emd-fixed"), 6, 4, copied=True), 6, 4)
    for flow in mapping.step(costs[:, mapping.rows][:, :, mapping.columns]).values():
        assert pairs(flow) == [(0, 0), (2, 1), (3, 2)]


def test_resumed_mapping_goes_on_as_the_first_would_have():
    first = LayerMapping("emd", 3, 2, separate=True)
    first.step(torch.stack([ATTENTION, HIDDEN]))
    second = LayerMapping("emd", 3, 2, separate=True)
    second.load_state({name: weights.clone() for name, weights in first.state().items()})
    first.step(torch.stack([HIDDEN, ATTENTION]))
    second.step(torch.stack([HIDDEN, ATTENTION]))
    assert_close(second.state(), first.state(), rtol=0, atol=0)
    assert_close(second.flows, first.flows, rtol=0, atol=0)


def test_two_mappings_share_no_state():
    first, second = LayerMapping("emd", 3, 2), LayerMapping("emd", 3, 2)
    first.step(torch.stack([ATTENTION, HIDDEN]))
    assert_close(second.marginals["hidden"][0], uniform_weights(3))
    assert second.flows == {}


def test_log_holds_both_flows_and_both_marginal_pairs():
    mapping = LayerMapping("emd", 3, 2)
    mapping.step(torch.stack([ATTENTION, HIDDEN]))
    log = mapping.log()
    assert set(log) == {
        "attention_flow",
        "hidden_flow",
        "attention_teacher",
        "attention_student",
        "hidden_teacher",
        "hidden_student",
    }
    assert log["hidden_flow"] == mapping.flows["hidden"].tolist()
    assert log["attention_student"] == mapping.marginals["attention"][1].tolist()


def test_cost_that_is_not_finite_is_an_error():
    with pytest.raises(EmdError, match="cost matrix 3x2: non-finite entry at teacher layer 1, student layer 1"):
        LayerMapping("emd", 3, 2).step(torch.stack([ATTENTION, HIDDEN.masked_fill(HIDDEN == 5, float("inf"))]))


@pytest.mark.parametrize("kind", [kind for kind in MAPPINGS if kind != "none"])
def test_only_the_layers_that_a_mapping_can_name_are_compared(kind):
    mapping = LayerMapping(kind, 12, 4)
    expected = {"uniform": [2, 5, 8, 11], "skip": [2, 5, 8], "last": [8, 9, 10]}.get(kind, list(range(12)))
    assert mapping.rows == expected
    assert mapping.solves is (kind in ("emd", "emd-fixed"))


def test_a_flow_without_costs_is_refused():
    with pytest.raises(EmdError, match=r"distill\.mapping emd: a flow cannot be solved without costs"):
        LayerMapping("emd", 3, 2).step()
