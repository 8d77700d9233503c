from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from bertemd_deploy import runtime
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import ArtifactError
from bertemd_deploy.runtime import CpuLimits, cgroup_cpu_quota, cpu_limits, open_session, predict_logits, run_session


def rows(*lengths: int) -> Encoded:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return Encoded(tokens, np.zeros(len(tokens), dtype=np.int8), offsets)


@pytest.fixture
def summing_graph(tmp_path: Path) -> Path:
    """A graph of two inputs whose logits are the row's sum of token ids over real tokens, and that negated."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["real"]),
        helper.make_node("Cast", ["real"], ["floats"], to=kinds.FLOAT),
        helper.make_node("ReduceSum", ["floats", "axis"], ["sum"], keepdims=1),
        helper.make_node("Neg", ["sum"], ["negated"]),
        helper.make_node("Concat", ["sum", "negated"], ["logits"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info(name, kinds.INT64, ["b", "t"]) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", kinds.FLOAT, ["b", 2])],
        [helper.make_tensor("axis", kinds.INT64, [1], [1])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


# ---- threads


@pytest.mark.parametrize(
    ("limits", "threads"),
    [
        (CpuLimits(8, None, 4), 4),
        (CpuLimits(2, None, 4), 2),
        (CpuLimits(8, 1.5, 4), 2),
        (CpuLimits(8, 0.25, 4), 1),
        (CpuLimits(1, 16.0, 16), 1),
    ],
)
def test_threads_are_the_least_bound(limits, threads):
    assert limits.threads == threads


def test_limits_of_this_process():
    limits = cpu_limits()
    assert limits.affinity == len(os.sched_getaffinity(0))
    assert 1 <= limits.threads <= limits.affinity


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nonsense\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "?\n"}, None),
        ({}, None),
    ],
)
def test_quota_of_the_container(tmp_path: Path, files, quota):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cgroup_cpu_quota(tmp_path) == quota


# ---- sessions


def test_session_takes_the_threads_it_is_given(summing_graph: Path):
    options = open_session(summing_graph, threads=2).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_session_takes_what_the_process_may_use(summing_graph: Path, monkeypatch):
    monkeypatch.setattr(runtime, "cpu_limits", lambda: CpuLimits(3, None, 8))
    assert open_session(summing_graph).get_session_options().intra_op_num_threads == 3


@pytest.mark.parametrize("spinning", [True, False])
@pytest.mark.parametrize("arena", [True, False])
def test_session_spins_and_keeps_memory_where_asked(summing_graph: Path, spinning, arena):
    session = open_session(summing_graph, threads=2, spinning=spinning, arena=arena)
    options = session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == ("0" if spinning else "1")
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (arena, arena)
    logits = run_session(session, rows(2, 3).batch([0, 1], pad_id=9))
    np.testing.assert_array_equal(logits, np.array([[3, -3], [12, -12]], dtype=np.float32), strict=True)


def test_session_by_default_stops_spinning_and_has_an_arena(summing_graph: Path):
    options = open_session(summing_graph).get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (True, True)


@pytest.mark.parametrize("optimize", [True, False])
def test_run_feeds_the_inputs_the_graph_declares(summing_graph: Path, optimize):
    session = open_session(summing_graph, threads=1, optimize=optimize)
    logits = run_session(session, rows(2, 3).batch([0, 1], pad_id=9))
    np.testing.assert_array_equal(logits, np.array([[3, -3], [12, -12]], dtype=np.float32), strict=True)


def test_no_such_graph(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"none\.onnx: there is no such graph"):
        open_session(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_damaged_graph(tmp_path: Path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(
        ArtifactError, match=r"model\.onnx: ONNX Runtime [0-9.]+ cannot load this file \(.+Export it again"
    ):
        open_session(tmp_path / "model.onnx")


def test_truncated_graph(summing_graph: Path):
    summing_graph.write_bytes(summing_graph.read_bytes()[:-60])
    with pytest.raises(ArtifactError, match="cannot load this file"):
        open_session(summing_graph)


def test_predict_keeps_the_order_over_batches_of_like_length(summing_graph: Path):
    lengths = np.random.default_rng(0).integers(1, 20, 101)
    examples = rows(*lengths)
    expected = np.add.reduceat(examples.tokens, examples.offsets[:-1])
    logits = predict_logits(open_session(summing_graph, threads=1), examples, pad_id=7, batch_size=4)
    np.testing.assert_array_equal(logits, np.stack([expected, -expected], 1).astype(np.float32), strict=True)


@pytest.fixture
def token_graph(tmp_path: Path) -> Path:
    """A graph that answers for every token, padding too: where a span starts, its id, and where it ends, its id negated."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["start_logits"], to=kinds.FLOAT),
        helper.make_node("Neg", ["start_logits"], ["end_logits"]),
    ]
    outputs = [helper.make_tensor_value_info(name, kinds.FLOAT, ["b", "t"]) for name in ("end_logits", "start_logits")]
    inputs = [helper.make_tensor_value_info("input_ids", kinds.INT64, ["b", "t"])]
    graph = helper.make_graph(nodes, "spans", inputs, outputs)
    path = tmp_path / "spans.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_start_and_end_are_the_last_axis_in_this_order(token_graph: Path):
    logits = run_session(open_session(token_graph, threads=1), rows(2, 1).batch([0, 1], pad_id=9))
    expected = np.array([[[1, -1], [2, -2]], [[3, -3], [9, -9]]], dtype=np.float32)
    np.testing.assert_array_equal(logits, expected, strict=True)


def test_logits_of_tokens_come_back_ragged_and_in_order(token_graph: Path):
    examples = rows(*np.random.default_rng(0).integers(1, 20, 101))
    logits = predict_logits(open_session(token_graph, threads=1), examples, pad_id=7, batch_size=4)
    expected = np.stack([examples.tokens, -examples.tokens], 1).astype(np.float32)
    np.testing.assert_array_equal(logits, expected, strict=True)


def test_predict_nothing(summing_graph: Path):
    with pytest.raises(ValueError, match="no examples"):
        predict_logits(open_session(summing_graph, threads=1), rows(), pad_id=0)


def test_onnxruntime_is_told_to_send_and_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    with pytest.raises(ArtifactError):
        open_session(Path(__file__))
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
