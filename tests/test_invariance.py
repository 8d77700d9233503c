from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_lookup import write_lookup
from tiny_student import examples, tiny_model

from bertemd_deploy import invariance
from bertemd_deploy.bert_graph import portable_graph
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import GateError
from bertemd_deploy.invariance import Bound, Invariance, bound_of, check_invariance, measure_invariance
from bertemd_deploy.onnx_edit import save
from bertemd_deploy.quantization.dynamic import quantize
from bertemd_deploy.tasks import Kind

LOOSE = Bound("per-tensor", None, 1.0)
NAMES = [
    "padded by 8 tokens",
    "padded to 40 tokens",
    "in batches of 8 of mixed length",
    "with other batch mates",
    "in batches of 32 of like length",
]


def leaking(path: Path, *, padding: float = 0.0, mates: float = 0.0, outputs: int = 2) -> Path:
    """Write a graph that sums a token's worth over a row, plus leaks: the padding of the row, the largest id of the batch.

    Output 0 is minus that sum, all other outputs are the sum.
    """
    worth = np.linspace(-1, 1, 100, dtype=np.float32)
    signs = np.array([[-1.0], *([[1.0]] * (outputs - 1))], dtype=np.float32).T if outputs > 1 else np.ones((1, 1))
    constants = {
        "worth": worth,
        "signs": signs.astype(np.float32),
        "axis": np.array([1]),
        "both": np.array([0, 1]),
        "padding": np.float32(padding),
        "mates": np.float32(mates),
        "one": np.int64(1),
    }
    nodes = [
        helper.make_node("Gather", ["worth", "input_ids"], ["each"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["each", "mask"], ["real"]),
        helper.make_node("ReduceSum", ["real", "axis"], ["sum"], keepdims=1),
        helper.make_node("Sub", ["one", "attention_mask"], ["unreal"]),
        helper.make_node("Cast", ["unreal"], ["pads"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["pads", "axis"], ["padded"], keepdims=1),
        helper.make_node("Mul", ["padded", "padding"], ["leak0"]),
        helper.make_node("ReduceMax", ["input_ids"], ["largest"], keepdims=1),
        helper.make_node("Cast", ["largest"], ["largest_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["largest_float", "mates"], ["leak1"]),
        helper.make_node("Sum", ["sum", "leak0", "leak1"], ["total"]),
        helper.make_node("Mul", ["total", "signs"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "leaking",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def measured(
    path: Path, *, kind: Kind = "classification", bound: Bound = LOOSE, part: Encoded | None = None
) -> Invariance:
    part = examples(60) if part is None else part
    return measure_invariance(path, examples=part, pad_id=0, kind=kind, max_length=40, bound=bound)


def test_a_graph_that_reads_each_row_by_itself_is_unchanged(tmp_path: Path) -> None:
    found = measured(leaking(tmp_path / "m.onnx"), bound=bound_of("float"))
    assert [arrangement.name for arrangement in found.arrangements] == NAMES
    assert found.max_abs_logit_difference is not None
    assert found.max_abs_logit_difference < 1e-5
    assert (found.changed_decision_share, found.changed_examples, found.within_bound) == (0, [], True)
    assert found.sentence().startswith("padding and batch mates change no decision of 60, logits by at most ")


def test_padding_is_told_from_mates(tmp_path: Path) -> None:
    """40 tokens of padding at most, 0.5 each; and the largest id of a batch, of less than 100."""
    padded = measured(leaking(tmp_path / "p.onnx", padding=0.5))
    by_name = {arrangement.name: arrangement for arrangement in padded.arrangements}
    assert by_name[NAMES[0]].max_abs_logit_difference == pytest.approx(4)
    assert by_name[NAMES[1]].max_abs_logit_difference == pytest.approx(0.5 * (40 - examples(60).lengths.min()))
    mates = measured(leaking(tmp_path / "m.onnx", mates=0.5))
    for arrangement in mates.arrangements:
        assert (arrangement.max_abs_logit_difference == 0) == arrangement.name.startswith("padded")


def test_the_changed_examples_are_named_by_their_rows(tmp_path: Path) -> None:
    """Two padding tokens' worth of leak turns the rows that lie so close below 0."""
    part = examples(60)
    path = leaking(tmp_path / "m.onnx", padding=0.25)
    worth = np.linspace(-1, 1, 100)
    sums = np.array([worth[part.tokens[slice(*part.offsets[row : row + 2])]].sum() for row in range(60)])
    found = measured(path, part=part)
    assert found.arrangements[0].changed_examples == np.flatnonzero((sums < 0) & (sums + 2 > 0)).tolist()
    assert found.arrangements[0].changed_decision_share == len(found.arrangements[0].changed_examples) / 60
    assert set(found.changed_examples) >= set(found.arrangements[0].changed_examples)
    assert found.changed_decision_share == max(each.changed_decision_share for each in found.arrangements)


def test_a_sample_keeps_its_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(invariance.MOST_EXAMPLES, "per-tensor", 20)
    part = examples(60)
    found = measured(leaking(tmp_path / "m.onnx", padding=100.0), part=part)
    assert found.examples == found.decisions == 20
    assert len(found.changed_examples) > 5
    assert max(found.changed_examples) > 20
    lengths = part.lengths[found.changed_examples]
    assert lengths.min() < 8 < 24 < lengths.max()
    monkeypatch.setattr(invariance, "MOST_TOKENS", 400)
    assert measured(leaking(tmp_path / "m.onnx"), part=part).examples == 10


def test_a_number_has_changed_where_it_moves_by_a_quarter_of_the_spread(tmp_path: Path) -> None:
    path = leaking(tmp_path / "m.onnx", mates=1.0, outputs=1)
    found = measured(path, kind="regression")
    assert found.changed_examples
    assert "numbers" in found.sentence()
    still = measured(leaking(tmp_path / "s.onnx", mates=1e-4, outputs=1), kind="regression")
    assert still.changed_examples == []
    assert "change no number of 60" in still.sentence()
    assert (still.max_abs_logit_difference or 0) > 1e-4


def test_labels_are_decided_one_by_one(tmp_path: Path) -> None:
    found = measured(leaking(tmp_path / "m.onnx", padding=0.25, outputs=3), kind="multilabel")
    same = measured(leaking(tmp_path / "m.onnx", padding=0.25))
    assert found.arrangements[0].changed_examples == same.arrangements[0].changed_examples != []


@pytest.mark.parametrize("kind", ["token-classification", "question-answering"])
def test_kinds_with_logits_of_every_token(tmp_path: Path, kind: Kind) -> None:
    random = np.random.default_rng(0)
    tables = (
        {"logits": random.normal(size=(100, 3))}
        if kind == "token-classification"
        else {name: random.normal(size=100) for name in ("start_logits", "end_logits")}
    )
    write_lookup(tmp_path / "m.onnx", tables)
    part = examples(60)
    found = measured(tmp_path / "m.onnx", kind=kind, part=part)
    assert found.decisions == (len(part.tokens) if kind == "token-classification" else 60)
    assert (found.changed_decision_share, found.max_abs_logit_difference) == (0, 0)


def test_one_changed_tag_names_its_row(tmp_path: Path) -> None:
    """A tagger whose logits are the batch's largest id for every token, against a class of its own."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["own"]),
        helper.make_node("ReduceMax", ["input_ids"], ["largest"], keepdims=0),
        helper.make_node("Gather", ["offsets", "largest"], ["offset"]),
        helper.make_node("Add", ["own", "offset"], ["logits"]),
    ]
    table = np.zeros((100, 2), dtype=np.float32)
    table[:, 0] = np.where(np.arange(100) == 50, 0.5, 2.0)
    offsets = np.zeros((100, 2), dtype=np.float32)
    offsets[99, 1] = 1.0  # a mate with word 99 turns the tag of word 50
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", 2])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(offsets, "offsets")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    rows = [[2, 50, 7, 3], [2, 99, 3], *([[2, 7, 8, 9, 3]] * 3)]
    offsets_of = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    tokens = np.concatenate(rows).astype(np.int32)
    part = Encoded(tokens, np.zeros(len(tokens), dtype=np.int8), offsets_of)
    found = measured(path, kind="token-classification", part=part)
    assert found.changed_examples == [0]
    assert found.changed_decision_share == 1 / len(tokens)


def test_one_scale_per_tensor_depends_on_the_batch_and_the_float_graph_does_not(tmp_path: Path) -> None:
    model = portable_graph(tiny_model(), exporter="torchscript", opset=17)
    save(model, tmp_path / "m.onnx")
    save(quantize(model, fused=False), tmp_path / "q.onnx")
    exact = measured(tmp_path / "m.onnx", bound=bound_of("float"))
    assert exact.within_bound
    dynamic = measured(tmp_path / "q.onnx", bound=bound_of("per-tensor", max_changed=100))
    assert (dynamic.max_abs_logit_difference or 0) > 1e-2
    assert dynamic.within_bound
    assert not measured(tmp_path / "q.onnx", bound=bound_of("fixed")).within_bound


def test_logits_that_are_not_finite_are_beyond_any_bound(tmp_path: Path) -> None:
    found = measured(leaking(tmp_path / "m.onnx", mates=float("nan")))
    assert found.max_abs_logit_difference is None
    assert not found.within_bound
    assert "logits that are not finite" in found.sentence()


def test_the_record_holds_what_was_found_and_what_is_allowed(tmp_path: Path) -> None:
    found = measured(leaking(tmp_path / "m.onnx", padding=0.25), bound=bound_of("per-tensor", max_changed=2.5))
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["activation_scales"] == "per-tensor"
    assert (record["examples"], record["decisions"]) == (60, 60)
    assert record["changed_decision_share_allowed"] == 0.025
    assert record["max_abs_logit_difference_allowed"] is None
    assert list(record["arrangements"]) == NAMES
    assert record["arrangements"][NAMES[0]]["changed_examples"] == found.arrangements[0].changed_examples
    assert record["changed_examples"] == found.changed_examples


def test_a_graph_within_its_bound_passes_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "onnx").mkdir()
    path = leaking(tmp_path / "onnx/model.onnx")
    check_invariance(measured(path, bound=bound_of("float")), path, out=tmp_path / "out")
    line = capsys.readouterr().err.strip()
    assert line.startswith("onnx/model.onnx: padding and batch mates change no decision of 60, logits by at most ")
    assert line.endswith("(allowed no decision, logits by 1e-04)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bound", "allowed", "remedy"),
    [
        (bound_of("float"), "allowed no decision, logits by 1e-04", "Set export.exporter to the other exporter"),
        (
            bound_of("fixed"),
            "allowed no decision, logits by 1e-03",
            "Update onnxruntime, or choose another quantize.mode.",
        ),
        (bound_of("per-tensor", max_changed=1), "allowed 1.0% of decisions.", "Raise quantize.max_changed"),
    ],
)
def test_a_graph_beyond_its_bound_is_rejected_and_kept(tmp_path: Path, bound: Bound, allowed: str, remedy: str) -> None:
    path = leaking(tmp_path / "model_quantized.onnx", padding=1.0)
    with pytest.raises(GateError) as caught:
        check_invariance(measured(path, bound=bound), path, out=tmp_path / "out")
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert message.startswith("model_quantized.onnx: padding and batch mates change ")
    assert " of 60 decisions (" in message
    assert ", padded by 8 tokens), logits by at most 3.7e+01; " in message
    assert allowed in message
    assert " Evaluation examples " in message
    assert f"Kept as model_quantized.rejected.onnx. {remedy}" in message
    assert (tmp_path / "out/onnx/model_quantized.rejected.onnx").read_bytes() == path.read_bytes()


def test_no_examples_are_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no examples"):
        measured(leaking(tmp_path / "m.onnx"), part=examples(1).select([]))
