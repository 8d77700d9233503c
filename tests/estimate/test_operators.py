from __future__ import annotations

import numpy as np
import pytest
from onnx import helper
from tiny_operators import write_operators, write_product

from bertemd_deploy.errors import MeasurementError
from bertemd_deploy.estimate.cases import plan
from bertemd_deploy.estimate.operators import RULES, TABLES, Part, count_operators, operator_cost
from bertemd_deploy.estimate.tracing import Step, Tensor

ACTIVATION = Tensor("float", (2, 5, 8))
WEIGHT = Tensor("float", (8, 6), constant=True)


def step(op_type: str, *inputs: Tensor, outputs=(ACTIVATION,), **attributes) -> Step:
    return Step("it", op_type, inputs, tuple(outputs), attributes, where="graph.onnx")


def floats(*dims: int) -> Tensor:
    return Tensor("float", dims)


def test_product_and_softmax_by_hand(tmp_path):
    product, softmax = count_operators(write_product(tmp_path / "product.onnx"), batch=2, sequence=5)
    assert (product.name, product.op_type, product.kind) == ("project", "MatMul", "fp32_product")
    assert product.macs == 2 * 5 * 8 * 6
    assert product.bytes_read == 4 * (2 * 5 * 8 + 8 * 6)
    assert product.constant_bytes == 4 * 8 * 6
    assert product.bytes_written == 4 * 2 * 5 * 6
    assert product.parts == (Part("fp32_product", 10, 48, macs=480, weight_bytes=192),)
    assert (softmax.kind, softmax.macs, softmax.parts) == ("elementwise", 0, (Part("softmax", 60, 6),))


def test_int8_product_that_quantizes_its_activations():
    weight = Tensor("int8", (8, 6), constant=True)
    scale = Tensor("float", (), constant=True)
    cost = operator_cost(step("DynamicQuantizeMatMul", ACTIVATION, weight, scale, outputs=[floats(2, 5, 6)]))
    assert (cost.kind, cost.macs) == ("int8_product", 480)
    assert cost.parts == (
        Part("int8_product", 10, 48, macs=480, weight_bytes=48),
        Part("dynamic_quantize", 80, 8, inner=True),
    )


@pytest.mark.parametrize("op_type", ["MatMulInteger", "MatMulIntegerToFloat"])
def test_int8_product_of_codes(op_type):
    codes, weight = Tensor("uint8", (1, 7, 8)), Tensor("int8", (8, 6), constant=True)
    cost = operator_cost(step(op_type, codes, weight, outputs=[floats(1, 7, 6)]))
    assert cost.parts == (Part("int8_product", 7, 48, macs=7 * 48, weight_bytes=48),)


def test_transposed_weights_have_the_columns_of_the_output():
    weight = Tensor("float", (6, 8), constant=True)
    cost = operator_cost(step("Gemm", floats(10, 8), weight, outputs=[floats(10, 6)], transB=1))
    assert cost.parts[0] == Part("fp32_product", 10, 48, macs=480, weight_bytes=192)


def test_products_of_activations_count_a_matrix_for_each_head():
    query, keys = floats(2, 3, 5, 4), floats(2, 3, 4, 7)
    scores = operator_cost(step("MatMul", query, keys, outputs=[floats(2, 3, 5, 7)]))
    assert scores.parts == (Part("batched_product", 5 * 7 * 4, 5, count=6, macs=6 * 140),)
    transposed = operator_cost(step("FusedMatMul", query, floats(2, 3, 7, 4), outputs=[floats(2, 3, 5, 7)], transB=1))
    assert transposed.parts == scores.parts
    context = operator_cost(step("MatMul", floats(2, 3, 5, 7), floats(2, 3, 7, 4), outputs=[floats(2, 3, 5, 4)]))
    assert context.parts == scores.parts
    assert scores.constant_bytes == 0


@pytest.mark.parametrize("length", [8, 64, 512])
def test_the_head_width_is_found_from_either_product(length):
    wide, narrow = floats(1, 2, length, length), floats(1, 2, length, 26)
    scores = operator_cost(step("MatMul", narrow, floats(1, 2, 26, length), outputs=[wide])).parts[0]
    context = operator_cost(step("MatMul", wide, narrow, outputs=[narrow])).parts[0]
    assert (scores.width, context.width) == (26, 26)


