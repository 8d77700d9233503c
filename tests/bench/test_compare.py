from __future__ import annotations

import dataclasses
import json
import math
import sys

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

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench import compare, passes, profiles
from bertemd_deploy.bench import record as recording
from bertemd_deploy.bench.compare import bench, usable_threads
from bertemd_deploy.bench.limits import Limits
from bertemd_deploy.devices import find_device, load_devices
from bertemd_deploy.errors import ArtifactError, MeasurementError, MemoryLimitError, NoisyError
from bertemd_deploy.report import report
from bertemd_deploy.runtime import CpuLimits
from bertemd_deploy.settings import BenchSettings

SMALL = BenchSettings(
    sequence_lengths=(4, "max", 64),
    batch_sizes=(1, 2),
    threads=(1,),
    rounds=3,
    seconds_per_cell=0.006,
    graphs=("fp32", "int8"),
    paced_interval_ms=5.0,
    paced_requests=2,
    idle_seconds=0.02,
)
BRIEF = {"rounds": 2, "seconds_per_cell": 0.004, "paced_interval_ms": 0.0, "idle_seconds": 0.0, "arena": False}


@pytest.fixture(autouse=True)
def one_cold_start(monkeypatch):
    monkeypatch.setattr(profiles, "COLD_STARTS", 1)


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
    assert set(record["noise"]) == {"noisy", "reasons"}
    assert record["conditions"]["during"]["samples"] >= 2
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
    for entry in record["models"]:
        assert entry["failed"] is None
        assert entry["memory"]["arena"]["peak_rss_bytes"] == entry["peak_rss_bytes"]
        assert entry["memory"]["no_arena"]["final_rss_bytes"] > 2**20
        assert entry["cold_start_ms"]["process"] > entry["cold_start_ms"]["first"]
        assert entry["idle"] is None  # one thread

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
        if part["n"] >= 5:  # a busy machine cuts turns short
            low, high = latency["p50_ci95"]
            assert low <= latency["p50"] <= high
        assert part["energy_joules_per_inference"] is None or part["energy_joules_per_inference"]["value"] > 0
        paced = part["batch"] == 1 and part["sequence"] in (MAX_LENGTH, "replay")
        assert (part["paced_ms"] is not None) == paced
        if paced:
            assert set(part["paced_ms"]) == {"interval_ms", "p50", "p90", "p95", "n", "samples"}
            assert (part["paced_ms"]["interval_ms"], part["paced_ms"]["n"]) == (5.0, 2)
        if part["model"] == "student":
            interval = part["speedup_vs_teacher"]["ci95"]
            assert interval is None or interval[0] <= interval[1]
            assert part["speedup_vs_teacher"]["claimed"] is (interval is not None and interval[0] > 1)


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
    settings = BenchSettings(sequence_lengths=(4,), batch_sizes=(2,), threads=(1,), **BRIEF, graphs=("fp32",))
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
        **BRIEF,
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
    monkeypatch.setattr(recording, "speedup", lambda *_, **__: {"p50": 4.0, "ci95": [3.0, 5.0], "claimed": True})
    settings = BenchSettings(sequence_lengths=(4,), batch_sizes=(1,), threads=(1,), **BRIEF, replay=False)
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
    settings = BenchSettings(sequence_lengths=(4,), batch_sizes=(2,), threads=(1,), graphs=("fp32",), **BRIEF)
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


# ---- quiet and noisy runs


@pytest.fixture
def noisy(monkeypatch):
    monkeypatch.setattr(compare, "judge_noise", lambda record: {"noisy": True, "reasons": ["a fan was lost", "rain"]})


def brief(**changes):
    return BenchSettings(sequence_lengths=(4,), batch_sizes=(1,), threads=(1,), graphs=("fp32",), **BRIEF | changes)


@pytest.mark.usefixtures("quiet_machine", "noisy")
def test_a_noisy_run_says_so(artifact_folder, tmp_path, capsys):
    record = bench(artifact_folder, teacher=None, out=tmp_path / "report", settings=brief())
    assert record["noise"] == {"noisy": True, "reasons": ["a fan was lost", "rain"]}
    assert "the measurement is noisy: a fan was lost; rain." in capsys.readouterr().err


@pytest.mark.usefixtures("quiet_machine", "noisy")
def test_a_noisy_run_is_written_and_fails_where_a_quiet_one_is_asked_for(artifact_folder, tmp_path):
    out = tmp_path / "report"
    with pytest.raises(
        NoisyError, match=r"noisy: a fan was lost; rain\. .*record\.json is written all the same"
    ) as error:
        bench(artifact_folder, teacher=None, out=out, settings=brief(strict=True))
    assert error.value.exit_code == 3
    assert json.loads((out / "record.json").read_text())["noise"]["noisy"] is True


@pytest.mark.usefixtures("quiet_machine")
def test_a_quiet_run_passes_where_one_is_asked_for(artifact_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "judge_noise", lambda record: {"noisy": False, "reasons": []})
    record = bench(artifact_folder, teacher=None, out=tmp_path / "report", settings=brief(strict=True))
    assert record["settings"]["strict"] is True


# ---- places this machine stands in for


