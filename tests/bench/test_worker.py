from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tiny_artifact import GOLD, write_graph

from bertemd_deploy import runtime
from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench import energy
from bertemd_deploy.bench.process import COMMAND, Worker, worker_environment
from bertemd_deploy.bench.worker import Session, TorchModel, Translated
from bertemd_deploy.errors import MeasurementError
from bertemd_deploy.metrics import accuracy


def opened(worker, folder, graph="onnx/model.onnx"):
    return worker.request(
        "open", backend="onnxruntime", path=str(folder / graph), threads=1, artifact=str(folder), seed=0
    )


def test_only_the_standard_library_is_imported_before_open():
    heavy = {"numpy", "onnxruntime", "torch", "rich", "psutil"}
    text = f"import sys, bertemd_deploy.bench.worker; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", text], env=worker_environment(1), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_what_libraries_print_stays_off_the_channel():
    text = (
        "import os, sys\nfrom bertemd_deploy.bench.worker import take_stdout\nchannel = take_stdout()\n"
        "print('noise', flush=True)\nos.write(1, b'native noise\\n')\nchannel.write('answer\\n')\nchannel.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], env=worker_environment(1), capture_output=True, text=True, check=True
    )
    assert done.stdout == "answer\n"
    assert done.stderr == "noise\nnative noise\n"


