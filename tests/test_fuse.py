from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_student import examples, tiny_model, torch_outputs
from transformers import BertConfig, BertForSequenceClassification

from bertemd_deploy.bert_graph import check_shapes, fusable_graph, head_kind, portable_graph
from bertemd_deploy.errors import ExportError
from bertemd_deploy.fuse import check_counts, fuse, fused_counts, optimize
from bertemd_deploy.onnx_edit import histogram, save
from bertemd_deploy.quantization.dynamic import quantize
from bertemd_deploy.runtime import open_session, predict_logits, run_session
from bertemd_deploy.tasks import Kind


def fused(model, *, exporter="torchscript", opset=17) -> tuple[onnx.ModelProto, dict[str, int]]:
    config = model.config
    return fuse(
        fusable_graph(model, exporter=exporter, opset=opset),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        hidden=config.hidden_size,
        opset=opset,
        first_row=head_kind(model) == "sequence",
    )


def test_every_layer_is_fused_and_the_result_equals_torch(tmp_path: Path) -> None:
    model = tiny_model()
    graph, counts = fused(model)
    assert counts == {"attention": 2, "skip_layer_normalization": 4, "gelu": 2, "embed_layer_normalization": 1}
    save(graph, tmp_path / "model_fused.onnx")
    assert check_shapes(tmp_path / "model_fused.onnx", model=model, name="x") == [[1, 1], [1, 7], [3, 64], [2, 64]]
    found = predict_logits(open_session(tmp_path / "model_fused.onnx"), examples(40), pad_id=0, batch_size=7)
    np.testing.assert_allclose(found, torch_outputs(model, examples(40)), atol=1e-4)
    kinds = histogram(graph)
    assert kinds["com.microsoft.MultiHeadAttention"] == 2
    assert kinds["LayerNormalization"] == 5
    assert not {"com.microsoft.SkipLayerNormalization", "com.microsoft.FastGelu", "Attention"} & set(kinds)
    assert graph.ir_version == 8


def test_padding_on_the_left_is_masked_as_torch_masks_it(tmp_path: Path) -> None:
    # ONNX Runtime's other mask format keeps a length per row and would look at the padding here.
    model = tiny_model()
    graph, _ = fused(model)
    save(graph, tmp_path / "model_fused.onnx")
    part = examples(1, longest=9)
    length = int(part.lengths[0])
    inputs = {name: np.pad(value, ((0, 0), (0, 3))) for name, value in part.batch([0], pad_id=0).items()}
    inputs["attention_mask"][0, 1:3] = 0
    inputs["attention_mask"][0, length:] = 0
    import torch

    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    found = run_session(open_session(tmp_path / "model_fused.onnx"), inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_model_of_one_layer_keeps_only_the_first_row(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=1)
    graph, counts = fused(model)
    assert counts["attention"] == 1
    save(graph, tmp_path / "m.onnx")
    check_shapes(tmp_path / "m.onnx", model=model, name="m.onnx")
    assert [node.op_type for node in graph.graph.node].count("Slice") == 2  # position ids, and the [CLS] row


def test_a_pattern_that_did_not_match_is_an_error_with_both_counts() -> None:
    model = tiny_model()
    counts = fused_counts(optimize(portable_graph(model, exporter="torchscript", opset=17), heads=4, hidden=32))
    with pytest.raises(ExportError, match=r"attention 0 \(expected 2\).*2-layer model.*torchscript"):
        check_counts(counts, layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "token-classification", "question-answering"])
def test_the_dynamo_exporter_gives_the_same_fused_operators(tmp_path: Path, kind: Kind) -> None:
    model = tiny_model(kind=kind)
    graph, counts = fused(model, exporter="dynamo")
    assert counts == fused(model)[1]
    save(graph, tmp_path / "m.onnx")
    check_shapes(tmp_path / "m.onnx", model=model, name="m.onnx")


@pytest.mark.slow
def test_the_four_layer_student_is_fused_and_small_enough(tmp_path: Path) -> None:
    sizes = {"hidden_size": 312, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1200}
    model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    graph, counts = fused(model)
    assert counts == {"attention": 4, "skip_layer_normalization": 8, "gelu": 4, "embed_layer_normalization": 1}
    for name, source in (("fused", graph), ("portable", portable_graph(model, exporter="torchscript", opset=17))):
        for per_channel in (False, True):
            path = tmp_path / f"{name}.onnx"
            save(quantize(source, fused=name == "fused", per_channel=per_channel), path)
            assert path.stat().st_size < 14.6e6
            logits = run_session(open_session(path), examples(4).batch([0, 1, 2, 3], pad_id=0))
            assert np.isfinite(logits).all()
