"""Embedding tables in 8 and 4 bits: the codes, what a lookup gives back bit by bit, and how far that is from the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from tiny_lookup import write_lookup as write_table
from tiny_student import examples, tiny_model, torch_outputs

from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ExportError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import Editor, histogram, save, tidy
from bertemd_deploy.quantization.dynamic import operators, quantize
from bertemd_deploy.quantization.tables import (
    group_size,
    pack_rows,
    quantize_rows,
    write_lookup,
)
from bertemd_deploy.runtime import open_session, predict_logits

IDS = np.array([[3, 0, 7], [7, 299, 120]])


def random_table(rows: int = 300, width: int = 48, *, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(rows, width)) * generator.uniform(0.2, 2, size=(rows, 1))).astype(np.float32)


def unpacked(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the rows that 4-bit codes stand for, by integer arithmetic on the bytes."""
    codes = np.concatenate([packed >> 4, packed & 15], axis=-1).astype(np.int32) - 8
    width = np.repeat(scale[..., 0].astype(np.float32), codes.shape[-1] // scale.shape[-2], axis=-1)
    return codes.astype(np.float32) * width


def looked_up(
    table: np.ndarray, bits: int, folder: Path, *, ids: np.ndarray = IDS
) -> tuple[np.ndarray, onnx.ModelProto]:
    """Return what a graph with one quantized table answers, and the graph."""
    write_table(folder / "float.onnx", {"rows": table})
    model = onnx.load(folder / "float.onnx")
    model.graph.node[0].name = "words"
    if ids.ndim == 1:
        del model.graph.input[0].type.tensor_type.shape.dim[1], model.graph.output[0].type.tensor_type.shape.dim[1]
    editor = Editor(model)

    def replace(node: onnx.NodeProto) -> bool:
        write_lookup(editor, node, table, bits=bits)
        return True

    editor.rewrite(replace)
    tidy(model, opset=17)
    onnx.checker.check_model(model, full_check=True)
    save(model, folder / "quantized.onnx")
    session = open_session(folder / "quantized.onnx")
    return session.run(None, {"input_ids": ids})[0], model


def test_two_codes_a_byte_by_hand() -> None:
    table = np.array([[-8, 1, 2, 3, 7, -1, 0, 4], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=np.float32) * 0.25
    packed, scale = pack_rows(table)
    assert scale.shape == (2, 1, 1)
    assert scale[0, 0, 0] == 0.25
    halves = [[0, 15], [9, 7], [10, 8], [11, 12]]  # columns j and j + 4, plus 8
    assert packed.tolist() == [[16 * upper + lower for upper, lower in halves], [0x88] * 4]
    np.testing.assert_array_equal(unpacked(packed, scale), table)


@pytest.mark.parametrize(("size", "stored"), [(1.0, np.float16), (1e-5, np.float32), (1e8, np.float32)])
def test_row_scales_are_half_precision_only_where_that_is_harmless(size: float, stored: type) -> None:
    table = (np.random.default_rng(0).normal(size=(50, 16)) * size).astype(np.float32)
    table[3] = 0
    table[4] *= 0.1
    if stored is np.float32 and size > 1:
        table[3] = table[2]
    codes, scale = quantize_rows(table)
    assert scale.dtype == stored
    assert codes.dtype == np.int8
    error = np.abs(codes * scale.astype(np.float32) - table)
    assert (error <= 0.5001 * scale.astype(np.float32)).all()


@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS[:1]], ids=["batch", "vector", "one row"])
def test_a_lookup_is_exactly_what_the_codes_stand_for(ids: np.ndarray, tmp_path: Path) -> None:
    table = random_table()
    codes, scale = quantize_rows(table)
    found, model = looked_up(table, 8, tmp_path, ids=ids)
    np.testing.assert_array_equal(found, (codes.astype(np.float32) * scale.astype(np.float32))[ids])
    assert histogram(model) == {"Cast": 2, "Gather": 2, "Mul": 1}
    found, model = looked_up(table, 4, tmp_path, ids=ids)
    np.testing.assert_array_equal(found, unpacked(*pack_rows(table))[ids])
    assert {node.domain for node in model.graph.node} == {""}
    stored = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert stored < table.nbytes / 8 + 2 * table.size / group_size(48) + 100


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), width=st.sampled_from([16, 22, 64, 78, 312]))
def test_four_bits_are_never_worse_than_the_plain_scale(seed: int, width: int) -> None:
    """The plain one: the largest entry of each group at the end of the range, as absmax quantizers have it."""
    table = random_table(20, width, seed=seed)
    packed, scale = pack_rows(table)
    assert scale.dtype == np.float16
    groups = table.reshape(20, -1, group_size(width))
    plain = np.abs(groups).max(axis=-1, keepdims=True) / 7
    expected = np.square(np.clip(np.rint(groups / plain), -8, 7) * plain - groups).sum(axis=-1)
    error = np.square(unpacked(packed, scale) - table).reshape(groups.shape).sum(axis=-1)
    assert (error <= expected * 1.01).all()  # one in a hundred for the scales' float16
    assert np.abs(unpacked(packed, scale) - table).max() < np.abs(table).max() / 4