def test_attention_is_two_products_and_three_transpositions():
    query, key, value = floats(2, 5, 12), floats(2, 7, 12), floats(2, 7, 8)
    cost = operator_cost(step("MultiHeadAttention", query, key, value, outputs=[floats(2, 5, 8)], num_heads=4))
    core, *moved = cost.parts
    assert core == Part("attention", 5 * 7 * (3 + 2), 2, count=8, macs=8 * 175)
    assert moved == [
        Part("transpose", 120, 3, inner=True),
        Part("transpose", 168, 3, inner=True),
        Part("transpose", 112, 2, inner=True),
    ]


def test_one_row_of_queries_is_not_transposed():
    cost = operator_cost(
        step(
            "MultiHeadAttention",
            floats(1, 1, 8),
            floats(1, 7, 8),
            floats(1, 7, 8),
            outputs=[floats(1, 1, 8)],
            num_heads=2,
        )
    )
    assert [part.table for part in cost.parts] == ["attention", "transpose", "transpose"]
    assert cost.macs == 1 * 7 * 16


def test_attention_with_its_projections():
    weight = Tensor("float", (8, 24), constant=True)
    cost = operator_cost(step("Attention", ACTIVATION, weight, num_heads=2))
    assert cost.macs == 10 * 8 * 24 + 2 * 5 * 5 * 16
    assert cost.parts[0] == Part("fp32_product", 10, 192, macs=1920, weight_bytes=768)
    assert cost.parts[1] == Part("attention", 5 * 5 * 8, 4, count=4, macs=800)
    codes = operator_cost(
        step("QAttention", Tensor("uint8", (2, 5, 8)), Tensor("int8", (8, 24), constant=True), num_heads=2)
    )
    assert (codes.kind, codes.macs, codes.parts[0].weight_bytes) == ("int8_product", cost.macs, 192)


def test_lookups_and_choices():
    table = Tensor("int8", (100, 8), constant=True)
    lookup = operator_cost(step("Gather", table, Tensor("int64", (2, 5)), outputs=[Tensor("int8", (2, 5, 8))]))
    assert (lookup.kind, lookup.parts) == ("gather", (Part("gather", 80, 8),))
    choice = operator_cost(step("Gather", ACTIVATION, Tensor("int64", ()), outputs=[floats(2, 8)]))
    assert (choice.kind, choice.parts) == ("other", (Part("copy", 16, 8),))
    whole = operator_cost(step("EmbedLayerNormalization", Tensor("int64", (2, 5)), table, table, WEIGHT))
    assert [part.table for part in whole.parts] == ["layer_norm", "gather", "gather", "gather"]
    assert [part.inner for part in whole.parts] == [False, True, True, True]


def test_arithmetic_on_equal_shapes_and_repeated():
    assert operator_cost(step("Add", ACTIVATION, ACTIVATION)).parts == (Part("binary", 80, 8),)
    row = Tensor("float", (8,), constant=True)
    assert operator_cost(step("Add", ACTIVATION, row)).parts == (Part("broadcast", 80, 8),)
    column = operator_cost(step("Mul", floats(2, 5, 1), ACTIVATION))
    assert column.parts == (Part("broadcast", 80, 8),)


def test_transpositions_of_rows_and_of_values():
    source = floats(1, 5, 2, 4)
    assert operator_cost(step("Transpose", source, perm=[0, 2, 1, 3])).parts[0].table == "transpose"
    assert operator_cost(step("Transpose", source, perm=[0, 2, 3, 1])).parts[0].table == "transpose_inner"
    assert operator_cost(step("Transpose", source)).parts[0].table == "transpose_inner"  # all axes reversed


def test_what_moves_nothing_and_what_gives_less_than_it_takes():
    assert operator_cost(step("Reshape", ACTIVATION, Tensor("int64", (2,)))).parts == (Part("view", 1),)
    assert operator_cost(step("Slice", ACTIVATION, outputs=[floats(2, 1, 8)])).parts == (Part("copy", 16, 8),)
    halves = operator_cost(step("Split", ACTIVATION, outputs=[floats(2, 5, 4), floats(2, 5, 4)]))
    assert halves.parts == (Part("copy", 80, 4),)
    assert operator_cost(step("ReduceMax", ACTIVATION, outputs=[floats(2, 5, 1)])).parts == (Part("reduce", 80, 8),)