def test_worker_ends_with_its_stdin():
    done = subprocess.run(COMMAND, env=worker_environment(1), input="", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_whole_session(artifact_folder, tmp_path):
    with Worker("student fp32", threads=1) as worker:
        start = opened(worker, artifact_folder)
        assert start["import_ms"] > 0
        assert start["load_ms"] > 0
        assert start["rss_after_import_bytes"] > 2**20
        assert start["parameters"] is None
        warm = worker.request("warm", seconds=0.05, count=5, batch=2, sequence=4)
        assert warm["calls"] >= 2
        assert set(warm) == {"calls", "steady", "median_ms", "settled_after"}
        turn = worker.request("turn", lead=True, most_seconds=None, count=7, batch=2, sequence=4)
        assert len(turn["samples_ms"]) == 7
        assert turn["cpu_seconds"] > 0
        assert set(turn) == {"samples_ms", "cpu_seconds", "energy_joules"}
        for texts in (False, True):
            turn = worker.request(
                "turn", lead=False, most_seconds=None, start=3, count=4, batch=3, sequence="replay", texts=texts
            )
            assert len(turn["samples_ms"]) == 4
        paced = worker.request("paced", interval_seconds=0.01, count=3, batch=1, sequence="replay")
        assert len(paced["samples_ms"]) == 3
        assert paced["idle_cpu_seconds"] >= 0
        assert paced["idle_seconds"] > 0
        worker.request("evaluate", out=str(tmp_path / "logits.npy"))
        logits = np.load(tmp_path / "logits.npy")
        assert logits.shape == (12, 2)
        assert accuracy(logits, GOLD) == 1.0


def test_peak_memory_is_that_of_the_model_and_not_of_a_large_parent(artifact_folder):
    large = np.ones(600 * 2**20, dtype=np.uint8)
    with Worker("student fp32", threads=1) as worker:
        start = opened(worker, artifact_folder)
        found = worker.request("memory", batches=[1, 8])
    assert start["rss_after_import_bytes"] <= found["peak_rss_bytes"] < large.nbytes
    assert 2**20 < found["final_rss_bytes"] <= found["peak_rss_bytes"]
    assert found["requests"] == 13 + 2  # twelve rows and the longest once more


@pytest.mark.parametrize("kind", ["multilabel", "token-classification", "question-answering"])
def test_pytorch_models_have_the_tasks_head(tmp_path, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tiny_student import LABELS, examples, write_student

    folder = write_student(tmp_path / "teacher", kind=kind)
    manifest = {"task": {"kind": kind}, "labels": list(LABELS[kind])}
    model = TorchModel(folder, artifact=Artifact(tmp_path, manifest), threads=1)
    inputs = examples(3).batch([0, 1, 2], pad_id=0)
    head = {"token-classification": "TokenClassification", "question-answering": "QuestionAnswering"}
    plain = getattr(transformers, f"BertFor{head.get(kind, 'SequenceClassification')}").from_pretrained(folder).eval()
    with torch.inference_mode():
        output = plain(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    logits = model.run(inputs)
    parts = [logits] if kind != "question-answering" else [logits[..., 0], logits[..., 1]]
    for found, expected in zip(parts, output.values(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert model.parameters == sum(weight.numel() for weight in plain.parameters())


def test_a_damaged_graph_is_one_sentence(artifact_folder):
    (artifact_folder / "onnx/model.onnx").write_bytes(b"not a graph")
    with (
        pytest.raises(
            MeasurementError, match=r"bench, student fp32: .*model\.onnx: ONNX Runtime .* cannot load this file"
        ),
        Worker("student fp32", threads=1) as worker,
    ):
        opened(worker, artifact_folder)


def test_a_graph_that_fails_when_run_ends_the_worker_with_its_reason(artifact_folder):
    write_graph(artifact_folder / "onnx/model.onnx", table=np.zeros((3, 2)), bias=np.zeros(2))  # too few tokens
    with Worker("student fp32", threads=1) as worker:
        opened(worker, artifact_folder)
        with pytest.raises(MeasurementError) as error:
            worker.request("evaluate", out=str(artifact_folder / "logits.npy"))
    assert "ended with exit code 1 during 'evaluate'" in str(error.value)
    assert "indices element out of data bounds" in str(error.value)


def test_a_translated_model_is_given_its_own_token_ids():
    class Echo:
        parameters = 7

        def run(self, inputs):
            return inputs["input_ids"] + inputs["attention_mask"]

    model = Translated(Echo(), [5, 9, 2])
    ids, mask = np.array([[0, 2], [1, 1]]), np.array([[1, 1], [1, 0]])
    assert model.run({"input_ids": ids, "attention_mask": mask}).tolist() == [[6, 3], [10, 9]]
    assert model.parameters == 7


def test_a_cold_start_opens_and_answers_once(artifact_folder):
    model = {"backend": "onnxruntime", "path": str(artifact_folder / "onnx/model.onnx"), "threads": 1}
    with Worker("student fp32", threads=1) as worker:
        start = worker.request(
            "cold",
            artifact=str(artifact_folder),
            options={"spinning": True, "arena": False},
            input_ids=[[2, 4, 3]],
            **model,
        )
    assert {"import_ms", "load_ms", "first_ms", "rss_after_import_bytes", "parameters"} == set(start)
    assert min(start["import_ms"], start["load_ms"], start["first_ms"]) > 0


def test_options_reach_the_session(artifact_folder, monkeypatch):
    opened = []
    monkeypatch.setattr(runtime, "open_session", lambda path, **options: opened.append(options))
    fields = {"backend": "onnxruntime", "path": "graph", "threads": 2, "artifact": str(artifact_folder), "seed": 0}
    Session().open(**fields, options={"spinning": True, "arena": False})
    Session().open(**fields)
    assert opened == [
        {"threads": 2, "spinning": True, "arena": False},
        {"threads": 2, "spinning": False, "arena": True},
    ]


def test_energy_is_read_around_the_timed_calls(artifact_folder, tmp_path, monkeypatch):
    package = tmp_path / "machine/sys/class/powercap/intel-rapl:0"
    package.mkdir(parents=True)
    for name, content in {"name": "package-0", "energy_uj": 0, "max_energy_range_uj": 10**9}.items():
        (package / name).write_text(f"{content}\n")
    monkeypatch.setattr(energy, "ROOT", tmp_path / "machine")
    session = Session()
    opened = session.open(
        backend="onnxruntime",
        path=str(artifact_folder / "onnx/model.onnx"),
        threads=1,
        artifact=str(artifact_folder),
        seed=0,
    )
    assert (opened["energy_source"], opened["least_joules"]) == ("rapl:package-0", 0.0)
    used = iter(range(250_000, 10**9, 250_000))
    run = session._model.run

    def costly(inputs):
        (package / "energy_uj").write_text(f"{next(used)}\n")
        return run(inputs)

    monkeypatch.setattr(session._model, "run", costly)
    turn = session.turn(lead=True, most_seconds=None, batch=1, sequence=4, count=4)
    assert turn["energy_joules"] == pytest.approx(1.0)


def test_a_machine_without_a_counter_counts_nothing(artifact_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "ROOT", tmp_path)
    session = Session()
    fields = {"backend": "onnxruntime", "path": str(artifact_folder / "onnx/model.onnx"), "threads": 1, "seed": 0}
    opened = session.open(artifact=str(artifact_folder), **fields)
    assert (opened["energy_source"], opened["least_joules"]) == (None, None)
    assert session.turn(lead=False, most_seconds=None, batch=1, sequence=4)["energy_joules"] is None
