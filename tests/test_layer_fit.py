"""A copied student's layers are fitted to what the teacher's compute, and nothing else about it changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_inherit import SAME
from tiny_family import LABELS, carve_codes, family_teacher

from bertemd_deploy import layer_fit, position_codes
from bertemd_deploy.capture import LayerReader
from bertemd_deploy.distill import _make_student
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ModelError, TrainingError
from bertemd_deploy.families import FAMILIES
from bertemd_deploy.layer_fit import fit_layers
from bertemd_deploy.models import load_classifier, output_layer
from bertemd_deploy.position_codes import code_coordinates, hold_codes
from bertemd_deploy.settings import DistillSettings, StudentSettings
from bertemd_deploy.students import Shape, build_student, fits_layers
from bertemd_deploy.tasks import Kind

WIDE = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 128}
POSITIONS = 16


def rows(count: int, *, seed: int, vocabulary: int = 28) -> Encoded:
    """Return rows of 4 to 12 random tokens, all real words."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, 13, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = generator.integers(5, vocabulary, offsets[-1]).astype(np.int32)
    return Encoded(tokens, np.zeros(len(tokens), dtype=np.int8), offsets)


def batch_of(examples: Encoded, pad: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(v) for name, v in examples.batch(range(len(examples)), pad_id=pad).items()}


def errors(student: Any, teacher: Any, layers: list[int], examples: Encoded, pad: int) -> list[float]:
    """Return, for each of the student's layers, 1 - the mean cosine of its outputs with the teacher's, but for codes."""
    inputs = batch_of(examples, pad)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        theirs, ours = LayerReader(teacher)(inputs).hidden_states, LayerReader(student)(inputs).hidden_states
    kept = ~carry_codes(student)
    pairs = [(ours[at][real][:, kept], theirs[layer][real][:, kept]) for at, layer in enumerate(layers)]
    return [1 - float(torch.cosine_similarity(*pair, dim=-1).mean()) for pair in pairs]


def carry_codes(student: Any) -> torch.Tensor:
    """Return (H,) bool: the coordinates that carry codes."""
    where = code_coordinates(student)
    found = torch.zeros(student.config.hidden_size, dtype=torch.bool)
    if where is not None:
        found[where] = True
    return found


def wide_mpnet(tmp_path: Path, kind: Kind = "classification") -> tuple[Any, Any]:
    teacher, encoder = family_teacher(tmp_path, "mpnet", kind=kind, **WIDE)
    table = teacher.mpnet.encoder.relative_attention_bias.weight
    distances = torch.arange(16) * torch.tensor(
        [[1], [-1]]
    )  # of a bucket, exact up to 8; later keys have the other half
    phases = torch.arange(4) * 0.8
    table.data.copy_(3 * torch.cos(0.4 * distances.reshape(-1, 1) + phases))  # cos of a difference: a table of rank 2
    return teacher, encoder


def copied(teacher: Any, encoder: Any, layers: int, examples: Encoded | None = None) -> tuple[Any, str]:
    sizes = (96, 4, 128) if teacher.config.hidden_size == 96 else (16, 2, 32)
    shape = Shape(layers, *sizes)
    return build_student(
        teacher, shape=shape, init="teacher", init_layers="even", seed=1, encoder=encoder, examples=examples
    )


