from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny_artifact import (
    MAX_LENGTH,
    TEXTS,
    lookup_tables,
    write_artifact,
    write_graph_teacher,
    write_lookup,
    write_other_artifact,
    write_tokenizer,
)

from bertemd_deploy.artifact import GRAPH_PRECISION, GRAPHS, Artifact
from bertemd_deploy.bench import compare, passes
from bertemd_deploy.bench.candidates import Candidate
from bertemd_deploy.bench.compare import artifact_excerpt, bench
from bertemd_deploy.errors import ArtifactError, MeasurementError
from bertemd_deploy.report import report
from bertemd_deploy.settings import BenchSettings

SMALL = BenchSettings(
    sequence_lengths=(4, "max", 64),
    batch_sizes=(1, 2),
    threads=(1,),
    rounds=2,
    seconds_per_cell=0.004,
    graphs=("fp32", "int8"),
)


@pytest.fixture(autouse=True)
def one_cold_start(monkeypatch):
    monkeypatch.setattr(passes, "COLD_STARTS", 1)


@pytest.fixture
def quiet_machine(monkeypatch):
    monkeypatch.setattr(passes.OtherWork, "cpus_busy", lambda self: 0.0)


def numbers(value):
    """Yield every number at any depth."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


@pytest.mark.usefixtures("no_torch", "quiet_machine")
def test_record_of_teacher_and_student(artifact_folder, graph_teacher, tmp_path):
    out = tmp_path / "report"
    record = bench(artifact_folder, teacher=graph_teacher, out=out, settings=SMALL)

    assert json.loads((out / "record.json").read_text()) == json.loads(json.dumps(record))
    assert all(map(math.isfinite, numbers(record)))
    assert record["schema_version"] == 1
    assert record["device"]["kind"] == "measured"
    assert record["started"].endswith("+00:00")
    assert record["notes"] == ["sequence lengths [64] left out: the artifact's longest input is 12 tokens"]
    assert record["baseline"] == "teacher onnxruntime fp32"
    assert record["distillation"] == {"flow": [[1.0]]}
    assert record["artifact"]["files"]["onnx/model.onnx"] == (artifact_folder / "onnx/model.onnx").stat().st_size

    assert [entry["name"] for entry in record["models"]] == [
        "teacher onnxruntime fp32",
        "student onnxruntime fp32",
        "student onnxruntime int8",
    ]
    # Equal weights with the outputs in another order: equal decisions only if the labels were matched by name.
    assert [entry["agreement_with_teacher"] for entry in record["models"]] == [None, 1.0, 1.0]
    assert all(entry["metrics"] == {"accuracy": 1.0, "f1": 1.0} for entry in record["models"])

    churn = record["churn"]
    assert churn["models"] == dict(
        zip(("teacher", "student", "int8"), (one["name"] for one in record["models"]), strict=True)
    )
    assert [(step["changed"], step["right_to_right"], step["mcnemar_p"]) for step in churn["steps"]] == [
        (0, 12, 1.0)
    ] * 3
    lines = [json.loads(line) for line in (out / churn["file"]).read_text().splitlines()]
    assert [line["text"] for line in lines] == list(TEXTS)
    assert lines[1]["decisions"] == dict.fromkeys(("teacher", "student", "int8"), "negative")

    cells = {(part["batch"], part["sequence"], part["threads"]) for part in record["measurements"]}
    assert cells == {(batch, sequence, 1) for batch in (1, 2) for sequence in (4, MAX_LENGTH, "replay")}
    assert len(record["measurements"]) == 3 * len(cells)
    for part in record["measurements"]:
        latency = part["latency_ms"]
        assert latency["min"] <= latency["p50"] <= latency["p95"] <= latency["max"]
        assert part["n"] == latency["n"] == len(latency["samples"]) == sum(latency["samples_per_round"])
        assert len(latency["samples_per_round"]) == SMALL.rounds
        assert part["throughput_per_s"] == pytest.approx(1000 * part["batch"] / latency["mean"])
        assert part["metric"] == 1.0
        assert part["peak_rss_bytes"] > 2**20
        assert (part["end_to_end_ms"] is not None) == (part["sequence"] == "replay")
        assert (part["speedup_vs_teacher"] is None) == (part["model"] == "teacher")
        if part["model"] == "student":
            low, high = part["speedup_vs_teacher"]["ci95"]
            assert low <= high
            assert part["speedup_vs_teacher"]["claimed"] is (low > 1)


@pytest.mark.parametrize(
    ("kind", "metrics", "examples"),
    [
        ("token-classification", {"entity_f1": 1.0}, 12),
        ("question-answering", {"f1_squad": 1.0, "exact_match": 1.0}, 4),
    ],
)
@pytest.mark.usefixtures("no_torch", "quiet_machine")
def test_kinds_that_decide_on_tokens(tmp_path, kind, metrics, examples):
    """From bench to the report's page; the teacher's graph has its tags in another order."""
    folder = write_other_artifact(tmp_path / "artifact", kind)
    teacher = write_graph_teacher(tmp_path / "teacher", id2label={"0": "B-loc", "1": "O", "2": "B-per"})
    tables = lookup_tables(kind)
    if "logits" in tables:
        tables = {"logits": tables["logits"][:, [2, 0, 1]]}
    write_lookup(teacher / "onnx/model.onnx", tables)
    settings = BenchSettings(
        sequence_lengths=(4,), batch_sizes=(2,), threads=(1,), rounds=2, seconds_per_cell=0.004, graphs=("fp32",)
    )
    record = bench(folder, teacher=teacher, out=tmp_path / "bench", settings=settings)
    assert [entry["metrics"] for entry in record["models"]] == [metrics] * 2
    assert [entry["agreement_with_teacher"] for entry in record["models"]] == [None, 1.0]
    assert [entry["evaluated_examples"] for entry in record["models"]] == [examples] * 2
    assert record["churn"]["right"] == {"teacher": examples, "student": examples}
    assert len((tmp_path / "bench/churn.jsonl").read_text().splitlines()) == examples
    whole = [part["end_to_end_ms"] for part in record["measurements"]]
    assert [part is None for part in whole] == [part["sequence"] != "replay" for part in record["measurements"]]
    page = report([tmp_path / "bench/record.json"], out=tmp_path / "report")
    text = page.read_text() + (tmp_path / "report/report.md").read_text()
    assert next(iter(metrics)) in text
    assert "accuracy" not in text


@pytest.mark.usefixtures("quiet_machine")
def test_student_alone_has_no_speedup(artifact_folder, tmp_path):
    settings = BenchSettings(
        sequence_lengths=(4,),
        batch_sizes=(1,),
        threads=(1,),
        rounds=2,
        seconds_per_cell=0.004,
        replay=False,
        graphs=("int8",),
    )
    out = tmp_path / "report"
    out.mkdir()
    (out / "record.json").write_text("{}")
    (out / "churn.jsonl").write_text("of an earlier run")
    record = bench(artifact_folder, teacher=None, out=out, settings=settings)
    assert record["baseline"] is None
    assert record["churn"] is None
    assert not (out / "churn.jsonl").exists()
    assert [entry["agreement_with_teacher"] for entry in record["models"]] == [None]
    (part,) = record["measurements"]
    assert part["speedup_vs_teacher"] is None
    assert (part["graph"], part["precision"]) == ("int8", "int8")


@pytest.mark.usefixtures("no_torch")
def test_nothing_is_claimed_on_a_busy_machine(artifact_folder, graph_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(passes.OtherWork, "cpus_busy", lambda self: float(self.cpus))
    monkeypatch.setattr(compare, "speedup", lambda *_, **__: {"p50": 4.0, "ci95": [3.0, 5.0], "claimed": True})
    settings = BenchSettings(
        sequence_lengths=(4,), batch_sizes=(1,), threads=(1,), rounds=2, seconds_per_cell=0.004, replay=False
    )
    record = bench(artifact_folder, teacher=graph_teacher, out=tmp_path / "report", settings=settings)
    gains = [part["speedup_vs_teacher"] for part in record["measurements"] if part["model"] == "student"]
    assert gains == [{"p50": 4.0, "ci95": [3.0, 5.0], "claimed": False}] * 2
    assert record["notes"][-1].startswith("other programs took CPU time in 1 of 1 cells; no speed-up is claimed there")
    assert "other programs took CPU time" in capsys.readouterr().err


def test_outputs_that_are_not_finite_are_an_error(tmp_path):
    folder = write_artifact(tmp_path / "artifact", bias=(math.nan, 0.0))
    with pytest.raises(
        MeasurementError, match=r"student onnxruntime fp32: its outputs .*12 of 12 outputs are not finite"
    ):
        bench(folder, teacher=None, out=tmp_path / "report", settings=SMALL)
    assert not (tmp_path / "report/record.json").exists()


def test_a_folder_of_something_else_is_left_alone(artifact_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds something else \(thesis\.tex\)"):
        bench(artifact_folder, teacher=None, out=tmp_path / "out", settings=SMALL)


def test_a_changed_file_is_refused_before_anything_is_measured(artifact_folder, tmp_path):
    write_tokenizer(artifact_folder, words=("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: its SHA-256 is"):
        bench(artifact_folder, teacher=None, out=tmp_path / "report", settings=SMALL)


def test_an_exported_teacher_that_is_another_function_is_refused():
    logits = np.zeros((4, 2), dtype=np.float32)
    compare._check_teacher_graph(logits, logits + 0.009)
    for other in (logits + 0.02, logits * math.nan):
        with pytest.raises(MeasurementError, match="the teacher's ONNX graph differs from PyTorch by"):
            compare._check_teacher_graph(logits, other)


@pytest.mark.parametrize(
    ("teacher", "graphs", "chosen"),
    [
        (True, GRAPHS, ["teacher", "fused", "fused-int8"]),
        (False, ("fp32", "int8"), ["fp32", "int8"]),
        (True, ("fp32", "int8", "fused"), ["teacher", "fp32", "int8"]),
        (True, ("fp32", "fused-int8"), ["teacher", "fp32", "fused-int8"]),
        (True, ("fused-int8",), ["teacher", "fused-int8"]),
        (True, ("fp32", "fused"), ["teacher", "fused"]),
        (False, ("int8",), ["int8"]),
    ],
)
def test_the_int8_graph_is_compared_with_the_one_it_came_from(teacher, graphs, chosen):
    def candidate(model, graph):
        return Candidate(model, "onnxruntime", graph, GRAPH_PRECISION[graph], Path(), 1, None, None, None, (0,))

    candidates = [candidate("teacher", "fp32")] * teacher + [candidate("student", graph) for graph in graphs]
    found = compare._steps(candidates)
    named = ["teacher" if candidates[at].model == "teacher" else candidates[at].graph for at in found.values()]
    assert named == chosen


def test_excerpt_counts_long_lists_and_keeps_the_rest(artifact):
    excerpt = artifact_excerpt(artifact)
    assert excerpt["quantization"] == {"mode": "dynamic", "excluded": {"count": 20}, "trials": [{"drop": 0.0}]}
    assert excerpt["labels"] == ["negative", "positive"]
    assert excerpt["student"]["layers"] == 1
    assert excerpt["teacher"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_machine")
def test_pytorch_teacher_is_the_baseline_of_its_own_graph_and_of_the_student(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        id2label={0: "positive", 1: "negative"},
        label2id={"positive": 0, "negative": 1},
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "teacher")
    write_tokenizer(tmp_path / "teacher")
    folder = write_artifact(tmp_path / "artifact")
    settings = BenchSettings(
        sequence_lengths=(4,), batch_sizes=(2,), threads=(1,), rounds=2, seconds_per_cell=0.02, graphs=("fp32",)
    )
    record = bench(folder, teacher=tmp_path / "teacher", out=tmp_path / "report", settings=settings)

    assert record["baseline"] == "teacher pytorch fp32"
    pytorch, graph, student = record["models"]
    assert (pytorch["graph"], pytorch["layers"], graph["graph"], student["layers"]) == (None, 2, "fp32", 1)
    assert pytorch["parameters"] == graph["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert pytorch["model_bytes"] == (tmp_path / "teacher/model.safetensors").stat().st_size
    assert pytorch["metrics"] == graph["metrics"]
    assert graph["agreement_with_teacher"] == 1.0

    examples = Artifact.load(folder).evaluation().examples
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(array) for name, array in examples.batch(range(12), pad_id=0).items()}
        decided = 1 - model.eval()(**inputs).logits.argmax(dim=-1).numpy()  # its label 0 is our label 1
    assert pytorch["metrics"]["accuracy"] == float((decided == Artifact.load(folder).evaluation().labels).mean())
    gains = [part["speedup_vs_teacher"] for part in record["measurements"]]
    assert [gain is None for gain in gains] == [True, False, False] * 2
