"""A graph whose answers are tables: what a test expects of it is read off, not computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_lookup(path: Path, tables: dict[str, np.ndarray]) -> None:
    """Write a graph that looks every token up by itself: each output is its table's (vocabulary, …) rows."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("Gather", [f"{name}_table", "input_ids"], [name]) for name in tables],
        "tiny",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", *table.shape[1:]])
            for name, table in tables.items()
        ],
        [numpy_helper.from_array(table.astype(np.float32), f"{name}_table") for name, table in tables.items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
