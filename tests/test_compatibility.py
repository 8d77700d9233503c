"""What a graph needs of ONNX Runtime, by its operator set, file format and fused attention; proved in `tests/compat`."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from bertemd_deploy.compatibility import SINCE, highest_opset, oldest_onnxruntime, release, release_fault
from bertemd_deploy.onnx_edit import IR_VERSIONS, MICROSOFT


def model(*, opset: int = 17, ir_version: int = 8, attention: list[str] | None = None) -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    if attention is not None:
        nodes.append(helper.make_node("MultiHeadAttention", attention, ["z"], domain=MICROSOFT, num_heads=2))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:])
    domains = [helper.make_opsetid(MICROSOFT, 1), helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=domains, ir_version=ir_version)


@pytest.mark.parametrize("opset", IR_VERSIONS)
def test_every_operator_set_that_export_writes_has_a_release(opset: int) -> None:
    oldest = oldest_onnxruntime(model(opset=opset, ir_version=IR_VERSIONS[opset]))
    assert highest_opset(f"{oldest}.0") == opset
    assert highest_opset(f"{release(oldest)[0]}.{release(oldest)[1] - 1}.9") == (opset - 1 if opset > 17 else None)


def test_the_file_format_counts_too() -> None:
    assert oldest_onnxruntime(model(opset=17, ir_version=9)) == "1.16"
    assert oldest_onnxruntime(model(opset=18, ir_version=10)) == "1.18"


@pytest.mark.parametrize(
    ("inputs", "opset", "oldest"),
    [
        (["q", "k", "v"], 17, "1.16"),
        (["q", "k", "v", "", ""], 17, "1.16"),
        (["q", "k", "v"], 20, "1.17"),
        (["q", "k", "v", "", "mask"], 17, "1.21"),
        (["q", "k", "v", "bias", "mask"], 20, "1.21"),
    ],
)
def test_fused_attention_wants_a_newer_one(inputs: list[str], opset: int, oldest: str) -> None:
    assert oldest_onnxruntime(model(opset=opset, ir_version=IR_VERSIONS[opset], attention=inputs)) == oldest


def test_what_is_newer_than_all_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="operator set 22 in file format 10; no release is known to run more than 21 in 10"
    ):
        oldest_onnxruntime(model(opset=22, ir_version=10))
    with pytest.raises(ValueError, match="operator set 17 in file format 11"):
        oldest_onnxruntime(model(ir_version=11))


def test_releases_are_compared_as_numbers() -> None:
    assert release("1.9.2") < release("1.12") < release("1.21.0+cpu") < release("2.0.dev1")
    assert list(SINCE) == sorted(SINCE, key=release)
    with pytest.raises(ValueError, match="'new' is not a version such as"):
        release("new")


def test_an_installed_release_is_held_against_what_is_needed() -> None:
    assert release_fault("1.16", installed="1.16.3") is None
    assert release_fault("1.16", installed="1.31.1") is None
    fault = "it needs ONNX Runtime 1.16 or newer; 1.15.1 would refuse it or answer wrongly"
    assert release_fault("1.16", installed="1.15.1") == fault
