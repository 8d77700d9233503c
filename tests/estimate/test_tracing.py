from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from tiny_operators import write_operators, write_product

from bertemd_deploy.errors import ArtifactError, MeasurementError
from bertemd_deploy.estimate import tracing
from bertemd_deploy.estimate.tracing import Dimension, Tensor, trace


def test_shapes_at_any_batch_and_length(tmp_path):
    traced = trace(write_product(tmp_path / "product.onnx"))
    product, softmax = traced.at(batch=4, sequence=100)
    assert (product.name, product.op_type, softmax.name, softmax.op_type) == ("project", "MatMul", "weigh", "Softmax")
    assert product.inputs == (Tensor("float", (4, 100, 8)), Tensor("float", (8, 6), constant=True))
    assert product.outputs == softmax.inputs == softmax.outputs == (Tensor("float", (4, 100, 6)),)
    assert softmax.attributes["axis"] == -1
    assert traced.at(batch=1, sequence=1)[0].inputs[0].dims == (1, 1, 8)
    assert product.where == traced.where == str(tmp_path / "product.onnx")


def test_operators_without_names_are_told_apart(tmp_path):
    steps = trace(write_product(tmp_path / "product.onnx", named=False)).at(batch=1, sequence=2)
    assert [step.op_type for step in steps] == ["MatMul", "Softmax"]
    assert steps[0].inputs[1].constant


def test_what_is_counted_is_what_onnx_runtime_makes_of_the_graph(tmp_path):
    """Two Casts of which ONNX Runtime leaves none: not counted. A constant is there at load: no operator."""
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], name="there", to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["whole"], ["back"], name="back", to=TensorProto.FLOAT),
        helper.make_node("Add", ["one", "one"], ["two"], name="known"),
        helper.make_node("Mul", ["back", "two"], ["y"], name="double"),
    ]
    path = write_operators(
        tmp_path / "casts.onnx", nodes, inputs={"x": ["batch", 3]}, constants={"one": np.float32([1, 1, 1])}
    )
    steps = trace(path).at(batch=7, sequence=1)
    assert "known" not in [step.name for step in steps]
    assert steps[-1].op_type == "Mul"
    assert steps[-1].outputs == (Tensor("float", (7, 3)),)


def test_the_models_inputs_may_have_any_names_of_dimensions(tmp_path):
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["y"], name="words")]
    constants = {"table": np.ones((3, 5), dtype=np.float32)}
    path = write_operators(
        tmp_path / "words.onnx", nodes, inputs={"input_ids": ["batch_size", "length"]}, constants=constants
    )
    (step,) = trace(path).at(batch=2, sequence=9)
    assert step.outputs[0].dims == (2, 9, 5)


def test_other_names_of_dimensions_are_refused(tmp_path):
    nodes = [helper.make_node("Abs", ["x"], ["y"], name="size")]
    path = write_operators(tmp_path / "odd.onnx", nodes, inputs={"x": ["rows", 4]}, constants={})
    with pytest.raises(
        MeasurementError, match=r"odd.onnx: input 'x' is tensor\(float\) \['rows', 4\].*batch and sequence"
    ):
        trace(path)


def test_a_dimension_that_is_no_multiple_is_refused(tmp_path):
    nodes = [helper.make_node("Concat", ["one", "x"], ["y"], name="longer", axis=1)]
    constants = {"one": np.ones((1, 1), dtype=np.float32)}
    path = write_operators(tmp_path / "longer.onnx", nodes, inputs={"x": [1, "sequence"]}, constants=constants)
    with pytest.raises(MeasurementError, match=r"'longer': a dimension is \[4, 6, 8\].*no multiple"):
        trace(path)


def test_a_graph_of_one_fixed_length_is_refused(tmp_path):
    nodes = [helper.make_node("Add", ["x", "row"], ["y"], name="add")]
    constants = {"row": np.ones((1, 4), dtype=np.float32)}
    path = write_operators(tmp_path / "fixed.onnx", nodes, inputs={"x": ["batch", "sequence"]}, constants=constants)
    with pytest.raises(ArtifactError, match=r"fixed.onnx: does not run at batch sizes and lengths.*dynamic dimensions"):
        trace(path)


def test_files_that_are_no_graph(tmp_path):
    with pytest.raises(ArtifactError, match=r"absent.onnx: there is no such graph"):
        trace(tmp_path / "absent.onnx")
    nodes = [helper.make_node("NoSuchOperator", ["x"], ["y"], name="none")]
    path = write_operators(tmp_path / "unknown.onnx", nodes, inputs={"x": ["batch", 4]}, constants={})
    with pytest.raises(ArtifactError, match=r"unknown.onnx: ONNX Runtime .* cannot load this file"):
        trace(path)


def event(name: str, **arguments) -> dict:
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": "Abs", **arguments}}


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([event("a")] * 4, "profile lists 4 operators over 3 runs, which do not line up"),
        ([event("a"), event("a"), event("b")], "profile lists 3 operators over 3 runs, which do not line up"),
        ([event("b")] * 3, "ran Abs 'b', which the graph that it wrote does not hold"),
        ([event("a")] * 3, "'a': ONNX Runtime's profile tells input_type_shape None of 1 values"),
        ([event("a", input_type_shape=[{"string": [1]}])] * 3, "'a' has values of type string"),
        (
            [event("a", input_type_shape=[{"float": shape}]) for shape in ([1], [1, 1], [1])],
            "'a': its values have .* dimensions",
        ),
    ],
)
def test_a_profile_of_another_form_is_refused(events, message):
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"], name="a")], "tiny", [], [])
    with pytest.raises(MeasurementError, match=message):
        tracing._operators(events, graph, where=Path("graph.onnx"))


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ((9, 9, 9), (9, 0, 0)),
        ((4, 6, 10), (2, 1, 0)),
        ((3, 5, 7), (1, 0, 1)),
        ((36, 100, 196), (4, 0, 2)),
        ((18, 45, 105), (3, 1, 1)),
        ((18, 75, 245), (1, 1, 2)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_forms_of_a_dimension(values, form):
    assert tracing._dimension(values, where="here") == Dimension(*form)
    assert Dimension(*form).at(2, 3) == values[0]


def test_sizes():
    assert (Tensor("float", (2, 3)).elements, Tensor("float", (2, 3)).bytes) == (6, 24)
    assert (Tensor("int64", ()).elements, Tensor("int64", ()).bytes) == (1, 8)
    assert Tensor("uint8", (0, 5)).bytes == 0


def test_the_file_is_left_alone(tmp_path):
    path = write_product(tmp_path / "product.onnx", named=False)
    before = path.read_bytes()
    trace(path)
    assert path.read_bytes() == before
    assert [found.name for found in Path(tmp_path).iterdir()] == ["product.onnx"]
