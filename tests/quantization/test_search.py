from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from tiny_student import labelled, shifted, tiny_model
from transformers import BertForSequenceClassification

from bertemd_deploy.bert_graph import portable_graph
from bertemd_deploy.errors import GateError
from bertemd_deploy.gate import score
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.quantization.dynamic import operators
from bertemd_deploy.quantization.search import EXCLUSIONS, Int8Search

MODEL = tiny_model()


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return portable_graph(MODEL, exporter="torchscript", opset=17)


def spoiled() -> BertForSequenceClassification:
    """Return a model with one product that int8 ruins: a feature that is always 0 has a huge weight in every column."""
    model = tiny_model()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.LayerNorm.weight[0] = 0
        layer.attention.output.LayerNorm.bias[0] = 0
        layer.intermediate.dense.weight[:, 0] = 500
    return model


def search(graph: onnx.ModelProto, path: Path, *, max_drop: float, model: torch.nn.Module = MODEL) -> Int8Search:
    save(graph, path)
    part = labelled(model, 80)
    found = score(path, ["accuracy"], part=part, pad_id=0)
    assert found is not None
    return Int8Search(
        graph,
        fused=False,
        metrics=["accuracy"],
        reference=found["accuracy"],
        max_drop=max_drop,
        evaluation=part,
        calibration=labelled(model, 20, seed=1),
        pad_id=0,
    )


def test_the_first_setting_that_keeps_the_accuracy_is_taken(graph: onnx.ModelProto, tmp_path: Path) -> None:
    found = search(graph, tmp_path / "m.onnx", max_drop=20).run(tmp_path / "q.onnx", out=tmp_path)
    assert (found.per_channel, found.excluded, found.passed) == (False, [], True)
    assert (tmp_path / "q.onnx").is_file()


def test_the_operator_that_loses_the_accuracy_is_found_and_left_in_float(tmp_path: Path) -> None:
    model = spoiled()
    fp32 = portable_graph(model, exporter="torchscript", opset=17)
    hard = search(fp32, tmp_path / "m.onnx", max_drop=15, model=model)
    assert hard.reference == 1
    found = hard.run(tmp_path / "model_quantized.onnx", out=tmp_path)
    assert [trial.passed for trial in hard.trials] == [False, False, True]
    assert [trial.per_channel for trial in hard.trials] == [False, True, True]
    assert found.excluded == ["/layers.0/intermediate/MatMul"]
    assert found.drop_points is not None
    assert found.drop_points <= 15


def test_no_setting_passes(graph: onnx.ModelProto, tmp_path: Path) -> None:
    impossible = search(graph, tmp_path / "m.onnx", max_drop=-1)
    with pytest.raises(GateError) as caught:
        impossible.run(tmp_path / "model_quantized.onnx", out=tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(
        "model_quantized.onnx loses too much accuracy against the fp32 student (1.0000; allowed -1"
    )
    assert "a scale per column with 4 operators in fp32" in message
    assert "Kept as model_quantized.rejected.onnx" in message
    assert (tmp_path / "out/onnx/model_quantized.rejected.onnx").is_file()
    assert len(impossible.trials) == 2 + sum(count < len(operators(graph)) for count in EXCLUSIONS)


def test_outputs_that_are_not_finite_are_a_miss(graph: onnx.ModelProto, tmp_path: Path) -> None:
    broken = search(graph, tmp_path / "m.onnx", max_drop=100)
    broken.model = shifted(graph, by=float("nan"))
    with pytest.raises(GateError, match="outputs that are not finite"):
        broken.run(tmp_path / "q.onnx", out=tmp_path / "out")
    assert {trial.metric for trial in broken.trials} == {None}
