"""The step benchmark: both steps compute the same, see the same rows, and the record says what it should. No timings."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import train_engines  # noqa: E402 - found through the line above
import train_step  # noqa: E402
from released_step import ATTENTION, pair_costs  # noqa: E402
from train_engines import (  # noqa: E402
    COMPARED,
    ENGINES,
    FOLDERS,
    LENGTHS,
    Engine,
    OurStep,
    Settings,
    Worker,
    build,
    choose_batches,
    count_flops,
    load_rows,
    model_flops,
    phases,
)

STUDENTS = ("4L-312", "6L-768")


def settings(**changes) -> Settings:
    given = {"student": "4L-312", "batch": 3, "length": 12, "pad": 32, "batches": 2, "threads": 1, "smoke": True}
    return Settings(**(given | changes))


def equal_batch(step, of: Settings):
    rows = load_rows("equal", of)
    return step.batch(rows, np.arange(len(rows)))


@pytest.mark.parametrize("student", STUDENTS)
def test_both_steps_agree_without_padding(student):
    given = settings(student=student)
    released, ours = (build(Engine(kind), given, dropout=0.0) for kind in ("released", "ours"))
    assert (released.trained.projection is None) is (student == "6L-768")
    for _ in range(3):
        theirs, mine = (step(equal_batch(step, given)) for step in (released, ours))
        assert {name: mine[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)
        gradients = [
            {name: value.grad for name, value in step.trained.named_parameters() if value.grad is not None}
            for step in (released, ours)
        ]
        assert gradients[0].keys() == gradients[1].keys()
        for name, expected in gradients[0].items():
            assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5)
        for weights, expected in zip(ours.mapping.marginals["hidden"], released.weights, strict=True):
            np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-4)


def test_both_steps_pad_alike():
    given = settings()
    data = load_rows("cola", given)
    rows = np.array([2, 0, 5])
    theirs, mine = (build(Engine(kind), given).batch(data, rows, length=40) for kind in ("released", "ours"))
    assert_close(mine.parts[0].inputs, theirs)
    assert theirs["input_ids"].shape == (3, 40)
    assert mine.tokens == int(theirs["attention_mask"].sum()) == int(data.examples.lengths[rows].sum())


def test_agreement_is_what_the_worker_reports():
    found = Worker("ours, float32", settings()).agree()
    assert set(found) == {"attention", "hidden", "embedding", "prediction", "layer weights"}
    assert 0 <= max(found.values()) < 1e-4


def test_released_scores_are_masked_at_padded_keys_only():
    step = build(Engine("released"), settings(), dropout=0.0)
    ids = torch.randint(1000, 2000, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    model = step.teacher
    assert model.config._attn_implementation == ATTENTION
    kept = {}
    self_attention = model.bert.encoder.layer[0].attention.self
    for name in ("query", "key"):
        getattr(self_attention, name).register_forward_hook(
            lambda _m, _i, output, name=name: kept.update({name: output})
        )
    output = model(input_ids=ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    query, key = (kept[name].unflatten(-1, (2, 12)).transpose(1, 2) for name in ("query", "key"))
    expected = query @ key.transpose(-1, -2) / 12**0.5
    real = mask.bool()[:, None, None, :].expand_as(expected)
    assert_close(output.attentions[0][real], expected[real])
    assert (output.attentions[0][~real] < -1e2).all()
    assert len(output.attentions) == len(output.hidden_states) - 1 == model.config.num_hidden_layers


def test_pair_costs_are_means_of_squares_teacher_in_rows():
    teacher, student = torch.randn(3, 2, 4, 5), torch.randn(2, 2, 4, 5)
    expected = (teacher[:, None] - student[None]).square().flatten(2).mean(2)
    assert_close(pair_costs(teacher=list(teacher), student=list(student)), expected)


@pytest.mark.parametrize("number", [0, 7])
def test_both_sides_see_the_same_rows(number):
    lengths = load_rows("rte", settings(pad=128)).examples.lengths
    given = {"batch": 8, "count": 4, "number": number, "seed": 0}
    bucketed = choose_batches(lengths, **given, shuffled=False)
    shuffled = choose_batches(lengths, **given, shuffled=True)
    assert sorted(np.concatenate(bucketed)) == sorted(np.concatenate(shuffled))
    assert [len(rows) for rows in (*bucketed, *shuffled)] == [8] * 8
    width = [sum(int(lengths[rows].max()) for rows in batches) for batches in (bucketed, shuffled)]
    assert width[0] < width[1]
    # Each batch comes from another quarter of the widths.
    widest = sorted(int(lengths[rows].max()) for rows in bucketed)
    assert widest[0] < np.median(lengths) < widest[-1]


def test_rounds_take_different_rows_until_all_were_seen():
    lengths = np.arange(1, 65)
    rounds = [
        np.concatenate(choose_batches(lengths, batch=4, count=4, number=number, seed=1, shuffled=False))
        for number in range(4)
    ]
    assert sorted(np.concatenate(rounds)) == list(range(64))


@pytest.mark.parametrize("task", LENGTHS)
def test_drawn_lengths_follow_the_histogram(task):
    lengths = load_rows(task, settings(pad=128)).examples.lengths
    cut = np.minimum(LENGTHS[task], 128)
    assert lengths.min() >= cut[0]
    assert lengths.max() <= cut[-1]
    assert abs(np.median(lengths) - cut[10]) <= 2


def test_rows_of_a_data_folder(tiny_bert, tiny_data, tmp_path):
    tokenizer = tiny_bert("tokenizer")
    folder = tiny_data("pair", train=10, name="glue/MRPC")
    rows = load_rows("mrpc", settings(glue=str(folder.parent), tokenizer=str(tokenizer), pad=9))
    assert len(rows) == 10
    assert rows.examples.lengths.max() <= 9
    assert set(FOLDERS) == set(LENGTHS)


@pytest.mark.parametrize("mapping", COMPARED)
def test_phases_cover_the_step(mapping):
    given = settings()
    step = build(Engine("ours"), given, mapping=mapping)
    ticks, backward = iter(range(1000)), torch.Tensor.backward
    with phases(step, lambda: float(next(ticks))) as spent:
        step(equal_batch(step, given))
    assert set(spent) <= set(train_step.PHASES)
    assert "flow" in spent or mapping == "none"
    assert {"teacher", "student", "losses", "losses backward", "student backward", "optimizer"} <= set(spent)
    assert sum(spent.values()) == next(ticks) - 1
    assert "step" not in vars(step.mapping)  # nothing stays behind
    assert torch.Tensor.backward is backward


def test_model_flops_are_those_counted():
    from torch.utils.flop_counter import FlopCounterMode

    model = build(Engine("released"), settings()).teacher  # its attention is plain products, all of them counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(3, 12, dtype=torch.int64), attention_mask=torch.ones(3, 12, dtype=torch.int64))
    assert model_flops(model.config, batch=3, tokens=12) == counter.get_total_flops()


def test_losses_arithmetic_is_counted_forward_and_backward():
    given = settings()
    step = build(Engine("ours"), given)
    counted = count_flops(step, equal_batch(step, given))
    projection = {"projection", "projection backward"}
    assert set(counted) == {"teacher", "student", "student backward", "losses", "losses backward", *projection}
    assert min(counted.values()) > 0


def test_our_step_is_the_projects_own(monkeypatch):
    called = []
    original = train_engines.training._Run.step
    monkeypatch.setattr(train_engines.training._Run, "step", lambda *given: called.append(given) or original(*given))
    given = settings()
    step = build(ENGINES["ours, float32"], given)
    before = nn.utils.parameters_to_vector(step.trained.parameters()).clone()
    step(equal_batch(step, given))
    assert isinstance(step, OurStep)
    assert len(called) == step.run.done.step == 1
    assert not torch.equal(before, nn.utils.parameters_to_vector(step.trained.parameters()))


def options(**changes) -> argparse.Namespace:
    given = vars(settings()) | {"memory_batch": 2, "memory_length": 16, "tasks": ["cola"], "rounds": 2, "out": None}
    given.pop("seed")
    return argparse.Namespace(**(given | {"ablation": True, "breakdown": True, "memory": True} | changes))


def in_process(name, given):
    worker = Worker(name, Settings(**given))
    return contextlib.nullcontext(lambda command, **more: json.loads(json.dumps(worker.ask(command, **more))))


def test_record_and_table(capsys):
    record = train_step.measure(options(), start=in_process)
    json.dumps(record)
    assert set(train_step.ENGINES) == set(ENGINES) == set(record["steps"]["cola"])
    assert set(record["steps"]["equal"]) == set(ENGINES) - {"ours, float32, padded"}
    rows = {
        name: sum(step["rows"] for part in rounds for step in part) for name, rounds in record["steps"]["cola"].items()
    }
    tokens = {
        name: sum(step["tokens"] for part in rounds for step in part)
        for name, rounds in record["steps"]["cola"].items()
    }
    assert set(rows.values()) == {2 * 2 * 3}
    assert len(set(tokens.values())) == 1
    assert {step["width"] for part in record["steps"]["cola"]["released"] for step in part} == {32}
    assert all(len(part) == 2 for part in record["breakdown_seconds"].values())
    assert record["device"]["cpu"] is not None or record["device"]["machine"]
    assert record["engines"]["released"] == {"precision": "float32", "threads": 1}
    record["conditions"] |= {"other_cpus_busy": 0.5, "disturbed": True}
    train_step.print_table(record)
    shown = capsys.readouterr().out
    for text in (
        "SMOKE TEST",
        "kept 0.50 CPUs busy: measure again",
        "\nequal (12 tokens each)",
        "\ncola (length histograms",
        "of released (bar 50%)",
    ):
        assert text in shown
    assert shown.count("costs and flow (losses, flow, losses backward)") == 2
    assert shown.count("over mapping uniform [") == 0
    assert shown.count("over mapping uniform (bar 5%)") == 2


def test_parts_can_be_left_out(capsys):
    record = train_step.measure(
        options(ablation=False, breakdown=False, memory=False, tasks=[], rounds=1), start=in_process
    )
    assert set(record["steps"]) == {"equal"}
    assert set(record["steps"]["equal"]) == {"released", "ours"}
    assert record["memory_bytes"] == record["breakdown_seconds"] == {}
    train_step.print_table(record)
    assert "bar" not in capsys.readouterr().out


def test_steps_that_differ_are_not_timed():
    def other(name, given):
        def ask(command, **_):
            assert command == "agree"
            return {"attention": 0.5}

        return contextlib.nullcontext(ask)

    with pytest.raises(SystemExit, match=r"released step and ours differ \(allowed 0\.001\): \{'attention': 0\.5\}"):
        train_step.measure(options(), start=other)


def test_worker_process_measures_memory():
    given = {**vars(settings()), "length": 16}
    with train_step.process("ours", given) as ask:
        found = ask("memory")
    assert found["before"] > 0
    assert found["peak"] is None or found["peak"] > found["before"]


def test_memory_that_is_not_known_is_said(capsys):
    sizes = {"released": {"before": 10, "peak": None}, "ours": {"before": 10, "peak": 20}}
    train_step.print_memory(sizes, {"memory_batch": 1, "memory_length": 2})
    assert capsys.readouterr().out.count("unknown on this system") == 2


def test_data_and_tokenizer_go_together(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--glue", "somewhere"])
    with pytest.raises(SystemExit):
        train_step.main()
    assert "--glue and --tokenizer go together" in capsys.readouterr().err