def test_a_copy_that_lacks_the_table_is_mended_on_rows_it_was_not_fitted_on(tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    train, other = rows(600, seed=1), rows(60, seed=2)
    plain, told = copied(teacher, encoder, 4)
    assert told == "teacher layers 1, 2, 3, 4"
    fitted, told = copied(teacher, encoder, 4, train)
    assert told == "teacher layers 1, 2, 3, 4, fitted"
    config = fitted.config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.1, 0.1)  # the teacher's
    assert code_coordinates(plain) is None
    asked = build_student(
        teacher,
        shape=Shape(4, 96, 4, 128),
        init="teacher",
        seed=1,
        encoder=encoder,
        examples=rows(30, seed=1),
        dropout=0.2,
    )[0]
    assert {module.p for module in asked.modules() if isinstance(module, torch.nn.Dropout)} == {0.2}
    before, after = (errors(model, teacher, [0, 1, 2, 3], other, encoder.pad_id) for model in (plain, fitted))
    assert all(new < 0.6 * old for old, new in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize(("fit", "carrying"), [("auto", 4), ("never", 0)])
def test_layer_losses_do_not_see_the_codes(fit: Any, carrying: int, tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    student = StudentSettings(name="4L", fit_layers=fit)
    trained, _, _ = _make_student(
        teacher, encoder, rows(300, seed=1), student=student, settings=DistillSettings(), kind="classification"
    )
    where = carry_codes(trained.student)
    assert int(where.sum()) == carrying
    hidden = torch.ones(1, 1, 96)
    assert torch.equal(trained.project(hidden)[0, 0] == 0, where)


def test_training_leaves_the_codes_as_they_are(tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    made = {"student": StudentSettings(name="4L"), "settings": DistillSettings(dropout=0.1), "kind": "classification"}
    trained, _, _ = _make_student(teacher, encoder, rows(300, seed=1), **made)
    student: Any = trained.student
    where = code_coordinates(student)
    assert where is not None
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0)
    inputs = batch_of(rows(16, seed=3), encoder.pad_id)
    for _ in range(3):
        optimizer.zero_grad()
        for half in (slice(8), slice(8, 16)):  # as micro-batches are
            hidden = student.bert(**{name: values[half] for name, values in inputs.items()}).last_hidden_state
            (hidden[..., where].sum() + hidden.square().sum()).backward()
        optimizer.step()
    others = torch.ones(96, dtype=torch.bool)
    others[where] = False
    writers = 0
    assert student.bert.embeddings.dropout.p == 0
    assert {module.p for module in student.bert.encoder.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    for name, values in student.state_dict().items():
        parts = name.split(".")
        if "embeddings" in name and parts[-2] != "LayerNorm":
            now, old = values.T, before[name].T
        elif "LayerNorm" in name or ".output.dense" in name:
            now, old = values, before[name]
        else:
            continue
        writers += 1
        assert torch.equal(now[where], old[where]), name
        assert not torch.equal(now[others], old[others]), name
    assert writers == 3 + 2 + 4 * 8
    assert torch.equal(where, code_coordinates(student))


def test_codes_are_coordinates_that_only_positions_write_to(tiny_bert: Callable[..., Path]) -> None:
    folder = tiny_bert("teacher", layers=2, labels=LABELS)
    assert code_coordinates(load_classifier(folder, labels=LABELS)) is None
    assert code_coordinates(torch.nn.Linear(2, 2)) is None  # no BERT
    carve_codes(folder, [3, 7])
    teacher: Any = load_classifier(folder, labels=LABELS)
    assert code_coordinates(teacher).tolist() == [3, 7]
    bert, layer = teacher.bert, teacher.bert.encoder.layer[1]
    with torch.no_grad():
        for values in (
            bert.embeddings.word_embeddings.weight[5],
            bert.embeddings.token_type_embeddings.weight[1],
            bert.embeddings.LayerNorm.bias,
            layer.attention.output.dense.weight[:, 2],
            layer.attention.output.dense.bias,
            layer.attention.output.LayerNorm.bias,
            layer.output.dense.weight[:, 2],
            layer.output.dense.bias,
            layer.output.LayerNorm.bias,
        ):
            values[3] = 0.1
            assert code_coordinates(teacher).tolist() == [7]
            values[3] = 0
        bert.embeddings.position_embeddings.weight[:, 3] = 0
        assert code_coordinates(teacher).tolist() == [7]
        bert.embeddings.position_embeddings.weight[:, 7] = 0
    assert code_coordinates(teacher) is None
    assert hold_codes(teacher) is None
    assert {module.p for module in teacher.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}


def test_a_fitted_student_that_becomes_a_teacher_is_copied_with_its_codes(tmp_path: Path) -> None:
    mpnet, encoder = wide_mpnet(tmp_path)
    teacher, _ = copied(mpnet, encoder, 4, rows(300, seed=1))
    again, told = copied(teacher, encoder, 3)
    assert told == "teacher layers 1, 2, 4"
    assert torch.equal(code_coordinates(again), code_coordinates(teacher))
    with pytest.raises(ModelError, match=r"a second fit would lose the positions that they carry\. Leave it at auto"):
        copied(teacher, encoder, 3, rows(300, seed=2))


def test_the_first_layers_are_fitted_where_the_recipe_asks_for_none(tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    train, other = rows(600, seed=1), rows(60, seed=2)
    made: dict[str, Any] = {"settings": DistillSettings(), "kind": "classification"}
    sizes = {"layers": 2, "hidden": 96, "heads": 4, "intermediate": 128}
    found = {
        rule: _make_student(teacher, encoder, train, student=StudentSettings(**sizes, init_layers=rule), **made)
        for rule in ("auto", "first", "even", (1, 3))
    }
    told = {rule: source for rule, (_, _, source) in found.items()}
    assert told == {
        "auto": "teacher layers 1, 2, fitted",
        "first": "teacher layers 1, 2, fitted",
        "even": "teacher layers 2, 4, fitted",
        (1, 3): "teacher layers 1, 3, fitted",
    }
    far, near = (
        sum(errors(found[rule][0].student, teacher, layers, other, encoder.pad_id))
        for rule, layers in (("even", [1, 3]), ("auto", [0, 1]))
    )
    assert near < 0.5 * far


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
def test_a_head_over_tokens_does_not_read_the_codes(kind: Kind, tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path, kind)
    shape = Shape(4, 96, 4, 128)
    student, told = build_student(
        teacher, shape=shape, init="teacher", seed=1, encoder=encoder, kind=kind, examples=rows(300, seed=1)
    )
    assert told.endswith("fitted")
    weight = output_layer(student).weight
    assert not weight[:, carry_codes(student)].any()
    assert torch.equal(weight[:, ~carry_codes(student)], output_layer(teacher).weight[:, ~carry_codes(student)])


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_layers_are_made_up_for_in_every_family(family: str, tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, family)
    train, other = rows(600, seed=1), rows(60, seed=2)
    layers = [1, 3]
    before, after = (
        errors(copied(teacher, encoder, 2, examples)[0], teacher, layers, other, encoder.pad_id)
        for examples in (None, train)
    )
    assert all(new < 0.8 * old for old, new in zip(before, after, strict=True)), (before, after)


def test_a_copy_that_computes_the_same_is_left_as_it_is(tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, "bert")
    student, _ = build_student(teacher, shape=SAME, init="teacher", seed=1, encoder=encoder)
    before = copy.deepcopy(student.state_dict())
    fit = fit_layers(student, teacher, rows(200, seed=1), layers=range(4), pad_id=encoder.pad_id, max_length=POSITIONS)
    assert fit.copied == pytest.approx([1.0] * 4, abs=1e-5)
    assert fit.fitted == pytest.approx([1.0] * 4, abs=1e-5)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-4)


def test_only_what_is_fitted_changes(tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, "bert")
    weights = copy.deepcopy(teacher.state_dict())
    plain, _ = copied(teacher, encoder, 2)
    fitted, _ = copied(teacher, encoder, 2, rows(200, seed=1))
    changed = {name for name, value in fitted.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    assert changed == {
        f"bert.encoder.layer.{layer}.{part}.dense.{leaf}"
        for layer in range(2)
        for part in ("attention.output", "output")
        for leaf in ("weight", "bias")
    }
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_pre_hooks for name, module in teacher.named_modules() if name)
    again, _ = copied(teacher, encoder, 2, rows(200, seed=1))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in fitted.state_dict().items())


def test_the_outputs_are_a_ridge_regression() -> None:
    """The change solves argmin sum_t |e_t - dW a_t|^2 / s_t^2 + lambda |dW|^2, with the best lambda for rows held back."""
    generator = torch.Generator().manual_seed(0)
    inputs, beside, wanted = (torch.randn(50, width, generator=generator) for width in (7, 5, 5))
    wanted = wanted + inputs @ torch.randn(7, 5, generator=generator)
    held = torch.arange(50) % 3 == 2
    part = torch.nn.Module()
    part.dense, part.LayerNorm = torch.nn.Linear(7, 5), torch.nn.LayerNorm(5)
    weights = torch.cat([part.dense.weight, part.dense.bias[:, None]], 1).double()
    with torch.no_grad():
        layer_fit._fit_output(part, torch.nn.Identity(), inputs, beside, wanted, held, None)
    moved = torch.cat([part.dense.weight, part.dense.bias[:, None]], 1).double() - weights
    scale = 1 / wanted.double().std(1, unbiased=False, keepdim=True)
    given = torch.cat([inputs, torch.ones(50, 1)], 1).double()
    missing = wanted.double() - given @ weights.T - beside.double()
    given, missing, moved = given * scale, (missing * scale).detach(), moved.detach()
    tried = []
    for ridge in layer_fit._RIDGES:
        root = (ridge * given[~held].square().sum(0).mean()).sqrt()
        augmented = torch.cat([given[~held], root * torch.eye(8)])
        change = torch.linalg.lstsq(augmented, torch.cat([missing[~held], torch.zeros(8, 5)])).solution
        tried.append((float((missing - given @ change)[held].square().sum()), change))
    best = min(range(len(tried)), key=lambda at: tried[at][0])
    assert 0 < best < len(tried) - 1 or tried[best][0] < tried[0][0]
    torch.testing.assert_close(moved, tried[best][1].T, rtol=1e-4, atol=1e-5)


def test_nothing_moves_where_rows_held_back_gain_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, beside, noise = (torch.randn(24, width, generator=generator) for width in (20, 5, 5))
    part = torch.nn.Module()
    part.dense, part.LayerNorm = torch.nn.Linear(20, 5), torch.nn.LayerNorm(5)
    before = copy.deepcopy(part.state_dict())
    held = torch.arange(24) % 2 == 1
    with torch.no_grad():
        exact = part.dense(inputs) + beside
        wanted = torch.where(held[:, None], exact, exact + noise)  # what is missing on the fitted rows is chance
        layer_fit._fit_output(part, torch.nn.Identity(), inputs, beside, wanted, held, None)
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())


def test_positions_stay_readable_in_every_layer(tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    train = rows(600, seed=1)
    student, _ = copied(teacher, encoder, 4, train)
    table = student.bert.embeddings.position_embeddings.weight
    read = carry_codes(student)
    assert int(read.sum()) == 96 // position_codes._CODE_SHARE
    codes = table[:POSITIONS, read]
    torch.testing.assert_close(codes.mean(1), torch.zeros(POSITIONS), rtol=0, atol=1e-6)
    inputs = batch_of(rows(60, seed=2), encoder.pad_id)
    real = inputs["attention_mask"].bool()
    places = torch.arange(real.shape[1]).expand_as(real)[real]
    with torch.no_grad():
        hidden = LayerReader(student)(inputs).hidden_states
        expected = codes[places]
    for layer in hidden:
        held = layer[real][:, read]
        held = held - held.mean(1, keepdim=True)  # what a norm subtracts from all coordinates, no scores read
        scale = float((held * expected).sum() / expected.square().sum())
        assert float((held - scale * expected).norm() / held.norm()) < 0.35
    assert not student.bert.pooler.dense.weight[:, read].any()
    assert torch.equal(student.classifier.weight, output_layer(teacher).weight)
    for layer in student.bert.encoder.layer:
        assert not layer.attention.self.value.weight[:, read].any()
        assert not layer.attention.output.dense.weight[read].any()
        assert not layer.output.dense.weight[read].any()
        assert not layer.intermediate.dense.weight[:, read].any()


def test_a_checkpoint_is_not_fitted_and_lacks_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    start = str(tmp_path / "mpnet")
    student, told = build_student(
        teacher, shape=Shape(2, 96, 4, 128), init=start, seed=1, encoder=encoder, examples=rows(30, seed=1)
    )
    assert told == f"checkpoint {start} (layers 2, 4)"
    assert not carry_codes(student).any()
    said = capsys.readouterr().err
    assert "a BERT has no place for a learned bias by relative position" in said
    assert "fitted" not in said


@pytest.mark.parametrize("what", ["teacher", "student"])
def test_what_is_not_finite_is_refused(what: str, tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, "bert")
    student, _ = copied(teacher, encoder, 2)
    model = {"teacher": teacher, "student": student}[what]
    model.bert.encoder.layer[1].intermediate.dense.bias.data[3] = float("nan")
    with pytest.raises(TrainingError, match="cannot be fitted to the teacher's: what they compute is not finite"):
        fit_layers(student, teacher, rows(20, seed=1), layers=[1, 3], pad_id=encoder.pad_id, max_length=POSITIONS)


def test_few_rows_are_enough_to_run_and_many_are_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, encoder = family_teacher(tmp_path, "bert")
    one, told = copied(teacher, encoder, 2, rows(1, seed=1))
    assert told == "teacher layers 2, 4"  # nothing is left to fit
    plain = copied(teacher, encoder, 2)[0].state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in one.state_dict().items())
    two, _ = copied(teacher, encoder, 2, rows(2, seed=1))
    assert all(torch.isfinite(value).all() for value in two.state_dict().values())
    used: list[int] = []
    plain = layer_fit._batches

    def batches(*given: Any, **named: Any) -> Any:
        found = plain(*given, **named)
        used.append(sum(int(batch.real.sum()) for batch in found))
        return found

    monkeypatch.setattr(layer_fit, "_batches", batches)
    monkeypatch.setattr(layer_fit, "FIT_TOKENS", 100)
    copied(teacher, encoder, 2, rows(500, seed=1))
    monkeypatch.setattr(layer_fit, "_TAUGHT_BYTES", 60 * 2 * 2 * 16 * 2)
    copied(teacher, encoder, 2, rows(500, seed=1))
    assert 60 < used[0] <= 110
    assert 35 < used[1] <= 70


def test_layers_are_fitted_where_a_copy_lacks_positions_or_it_is_asked_for() -> None:
    configs = {name: {"model_type": name} for name in FAMILIES}
    assert [name for name, config in configs.items() if fits_layers("auto", config)] == ["mpnet"]
    assert all(fits_layers("always", config) for config in configs.values())
    assert not any(fits_layers("never", config) for config in configs.values())
    assert StudentSettings().fit_layers == "auto"


def test_what_is_folded_gives_the_table_back() -> None:
    """P_h = x D_h x^T for codes x as the hidden states hold them, where the table has no more than their rank."""
    places = torch.arange(POSITIONS, dtype=torch.float64)
    table = torch.stack([3 * torch.cos(0.4 * (places[:, None] - places) + head) for head in range(2)])
    embeddings = torch.nn.Module()
    for name, count in (("word", 28), ("token_type", 2), ("position", 40)):
        setattr(embeddings, f"{name}_embeddings", torch.nn.Embedding(count, 96))
    embeddings.LayerNorm = torch.nn.LayerNorm(96)
    batches = layer_fit._batches(rows(80, seed=1), most=10_000, pad_id=0)
    count = sum(int(batch.real.sum()) for batch in batches)
    generator = torch.Generator().manual_seed(0)
    seen, read = torch.randn(count, 96, generator=generator) * 0.3, torch.rand(96, generator=generator)
    with torch.no_grad():
        codes = layer_fit._begin_codes(embeddings, table, batches, layer_fit._Taught(seen, read, [], []))
    assert codes.where.tolist() == sorted(read.argsort()[:4].tolist())
    held = embeddings.position_embeddings.weight[:POSITIONS, codes.where].double().detach()
    torch.testing.assert_close(held @ codes.shares @ held.T, table, rtol=1e-3, atol=1e-3)
    assert codes.scale == pytest.approx(2 * float(seen.square().mean().sqrt()))
    norms = held.norm(dim=1)
    assert norms[12:].max() <= norms[:12].max() * (1 + 1e-5)  # no row has more than 12 tokens
    assert not embeddings.word_embeddings.weight[:, codes.where].any()


def test_scores_are_the_nearest_of_their_rank_on_the_layers_inputs() -> None:
    """No small change of the factors brings the scores nearer to content plus table, on inputs as they are."""
    generator = torch.Generator().manual_seed(0)
    width, heads, size = 24, 3, 8
    attention = torch.nn.Module()
    for name in ("query", "key", "value"):
        setattr(attention, name, torch.nn.Linear(width, width))
    hidden = torch.randn(400, width, generator=generator) * torch.linspace(0.1, 3, width)  # some directions are rare
    where = torch.tensor([2, 9, 17, 20])
    shares = torch.randn(heads, 4, 4, generator=generator, dtype=torch.float64) * 0.3
    inputs = torch.cat([hidden, torch.ones(400, 1)], 1).double()

    def products() -> list[torch.Tensor]:
        parts = [torch.cat([part.weight, part.bias[:, None]], 1).double() for part in (attention.query, attention.key)]
        query, key = (part.view(heads, size, -1) for part in parts)
        return [query[head].T @ key[head] / size**0.5 for head in range(heads)]

    with torch.no_grad():
        aims = products()
        for aim, share in zip(aims, shares, strict=True):
            aim[where[:, None], where] += share
        position_codes.fold_scores(attention, hidden, position_codes.Codes(where, shares, 1.0))
        for aim, found in zip(aims, products(), strict=True):
            wanted, given = inputs @ aim @ inputs.T, inputs @ found @ inputs.T
            outer, gains, inner = torch.linalg.svd(wanted)
            nearest = (outer[:, :size] * gains[:size]) @ inner[:size]
            torch.testing.assert_close(given, nearest, rtol=1e-3, atol=2e-2)
            assert (wanted - given).norm() > 0.01 * wanted.norm()  # or the rank would not matter


def test_what_is_read_no_more_stays_in_the_bias_on_the_average() -> None:
    dense, where = torch.nn.Linear(6, 3), torch.tensor([1, 4])
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = dense(inputs).mean(0)
        position_codes.stop_reading(dense, where, inputs.mean(0))
        torch.testing.assert_close(dense(inputs).mean(0), before)
        assert not dense.weight[:, where].any()


def test_a_fit_that_does_not_help_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, encoder = family_teacher(tmp_path, "bert")
    plain = copied(teacher, encoder, 2)[0].state_dict()
    spoil = layer_fit._fit_output

    def spoiled(output: Any, *given: Any) -> torch.Tensor:
        output.dense.weight.mul_(-3)
        return spoil(output, *given) * -1

    monkeypatch.setattr(layer_fit, "_fit_output", spoiled)
    student, told = copied(teacher, encoder, 2, rows(100, seed=1))
    assert told == "teacher layers 2, 4"
    assert "layers stay as copied, as fitting them gained nothing on rows held back (cosine" in capsys.readouterr().err
    assert all(torch.equal(value, plain[name]) for name, value in student.state_dict().items())


def test_a_table_that_is_not_folded_after_all_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, encoder = family_teacher(tmp_path, "mpnet")
    teacher.mpnet.encoder.relative_attention_bias.weight.data.mul_(0.01)  # next to nothing is lost by copying
    student, told = copied(teacher, encoder, 4, rows(100, seed=1))
    assert told == "teacher layers 1, 2, 3, 4"
    assert not carry_codes(student).any()
    assert "it lacks what its teacher has, a learned bias by relative position" in capsys.readouterr().err


def test_cosines_are_those_of_rows_held_back(tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, "bert")
    train = rows(160, seed=1)
    student, _ = copied(teacher, encoder, 2)
    held = train.select([row for row in range(160) if row % layer_fit._HELD == layer_fit._HELD - 1])
    before = errors(student, teacher, [1, 3], held, encoder.pad_id)
    fit = fit_layers(student, teacher, train, layers=[1, 3], pad_id=encoder.pad_id, max_length=POSITIONS)
    assert fit.copied == pytest.approx([1 - error for error in before], abs=1e-3)
    after = errors(student, teacher, [1, 3], held, encoder.pad_id)
    assert fit.fitted == pytest.approx([1 - error for error in after], abs=1e-3)


def test_pairs_of_a_teacher_without_second_types_and_chunks(tmp_path: Path) -> None:
    teacher, encoder = family_teacher(tmp_path, "bert", type_vocab_size=1, chunk_size_feed_forward=1)
    plain = rows(60, seed=1)
    pairs = Encoded(plain.tokens, (np.arange(len(plain.tokens)) % 2).astype(np.int8), plain.offsets)
    student, _ = copied(teacher, encoder, 2, pairs)
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert [layer.chunk_size_feed_forward for layer in teacher.bert.encoder.layer] == [1] * 4  # as before


def test_dead_coordinates_carry_codes_in_scale(tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    dead = slice(0, 4)
    teacher.mpnet.embeddings.LayerNorm.weight.data[dead] = teacher.mpnet.embeddings.LayerNorm.bias.data[dead] = 0
    for layer in teacher.mpnet.encoder.layer:
        for part in (layer.attention.attn.q, layer.attention.attn.k, layer.attention.attn.v, layer.intermediate.dense):
            part.weight.data[:, dead] = 0
    student, _ = copied(teacher, encoder, 4, rows(200, seed=1))
    assert carry_codes(student).nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert student.bert.embeddings.position_embeddings.weight[:POSITIONS, dead].square().mean() > 1e-4
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())


def test_a_table_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    teacher, encoder = wide_mpnet(tmp_path)
    student, _ = copied(teacher, encoder, 2)
    table = teacher.mpnet.encoder.relative_attention_bias.weight
    table.data[-1] = float("inf")  # of distances that no row has
    with pytest.raises(TrainingError, match="cannot be fitted to the teacher's"):
        fit_layers(student, teacher, rows(20, seed=1), layers=[1, 3], pad_id=encoder.pad_id, max_length=200)
