"""Quantization-aware training: the codes of the exported graph, ranges that follow real tokens, and runs that continue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_student import examples, labelled, tiny_model, torch_outputs
from torch import Tensor, nn
from torch.nn import functional

from bertemd_deploy.batching import Batch, Batching
from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ExportError, ModelError, TrainingError, UnfinishedError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.mapping import LayerMapping
from bertemd_deploy.objective import Distiller, Objective
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.processes import Processes
from bertemd_deploy.quantization.aware import BUFFER, KEPT, RANGES, QuantAware, TrainedRanges, graph_ranges, prepare
from bertemd_deploy.quantization.calibration import Range, calibrate
from bertemd_deploy.quantization.dynamic import quantize_weight
from bertemd_deploy.quantization.static import activations, quantize_static
from bertemd_deploy.quantization.tables import quantize_rows
from bertemd_deploy.runtime import open_session, predict_logits
from bertemd_deploy.settings import DistillSettings
from bertemd_deploy.tasks import Kind
from bertemd_deploy.training import Schedule, fit
from bertemd_deploy.training_device import matrix_precision

QUERY, KEY = (f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "key"))
ROWS = 24


def objective_of(
    student: nn.Module, *, kind: Kind = "classification", mapping: str = "emd", **prepared: Any
) -> Objective:
    """Return the objective of a 4-layer teacher and a prepared student."""
    outputs = 5 if kind == "token-classification" else 2
    teacher = tiny_model(outputs=outputs, kind=kind, num_hidden_layers=4).requires_grad_(False)
    settings = DistillSettings(mapping=mapping, beta=0.1)
    aware = prepare(student, **prepared)
    trained = Distiller(student, student_hidden=32, teacher_hidden=32, project=False, seed=0)
    trained.train()
    objective = Objective(teacher, trained, LayerMapping(settings.mapping, 4, 2), settings, kind=kind)
    objective.aware = aware
    return objective


def student_of(kind: Kind = "classification", *, seed: int = 1, **config: Any) -> nn.Module:
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    outputs = 5 if kind == "token-classification" else 2
    return tiny_model(outputs=outputs, kind=kind, seed=seed, **(plain | config))


def batches(
    kind: Kind = "classification", *, micro: int | None = None, processes: Processes | None = None
) -> list[Batch]:
    outputs = 5 if kind == "token-classification" else 2
    data = labelled(tiny_model(outputs=outputs, kind=kind, num_hidden_layers=4), ROWS, kind=kind)
    cut = Batching(8, micro, 3, 0, processes or Processes(), torch.device("cpu"))
    return [cut.batch(data, rows, number=at) for at, rows in enumerate(np.split(np.arange(ROWS), 3))]


def train(objective: Objective, steps: list[Batch], *, rate: float = 1e-3) -> list[float]:
    optimizer = torch.optim.AdamW(objective.trained.parameters(), lr=rate)
    losses = []
    for batch in steps:
        optimizer.zero_grad()
        losses.append(float(objective(batch).loss))
        optimizer.step()
    return losses


def graph_of(
    model: nn.Module, *, fused: bool, exporter: str = "torchscript", first_row: bool = True
) -> onnx.ModelProto:
    if not fused:
        return portable_graph(model, exporter=exporter, opset=17)
    fusable = fusable_graph(model, exporter=exporter, opset=17)
    return fuse(fusable, layers=2, heads=4, hidden=32, opset=17, first_row=first_row)[0]


def aware_of(objective: Objective) -> QuantAware:
    assert objective.aware is not None
    return objective.aware


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - expected).mean()) / expected.std())


@pytest.mark.parametrize(
    ("kind", "fused", "exporter", "per_channel"),
    [
        ("classification", False, "torchscript", True),
        ("classification", False, "torchscript", False),
        ("classification", False, "dynamo", True),
        ("classification", True, "torchscript", True),
        ("classification", True, "torchscript", False),
        ("token-classification", False, "torchscript", False),
        ("token-classification", True, "torchscript", True),
    ],
)
def test_the_exported_static_graph_says_what_the_student_said(
    kind: Kind, fused: bool, exporter: str, per_channel: bool, tmp_path: Path
) -> None:
    student = student_of(kind)
    objective = objective_of(student, kind=kind, per_channel=per_channel)
    train(objective, batches(kind))
    part = examples(40, seed=5)
    aware, _ = aware_of(objective), student.eval()
    said = torch_outputs(student, part)
    trained = aware.trained()
    aware.release()
    plain = torch_outputs(student, part)
    graph = graph_of(student, fused=fused, exporter=exporter, first_row=kind == "classification")
    ranges = graph_ranges(graph, student=student, trained=trained)
    assert set(ranges) == set(activations(graph))
    found = static_logits(graph, ranges, tmp_path / "q.onnx", fused=fused, per_channel=per_channel)
    apart = np.abs(found - said)
    # The same codes, but where a sum in the middle between two of them rounds to the other one, and for the tanh form that
    # the fused graph has of the Gelu.
    assert np.median(apart) < (0.01 if fused else 1e-5)
    assert relative(found, said) < (0.25 if fused else 0.05) * relative(plain, said)
    calibrated = calibrate(graph, activations(graph), examples=part, pad_id=0, method="minmax", count=40)
    other = static_logits(graph, calibrated, tmp_path / "c.onnx", fused=fused, per_channel=per_channel)
    assert relative(found, said) < 0.25 * relative(other, said)


def static_logits(
    graph: onnx.ModelProto, ranges: Mapping[str, Range], path: Path, *, fused: bool, per_channel: bool
) -> np.ndarray:
    save(quantize_static(graph, ranges=ranges, fused=fused, per_channel=per_channel), path)
    return predict_logits(open_session(path), examples(40, seed=5), pad_id=0)


def test_codes_by_hand() -> None:
    student = student_of()
    name = "bert.encoder.layer.0.intermediate.dense"
    source = student.get_submodule(name)
    aware = prepare(student)
    with torch.no_grad():
        student.get_buffer(BUFFER).copy_(torch.tensor([-1.0, 4.1]).repeat(len(aware.names), 1))
    aware._begin_forward(student, (), {})
    inputs = torch.tensor([[-5.0, -1.0, 0.004, 0.013, 4.1, 9.0] + [0.0] * 26], requires_grad=True)
    output = student.get_submodule(name)(inputs)
    codes = np.array([-50, -50, 0, 1, 205, 205] + [0] * 26)  # q - z
    weights, scale = quantize_weight(source.weight.detach().numpy().T, per_channel=True)
    expected = codes @ weights * (np.float32(5.1 / 255) * scale) + source.bias.detach().numpy()
    np.testing.assert_allclose(output.detach().numpy()[0], expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(output.sum(), inputs)
    stored = torch.from_numpy(weights * scale).sum(1)
    torch.testing.assert_close(gradient[0, 1:5], stored[1:5])  # as if nothing had been rounded
    assert gradient[0, [0, 5]].tolist() == [0, 0]  # clipped


def test_rows_of_embedding_tables_are_those_of_the_exported_table() -> None:
    student = student_of()
    table = student.bert.embeddings.word_embeddings.weight
    codes, scale = quantize_rows(table.detach().numpy())
    aware = prepare(student)
    aware.active = True
    ids = torch.arange(40).reshape(2, 20)
    rows = student.bert.embeddings.word_embeddings(ids)
    np.testing.assert_array_equal(rows.detach().numpy().reshape(40, -1), (codes * scale.astype(np.float32))[:40])
    assert type(student.bert.embeddings.token_type_embeddings) is nn.Embedding
    rows.sum().backward()
    assert table.grad[1:40].eq(1).all()


def test_ranges_start_as_the_first_batch_and_follow_the_next_ones() -> None:
    student = student_of()
    aware = prepare(student, first_step=2)
    student.train()
    data = examples(9)
    extremes = []
    for step in range(4):
        aware.begin(step)
        inputs = {key: torch.from_numpy(value) for key, value in data.batch([step, step + 4], pad_id=0).items()}
        seen: list[Tensor] = []
        hook = student.get_submodule(QUERY).register_forward_pre_hook(
            lambda _m, given, seen=seen: seen.append(given[0])
        )
        student(**inputs)
        hook.remove()
        real = seen[0].detach()[inputs["attention_mask"].bool()]
        extremes.append([min(0.0, float(real.min())), max(0.0, float(real.max()))])
        aware.finish(Processes())
        if step < 2:
            assert not aware.active
            with pytest.raises(TrainingError, match=r"no range was seen for 13 of 13 inputs \(bert.encoder.layer.0"):
                aware.trained()
    first, second = torch.tensor(extremes[2]), torch.tensor(extremes[3])
    found = student.get_buffer(BUFFER)[aware.names.index(QUERY)]
    torch.testing.assert_close(found, KEPT * first + (1 - KEPT) * second)
    assert aware.trained().ranges[QUERY] == aware.trained().ranges[KEY]
    before = student.get_buffer(BUFFER).clone()
    student.eval()
    aware.begin(4)
    student(**inputs)
    aware.finish(Processes())
    assert aware.active  # evaluation is quantized, and moves nothing
    torch.testing.assert_close(student.get_buffer(BUFFER), before, rtol=0, atol=0)


def test_padding_is_not_watched() -> None:
    found = []
    for length in (None, 48):
        student = student_of()
        aware = prepare(student)
        student.train()
        aware.begin(0)
        inputs = examples(6).batch(np.arange(6), pad_id=0, length=length)
        student(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        aware.finish(Processes())
        found.append(student.get_buffer(BUFFER).clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_give_the_ranges_and_gradients_of_the_whole() -> None:
    whole, parts = (objective_of(student_of()) for _ in range(2))
    for at, (one, cut) in enumerate(zip(batches(), batches(micro=3), strict=True)):
        assert [len(batch.parts) for batch in (one, cut)] == [1, 3]
        for objective, batch in ((whole, one), (parts, cut)):
            objective.trained.zero_grad()
            objective(batch)
        torch.testing.assert_close(
            parts.trained.student.get_buffer(BUFFER), whole.trained.student.get_buffer(BUFFER), rtol=1e-4, atol=1e-5
        )
        gradients = [
            torch.cat([value.grad.flatten() for value in objective.trained.parameters() if value.grad is not None])
            for objective in (whole, parts)
        ]
        # A value in the middle between two codes may round either way, which another batch shape decides.
        assert (gradients[0] - gradients[1]).norm() < (1e-4 if at == 0 else 0.05) * gradients[0].norm()


@dataclasses.dataclass(frozen=True)
class Pair(Processes):
    """Process 0 of two, whose partner saw `other`."""

    size: int = 2
    other: Tensor | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        assert self.other is not None
        tensor[1] += self.other
        return tensor


def test_ranges_hold_what_any_process_saw() -> None:
    student = student_of()
    aware = prepare(student)
    aware.begin(0)
    aware._batch[:] = torch.tensor([-1.0, 2.0])
    aware._batch[1] = torch.tensor([torch.inf, -torch.inf])  # no row of ours
    theirs = torch.tensor([-0.5, 3.0]).repeat(len(aware.names), 1)
    theirs[2] = torch.tensor([torch.inf, -torch.inf])  # none of theirs
    aware.finish(Pair(other=theirs))
    found = student.get_buffer(BUFFER)
    assert found[:3].tolist() == [[-1, 3], [-0.5, 3], [-1, 2]]


def test_bfloat16_products_multiply_the_same_codes() -> None:
    torch.manual_seed(0)
    student = student_of()
    objective = objective_of(student)
    train(objective, batches())
    student.eval()
    inputs = {key: torch.from_numpy(value) for key, value in examples(8).batch(np.arange(8), pad_id=0).items()}
    module = student.get_submodule(QUERY)
    given, half = torch.randn(4, 7, 32), []
    student(**inputs)
    for bfloat16 in (False, True):
        with torch.no_grad(), matrix_precision(torch.device("cpu"), bfloat16=bfloat16):
            half.append(module(given))
    assert [value.dtype for value in half] == [torch.float32, torch.bfloat16]
    assert (half[0] - half[1].float()).abs().max() < 2**-7 * half[0].abs().max()  # of the product and of the output
    objective.bfloat16 = True
    assert np.isfinite(train(objective, batches())).all()


def divergence(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the mean KL of two models' probabilities."""
    logs = [torch.from_numpy(logits).log_softmax(-1) for logits in (found, expected)]
    return float(functional.kl_div(*logs, reduction="batchmean", log_target=True))