def test_an_unknown_operator_is_an_error_that_names_it(tmp_path):
    nodes = [helper.make_node("Round", ["x"], ["y"], name="to_whole")]
    path = write_operators(tmp_path / "round.onnx", nodes, inputs={"x": ["batch", 4]}, constants={})
    with pytest.raises(
        MeasurementError, match=r"round.onnx: operator Round \('to_whole'\) is not among .*BiasGelu.*ssh://"
    ):
        count_operators(path, batch=1, sequence=1)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (
            step("MatMulInteger", Tensor("uint8", (5, 8)), Tensor("uint8", (8, 6)), outputs=[floats(5, 6)]),
            "no constant matrix",
        ),
        (step("MatMul", Tensor("float16", (5, 8)), WEIGHT, outputs=[floats(5, 6)]), "only float activations"),
        (step("MatMul", floats(5, 8), WEIGHT, outputs=[floats(5, 5)]), "do not give 5 columns"),
        (step("MatMul", floats(8), floats(8), outputs=[floats()]), "product of vectors"),
        (step("MultiHeadAttention", floats(1, 5, 8), num_heads=2), "of three dimensions each"),
        (step("MultiHeadAttention", ACTIVATION, ACTIVATION, ACTIVATION), "num_heads is None"),
        (step("Attention", floats(5, 8), WEIGHT, num_heads=2), "input needs three dimensions"),
    ],
)
def test_a_known_operator_used_otherwise_is_an_error_too(wrong, why):
    with pytest.raises(MeasurementError, match=rf"graph.onnx: operator {wrong.op_type} \('it'\) on .*{why}.*ssh://"):
        operator_cost(wrong)


def test_every_rule_is_timed_by_a_table_that_is_calibrated():
    measured = {case.table for case in plan()}
    assert set(TABLES) <= measured
    used = set()
    for op_type in RULES:
        weight = Tensor("int8" if "Integer" in op_type or "Quantize" in op_type else "float", (8, 24), constant=True)
        dtype = "uint8" if "Integer" in op_type or op_type == "QAttention" else "float"
        activation = Tensor(dtype, (2, 5, 8))
        inputs = (activation,) * 3 if op_type == "MultiHeadAttention" else (activation, weight)
        output = floats(2, 5, 24) if inputs[1] is weight else floats(2, 5, 8)
        used |= {part.table for part in operator_cost(step(op_type, *inputs, outputs=[output], num_heads=2)).parts}
    assert used <= set(TABLES)


def test_a_whole_student_by_hand(tiny_bert, tmp_path):
    """Two layers, width 16, two heads, 32 inside: every form of its graph multiplies what its shapes ask for."""
    import torch

    from bertemd_deploy.bert_graph import fusable_graph, load_model, portable_graph
    from bertemd_deploy.fuse import fuse
    from bertemd_deploy.onnx_edit import save
    from bertemd_deploy.quantization.dynamic import quantize

    with torch.random.fork_rng():
        model = load_model(tiny_bert())
        portable = portable_graph(model, exporter="torchscript", opset=17)
        fused, _ = fuse(fusable_graph(model, exporter="torchscript", opset=17), layers=2, heads=2, hidden=16, opset=17)
    graphs = {
        "fp32": portable,
        "fused": fused,
        "int8": quantize(portable, fused=False),
        "fused-int8": quantize(fused, fused=True),
    }
    batch, tokens = 3, 10
    rest = 16 * 16 + 2 * 16 * 32  # behind attention, for each token
    head = 16 * 16 + 16 * 2  # pooler and classifier, once
    for name, graph in graphs.items():
        save(graph, tmp_path / f"{name}.onnx")
        found = count_operators(tmp_path / f"{name}.onnx", batch=batch, sequence=tokens)
        query, both = (18, 52) if name.startswith("fused") else (16, 48)  # heads one entry wider for the mask
        weights = tokens * (16 * both + rest) + tokens * 16 * (both - query) + 16 * query + rest + head
        attention = (tokens + 1) * tokens * (query + 16)  # all tokens in the first layer, one in the last
        assert sum(cost.macs for cost in found) == batch * (weights + attention), name
        integer = sum(cost.macs for cost in found if cost.kind == "int8_product")
        assert integer == (batch * (weights - 16 * 2) if "int8" in name else 0), name
        assert all(cost.bytes_written > 0 for cost in found)


def test_counts_grow_with_batch_and_length(tmp_path):
    path = write_product(tmp_path / "product.onnx")
    macs = [sum(cost.macs for cost in count_operators(path, batch=b, sequence=t)) for b, t in ((1, 1), (1, 9), (4, 9))]
    assert macs == [48, 9 * 48, 36 * 48]
    assert np.all(np.diff(macs) > 0)
