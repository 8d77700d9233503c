"""Targets: the table, this machine's row, what a target's runtime would not load, and what a file asks of a CPU."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from tiny_student import tiny_model

from bertemd_deploy import targets
from bertemd_deploy.bench.environment import ISA_FLAGS, instruction_sets
from bertemd_deploy.bert_graph import fusable_graph, portable_graph
from bertemd_deploy.errors import ArtifactError, ExportError, RecipeError
from bertemd_deploy.fuse import fuse
from bertemd_deploy.onnx_edit import IR_VERSIONS
from bertemd_deploy.quantization.dynamic import quantize
from bertemd_deploy.targets import (
    EXACT_INT8,
    FULL,
    REDUCED,
    TARGETS,
    UNSIGNED,
    check_graph,
    check_isa,
    products_saturate,
    requirements,
    resolve,
    saturates,
)

NAMES = "portable x86-avx2 x86-avx512 x86-avx512-vnni x86-amx arm64 arm64-dotprod arm64-i8mm wasm"


def machine(root: Path, flags: str) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(f"processor : 0\nflags : {flags}\n\nprocessor : 1\nflags : {flags}\n")
    return root


def test_the_table_holds_together() -> None:
    assert set(TARGETS) == set(NAMES.split())
    for name, target in TARGETS.items():
        assert resolve(name) is target
        assert target.name == name
        assert IR_VERSIONS[target.ceiling.opset] == target.ceiling.ir_version
        assert set(target.isa) <= set(ISA_FLAGS)
        assert set(target.weights) == ({FULL, REDUCED, UNSIGNED} if target.saturates else {FULL})
        assert target.weights[0] == FULL  # the fastest wherever it is accurate
        exact = bool(set(target.isa) & set(EXACT_INT8)) or name.startswith("arm64") or name == "wasm"
        assert target.saturates is not exact
        assert target.graph == "portable" or targets.MICROSOFT in target.domains
    assert TARGETS["portable"].ceiling == (17, 8)
    assert TARGETS["arm64"].ceiling == (21, 10)
    assert [weights.can_saturate for weights in (FULL, REDUCED, UNSIGNED)] == [True, False, False]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("sse4_2 avx", "portable"),
        ("avx fma avx2", "x86-avx2"),
        ("avx avx2 avx512f avx512bw avx512vl", "x86-avx512"),
        ("avx avx2 avx_vnni", "x86-avx512-vnni"),
        ("avx avx2 avx512f avx512bw avx512vl avx512_vnni", "x86-avx512-vnni"),
        ("avx avx2 avx512bw avx512_vnni amx_int8 amx_bf16", "x86-amx"),
        ("fp asimd", "arm64"),
        ("fp asimd asimdhp asimddp", "arm64-dotprod"),
        ("fp asimd asimddp sve i8mm bf16", "arm64-i8mm"),
    ],
)
def test_auto_is_this_machines_row(flags: str, expected: str, tmp_path: Path) -> None:
    assert resolve("auto", machine(tmp_path, flags)).name == expected


@pytest.mark.parametrize(("kind", "expected"), [("arm64", "arm64"), ("x86_64", "portable")])
def test_auto_where_the_system_names_no_flags(
    kind: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: kind)
    assert instruction_sets(tmp_path) is None
    assert resolve("auto", tmp_path).name == expected


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no target 'avx3'; targets are portable, x86-avx2, .*wasm, auto\."):
        resolve("avx3")


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    model = tiny_model()
    portable = portable_graph(model, exporter="torchscript", opset=17)
    fused, _ = fuse(fusable_graph(model, exporter="torchscript", opset=17), layers=2, heads=4, hidden=32, opset=17)
    found = {"fp32": portable, "fused": fused}
    return found | {"int8": quantize(portable, fused=False), "fused-int8": quantize(fused, fused=True)}


@pytest.mark.parametrize("name", NAMES.split())
def test_the_graphs_of_every_target_run_there(name: str, graphs: dict[str, onnx.ModelProto]) -> None:
    for form, graph in graphs.items():
        if name != "portable" or "fused" not in form:
            check_graph(TARGETS[name], graph, name=form)


def test_fused_operators_are_not_portable(graphs: dict[str, onnx.ModelProto]) -> None:
    with pytest.raises(ExportError) as caught:
        check_graph(TARGETS["portable"], graphs["fused-int8"], name="model_fused_quantized.onnx")
    message = str(caught.value)
    assert message.startswith("model_fused_quantized.onnx would not run on portable: it has com.microsoft.")
    assert "com.microsoft.DynamicQuantizeMatMul" in message
    assert message.endswith("portable knows standard operators only: use the portable graph.")


def test_a_graph_too_new_for_the_target_is_refused(graphs: dict[str, onnx.ModelProto]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(graphs["fp32"])
    model.ir_version = 9
    with pytest.raises(ExportError) as caught:
        check_graph(TARGETS["portable"], model, name="m.onnx")
    assert str(caught.value) == (
        "m.onnx would not run on portable: it is of operator set 17 in file format 9, and ONNX Runtime 1.12 reads up to 17 "
        "in 8: set export.opset to 17 or less."
    )
    model.ir_version, model.opset_import[0].version = 10, 99
    model.graph.node[0].domain = "ai.onnx.ml"
    with pytest.raises(ExportError, match=r"it has ai\.onnx\.ml\.\w+, and arm64 knows .*; it is of operator set 99 in"):
        check_graph(TARGETS["arm64"], model, name="m.onnx")


def test_a_graph_that_an_old_runtime_answers_wrongly_is_refused(graphs: dict[str, onnx.ModelProto]) -> None:
    old = replace(TARGETS["wasm"], runtime="1.14")
    with pytest.raises(ExportError, match=r"it is answered rightly from ONNX Runtime 1\.\d+ on, and wasm is for 1\.14"):
        check_graph(old, graphs["fused"], name="model_fused.onnx")


def test_what_a_file_asks_for() -> None:
    held = {"int8": FULL, "fused-int8": REDUCED}
    target = TARGETS["x86-avx512-vnni"]
    assert requirements(target, weights=held) == {"target": "x86-avx512-vnni", "isa": {"int8": list(EXACT_INT8)}}
    assert requirements(target, weights=held, harmless=["int8"])["isa"] == {}
    assert requirements(target, weights={"int8": UNSIGNED})["isa"] == {}


def test_a_cpu_without_what_a_graph_needs_is_refused() -> None:
    requires = requirements(TARGETS["x86-amx"], weights={"int8": FULL})
    for flags in (["avx2", "avx512_vnni"], ["avx2", "avx_vnni"], ["asimd"], ["amx_int8", "avx2"]):
        check_isa(requires, graph="int8", found=flags)
    check_isa(requires, graph="fp32", found=["avx2"])
    check_isa(requires, graph="int8", found=["avx"])  # older than AVX2: 32-bit sums
    with pytest.raises(ArtifactError) as caught:
        check_isa(requires, graph="int8", found=["avx", "avx2", "avx512bw"])
    message = str(caught.value)
    assert message.startswith(
        "graph 'int8' needs a CPU with one of avx512_vnni, avx_vnni, amx_int8, asimd; this one has avx, avx2, avx512bw."
    )
    assert message.endswith("Load graph 'fp32' or 'fused', or export with --target portable.")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("does", [True, False])
def test_where_the_flags_are_unknown_the_runtime_is_asked(does: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "products_saturate", lambda: does)
    requires = requirements(TARGETS["wasm"], weights={"int8": FULL})
    if does:
        with pytest.raises(ArtifactError, match="the sums that ONNX Runtime makes on this one saturate"):
            check_isa(requires, graph="int8", found=None)
    else:
        check_isa(requires, graph="int8", found=None)


@pytest.mark.parametrize("requires", [None, {}, {"isa": [], "int8_exact_with_any_of": ["avx512_vnni"]}, {"isa": {}}])
def test_a_manifest_of_an_older_version_asks_for_nothing(requires: object) -> None:
    check_isa(requires, graph="int8", found=["avx2"])


@pytest.mark.parametrize("needed", ["avx512_vnni", [1], {"avx2": True}])
def test_a_damaged_entry_is_refused(needed: object) -> None:
    with pytest.raises(ArtifactError, match=r"requires\.isa of graph 'int8' should be a list of names, found"):
        check_isa({"isa": {"int8": needed}}, graph="int8", found=["avx512_vnni"])


def test_the_question_put_to_the_runtime() -> None:
    rows = [("a", TensorProto.UINT8, [1, 4]), ("b", TensorProto.INT8, [4, 8]), ("c", TensorProto.INT32, [1, 8])]
    values = [helper.make_tensor_value_info(*row) for row in rows]
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    found = onnx.load_model_from_string(base64.b64decode(targets._PROBE))
    onnx.checker.check_model(found, full_check=True)
    assert (list(found.graph.node), list(found.graph.input), list(found.graph.output)) == (
        [node],
        values[:2],
        values[2:],
    )
    flags = instruction_sets()
    assert products_saturate() is (False if flags is None else saturates(flags))
