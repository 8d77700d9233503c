from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_student import examples, tiny_model, torch_outputs

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ExportError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.invariance import bound_of, measure_invariance
from bertemd_deploy.onnx_edit import histogram, save
from bertemd_deploy.quantization.dynamic import quantize
from bertemd_deploy.quantization.padding import copy_first_row
from bertemd_deploy.runtime import open_session, predict_logits
from bertemd_deploy.tasks import Kind

PART = examples(60)


def graph(
    model, *, fused: bool, exporter: str = "torchscript", opset: int = 17, first_row: bool = True
) -> onnx.ModelProto:
    if not fused:
        return portable_graph(model, exporter=exporter, opset=opset)
    made = fusable_graph(model, exporter=exporter, opset=opset)
    return fuse(made, layers=2, heads=4, hidden=32, opset=opset, first_row=first_row)[0]


@pytest.mark.parametrize("fused", [False, True], ids=["portable", "fused"])
@pytest.mark.parametrize("kind", ["classification", "token-classification"])
def test_padding_changes_nothing_and_batch_mates_do(kind: Kind, fused: bool, tmp_path: Path) -> None:
    model = tiny_model(kind=kind)
    source = quantize(graph(model, fused=fused, first_row=kind == "classification"), fused=fused)

    def differences(made: onnx.ModelProto) -> dict[str, float]:
        save(made, tmp_path / "m.onnx")
        bound = bound_of("per-tensor")
        found = measure_invariance(tmp_path / "m.onnx", examples=PART, pad_id=0, kind=kind, max_length=40, bound=bound)
        return {way.name: way.max_abs_logit_difference or 0.0 for way in found.arrangements}

    before, after = differences(source), differences(copy_first_row(source))
    for name, difference in after.items():
        assert before[name] > 1e-2
        assert (difference < 1e-4) == name.startswith("padded")


@pytest.mark.parametrize("fused", [False, True], ids=["portable", "fused"])
def test_a_float_graph_answers_as_before(fused: bool, tmp_path: Path) -> None:
    model = tiny_model()
    save(copy_first_row(graph(model, fused=fused)), tmp_path / "m.onnx")
    found = predict_logits(open_session(tmp_path / "m.onnx"), PART, pad_id=0)
    np.testing.assert_allclose(found, torch_outputs(model, PART), atol=1e-4)


def test_the_other_exporter_too(tmp_path: Path) -> None:
    model = tiny_model()
    source = quantize(graph(model, fused=False, exporter="dynamo", opset=18), fused=False)
    save(copy_first_row(source), tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx")
    row = PART.select([int(PART.lengths.argmin())])
    alone = session.run(None, row.batch([0], pad_id=0))[0]
    np.testing.assert_allclose(session.run(None, row.batch([0], pad_id=0, length=40))[0], alone, atol=1e-4)


def test_four_nodes_are_added_and_the_source_left_as_it_is() -> None:
    source = graph(tiny_model(), fused=False)
    before = source.SerializeToString()
    added = {name: count - histogram(source).get(name, 0) for name, count in histogram(copy_first_row(source)).items()}
    assert {name: count for name, count in added.items() if count} == {
        "Slice": 1,
        "Cast": 1,
        "Unsqueeze": 1,
        "Where": 1,
    }
    assert source.SerializeToString() == before


def test_a_graph_without_mask_or_norm_is_refused() -> None:
    helper = onnx.helper
    bare = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["attention_mask"], ["logits"])],
            "bare",
            [helper.make_tensor_value_info("attention_mask", onnx.TensorProto.INT64, ["b", "t"])],
            [helper.make_tensor_value_info("logits", onnx.TensorProto.INT64, ["b", "t"])],
        )
    )
    with pytest.raises(ExportError, match="the operator is absent"):
        copy_first_row(bare)
    source = graph(tiny_model(), fused=False)
    for value in source.graph.input:
        value.name = value.name.replace("attention_mask", "mask")
    with pytest.raises(ExportError, match=r"needs the graph's attention_mask .* the input is absent"):
        copy_first_row(source)
