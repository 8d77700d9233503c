"""The export benchmark: the floor is what it says, engines take turns, failures are recorded, tables state the record."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import export_peers  # noqa: E402 - found through the line above
import peer_engines  # noqa: E402
import peer_models  # noqa: E402
import peer_tables  # noqa: E402

from bertemd_deploy.bert_graph import BertGraph, load_model  # noqa: E402
from bertemd_deploy.errors import ArtifactError, MeasurementError  # noqa: E402

SIZES = export_peers.SMOKE
CONFIG = SIZES | {"max_position_embeddings": 512}
TESTED = ("onnxruntime optimized dynamic", "onnxruntime static products", "pytorch eager", "optimum O3")


def in_process(name: str, *, python: str, threads: int):
    worker = peer_engines.Worker()

    def ask(command: str, **arguments: Any) -> Any:
        try:
            return json.loads(json.dumps(worker.ask(command, **arguments)))
        except Exception as error:
            raise MeasurementError(f"bench, {name}: {type(error).__name__}: {error}") from error

    return contextlib.nullcontext(ask)


def options(*arguments: str):
    grid = ("--threads", "1", "--sequences", "8", "--batches", "1", "2", "--rounds", "2", "--seconds", "0.001")
    return export_peers.parse(["--smoke", *grid, *arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def record(work: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_peers, "WARM_UP_SECONDS", 0.01)
        return export_peers.measure(options("--peers", *TESTED), work=work, start=in_process)


# The floor


def test_the_floor_holds_the_arithmetic_of_our_graph_but_for_the_head(record: dict[str, Any], work: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = load_model(work / "student-smoke")
    products = peer_models.floor_products(CONFIG)
    weights = sum(math.prod(product.right) for product in products if isinstance(product.right[0], int))
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert weights == sum(layer.weight.numel() for layer in linear) - model.classifier.weight.numel()
    batch, sequence = 2, 5
    sizes = peer_models.floor_sizes(batch=batch, sequence=sequence, heads=CONFIG["num_attention_heads"])
    operations = 0
    for product in products:
        left, columns = [sizes.get(size, size) for size in product.left], product.right[-1]
        operations += 2 * math.prod(left) * sizes.get(columns, columns)
    inputs = peer_models.cell_inputs(batch=batch, sequence=sequence, vocabulary=CONFIG["vocab_size"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        BertGraph(model, portable=True)(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    head = 2 * batch * model.classifier.weight.numel()
    assert operations == counter.get_total_flops() - head


def test_the_floor_computes_its_products_and_nothing_else(tmp_path: Path) -> None:
    graph = peer_models.floor_graph(CONFIG)
    assert {node.op_type for node in graph.graph.node} == {"MatMulInteger"}
    path = tmp_path / "floor.onnx"
    onnx.save_model(graph, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    sizes = peer_models.floor_sizes(batch=2, sequence=5, heads=CONFIG["num_attention_heads"])
    assert sizes == {"batch": 2, "sequence": 5, "tokens": 10, "maps": 4}
    random = np.random.default_rng(3)
    feed = {
        node.name: random.integers(0, 100, size=[sizes.get(size, size) for size in node.shape]).astype(
            np.uint8 if node.type == "tensor(uint8)" else np.int8
        )
        for node in session.get_inputs()
    }
    found = session.run(None, feed)
    values = feed | {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    for node, result in zip(graph.graph.node, found, strict=True):
        left, right = (values[name].astype(np.int32) for name in node.input)
        np.testing.assert_array_equal(result, left @ right)
    prepare = peer_engines.open_floor(path, threads=1, options={"heads": CONFIG["num_attention_heads"]})
    inputs = peer_models.cell_inputs(batch=2, sequence=5, vocabulary=50)
    assert prepare(inputs)() is None


# What is built


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    path, made = tmp_path / "model.onnx", []

    def broken(partial: Path) -> None:
        partial.write_text("half")
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        peer_models.once(path, broken)
    assert not path.exists()
    for text in ("first", "second"):
        peer_models.once(path, lambda partial, text=text: made.append(partial.write_text(text)))
    assert path.read_text() == "first"
    assert len(made) == 1


def test_inputs_are_ordinary_tokens_and_the_same_in_every_process() -> None:
    first, second = (peer_models.cell_inputs(batch=3, sequence=7, vocabulary=20) for _ in range(2))
    for name, value in first.items():
        assert value.shape == (3, 7)
        assert value.dtype == np.int64
        np.testing.assert_array_equal(value, second[name])
    assert first["input_ids"].min() >= peer_models.FIRST_TOKEN
    rows = peer_models.calibration_inputs({"vocab_size": 20, "max_position_embeddings": 16})
    assert len(rows) == peer_models.CALIBRATION_ROWS
    lengths = [int(row["attention_mask"].sum()) for row in rows]
    assert {row["input_ids"].shape for row in rows} == {(1, 16)}
    assert min(lengths) >= 4
    assert len(set(lengths)) > 4
    for row in rows:
        assert (row["input_ids"][row["attention_mask"] == 0] == 0).all()
        assert row["input_ids"].max() < 20


def test_compilation_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert peer_models.build_pytorch({}, tmp_path, tmp_path) == tmp_path
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, and no-such-compiler is not installed"):
        peer_models.build_pytorch({"compile": True}, tmp_path, tmp_path)


def test_every_peer_has_a_builder_an_opener_and_known_versions() -> None:
    assert set(peer_models.PEERS) == set(peer_models.BUILDERS) <= set(peer_models.PACKAGES)
    assert set(peer_engines.OPENERS) == {*peer_models.PEERS, "ours", "floor"}
    assert {peer.precision for names in peer_models.PEERS.values() for peer in names.values()} == {
        "fp32",
        "bf16",
        "int8",
    }


def test_the_processes_import_nothing_that_other_environments_lack() -> None:
    heavy = "torch", "transformers", "onnx", "onnxruntime", "tokenizers", "psutil", "yaml", "typer", "rich"
    code = f"import sys, peer_engines; print([name for name in {heavy} if name in sys.modules])"
    folder = ROOT / "benchmarks"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The measurement


def test_the_record_holds_raw_samples_of_every_engine_in_every_cell(record: dict[str, Any]) -> None:
    json.dumps(record, allow_nan=False)
    engines = {"ours int8", "ours fused-int8", "floor", *TESTED[:3]}
    assert set(record["engines"]) == engines
    assert record["ours"] in engines
    assert [(cell["threads"], cell["batch"], cell["sequence"]) for cell in record["cells"]] == [(1, 1, 8), (1, 2, 8)]
    for cell in record["cells"]:
        assert set(cell["samples_ms"]) == engines
        assert all(len(rounds) == 2 and all(rounds) for rounds in cell["samples_ms"].values())
        assert set(cell["difference"]) == engines - {"floor"}
        assert cell["difference"]["pytorch eager"] < 1e-6
        assert 0 < cell["difference"]["onnxruntime optimized dynamic"] < 1
    assert [cell["sequence"] for cell in record["summary"]] == [8, 8]
    assert record["versions"]["onnxruntime"]["onnxruntime"] == onnxruntime.__version__
    assert record["engines"]["floor"]["bytes"] > 0
    assert str(ROOT) not in json.dumps(record["engines"])


def test_a_peer_without_an_environment_is_not_dropped_silently(record: dict[str, Any]) -> None:
    assert record["not_measured"] == {"optimum O3": "no --env optimum=PYTHON was given"}
    assert "- optimum O3: no --env optimum=PYTHON was given" in peer_tables.table(record)


def test_a_peer_that_fails_is_recorded_and_the_others_go_on(record: dict[str, Any], work: Path) -> None:
    def start(name: str, *, python: str, threads: int):
        inner = in_process(name, python=python, threads=threads).enter_result

        def ask(command: str, **arguments: Any) -> Any:
            if failing.get(name) == command:
                raise MeasurementError(f"bench, {name}: OSError: no {command} in {work}/x\nand a second line")
            return inner(command, **arguments)

        return contextlib.nullcontext(ask)

    engines = [
        export_peers.Engine(
            family, name, "fp32", "", sys.executable, str(work / "student-smoke"), 1, {"dtype": "float32"}
        )
        for family, name in (("pytorch", "a"), ("pytorch", "b"), ("pytorch", "c"), ("pytorch", "d"))
    ]
    inputs = peer_models.cell_inputs(batch=1, sequence=8, vocabulary=SIZES["vocab_size"])
    opened = peer_engines.open_pytorch(work / "student-smoke", threads=1, options={"dtype": "float32"})
    given = {
        "threads": 1,
        "reference": {(1, 8): opened(inputs)()},
        "vocabulary": SIZES["vocab_size"],
        "options": options(),
        "work": work,
        "start": start,
    }
    failing = {"pytorch a": "open", "pytorch b": "shape", "pytorch c": "turn"}
    (cell,) = export_peers.time_cells(engines, **given)
    assert set(cell["samples_ms"]) == {"pytorch d"}
    assert cell["not_measured"] == {label: f"OSError: no {command} in WORK/x" for label, command in failing.items()}
    failing = {"ours a": "turn"}
    ours = export_peers.Engine("ours", "a", "int8", "", sys.executable, "x", 1, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peer_engines.OPENERS, "ours", lambda path, **_: opened)
        with pytest.raises(MeasurementError, match="no turn"):
            export_peers.time_cells([ours], **given)


def test_peers_that_cannot_be_built_are_recorded(monkeypatch: pytest.MonkeyPatch, record, work: Path) -> None:
    def broken(options: Any, source: Path, folder: Path) -> Path:
        raise OSError(f"nothing in {folder.parent}")

    monkeypatch.setitem(peer_models.BUILDERS, "pytorch", broken)
    chosen = options("--peers", "pytorch eager", "onnxruntime plain")
    engines, missing, found = export_peers.build(chosen, source=work / "student-smoke", work=work, start=in_process)
    assert [engine.label for engine in engines] == ["onnxruntime plain"]
    assert missing == {"pytorch eager": "OSError: nothing in WORK"}
    assert set(found) == {"onnxruntime", "pytorch"}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_logits_are_compared(precision: str) -> None:
    expected = np.array([[1.0, 2.0]])
    given = {"precision": precision, "label": "x y"}
    assert export_peers.difference(expected + 0.005, expected, **given) == pytest.approx(0.005)
    if precision == "fp32":
        with pytest.raises(
            MeasurementError, match=r"x y: its logits differ from PyTorch's by 5\.0e-01 \(allowed 1e-02\)"
        ):
            export_peers.difference(expected + 0.5, expected, **given)
    else:
        assert export_peers.difference(expected + 0.5, expected, **given) == 0.5
    for wrong in (expected[:, :1], expected * np.nan):
        with pytest.raises(MeasurementError, match=r"are not finite values of \(1, 2\)"):
            export_peers.difference(wrong, expected, **given)


def test_turns_fit_their_time() -> None:
    assert export_peers.turn_of(0.5, seconds=0.15) == {"count": 24, "lead": 10, "most_seconds": 0.6}
    assert export_peers.turn_of(20, seconds=0.15)["count"] == 7
    assert export_peers.turn_of(20, seconds=0.15)["lead"] == 1
    slow = export_peers.turn_of(900, seconds=0.15)
    assert (slow["count"], slow["lead"]) == (1, 0)


def test_each_round_begins_elsewhere() -> None:
    labels = list("abcdef")
    orders = [export_peers.rotated(labels, number, rounds=3) for number in range(3)]
    assert [order[0] for order in orders] == ["a", "c", "e"]
    assert all(sorted(order) == labels for order in orders)


def test_an_artifact_of_other_sizes_is_refused(record: dict[str, Any], work: Path, tiny_artifact) -> None:
    def never(command: str, **_: Any) -> Any:
        raise AssertionError(command)

    config = peer_models.config_of(work / "student-smoke")
    given = {"config": config, "source": work, "out": work, "ask": never}
    ours = options("--artifact", str(work / "ours-smoke"))
    assert export_peers._artifact(ours, **given).folder == work / "ours-smoke"
    other = tiny_artifact()  # of another vocabulary, for 64 tokens
    with pytest.raises(
        ArtifactError, match=r"a student for classification of sizes .* Name the --student it was made as"
    ):
        export_peers._artifact(options("--artifact", str(other)), **given)
    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(ArtifactError, match=r"takes up to 64 tokens\. Give shorter --sequences"):
        export_peers._artifact(
            options("--artifact", str(other), "--sequences", "65"), **(given | {"config": config | sizes})
        )


def test_an_artifact_may_have_another_vocabulary_and_other_weights(
    tiny_artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_artifact()
    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(export_peers, "SMOKE", sizes | {"vocab_size": 99})
    monkeypatch.setattr(export_peers, "WARM_UP_SECONDS", 0.01)
    record = export_peers.measure(
        options("--peers", "--artifact", str(other), "--rounds", "1"), work=tmp_path, start=in_process
    )
    assert record["weights"].endswith("ours: those of the artifact")
    assert record["ours"] == "ours fused"  # this artifact holds no int8 graph, and "auto" picks its fastest
    assert set(record["engines"]) == {"ours fused", "floor"}
    assert record["cells"][0]["difference"] == {}


def test_a_process_is_suspended_between_answers() -> None:
    before = set(psutil.Process().children())
    with export_peers.process("some engine", python=sys.executable, threads=1) as ask:
        found = ask("versions", family="ours")
        assert found["onnxruntime"] == onnxruntime.__version__
        (child,) = set(psutil.Process().children()) - before
        assert child.status() == psutil.STATUS_STOPPED
        with pytest.raises(MeasurementError, match=r"some engine: AttributeError: .*no_such_command"):
            ask("no_such_command")
        assert ask("versions", family="ours") == found
    assert not child.is_running()


# The command line


def test_peers_are_chosen_by_family_or_by_engine() -> None:
    chosen = options("--peers", "pytorch compile", "optimum").peers
    assert chosen == [*(("optimum", name) for name in peer_models.PEERS["optimum"]), ("pytorch", "compile")]
    assert len(options().peers) == sum(map(len, peer_models.PEERS.values()))
    assert options("--peers").peers == []
    given = options("--env", f"openvino={sys.executable}").env
    assert given == dict.fromkeys(("onnxruntime", "pytorch", "openvino"), sys.executable)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "tensorrt"), "--peers: unknown tensorrt; known are optimum"),
        (("--env", "openvino=/no/such/python"), "give PEER=PYTHON"),
        (("--rounds", "0"), "all numbers are above 0"),
        (("--sequences", "513"), "the student has positions for 512 tokens"),
        (("--env", f"tensorrt={sys.executable}"), "a peer of optimum, onnxruntime, openvino, pytorch"),
    ],
)
def test_a_wrong_command_line_is_explained(arguments: tuple[str, ...], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        options(*arguments)
    assert message in capsys.readouterr().err


def test_a_record_is_rendered_without_measuring(record, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    monkeypatch.setattr(export_peers, "measure", None)
    monkeypatch.setattr(sys, "argv", ["export_peers.py", "--table", str(path)])
    export_peers.main()
    assert capsys.readouterr().out == peer_tables.table(record) + "\n"


# What a record states


def cell(sequence: int = 32, batch: int = 1, **samples: list[list[float]]) -> dict[str, Any]:
    named = {label.replace("_", " "): rounds for label, rounds in samples.items()}
    return {"threads": 1, "batch": batch, "sequence": sequence, "samples_ms": named}


def test_p50_the_best_peer_and_paired_ratios() -> None:
    found = peer_tables.summarise(
        cell(
            ours_int8=[[1, 1], [2, 2], [3, 3]],
            a_fp32=[[2, 2], [4, 4], [6, 6]],
            b_int8=[[9, 9], [9], [9]],
            floor=[[1]] * 3,
        ),
        ours="ours int8",
    )
    assert found["p50_ms"] == {"ours int8": 2, "a fp32": 4, "b int8": 9, "floor": 1}
    assert found["best_peer"] == "a fp32"
    assert found["ours_over"]["a fp32"] == [0.5, 0.5, 0.5]
    assert found["ours_over"]["floor"] == [2, 1, 3]
    assert set(found["ours_over"]) == {"a fp32", "b int8", "floor"}


def test_bars_are_judged_where_they_hold() -> None:
    cells = [
        cell(32, ours_x=[[6.0]], p_y=[[10.0]], floor=[[5.0]]),
        cell(128, ours_x=[[7.0]], p_y=[[10.0]], floor=[[4.0]]),
        cell(128, 8, ours_x=[[8.0]], p_y=[[10.0]], floor=[[6.0]]),
        cell(512, ours_x=[[9.5]], p_y=[[10.0]], floor=[[8.0]]),
    ]
    matched, anywhere, floor = peer_tables.verdicts([peer_tables.summarise(one, ours="ours x") for one in cells])
    assert matched[1:] == (0.65, 2, ["0.70 at 1 threads, batch 1, 128 tokens"])
    assert anywhere[1:] == (0.9, 4, ["0.95 at 1 threads, batch 1, 512 tokens"])
    assert floor[1:] == (1.5, 4, ["1.75 at 1 threads, batch 1, 128 tokens"])


def test_without_peers_the_bars_are_open(record: dict[str, Any]) -> None:
    alone = cell(8, ours_x=[[1.0]], floor=[[1.0]])
    summary = peer_tables.summarise(alone, ours="ours x")
    assert summary["best_peer"] is None
    extra = {"difference": {}, "not_measured": {"p y": "it broke"}, "disturbed": True}
    text = peer_tables.table(
        record | {"ours": "ours x", "summary": [summary], "cells": [alone | extra], "not_measured": {}}
    )
    assert "| 8 | 1.00 |  | none measured |  | 1.00 | 1.00x (1.00 to 1.00) |" in text
    assert "| ours / best peer, anywhere | 0.9x | not measured |" in text
    assert "| ours / floor, anywhere | 1.5x | yes, 1 cells |" in text
    assert "| pytorch eager | not measured |" in text
    assert "- p y: it broke (batch 1, 8 tokens)" in text
    assert "Other programs took CPU time in 1 of 1 cells: measure again." in text


def test_the_table_states_every_engine(record: dict[str, Any]) -> None:
    text = peer_tables.table(record)
    assert "SMOKE TEST" in text
    assert "Threads: 1, batch: 2" in text
    for label, engine in record["engines"].items():
        assert f"| {label} | {engine['precision']} | {engine['how']} |" in text