def test_training_wins_back_what_the_codes_cost() -> None:
    """The student is the teacher itself, so that nothing but the codes is between them."""
    student = student_of(num_hidden_layers=4, seed=0)
    objective = objective_of(student, mapping="none", per_channel=False)
    data = labelled(tiny_model(num_hidden_layers=4), ROWS).examples
    expected = torch_outputs(objective.teacher, data)
    distances = []
    train(objective, batches(), rate=0.0)
    for _ in range(6):
        distances.append(divergence(torch_outputs(student.eval(), data), expected))
        student.train()
        train(objective, batches() * 4, rate=1e-5)
    assert distances[0] > 1e-5
    assert np.mean(distances[2:]) < 0.7 * distances[0]


def run(folder: Path, *, minutes: float | None = None) -> tuple[nn.Module, QuantAware]:
    """Train two epochs, for int8 from the second step on; `minutes` stops early."""
    student = student_of()
    objective = objective_of(student, first_step=1)
    inputs = examples(2).batch([0, 1], pad_id=0)

    def evaluate() -> dict[str, float]:
        student(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        return {"score": float(aware_of(objective).active)}

    fit(
        objective.trained,
        schedule=Schedule(2, 8, 1e-3, 0.1, 0.01, 0, checkpoint_seconds=0, max_minutes=minutes),
        data=labelled(tiny_model(num_hidden_layers=4), ROWS),
        pad_id=0,
        objective=objective,
        evaluate=evaluate,
        metric="score",
        checkpoints=folder / "checkpoints",
        log=folder / "log.jsonl",
        name="test",
        extra_state=objective.mapping,
    )
    return student, aware_of(objective)


def test_a_run_that_was_stopped_after_every_step_ends_as_one_that_was_not(tmp_path: Path) -> None:
    expected, whole = run(tmp_path / "whole")
    stops = 0
    while True:
        try:
            student, aware = run(tmp_path / "cut", minutes=0)
        except UnfinishedError:
            stops += 1
            continue
        break
    assert stops == 6
    assert aware.trained() == whole.trained()
    for (name, found), value in zip(student.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0, msg=name)


def test_release_leaves_a_plain_student_with_the_trained_weights(tmp_path: Path) -> None:
    student = student_of()
    names, kinds = list(student.state_dict()), [type(module) for module in student.modules()]
    before = {name: value.clone() for name, value in student.state_dict().items()}
    objective = objective_of(student)
    train(objective, batches())
    assert BUFFER in student.state_dict()
    aware_of(objective).release()
    assert list(student.state_dict()) == names
    assert [type(module) for module in student.modules()] == kinds
    moved = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert {QUERY + ".weight", "bert.embeddings.word_embeddings.weight", "classifier.weight"} <= set(moved)


def test_ranges_are_written_and_read_whole(tmp_path: Path) -> None:
    trained = TrainedRanges({QUERY: Range(-0.1, float(np.float32(1 / 3)))}, per_channel=False)
    trained.write(tmp_path)
    assert TrainedRanges.read(tmp_path) == trained
    assert TrainedRanges.read(tmp_path / "nothing") is None
    text = (tmp_path / RANGES).read_text()
    for old, new in (("-0.1", "0.1"), ('"schema_version": 1', '"schema_version": 9'), ("-0.1,", ""), ("{", "[")):
        (tmp_path / RANGES).write_text(text.replace(old, new))
        with pytest.raises(
            ModelError, match=r"quantization_ranges.json: not ranges of activations \(.*Distil the student"
        ):
            TrainedRanges.read(tmp_path)


def test_ranges_of_another_student_are_refused() -> None:
    student = student_of()
    graph = graph_of(student_of(), fused=False)
    everywhere = {name: Range(-1, 1) for name, module in student.named_modules() if isinstance(module, nn.Linear)}
    found = graph_ranges(graph, student=student, trained=TrainedRanges(everywhere, per_channel=True))
    assert set(found) == set(activations(graph))
    other = tiny_model(seed=2)
    with pytest.raises(
        ExportError, match=r"merged/MatMul: its weights are of no linear map in quantization_ranges.json"
    ):
        graph_ranges(graph, student=other, trained=TrainedRanges(everywhere, per_channel=True))
    with pytest.raises(ExportError, match=r"the student has no linear map bert\.nowhere"):
        graph_ranges(graph, student=student, trained=TrainedRanges({"bert.nowhere": Range(-1, 1)}, per_channel=True))
