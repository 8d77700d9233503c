from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bertemd_deploy.emd import (
    attention_cost,
    cost_attention,
    emd_loss,
    hidden_cost,
    solve_flow,
    uniform_weights,
)
from bertemd_deploy.errors import EmdError

COST = torch.tensor([[0.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
A = torch.tensor([0.5, 0.5], dtype=torch.float64)
B = torch.tensor([0.25, 0.75], dtype=torch.float64)
FLOW = torch.tensor([[0.25, 0.25], [0.0, 0.5]], dtype=torch.float64)


def solve(cost: Tensor, a: Tensor = A, b: Tensor = B) -> Tensor:
    return solve_flow(cost, teacher_weights=a, student_weights=b)


# ---- the flow and its loss, worked by hand


def test_flow_and_emd_of_the_hand_solved_case():
    flow = solve(COST)
    assert_close(flow, FLOW)
    assert flow.dtype == torch.float64
    assert not flow.requires_grad
    assert_close(emd_loss(COST, flow), torch.tensor(1.25, dtype=torch.float64))


def test_flow_ignores_the_costs_gradient_and_float_type():
    assert_close(solve(COST.to(torch.bfloat16).requires_grad_()), FLOW)


def test_gradient_of_the_loss_is_the_flow():
    cost = COST.clone().requires_grad_()
    emd_loss(cost, solve(cost)).backward()
    assert_close(cost.grad, FLOW)


def test_gradient_is_that_of_the_optimum_itself():
    """The envelope theorem: moving one cost a little moves the solved EMD by the flow there."""
    step = 1e-4
    for row in range(2):
        for column in range(2):
            shifted = COST.clone()
            shifted[row, column] += step
            slope = (emd_loss(shifted, solve(shifted)) - emd_loss(COST, solve(COST))) / step
            assert_close(slope, FLOW[row, column], rtol=0, atol=1e-9)


def test_loss_keeps_the_costs_float_type():
    assert emd_loss(COST.float(), FLOW).dtype == torch.float32


# ---- cost attention, worked by hand: <F, C> by rows is (0.75, 0.5), by columns (0, 1.25)

POSITIVE = torch.tensor(
    [[1.0, 3.0], [2.0, 1.0]], dtype=torch.float64
)  # the same flow; rows move (1, .5), columns (.25, 1.25)


def test_ratio_is_inverse_unit_cost_normalised():
    assert_close(solve(POSITIVE), FLOW)
    teacher, student = cost_attention(POSITIVE, FLOW, teacher_weights=A, student_weights=B)
    # teacher: u = (2, 1), r = (3/2, 3); student: u = (1, 5/3), r = (8/3, 8/5)
    assert_close(teacher, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    assert_close(student, torch.tensor([5 / 8, 3 / 8], dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_softmax_is_of_the_inverse_cost_scores(temperature):
    teacher, student = cost_attention(
        POSITIVE, FLOW, teacher_weights=A, student_weights=B, mode="softmax", temperature=temperature
    )
    lead = 1 / (1 + math.exp((3 - 1.5) / temperature))
    assert_close(teacher, torch.tensor([lead, 1 - lead], dtype=torch.float64))
    lead = 1 / (1 + math.exp((8 / 5 - 8 / 3) / temperature))
    assert_close(student, torch.tensor([lead, 1 - lead], dtype=torch.float64))


@pytest.mark.parametrize("mode", ["ratio", "softmax"])
def test_layer_moved_for_nothing_takes_nearly_all_weight(mode):
    _, student = cost_attention(COST, FLOW, teacher_weights=A, student_weights=B, mode=mode)
    assert torch.isfinite(student).all()
    assert_close(student.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert student[0] > 0.999999


@pytest.mark.parametrize("mode", ["ratio", "softmax"])
def test_all_costs_zero_leave_equal_weights(mode):
    teacher, student = cost_attention(COST * 0, FLOW, teacher_weights=A, student_weights=B, mode=mode)
    assert_close(teacher, A)
    assert_close(student, uniform_weights(2))


@pytest.mark.parametrize("mode", ["ratio", "softmax"])
def test_layer_of_zero_weight_stays_at_zero_and_finite(mode):
    a = torch.tensor([0.0, 1.0], dtype=torch.float64)
    flow = solve(POSITIVE, a, B)
    assert_close(flow, torch.tensor([[0.0, 0.0], [0.25, 0.75]], dtype=torch.float64))
    teacher, student = cost_attention(POSITIVE, flow, teacher_weights=a, student_weights=B, mode=mode)
    assert_close(teacher, a)
    assert torch.isfinite(student).all()
    solve(POSITIVE, teacher, student)  # the next step takes them


def test_uniform_weights():
    assert_close(uniform_weights(4), torch.full((4,), 0.25, dtype=torch.float64))


# ---- the recorded reference


def assert_step(actual: Tensor, expected: list) -> None:
    np.testing.assert_allclose(actual.numpy(), np.asarray(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.golden
@pytest.mark.parametrize("chained", [False, True], ids=["from_file", "from_own_output"])
def test_reference_vectors(shared: Path, chained: bool):
    cases = json.loads((shared / "golden" / "emd_reference.json").read_text())["cases"]
    assert cases
    for case in cases:
        own: dict[str, tuple[Tensor, Tensor]] | None = None
        assert case["steps"]
        for step in case["steps"]:
            recorded = {
                side: tuple(
                    torch.tensor(step["marginals_before"][side][who], dtype=torch.float64)
                    for who in ("teacher", "student")
                )
                for side in ("attention", "hidden")
            }
            used = own if chained and own is not None else recorded
            fresh = {}
            for side in ("attention", "hidden"):
                cost = torch.tensor(step[f"{side}_cost"], dtype=torch.float64)
                assert cost.shape == (case["teacher_layers"], case["student_layers"])
                a, b = (weights / weights.sum() for weights in used[side])
                flow = solve(cost, a, b)
                assert_step(flow, step[f"{side}_flow"])
                assert_step(emd_loss(cost, flow), step[f"{side}_emd"])
                fresh[side] = cost_attention(cost, flow, teacher_weights=a, student_weights=b)
            if not case["separate_marginals"]:
                mean = tuple((left + right) / 2 for left, right in zip(*fresh.values(), strict=True))
                fresh = dict.fromkeys(fresh, mean)
            for side in ("attention", "hidden"):
                for weights, who in zip(fresh[side], ("teacher", "student"), strict=True):
                    assert_step(weights, step["marginals_after"][side][who])
            own = fresh


# ---- properties


@st.composite
def problems(draw) -> tuple[Tensor, Tensor, Tensor]:
    teachers, students = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    values = draw(st.lists(st.floats(0, 100), min_size=teachers * students, max_size=teachers * students))

    def weights(count: int) -> Tensor:
        raw = torch.tensor(draw(st.lists(st.integers(0, 20), min_size=count, max_size=count)), dtype=torch.float64)
        return raw / raw.sum() if raw.sum() > 0 else uniform_weights(count)

    return torch.tensor(values, dtype=torch.float64).view(teachers, students), weights(teachers), weights(students)


quick = settings(deadline=None, max_examples=60, derandomize=True)


@quick
@given(problems())
def test_flow_holds_its_marginals_and_an_outside_solver_agrees(problem):
    optimize = pytest.importorskip("scipy.optimize")
    cost, a, b = problem
    flow = solve(cost, a, b)
    assert (flow >= 0).all()
    assert_close(flow.sum(1), a, rtol=0, atol=1e-9)
    assert_close(flow.sum(0), b, rtol=0, atol=1e-9)
    rows = np.kron(np.eye(len(a)), np.ones(len(b)))
    columns = np.kron(np.ones(len(a)), np.eye(len(b)))
    answer = optimize.linprog(
        cost.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a.numpy(), b.numpy()])
    )
    assert answer.status == 0
    np.testing.assert_allclose(float(emd_loss(cost, flow)), answer.fun, rtol=1e-7, atol=1e-7)


@quick
@given(problems(), st.sampled_from([0.1, 0.5, 0.9]))
def test_partial_flow_holds_its_bounds_and_an_outside_solver_agrees(problem, mass):
    optimize = pytest.importorskip("scipy.optimize")
    cost, a, b = problem
    flow = solve_flow(cost, teacher_weights=a, student_weights=b, mass=mass)
    assert (flow >= 0).all()
    assert_close(flow.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (flow.sum(1) * mass <= a + 1e-9).all()
    assert_close(flow.sum(0), b, rtol=0, atol=1e-9)
    rows = np.kron(np.eye(len(a)), np.ones(len(b)))
    columns = np.kron(np.ones(len(a)), np.eye(len(b)))
    answer = optimize.linprog(
        cost.flatten().numpy(),
        A_ub=rows,
        b_ub=a.numpy() / mass,
        A_eq=columns,
        b_eq=b.numpy(),
    )
    assert answer.status == 0
    np.testing.assert_allclose(float(emd_loss(cost, flow)), answer.fun, rtol=1e-6, atol=1e-6)


def test_partial_flow_by_hand():
    """Layer 1 asks for 0.75: with a teacher mass of 1 it has 0.5 of it from teacher layer 1, with twice that all of it."""
    flow = solve_flow(COST, teacher_weights=A, student_weights=B, mass=0.5)
    assert_close(flow, torch.tensor([[0.25, 0.0], [0.0, 0.75]], dtype=torch.float64))
    flow = solve_flow(COST, teacher_weights=A, student_weights=B, mass=0.8)
    assert_close(flow, torch.tensor([[0.25, 0.125], [0.0, 0.625]], dtype=torch.float64))


@pytest.mark.parametrize("mass", [0.0, -0.5, 1.5, float("nan")])
def test_a_mass_that_cannot_be_moved(mass):
    with pytest.raises(EmdError, match=r"the mass that is moved should be above 0 and at most 1, found"):
        solve_flow(COST, teacher_weights=A, student_weights=B, mass=mass)


def test_cost_attention_of_a_partial_flow_by_hand():
    """Teacher layer 1 moved nothing: its unit cost is the least of its costs, 1.2; layer 0 moved its mass for 0.6 a unit."""
    cost = torch.tensor([[0.6, 0.6], [2.0, 1.2]], dtype=torch.float64)
    flow = solve_flow(cost, teacher_weights=A, student_weights=B, mass=0.25)
    assert_close(flow, torch.tensor([[0.25, 0.75], [0.0, 0.0]], dtype=torch.float64))
    teacher, student = cost_attention(cost, flow, teacher_weights=A, student_weights=B)
    assert_close(teacher, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    assert_close(student, torch.tensor([1 / 2, 1 / 2], dtype=torch.float64))


@quick
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_layers_permutes_the_problem(problem, random):
    cost, a, b = problem
    rows, columns = random.sample(range(len(a)), len(a)), random.sample(range(len(b)), len(b))
    flow, moved = solve(cost, a, b), solve(cost[rows][:, columns], a[rows], b[columns])
    # Ties may be broken otherwise, so the flows are compared by what they cost.
    assert_close(emd_loss(cost[rows][:, columns], moved), emd_loss(cost, flow))
    assert_close(emd_loss(cost[rows][:, columns], flow[rows][:, columns]), emd_loss(cost, flow))
    before = cost_attention(cost, flow, teacher_weights=a, student_weights=b)
    after = cost_attention(
        cost[rows][:, columns], flow[rows][:, columns], teacher_weights=a[rows], student_weights=b[columns]
    )
    assert_close(after[0], before[0][rows])
    assert_close(after[1], before[1][columns])


@quick
@given(problems())
def test_gradient_in_the_cost_is_the_flow(problem):
    cost, a, b = problem
    cost.requires_grad_()
    flow = solve(cost, a, b)
    emd_loss(cost, flow).backward()
    assert_close(cost.grad, flow)


@quick
@given(problems(), st.sampled_from(["ratio", "softmax"]), st.sampled_from([0.5, 1.0, 10.0]))
def test_cost_attention_gives_marginals_of_the_next_step(problem, mode, temperature):
    cost, a, b = problem
    for _ in range(3):
        a, b = cost_attention(
            cost, solve(cost, a, b), teacher_weights=a, student_weights=b, mode=mode, temperature=temperature
        )
        for weights in (a, b):
            assert torch.isfinite(weights).all()
            assert (weights >= 0).all()
            assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_permuting_a_problem_without_ties_permutes_its_flow():
    cost = torch.rand(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = uniform_weights(5), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    rows, columns = [4, 1, 0, 3, 2], [2, 0, 1]
    assert_close(solve(cost[rows][:, columns], a[rows], b[columns]), solve(cost, a, b)[rows][:, columns])


# ---- errors


def test_cost_that_is_not_finite_is_named():
    cost = torch.ones(12, 6)
    cost[3, 0] = math.nan
    with pytest.raises(
        EmdError, match=r"cost matrix 12x6: non-finite entry at teacher layer 3, student layer 0\. Lower"
    ):
        solve(cost, uniform_weights(12), uniform_weights(6))


def test_pot_answers_a_nan_cost_with_a_wrong_plan():
    """The reason for the check above: POT only warns, and answers all the same."""
    with pytest.warns(UserWarning, match="infeasible"):
        flow = ot.emd([0.5, 0.5], [0.5, 0.5], np.array([[math.nan, 1.0], [1.0, 1.0]]))
    assert abs(np.asarray(flow).sum() - 1) > 1e-6 or not np.isfinite(flow).all()


def test_cost_that_does_not_fit_its_weights():
    with pytest.raises(EmdError, match=r"cost matrix \(2, 2\) does not fit 3 teacher and 2 student weights"):
        solve(COST, uniform_weights(3))


@pytest.mark.parametrize("bad", [[0.5, 0.6], [-0.5, 1.5], [math.nan, 1.0], [0.0, 0.0]])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_marginal_that_is_none(bad, side):
    weights = {"teacher_weights": A, "student_weights": B, f"{side}_weights": torch.tensor(bad, dtype=torch.float64)}
    with pytest.raises(EmdError, match=rf"{side} weights should be non-negative and sum to 1, found \["):
        solve_flow(COST, **weights)


def test_solver_stopped_early(monkeypatch):
    solver = ot.emd
    monkeypatch.setattr(ot, "emd", lambda *args, **kwargs: solver(*args, numItermax=1, **kwargs))
    cost = torch.rand(12, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(EmdError, match=r"the flow's solver stopped short of the optimum \(POT: .*numItermax"):
        solve(cost, uniform_weights(12), uniform_weights(6))


def test_solver_whose_plan_misses_its_marginals(monkeypatch):
    answer = (np.zeros((2, 2)), {"result_code": 1, "warning": None})
    monkeypatch.setattr(ot, "emd", lambda *args, **kwargs: answer)
    with pytest.raises(EmdError, match=r"the flow misses its marginals by 7\.5e-01 \(allowed 1e-06\)"):
        solve(COST)


# ---- ground costs against a plain pair loop

LENGTHS = (5, 1, 3)


def mask_of(lengths: tuple[int, ...], tokens: int) -> Tensor:
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop_hidden(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([torch.stack([((x - y)[mask] ** 2).mean() for y in student]) for x in teacher])


def loop_attention(tq: Tensor, tk: Tensor, sq: Tensor, sk: Tensor, mask: Tensor) -> Tensor:
    def scores(query: Tensor, key: Tensor) -> Tensor:
        return query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])

    teacher, student = scores(tq, tk), scores(sq, sk)
    if teacher.shape[2] != student.shape[2]:
        teacher, student = teacher.mean(2, keepdim=True), student.mean(2, keepdim=True)
    real = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(teacher[0])
    return torch.stack([torch.stack([((x - y)[real] ** 2).mean() for y in student]) for x in teacher])


def gradients(compute, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    cost = compute(*leaves)
    weights = torch.linspace(0.5, 1.5, cost.numel()).view_as(cost)
    return cost.detach(), list(torch.autograd.grad((cost * weights).sum(), leaves))


def test_hidden_cost_by_hand():
    teacher = torch.tensor([[[[1.0, 2.0], [9.0, 9.0]]]])
    student = torch.tensor([[[[0.0, 0.0], [5.0, 5.0]]]])
    assert_close(hidden_cost(teacher, student, mask=torch.tensor([[True, False]])), torch.tensor([[2.5]]))


def test_attention_cost_by_hand():
    """One real token, d = 4: teacher score 1 * 4 / 2 = 2 per unit, student 0."""
    query, key = torch.ones(1, 1, 1, 2, 4), torch.ones(1, 1, 1, 2, 4)
    mask = torch.tensor([[True, False]])
    for method in ("scores", "factored"):
        cost = attention_cost(query, key, query * 0, key, mask=mask, method=method)
        assert_close(cost, torch.tensor([[4.0]]))


def test_hidden_cost_is_that_of_the_pair_loop():
    teacher, student, mask = normal(4, 3, 5, 8, seed=0), normal(3, 3, 5, 8, seed=1), mask_of(LENGTHS, 5)
    actual, actual_gradients = gradients(lambda x, y: hidden_cost(x, y, mask=mask), teacher, student)
    expected, expected_gradients = gradients(lambda x, y: loop_hidden(x, y, mask), teacher, student)
    assert_close(actual, expected)
    assert_close(actual_gradients, expected_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["auto", "scores", "factored"])
@pytest.mark.parametrize(("teacher_heads", "student_heads"), [(2, 2), (4, 2), (3, 6)])
def test_attention_cost_is_that_of_the_pair_loop(method, teacher_heads, student_heads):
    mask = mask_of(LENGTHS, 5)
    inputs = [normal(4, 3, teacher_heads, 5, 6, seed=seed) for seed in (0, 1)]
    inputs += [normal(3, 3, student_heads, 5, 4, seed=seed) for seed in (2, 3)]
    actual, actual_gradients = gradients(lambda *given: attention_cost(*given, mask=mask, method=method), *inputs)
    expected, expected_gradients = gradients(lambda *given: loop_attention(*given, mask), *inputs)
    assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert_close(actual_gradients, expected_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_layers_that_agree_cost_next_to_nothing_and_never_less(shift):
    teacher, mask = normal(3, 2, 9, 32, seed=5) + shift, mask_of((9, 4), 9)
    cost = hidden_cost(teacher, teacher.clone(), mask=mask)
    assert (cost >= 0).all()
    assert_close(cost.diagonal(), torch.zeros(3), rtol=0, atol=1e-4)
    assert_close(cost, loop_hidden(teacher, teacher, mask), rtol=1e-4, atol=1e-4)


def test_score_maps_that_share_a_large_part_lose_no_digits():
    common, mask = [10 * normal(1, 2, 2, 9, 8, seed=seed) for seed in (0, 1)], mask_of((9, 4), 9)
    heads = [common[seed % 2] + 0.01 * normal(3, 2, 2, 9, 8, seed=seed) for seed in (2, 3, 4, 5)]
    expected = loop_attention(*(tensor.double() for tensor in heads), mask).float()
    assert_close(attention_cost(*heads, mask=mask, method="scores"), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["scores", "factored"])
def test_cancellation_never_makes_an_attention_cost_negative(method):
    for seed in range(10):
        query, key = (30 * normal(3, 2, 2, 9, 8, seed=2 * seed + side) for side in (0, 1))
        cost = attention_cost(query, key, query.clone(), key.clone(), mask=mask_of((9, 4), 9), method=method)
        assert (cost >= 0).all()


def test_padding_content_does_not_matter():
    mask = mask_of(LENGTHS, 5)
    real = mask[None, :, :, None]
    teacher, student = normal(4, 3, 5, 8, seed=0), normal(2, 3, 5, 8, seed=1)
    dirty = [tensor.masked_fill(~real, 1e4) for tensor in (teacher, student)]
    assert_close(hidden_cost(*dirty, mask=mask), hidden_cost(teacher, student, mask=mask), rtol=0, atol=0)
    heads = [normal(layers, 3, 2, 5, 4, seed=layers) for layers in (4, 4, 2, 2)]
    filled = [tensor.masked_fill(~mask[None, :, None, :, None], math.nan) for tensor in heads]
    for method in ("scores", "factored"):
        clean = attention_cost(*heads, mask=mask, method=method)
        assert_close(attention_cost(*filled, mask=mask, method=method), clean, rtol=0, atol=0)
        wider = [torch.nn.functional.pad(tensor, (0, 0, 0, 3), value=7.0) for tensor in heads]
        padded = torch.nn.functional.pad(mask, (0, 3))
        assert_close(attention_cost(*wider, mask=padded, method=method), clean)


def test_costs_are_float32_under_bfloat16_autocast():
    mask = mask_of(LENGTHS, 5)
    hidden = [normal(4, 3, 5, 8, seed=0), normal(2, 3, 5, 8, seed=1)]
    heads = [normal(layers, 3, 2, 5, 4, seed=layers) for layers in (4, 4, 2, 2)]
    plain = hidden_cost(*hidden, mask=mask), attention_cost(*heads, mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = hidden_cost(*hidden, mask=mask), attention_cost(*heads, mask=mask)
        low = hidden_cost(*(tensor.bfloat16() for tensor in hidden), mask=mask)
    assert_close(cast, plain, rtol=0, atol=0)
    assert low.dtype == torch.float32


def test_hidden_cost_shapes_that_do_not_fit():
    mask = mask_of((2,), 2)
    with pytest.raises(
        EmdError, match=r"teacher \(2, 1, 2, 8\), student \(2, 1, 2, 4\) and mask \(1, 2\) should agree"
    ):
        hidden_cost(torch.ones(2, 1, 2, 8), torch.ones(2, 1, 2, 4), mask=mask)


def test_attention_cost_batches_that_do_not_fit():
    teacher, student = torch.ones(2, 1, 2, 4, 8), torch.ones(2, 1, 2, 5, 8)
    with pytest.raises(EmdError, match=r"attention_cost: .* do not fit"):
        attention_cost(teacher, teacher, student, student, mask=mask_of((4,), 4))


def test_attention_cost_query_and_key_that_do_not_fit():
    teacher = torch.ones(2, 1, 2, 4, 8)
    with pytest.raises(EmdError, match=r"query \(2, 1, 2, 4, 8\), key \(2, 1, 2, 4, 6\) and mask \(1, 4\) do not fit"):
        attention_cost(teacher, torch.ones(2, 1, 2, 4, 6), teacher, teacher, mask=mask_of((4,), 4))


def test_mask_without_a_real_token():
    states, heads, mask = torch.ones(2, 1, 3, 4), torch.ones(2, 1, 1, 3, 4), mask_of((0,), 3)
    with pytest.raises(EmdError, match="the mask marks no real token"):
        hidden_cost(states, states, mask=mask)
    with pytest.raises(EmdError, match="the mask marks no real token"):
        attention_cost(heads, heads, heads, heads, mask=mask)


def test_mask_of_ones_and_zeros_is_refused():
    states, heads, mask = torch.ones(2, 1, 3, 4), torch.ones(2, 1, 1, 3, 4), mask_of((2,), 3).long()
    with pytest.raises(EmdError, match=r"the mask should be bool, found torch\.int64"):
        hidden_cost(states, states, mask=mask)
    with pytest.raises(EmdError, match=r"Pass attention_mask\.bool\(\)"):
        attention_cost(heads, heads, heads, heads, mask=mask)
