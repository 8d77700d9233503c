from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_student import labelled, outliers, shifted, tiny_model
from transformers import BertForSequenceClassification

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ExportError, GateError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.gate import score
from bertemd_deploy.invariance import Invariance, bound_of, measure_invariance
from bertemd_deploy.onnx_edit import histogram, save
from bertemd_deploy.quantization.calibration import METHODS, calibrate
from bertemd_deploy.quantization.dynamic import operators, quantize
from bertemd_deploy.quantization.padding import copy_first_row
from bertemd_deploy.quantization.search import EXCLUSIONS, Activations, Int8Search
from bertemd_deploy.quantization.smoothing import smooth
from bertemd_deploy.quantization.static import activations
from bertemd_deploy.runtime import open_session, predict_logits

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


def search(
    graph: onnx.ModelProto, path: Path, *, max_drop: float, model: torch.nn.Module = MODEL, **given: Any
) -> Int8Search:
    save(graph, path)
    part = labelled(model, 80)
    found = score(path, ["accuracy"], part=part, pad_id=0)
    assert found is not None
    return Int8Search(
        graph,
        **({"fused": False} | given),
        metrics=["accuracy"],
        reference=found["accuracy"],
        max_drop=max_drop,
        evaluation=part,
        calibration=labelled(model, 20, seed=1),
        pad_id=0,
    )


def test_the_first_setting_that_keeps_the_accuracy_is_taken(graph: onnx.ModelProto, tmp_path: Path) -> None:
    found = search(graph, tmp_path / "m.onnx", max_drop=20).run(tmp_path / "q.onnx", out=tmp_path)
    assert (found.per_channel, found.excluded, found.passed) == (True, [], True)
    assert (found.mode, found.method) == ("dynamic", None)
    assert (tmp_path / "q.onnx").is_file()


def test_the_operator_that_loses_the_accuracy_is_found_and_left_in_float(tmp_path: Path) -> None:
    model = spoiled()
    fp32 = portable_graph(model, exporter="torchscript", opset=17)
    hard = search(fp32, tmp_path / "m.onnx", max_drop=15, model=model)
    assert hard.reference == 1
    found = hard.run(tmp_path / "model_quantized.onnx", out=tmp_path)
    assert [trial.passed for trial in hard.trials] == [False, False, True]
    assert [trial.per_channel for trial in hard.trials] == [True, True, True]
    assert [trial.activations for trial in hard.trials] == ["per-tensor", "per-row", "per-row"]
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
    assert "a scale per column, one per row of activations with 4 operators in fp32" in message
    assert "Kept as model_quantized.rejected.onnx" in message
    assert (tmp_path / "out/onnx/model_quantized.rejected.onnx").is_file()
    assert len(impossible.trials) == 2 + sum(count < len(operators(graph)) for count in EXCLUSIONS)


def test_outputs_that_are_not_finite_are_a_miss(graph: onnx.ModelProto, tmp_path: Path) -> None:
    broken = search(graph, tmp_path / "m.onnx", max_drop=100)
    broken.model = shifted(graph, by=float("nan"))
    with pytest.raises(GateError, match="outputs that are not finite"):
        broken.run(tmp_path / "q.onnx", out=tmp_path / "out")
    assert {trial.metric for trial in broken.trials} == {None}


def distance(path: Path, graph: onnx.ModelProto, folder: Path) -> float:
    """Return how far a graph's logits on the calibration slice are from fp32's."""
    save(graph, folder / "fp32.onnx")
    part = labelled(MODEL, 20, seed=1).examples
    found, expected = (predict_logits(open_session(file), part, pad_id=0) for file in (path, folder / "fp32.onnx"))
    return float(np.square(found - expected).mean())