def test_errors_of_all_forms() -> None:
    table = random_table(500, 96)
    codes, scale = quantize_rows(table)
    eight = np.linalg.norm(codes * scale.astype(np.float32) - table) / np.linalg.norm(table)
    four = np.linalg.norm(unpacked(*pack_rows(table)) - table) / np.linalg.norm(table)
    assert 0.003 < eight < 0.01
    assert 0.05 < four < 0.1


@pytest.mark.parametrize(("width", "size"), [(312, 39), (384, 32), (768, 32), (48, 24), (8, 8), (16, 16), (314, 157)])
def test_group_sizes_divide_the_width(width: int, size: int) -> None:
    assert group_size(width) == size
    assert width % size == 0


def test_scales_beyond_half_precision_are_kept_in_float32() -> None:
    for size in (1e-8, 1e8):
        table = random_table() * np.float32(size)
        packed, scale = pack_rows(table)
        assert scale.dtype == np.float32
        assert np.linalg.norm(unpacked(packed, scale) / size - table / size) < 0.1 * np.linalg.norm(table / size)


def test_other_widths_and_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"table 300 x 27: rows of an odd width .* Set embedding_bits to 8"):
        pack_rows(random_table(width=27))
    with pytest.raises(ExportError, match="words: embedding tables of 5 bits; allowed are 8 or 4"):
        looked_up(random_table(), 5, tmp_path)


@pytest.mark.parametrize("fused", [False, True], ids=["portable", "fused"])
def test_a_graph_with_only_its_tables_quantized_is_one_with_their_values(fused: bool, tmp_path: Path) -> None:
    model = tiny_model()
    if fused:
        graph, _ = fuse(fusable_graph(model, exporter="torchscript", opset=17), layers=2, heads=4, hidden=32, opset=17)
    else:
        graph = portable_graph(model, exporter="torchscript", opset=17)
    tables = {node.name for node in graph.graph.node if node.op_type == "Gather"}
    result = quantize(graph, fused=fused, excluded=set(operators(graph)) - tables, embedding_bits=4)
    save(result, tmp_path / "q.onnx")
    arrays = {(array.dtype, array.shape): array for array in map(numpy_helper.to_array, result.graph.initializer)}
    words, positions = arrays[np.dtype(np.uint8), (100, 16)], arrays[np.dtype(np.int8), (64, 32)]
    with torch.no_grad():
        found = unpacked(words, arrays[np.dtype(np.float16), (100, 1, 1)])
        model.bert.embeddings.word_embeddings.weight.copy_(torch.from_numpy(found))
        scale = arrays[np.dtype(np.float16), (64, 1)].astype(np.float32)
        model.bert.embeddings.position_embeddings.weight.copy_(torch.from_numpy(positions * scale))
    part = examples(40)
    found = predict_logits(open_session(tmp_path / "q.onnx"), part, pad_id=0)
    np.testing.assert_allclose(found, torch_outputs(model, part), atol=1e-4)
