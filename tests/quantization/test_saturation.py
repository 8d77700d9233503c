"""The prediction: planted saturation found where it is, remedies that remove it, and what this very CPU does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_student import examples, tiny_model

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.quantization.calibration import collect
from bertemd_deploy.quantization.dynamic import quantize
from bertemd_deploy.quantization.saturation import SaturationReport, predict_saturation
from bertemd_deploy.quantization.static import activations, quantize_static
from bertemd_deploy.quantization.unsigned import unsigned
from bertemd_deploy.runtime import open_session, predict_logits
from bertemd_deploy.targets import products_saturate
from bertemd_deploy.tasks import Kind

PART = examples(40)
FORMS = ("dynamic", "dynamic fused", "static", "static fused")


def planted() -> torch.nn.Module:
    """Return a model whose first feed-forward product saturates in every row: two neighbours, always large, with the
    largest weights of every column, alike in sign."""
    model = tiny_model()
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.attention.output.LayerNorm.bias[4:6] = 40
        signs = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
        layer.intermediate.dense.weight[:, 4:6] = 1.05 * layer.intermediate.dense.weight.abs().max() * signs[:, None]
        layer.intermediate.dense.bias[:] = -40 * layer.intermediate.dense.weight[:, 4:6].sum(dim=1)
    return model


def int8_graph(model: torch.nn.Module, form: str, **options: bool) -> onnx.ModelProto:
    fused = form.endswith("fused")
    if fused:
        fusable = fusable_graph(model, exporter="torchscript", opset=17)
        graph = fuse(fusable, layers=2, heads=4, hidden=32, opset=17)[0]
    else:
        graph = portable_graph(model, exporter="torchscript", opset=17)
    if form.startswith("dynamic"):
        return quantize(graph, fused=fused, **options)
    seen = collect(graph, activations(graph), examples=PART, pad_id=0, count=len(PART))
    return quantize_static(graph, ranges=seen.ranges("minmax"), fused=fused, **options)


def predict(model: onnx.ModelProto, kind: Kind = "classification") -> SaturationReport:
    return predict_saturation(model, examples=PART, pad_id=0, kind=kind)


@pytest.mark.parametrize("form", FORMS)
def test_planted_saturation_is_found_in_the_right_product(form: str) -> None:
    report = predict(int8_graph(planted(), form))
    assert len(report.products) == 10
    worst = max(report.products, key=lambda product: product.share)
    assert "layers.0/intermediate" in worst.name
    assert worst.share == pytest.approx(1 / 16)  # one of 16 pairs, in every row and column
    assert sum(product.saturated for product in report.products if product is not worst) < 0.05 * worst.saturated
    assert np.abs(report.logits - report.exact_logits).max() > 0.1
    record = report.record()
    assert record["products"][worst.name] == worst.share
    assert record["saturated_pairs"] == report.saturated >= worst.saturated
    assert record["max_abs_logit_difference"] > 0.1
    same = (report.logits.argmax(axis=1) == report.exact_logits.argmax(axis=1)).mean()
    assert record["decision_agreement"] == pytest.approx(same)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_seven_bits_never_saturate(form: str) -> None:
    reduced = int8_graph(planted(), form, reduce_range=True)
    report = predict(reduced)
    assert report.saturated == 0
    np.testing.assert_array_equal(report.logits, report.exact_logits)
    assert report.decision_agreement == 1
    assert report.record()["products"] == {}


@pytest.mark.parametrize("form", ["dynamic", "dynamic fused"])
def test_unsigned_weights_are_exact_and_lose_nothing(form: str, tmp_path: Path) -> None:
    signed, made = int8_graph(planted(), form), int8_graph(planted(), form, weight_type="uint8")
    assert made == unsigned(signed)
    assert predict(made).products == []
    save(made, tmp_path / "q.onnx")
    found = predict_logits(open_session(tmp_path / "q.onnx"), PART, pad_id=0)
    np.testing.assert_array_equal(found, predict(signed).exact_logits)


@pytest.mark.parametrize("form", FORMS)
def test_this_cpu_does_what_is_predicted(form: str, tmp_path: Path) -> None:
    graph = int8_graph(planted(), form)
    report = predict(graph)
    save(graph, tmp_path / "q.onnx")
    found = predict_logits(open_session(tmp_path / "q.onnx"), PART, pad_id=0)
    expected = report.logits if products_saturate() else report.exact_logits
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "outputs"), [("question-answering", 2), ("token-classification", 5), ("regression", 1)]
)
def test_every_kind_of_task(kind: Kind, outputs: int, tmp_path: Path) -> None:
    model = tiny_model(kind=kind, outputs=outputs)
    graph = quantize(portable_graph(model, exporter="torchscript", opset=17), fused=False)
    report = predict(graph, kind)
    save(graph, tmp_path / "q.onnx")
    shape = predict_logits(open_session(tmp_path / "q.onnx"), PART, pad_id=0).shape
    assert report.logits.shape == report.exact_logits.shape == shape
    assert shape == ((len(PART), 1) if kind == "regression" else (len(PART.tokens), outputs))
    assert (report.decision_agreement is None) == (kind == "regression")
