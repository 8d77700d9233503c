"""The saturating graph: against a loop over scalars, in every int8 form; which pairs of weights can saturate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from integer_graphs import FORMS, ZERO, form, run
from onnx import TensorProto, helper

from bertemd_deploy.errors import ExportError
from bertemd_deploy.onnx_edit import histogram
from bertemd_deploy.quantization import emulation
from bertemd_deploy.quantization.emulation import PAIRS, SATURATED, emulate, saturating, weight_pairs


def by_hand(codes: np.ndarray, weight: np.ndarray, *, zero: int) -> tuple[np.ndarray, int]:
    """Return the sums that a CPU without VNNI gives, scalar by scalar, and how many pairs did not fit."""
    rows, inner = codes.shape
    sums = np.zeros((rows, weight.shape[1]), dtype=np.int64)
    clipped = 0
    for row in range(rows):
        for column in range(weight.shape[1]):
            for at in range(0, inner, 2):
                pair = sum(int(codes[row, k]) * int(weight[k, column]) for k in range(at, min(at + 2, inner)))
                fitting = min(max(pair, -32768), 32767)
                clipped += pair != fitting
                sums[row, column] += fitting
            sums[row, column] -= zero * sum(int(value) for value in weight[:, column])
    return sums, clipped


def extremes(rows: int, inner: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and weights of which some pairs saturate, either way, and columns differ in how many."""
    random = np.random.default_rng(seed)
    weight = random.integers(-127, 128, size=(inner, width))
    weight = np.where(random.random((inner, width)) < np.linspace(0, 1, width), np.sign(weight) * 127, weight // 2)
    return random.integers(100, 256, size=(rows, inner)).astype(np.uint8), weight.astype(np.int8)


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(("inner", "width", "per_channel"), [(8, 5, False), (7, 6, True), (1, 3, False)])
@pytest.mark.parametrize("at_once", [1, 8, 2048])
def test_the_graph_is_the_loop(
    kind: str,
    inner: int,
    width: int,
    per_channel: bool,
    at_once: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(emulation, "_PAIRS_AT_ONCE", at_once)
    codes, weight = extremes(4, inner, width, seed=inner)
    expected, clipped = by_hand(codes, weight, zero=ZERO)
    exact = (codes.astype(np.int64) - ZERO) @ weight.astype(np.int64)
    assert (clipped > 0) == (inner > 1) == bool((exact != expected).any())
    model = form(kind, weight, per_channel=per_channel)
    before = model.SerializeToString()
    made = saturating(model)
    assert model.SerializeToString() == before
    np.testing.assert_array_equal(run(made, kind, codes, tmp_path), expected)
    np.testing.assert_array_equal(
        run(saturating(form(kind, weight // 2)), kind, codes, tmp_path), exact_of(codes, weight)
    )


def exact_of(codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return (codes.astype(np.int64) - ZERO) @ (weight // 2).astype(np.int64)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_counted(seed: int, tmp_path: Path) -> None:
    import onnxruntime

    codes, weight = extremes(6, 9, 7, seed)
    _, clipped = by_hand(codes, weight, zero=ZERO)
    made, names = emulate(form("MatMulInteger", weight), counted=True)
    assert names == ["product"]
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    pairs, saturated = session.run([f"{PAIRS}product", f"{SATURATED}product"], {"a": codes})
    assert (int(pairs), int(saturated)) == (6 * 5 * 7, clipped)
    assert clipped > 0


def test_leading_dimensions_stay(tmp_path: Path) -> None:
    """Activations of a model are (batch, tokens, width)."""
    import onnxruntime

    codes, weight = extremes(6, 8, 5, seed=0)
    model = form("MatMulInteger", weight)
    for value, last in ((model.graph.input[0], 8), (model.graph.output[0], 5)):
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for size in ("b", "t", last):
            shape.dim.add(**({"dim_param": size} if isinstance(size, str) else {"dim_value": size}))
    session = onnxruntime.InferenceSession(saturating(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": codes.reshape(2, 3, 8)})
    np.testing.assert_array_equal(found, by_hand(codes, weight, zero=ZERO)[0].reshape(2, 3, 5))


def test_two_weights_of_seven_bits_cannot_saturate_and_more_can() -> None:
    """255 x (64 + 64) = 32640 <= 32767 < 255 x (65 + 64): shown for every pair of weights there is."""
    values = np.arange(-128, 128)
    first, second = (grid.reshape(1, -1) for grid in np.meshgrid(values, values, indexing="ij"))
    weight = np.concatenate([first, second]).astype(np.int8)
    pairs, columns = weight_pairs(weight)
    assert not pairs.any()
    largest = np.maximum(
        np.abs(np.maximum(weight, 0).astype(int).sum(0)), np.abs(np.minimum(weight, 0).astype(int).sum(0))
    )
    expected = np.flatnonzero(
        255 * largest > np.where(np.minimum(weight, 0).astype(int).sum(0) == -largest, 32768, 32767)
    )
    np.testing.assert_array_equal(columns, expected)
    small = np.abs(weight.astype(int)).max(axis=0) <= 64
    assert not small[columns].any()
    assert small.sum() == 129**2
    for codes in ((255, 255), (255, 0), (0, 255)):  # the corners of what codes can be
        sums = np.array(codes) @ weight.astype(np.int64)
        assert ((sums >= -32768) & (sums <= 32767) | np.isin(np.arange(sums.size), columns)).all()
        assert (np.abs(sums[small]) <= 32640).all()


def test_a_product_that_cannot_saturate_gets_no_extra_work() -> None:
    _, weight = extremes(2, 8, 5, seed=0)
    assert "Clip" in histogram(saturating(form("MatMulInteger", weight)))
    assert set(histogram(saturating(form("MatMulInteger", weight // 2)))) == {"MatMulInteger", "Identity"}
    unsigned_weight = form("MatMulInteger", weight)
    unsigned_weight.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array((weight.astype(np.int16) + 128).astype(np.uint8), "w")
    )
    assert [node.op_type for node in saturating(unsigned_weight).graph.node] == ["MatMulInteger"]


def test_a_float_product_with_restored_weights_is_left_alone() -> None:
    _, weight = extremes(2, 8, 5, seed=0)
    model = form("qdq", weight)
    model.graph.node[-1].input[0] = "a"
    assert "MatMulInteger" not in histogram(saturating(model))


@pytest.mark.parametrize("case", ["computed weight", "Gemm", "two activations", "QLinearMatMul"])
def test_forms_without_an_emulation_are_refused(case: str) -> None:
    _, weight = extremes(2, 8, 5, seed=0)
    model = form("MatMulInteger" if case == "computed weight" else "qdq", weight)
    product = model.graph.node[-1]
    if case in ("computed weight", "two activations"):
        del model.graph.initializer[0]
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.INT8, [8, 5]))
    else:
        product.op_type = case
    with pytest.raises(ExportError) as caught:
        saturating(model)
    message = str(caught.value)
    assert message.startswith(f"product: what a CPU without VNNI makes of this {product.op_type} cannot be worked out.")
    assert message.endswith("Leave this operator in fp32.")
