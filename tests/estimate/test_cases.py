from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bertemd_deploy.estimate import cases
from bertemd_deploy.estimate.cases import PRODUCT_SHAPES, plan, product
from bertemd_deploy.estimate.operators import TABLES
from bertemd_deploy.estimate.probe import make_feeds


def test_names_are_unique_and_every_table_is_measured():
    found = plan()
    names = Counter(case.name for case in found)
    assert [name for name, count in names.items() if count > 1] == []
    assert {case.table for case in found} == {*TABLES, "call", "wake", "stream"}


def test_products_are_counted_there_and_back():
    case = product("fp32_product", 5, (24, 32), copies=3)
    assert (case.macs, case.weight_bytes, case.repeats) == (2 * 5 * 24 * 32, 2 * 24 * 32 * 4, 3)
    assert product("int8_product", 5, (24, 32)).weight_bytes == 2 * 24 * 32
    graph = case.build().graph
    assert [node.op_type for node in graph.node] == ["MatMul"] * 6
    assert len({node.input[1] for node in graph.node}) == 6


def test_no_student_has_the_widths_of_the_cases():
    """Nor a multiple of eight vectors: what is measured is no best case."""
    widths = {width for shape in PRODUCT_SHAPES for width in shape}
    assert not widths & {312, 384, 768, 1200, 1536, 3072}
    assert all(width % 64 for width in widths)


@pytest.mark.usefixtures("few_cases")
def test_every_graph_runs_the_operators_it_counts():
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for case in plan():
        model = case.build()
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for values in session.run(None, make_feeds(case.feeds)):
            assert np.isfinite(values.astype(np.float64)).all(), case.name
        pairs = case.table in ("fp32_product", "int8_product", "stream", "wake")
        assert len(model.graph.node) == case.repeats * (2 if pairs else 1), case.name


def test_chains_keep_values_where_operators_do_their_usual_work():
    """The longest chain of products neither grows beyond float32 nor dies out."""
    import onnxruntime

    case = product("stream", 1, (64, 256), copies=max(cases.STREAM_COPIES))
    session = onnxruntime.InferenceSession(case.build().SerializeToString(), providers=["CPUExecutionProvider"])
    (values,) = session.run(None, make_feeds(case.feeds))
    assert 1e-20 < float(np.abs(values).max()) < 1e20


def test_feeds():
    feeds = make_feeds(
        {
            "x": {"dtype": "float32", "shape": [50, 40], "scale": 3.0},
            "ids": {"dtype": "int64", "shape": [1000], "low": 2, "high": 5},
        }
    )
    assert (feeds["x"].dtype, feeds["x"].shape, feeds["ids"].dtype) == (np.float32, (50, 40), np.int64)
    assert float(feeds["x"].std()) == pytest.approx(3.0, rel=0.1)
    assert set(feeds["ids"].tolist()) == {2, 3, 4}
