"""Calibration: histograms that hold any number of values, ranges by four methods, and padding that does not count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_student import examples, shifted, tiny_model

from bertemd_deploy.bert_graph import portable_graph
from bertemd_deploy.encoding import Encoded
from bertemd_deploy.errors import DataError, ExportError
from bertemd_deploy.quantization.calibration import (
    BINS,
    METHODS,
    TOKENS_AT_ONCE,
    Histogram,
    Method,
    Range,
    calibrate,
    collect,
)
from bertemd_deploy.quantization.static import activations
from bertemd_deploy.runtime import open_session


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return portable_graph(tiny_model(), exporter="torchscript", opset=17)


def filled(*batches: np.ndarray) -> Histogram:
    found = Histogram()
    for batch in batches:
        found.add(batch.astype(np.float32))
    return found


def error(values: np.ndarray, chosen: Range) -> float:
    """Return the mean squared error of values in the 256 codes of a range."""
    scale, zero = chosen.parameters
    codes = np.clip(np.rint(values / scale) + zero, 0, 255)
    return float(np.square((codes - zero) * float(scale) - values).mean())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-50, 50), st.sampled_from([1e-3, 1.0, 40.0]), st.integers(1, 200)), min_size=1, max_size=6
    )
)
def test_doubling_the_range_moves_no_value_by_more_than_a_bin(batches: list[tuple[float, float, int]]) -> None:
    random = np.random.default_rng(0)
    parts = [(random.normal(centre, spread, size=count)).astype(np.float32) for centre, spread, count in batches]
    found, values = filled(*parts), np.concatenate(parts)
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert found.counts.sum() == len(values)
    assert len(found.counts) == BINS
    edges, slack = found.edges, found.width * 0.01 + 1e-4
    assert edges[0] <= values.min()
    assert values.max() <= edges[-1] + slack
    below = np.concatenate([[0], np.cumsum(found.counts)])
    assert (below >= np.array([(values < edge - slack).sum() for edge in edges])).all()
    assert (below <= np.array([(values <= edge + slack).sum() for edge in edges])).all()


def test_bins_are_joined_in_pairs_on_the_side_that_was_exceeded() -> None:
    found = filled(np.array([0.0, 1.0]))
    assert (found.start, found.width * BINS) == (0, 1)
    found.add(np.array([1.5], dtype=np.float32))
    assert (found.start, found.width * BINS) == (0, 2)
    found.add(np.array([-3.0], dtype=np.float32))
    assert (found.start, found.width * BINS) == (-6, 8)
    assert found.counts[[int((value + 6) / found.width) for value in (-3, 0, 1.5)]].tolist() == [1, 1, 1]


NORMAL = np.random.default_rng(0).normal(size=50_000)
OUTLIERS = np.where(np.random.default_rng(1).random(50_000) < 1e-4, NORMAL * 30, NORMAL)
GELU = 2 * NORMAL / (1 + np.exp(-3.4 * NORMAL))  # nearly


def test_minmax_is_exact_whatever_the_bins() -> None:
    found = filled(NORMAL, NORMAL * 7)
    exact = (NORMAL * 7).astype(np.float32)
    assert found.range("minmax") == Range(float(exact.min()), float(exact.max()))


def test_percentile_cuts_half_at_either_end() -> None:
    found = filled(*np.split(NORMAL, 10))
    chosen = found.range("percentile", percentile=99)
    np.testing.assert_allclose([chosen.low, chosen.high], np.quantile(NORMAL, [0.005, 0.995]), atol=found.width)
    assert found.range("percentile", percentile=100) == found.range("minmax")


@pytest.mark.parametrize("values", [NORMAL, OUTLIERS, GELU], ids=["normal", "outliers", "gelu"])
def test_mse_is_close_to_the_best_clip_found_by_trying(values: np.ndarray) -> None:
    found = filled(*np.split(values, 10))
    lows, highs = np.linspace(values.min(), 0, 17)[:-1], np.linspace(values.max(), 0, 17)[:-1]
    best = min(error(values, Range(low, high)) for low in lows for high in highs)
    reached = error(values, found.range("mse"))
    assert reached < 1.03 * best
    assert all(reached < 1.01 * error(values, found.range(method)) for method in METHODS)


def test_entropy_clips_outliers_and_leaves_evenly_spread_values_alone() -> None:
    clipped = filled(np.append(NORMAL, 80)).range("entropy")
    assert 3 < clipped.high < 20
    assert -20 < clipped.low < -3
    even = filled(np.linspace(-1, 1, 100_000)).range("entropy")
    np.testing.assert_allclose([even.low, even.high], [-1, 1], atol=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [np.zeros(50), np.full(50, 3.0), np.full(50, -3.0), np.array([1e-20])])
def test_ranges_of_values_without_spread_hold_them_and_zero(method: Method, values: np.ndarray) -> None:
    chosen = filled(values).range(method)
    assert chosen.low <= 0 <= chosen.high
    assert error(values, chosen) <= 1e-4 * max(1, np.abs(values).max())


def test_scale_and_zero_point_by_hand() -> None:
    scale, zero = Range(-1.0, 4.1).parameters
    assert (scale.dtype, zero.dtype) == (np.float32, np.uint8)
    np.testing.assert_allclose(scale, 0.02, rtol=1e-6)
    assert zero == 50
    assert Range(0.0, 0.0).parameters == (1, 0)
    assert Range(-2.0, 0.0).parameters[1] == 255
    for low, high in ((0.5, 1.0), (-1.0, -0.5), (-np.inf, 1.0)):
        with pytest.raises(ExportError, match="it must be finite and hold 0"):
            Range(low, high)


def test_padding_does_not_count(graph: onnx.ModelProto, tmp_path: Path) -> None:
    names, part = activations(graph), examples(60, seed=3)
    found = calibrate(graph, names, examples=part, pad_id=0, method="minmax", count=60)
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    for name in names:
        watched.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save_model(watched, tmp_path / "watched.onnx")
    session = open_session(tmp_path / "watched.onnx")
    alone = [session.run(names, part.batch([row], pad_id=0)) for row in range(60)]
    padded = session.run(names, part.batch(np.arange(60), pad_id=0))
    wider = 0
    for at, name in enumerate(names):
        low, high = min(row[at].min() for row in alone), max(row[at].max() for row in alone)
        np.testing.assert_allclose(
            [found[name].low, found[name].high], [min(low, 0), max(high, 0)], rtol=1e-4, atol=1e-5
        )
        wider += padded[at].min() < low - 0.01 or padded[at].max() > high + 0.01
    assert wider  # it would have counted


def test_memory_is_bounded_and_does_not_grow_with_the_examples(graph: onnx.ModelProto) -> None:
    names = activations(graph)
    part = examples(400, longest=16)
    few, many = (collect(graph, names, examples=part, pad_id=0, count=count) for count in (200, 400))
    assert (few.examples, many.examples) == (200, 400)
    widths = [32] * 8 + [64] * 2  # what goes into the products of two layers and of the pooler
    assert len(names) == len(widths)
    held = len(names) * BINS * 8 + TOKENS_AT_ONCE * 4 * (sum(widths) + max(widths))
    assert few.memory_bytes == many.memory_bytes == held
    seen = [found.histograms[names[0]].counts.sum() for found in (few, many)]
    assert seen == [part.select(np.arange(count)).lengths.sum() * 32 for count in (200, 400)]


def test_too_few_examples_are_refused(graph: onnx.ModelProto) -> None:
    for count in (21, 0):
        with pytest.raises(DataError, match=rf"calibration: 20 examples, {count} asked for. Give more train rows"):
            collect(graph, activations(graph), examples=examples(20), pad_id=0, count=count)


def test_a_tensor_of_another_graph_is_refused(graph: onnx.ModelProto) -> None:
    with pytest.raises(ExportError, match="the graph has no tensor nothing"):
        collect(graph, ["nothing"], examples=examples(4), pad_id=0, count=4)


def test_activations_that_are_not_finite_are_refused(graph: onnx.ModelProto) -> None:
    broken = shifted(graph, by=float("nan"))
    with pytest.raises(ExportError, match="calibration: logits is not finite on a train row"):
        collect(broken, ["logits"], examples=examples(4), pad_id=0, count=4)


def test_no_batch_is_larger_than_the_bound_says(graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    batch = Encoded.batch

    def watched(self: Encoded, rows: np.ndarray, **given: int) -> dict[str, np.ndarray]:
        made = batch(self, rows, **given)
        shapes.append(made["input_ids"].shape)
        return made

    monkeypatch.setattr(Encoded, "batch", watched)
    part = examples(300)
    collect(graph, activations(graph), examples=part, pad_id=0, count=300)
    assert sum(rows for rows, _ in shapes) == 300
    assert max(rows * tokens for rows, tokens in shapes) <= TOKENS_AT_ONCE
    assert len(shapes) <= 1.2 * len(part.tokens) / TOKENS_AT_ONCE + 1  # and hardly any is much smaller