@pytest.mark.parametrize("fused", [False, True])
def test_static_int8_is_calibrated_by_the_method_that_stays_closest_to_fp32(fused: bool, tmp_path: Path) -> None:
    fp32 = portable_graph(MODEL, exporter="torchscript", opset=17)
    if fused:
        fp32 = fuse(fusable_graph(MODEL, exporter="torchscript", opset=17), layers=2, heads=4, hidden=32, opset=17)[0]
    sought = search(fp32, tmp_path / "m.onnx", max_drop=20, fused=fused, mode="static")
    found = sought.run(tmp_path / "q.onnx", out=tmp_path)
    assert [trial.mode for trial in sought.trials] == ["static"]
    assert (found.graph, found.per_channel) == ("fused-int8" if fused else "int8", True)
    kinds = histogram(onnx.load_model(tmp_path / "q.onnx"))
    assert kinds["QuantizeLinear"] == 10
    assert kinds.get("DequantizeLinear", 0) == (0 if fused else 20)
    part = labelled(MODEL, 20, seed=1).examples
    distances = {}
    smoothed, divided = smooth(fp32, examples=part, pad_id=0)
    assert divided
    for method in METHODS:
        for graph, count in ((fp32, 0), (smoothed, len(divided))):
            ranges = calibrate(graph, activations(graph), examples=part, pad_id=0, method=method, count=20)
            trained = search(
                graph, tmp_path / "m.onnx", max_drop=100, fused=fused, mode="static", trained_ranges=ranges
            )
            learnt = trained.run(tmp_path / "other.onnx", out=tmp_path)
            assert (learnt.method, learnt.smoothed_activations) == ("training", 0)
            distances[method, count] = distance(tmp_path / "other.onnx", fp32, tmp_path)
    chosen = found.method, found.smoothed_activations
    assert chosen == min(distances, key=distances.__getitem__)
    assert distance(tmp_path / "q.onnx", fp32, tmp_path) == distances[chosen]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_what_stands_out_is_smoothed_where_that_keeps_int8_closer(mode: str, tmp_path: Path) -> None:
    fp32 = portable_graph(outliers(), exporter="torchscript", opset=17)
    sought = search(fp32, tmp_path / "m.onnx", max_drop=50, model=outliers(), mode=mode)
    before = fp32.SerializeToString()
    found = sought.run(tmp_path / "q.onnx", out=tmp_path)
    again = sought.run(tmp_path / "again.onnx", out=tmp_path)
    assert found.smoothed_activations == again.smoothed_activations > 0
    assert fp32.SerializeToString() == before
    part = labelled(outliers(), 20, seed=1).examples
    if mode == "dynamic":
        save(copy_first_row(quantize(fp32, fused=False, per_channel=True)), tmp_path / "plain.onnx")
        expected, plain, chosen = (
            predict_logits(open_session(tmp_path / name), part, pad_id=0) for name in ("m.onnx", "plain.onnx", "q.onnx")
        )
        assert np.square(chosen - expected).mean() * 2 < np.square(plain - expected).mean()


def test_static_trials_go_the_same_way_as_dynamic_ones(tmp_path: Path) -> None:
    model = spoiled()
    fp32 = portable_graph(model, exporter="torchscript", opset=17)
    hard = search(fp32, tmp_path / "m.onnx", max_drop=15, model=model, mode="static")
    found = hard.run(tmp_path / "model_quantized.onnx", out=tmp_path)
    assert [(trial.per_channel, len(trial.excluded), trial.passed) for trial in hard.trials] == [
        (True, 0, False),
        (True, 1, True),
    ]
    assert found.excluded == ["/layers.0/intermediate/MatMul"]
    assert len({trial.method for trial in hard.trials}) == 1
    assert found.method in METHODS


def test_a_static_miss_names_the_method(graph: onnx.ModelProto, tmp_path: Path) -> None:
    impossible = search(graph, tmp_path / "m.onnx", max_drop=-1, mode="static")
    with pytest.raises(GateError, match=r"a scale per column, ranges by (minmax|percentile|mse|entropy): "):
        impossible.run(tmp_path / "q.onnx", out=tmp_path / "out")


def test_trained_ranges_of_another_graph_are_refused(graph: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="static int8: no range for /LayerNorm"):
        search(graph, tmp_path / "m.onnx", max_drop=5, mode="static", trained_ranges={}).run(
            tmp_path / "q.onnx", out=tmp_path
        )


def test_a_graph_that_its_batch_moves_too_much_is_passed_over(graph: onnx.ModelProto, tmp_path: Path) -> None:
    sought = search(graph, tmp_path / "m.onnx", max_drop=20)

    def measured(path: Path, activations: Activations) -> Invariance:
        examples = sought.evaluation.examples
        bound = bound_of(activations, max_changed=0)
        kind = "classification"
        return measure_invariance(path, examples=examples, pad_id=0, kind=kind, max_length=32, bound=bound)

    sought.invariance = measured
    found = sought.run(tmp_path / "q.onnx", out=tmp_path)
    assert (found.activations, found.changed_decision_share) == ("per-row", 0)
    rejected = sought.trials[:-1]
    assert [trial.activations for trial in rejected] == ["per-tensor"]
    assert all(trial.changed_decision_share for trial in rejected)