@pytest.mark.parametrize(
    ("cpus", "session_threads", "limits", "expected"),
    [
        (CpuLimits(8, None, 4), None, None, (4, 8)),
        (CpuLimits(8, 2.5, 4), None, None, (3, 3)),
        (CpuLimits(8, None, 4), None, Limits(cpus=2), (2, 2)),
        (CpuLimits(8, None, 4), None, Limits(cpus=4, cpu_share=0.5), (1, 1)),
        (CpuLimits(8, None, 4), None, Limits(cpu_share=1.5), (2, 2)),
        (CpuLimits(8, None, 4), None, Limits(memory_bytes=2**20), (4, 8)),
        (CpuLimits(8, None, 4), 2, Limits(cpus=4), (2, 4)),
        (CpuLimits(2, None, 2), 4, None, (2, 2)),
    ],
)
def test_threads_go_by_this_process_the_device_and_the_limits(cpus, session_threads, limits, expected):
    device = None
    if session_threads is not None:
        device = find_device("raspberry-pi-5", load_devices())
        device = dataclasses.replace(device, session=dataclasses.replace(device.session, threads=session_threads))
    assert usable_threads(cpus, device=device, limits=limits) == expected


@pytest.mark.usefixtures("quiet_machine")
def test_record_of_a_device_this_machine_stands_in_for(artifact_folder, tmp_path):
    device = find_device("raspberry-pi-5", load_devices())
    limits = Limits(cpus=1, memory_bytes=4 * 2**30)
    record = bench(
        artifact_folder, teacher=None, out=tmp_path / "report", settings=brief(), device=device, limits=limits
    )
    found = record["device"]
    assert (found["kind"], found["name"], found["target"]) == ("constrained", "raspberry-pi-5", device.target)
    assert found["row"]["title"] == device.title
    assert (found["cores"], found["threads"], found["memory_bytes"]) == (1, 1, 4 * 2**30)
    assert found["limited_to"] == {"cpus": 1, "cpu_share": None, "memory_bytes": 4 * 2**30}
    assert found["confinement"]["cpus"] in ("affinity", "not limited")
    assert found["host"]["memory_bytes"] > 2**20
    (entry,) = record["models"]
    own, other = ("arena", "no_arena") if device.session.arena else ("no_arena", "arena")
    assert entry["memory"][own]["peak_rss_bytes"] == entry["peak_rss_bytes"]
    assert entry["memory"][other] is None
    assert json.loads((tmp_path / "report/record.json").read_text()) == json.loads(json.dumps(record))


def does_not_fit(name):
    return MemoryLimitError(f"bench, {name}: does not fit into 40 MiB.", limit_bytes=40 * 2**20, peak_bytes=39 * 2**20)


FAILED = {"reason": "out of memory", "limit_bytes": 40 * 2**20, "peak_bytes": 39 * 2**20}


@pytest.mark.usefixtures("no_torch", "quiet_machine")
@pytest.mark.parametrize("early", [True, False], ids=["before it is timed", "while it is timed"])
def test_a_model_that_does_not_fit_is_a_result(artifact_folder, graph_teacher, tmp_path, monkeypatch, capsys, early):
    lost = "student onnxruntime int8"
    if early:

        def profile(candidate, **fields):
            if candidate.name == lost:
                raise does_not_fit(lost)
            return profiles.profile(candidate, **fields)

        monkeypatch.setattr(compare, "profile", profile)
    else:
        time_cells = compare.time_cells
        monkeypatch.setattr(
            compare,
            "time_cells",
            lambda *found, **fields: (time_cells(*found, **fields)[0], {lost: does_not_fit(lost)}),
        )
    settings = dataclasses.replace(brief(), graphs=("fp32", "int8"))
    record = bench(artifact_folder, teacher=graph_teacher, out=tmp_path / "bench", settings=settings)
    assert [entry["failed"] for entry in record["models"]] == [None, None, FAILED]
    assert {(part["model"], part["graph"]) for part in record["measurements"]} == {
        ("teacher", "fp32"),
        ("student", "fp32"),
    }
    failed = record["models"][2]
    assert (failed["metrics"] is None, failed["cold_start_ms"] is None) == (early, early)
    assert failed["model_bytes"] > 0
    assert set(record["churn"]["models"]) == ({"teacher", "student"} if early else {"teacher", "student", "int8"})
    assert "student onnxruntime int8: does not fit into 40 MiB" in record["notes"]
    assert "does not fit into 40 MiB." in capsys.readouterr().err
    page = report([tmp_path / "bench/record.json"], out=tmp_path / "report")
    assert page.is_file()


@pytest.mark.usefixtures("no_torch", "quiet_machine")
def test_a_teacher_that_does_not_fit_leaves_the_student_without_a_speedup(
    artifact_folder, graph_teacher, tmp_path, monkeypatch
):
    def profile(candidate, **fields):
        if candidate.model == "teacher":
            raise does_not_fit(candidate.name)
        return profiles.profile(candidate, **fields)

    monkeypatch.setattr(compare, "profile", profile)
    record = bench(artifact_folder, teacher=graph_teacher, out=tmp_path / "bench", settings=brief())
    assert record["baseline"] is None
    assert [entry["failed"] for entry in record["models"]] == [FAILED, None]
    assert [entry["agreement_with_teacher"] for entry in record["models"]] == [None, None]
    assert {part["speedup_vs_teacher"] for part in record["measurements"]} == {None}
    assert report([tmp_path / "bench/record.json"], out=tmp_path / "report").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="no memory limits")
def test_a_place_too_small_for_any_model(artifact_folder, tmp_path):
    limits = Limits(memory_bytes=24 * 2**20)  # the interpreter with its packages takes more
    record = bench(artifact_folder, teacher=None, out=tmp_path / "bench", settings=brief(), limits=limits)
    (entry,) = record["models"]
    assert (entry["failed"]["reason"], entry["failed"]["limit_bytes"]) == ("out of memory", 24 * 2**20)
    assert record["measurements"] == []
    assert record["churn"] is None
    assert report([tmp_path / "bench/record.json"], out=tmp_path / "report").is_file()
