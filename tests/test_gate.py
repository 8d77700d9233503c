from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_student import examples, shifted, tiny_model, torch_outputs

from bertemd_deploy import gate
from bertemd_deploy.bert_graph import portable_graph, torch_logits
from bertemd_deploy.errors import GateError
from bertemd_deploy.gate import check_parity, discard_rejected, measure_parity, parity_reference
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.tasks import Kind

MODEL = tiny_model()


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return portable_graph(MODEL, exporter="torchscript", opset=17)


def reference(count: int = 40, *, kind: Kind = "classification") -> gate.Reference:
    return parity_reference(examples(count), pad_id=0, kind=kind, logits=lambda batch: torch_logits(MODEL, batch))


def test_the_reference_mixes_lengths_and_has_single_rows() -> None:
    batches = reference().batches
    padded = [batch for batch in batches if len(batch["input_ids"]) > 1]
    single = [batch for batch in batches if len(batch["input_ids"]) == 1]
    assert all((batch["attention_mask"] == 0).any() for batch in padded)
    assert sum(len(batch["input_ids"]) for batch in padded) == 40
    assert len(single) == gate.SINGLE_ROWS


def test_an_equal_graph_passes(graph: onnx.ModelProto, tmp_path: Path) -> None:
    save(graph, tmp_path / "model.onnx")
    parity = measure_parity(tmp_path / "model.onnx", reference())
    assert parity.beyond_tolerance == 0
    assert parity.decision_agreement == 1
    assert parity.inputs == 56
    assert [1, 3] in parity.shapes
    check_parity(parity, tmp_path / "model.onnx", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shifted_graph_is_rejected_and_kept(graph: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save(shifted(graph, by=0.031), path)
    parity = measure_parity(path, reference())
    with pytest.raises(GateError) as caught:
        check_parity(parity, path, out=tmp_path / "out")
    assert caught.value.exit_code == 4
    assert "model.onnx differs from the torch student by 3.1e-02 on logits (allowed 1.0e-03, 56 of 56 inputs" in str(
        caught.value
    )
    assert "Kept as model.rejected.onnx." in str(caught.value)
    assert (tmp_path / "out/onnx/model.rejected.onnx").read_bytes() == path.read_bytes()
    discard_rejected(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_finite_miss_parity(graph: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save(shifted(graph, by=float("nan")), path)
    parity = measure_parity(path, reference())
    assert parity.max_abs_logit_difference is None
    assert parity.beyond_tolerance == parity.inputs
    with pytest.raises(GateError, match="not finite on logits"):
        check_parity(parity, path, out=tmp_path)


def test_regression_has_no_decisions(graph: onnx.ModelProto, tmp_path: Path) -> None:
    save(graph, tmp_path / "m.onnx")
    assert measure_parity(tmp_path / "m.onnx", reference(kind="regression")).decision_agreement is None


def test_tokens_are_compared_one_by_one_and_padding_not_at_all(tmp_path: Path) -> None:
    model = tiny_model(kind="token-classification", outputs=3)
    save(portable_graph(model, exporter="torchscript", opset=17), tmp_path / "m.onnx")
    asked = parity_reference(
        examples(40), pad_id=0, kind="token-classification", logits=lambda batch: torch_logits(model, batch)
    )
    for logits, batch in zip(asked.logits, asked.batches, strict=True):
        logits[batch["attention_mask"] == 0] = 1e6
    parity = measure_parity(tmp_path / "m.onnx", asked)
    assert (parity.beyond_tolerance, parity.decision_agreement, parity.inputs) == (0, 1, 56)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in asked.batches)
    asked.logits[0][2, 1] = asked.logits[0][2, 1][[2, 0, 1]]  # another tag for one token of the third input
    parity = measure_parity(tmp_path / "m.onnx", asked)
    assert (parity.beyond_tolerance, parity.decision_agreement) == (1, pytest.approx(1 - 1 / tokens))
    with pytest.raises(GateError, match="1 of 56 inputs, same decision on 99"):
        check_parity(parity, tmp_path / "m.onnx", out=tmp_path / "out")


def test_torch_alone_and_graph_in_batches_agree(graph: onnx.ModelProto, tmp_path: Path) -> None:
    save(graph, tmp_path / "m.onnx")
    from bertemd_deploy.runtime import open_session, predict_logits

    found = predict_logits(open_session(tmp_path / "m.onnx"), examples(30), pad_id=0, batch_size=4)
    np.testing.assert_allclose(found, torch_outputs(MODEL, examples(30)), atol=1e-4)
