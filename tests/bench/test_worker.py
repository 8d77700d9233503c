from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tiny_artifact import GOLD, MAX_LENGTH, write_graph

from bertemd_deploy.artifact import Artifact
from bertemd_deploy.bench.process import COMMAND, Worker, worker_environment
from bertemd_deploy.bench.worker import TorchModel, Translated
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
        assert worker.request("first", sequence=MAX_LENGTH)["first_ms"] > 0
        warm = worker.request("warm", seconds=0.05, count=5, batch=2, sequence=4)
        assert warm["calls"] >= 2
        turn = worker.request("turn", lead=True, most_seconds=None, count=7, batch=2, sequence=4)
        assert len(turn["samples_ms"]) == 7
        for texts in (False, True):
            turn = worker.request(
                "turn", lead=False, most_seconds=None, start=3, count=4, batch=3, sequence="replay", texts=texts
            )
            assert len(turn["samples_ms"]) == 4
        worker.request("evaluate", out=str(tmp_path / "logits.npy"))
        logits = np.load(tmp_path / "logits.npy")
        assert logits.shape == (12, 2)
        assert accuracy(logits, GOLD) == 1.0


def test_peak_memory_is_that_of_the_model_and_not_of_a_large_parent(artifact_folder):
    large = np.ones(600 * 2**20, dtype=np.uint8)
    with Worker("student fp32", threads=1) as worker:
        start = opened(worker, artifact_folder)
        peak = worker.request("memory", batches=[1, 8])["peak_rss_bytes"]
    assert start["rss_after_import_bytes"] <= peak < large.nbytes


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
