"""The Triton bundle: its config is read, its model served by a stand-in, and its client's answers are the classifier's."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from handoff_artifacts import AWKWARD, KINDS, LABELS, MAX_LENGTH, assert_same, question, said, write_artifact
from triton_config import read_config
from triton_stand_in import serving

from bertemd_deploy.handoff import write_bundle
from bertemd_deploy.handoff.triton import MAX_QUEUE_DELAY_US, NAME, PAD_TO_MULTIPLE_OF, PREFERRED_BATCH_SIZES
from bertemd_deploy.runtime import BATCH_SIZE

PER_TENSOR = {"activation_scales": "per-tensor", "changed_decision_share": 0.0234}


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a factory of an artifact and its bundle."""

    def build(kind: str = "classification", **options: Any) -> tuple[Path, Path]:
        artifact = write_artifact(tmp_path / "artifact", kind, **options)
        return artifact, write_bundle(artifact, kind="triton", out=tmp_path / "out")

    return build


@pytest.fixture
def predictor_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the function that makes a bundle's client, imported as its user does."""

    def make(out: Path, url: str) -> Any:
        for name in ("predictor", "client"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(out / "client")
        return importlib.import_module("client").triton_predictor(url)

    yield make
    for name in ("predictor", "client"):
        sys.modules.pop(name, None)


def config_of(out: Path) -> dict[str, Any]:
    return read_config((out / "model_repository" / NAME / "config.pbtxt").read_text())


def test_the_config(bundle) -> None:
    _, out = bundle()
    config = config_of(out)
    inputs = [
        {"name": name, "data_type": "TYPE_INT64", "dims": ["-1"]}
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert config == {
        "name": NAME,
        "backend": "onnxruntime",
        "default_model_filename": "model.onnx",
        "max_batch_size": BATCH_SIZE,
        "input": inputs,
        "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["3"], "label_filename": "labels.txt"}],
        "dynamic_batching": {
            "preferred_batch_size": list(PREFERRED_BATCH_SIZES),
            "max_queue_delay_microseconds": str(MAX_QUEUE_DELAY_US),
        },
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": {"intra_op_thread_count": "1", "inter_op_thread_count": "1"},
    }
    assert max(PREFERRED_BATCH_SIZES) <= BATCH_SIZE


def test_a_config_with_a_field_that_there_is_none_of_is_not_read(bundle) -> None:
    _, out = bundle()
    text = (out / "model_repository" / NAME / "config.pbtxt").read_text()
    with pytest.raises(text_format.ParseError, match='no field named "max_batch"'):
        read_config(text.replace("max_batch_size", "max_batch"))


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        ("classification", [("logits", ["3"])]),
        ("regression", [("logits", ["1"])]),
        ("multilabel", [("logits", ["3"])]),
        ("token-classification", [("logits", ["-1", "5"])]),
        ("question-answering", [("start_logits", ["-1"]), ("end_logits", ["-1"])]),
    ],
)
def test_outputs_of_every_kind(kind: str, outputs: Any, bundle) -> None:
    _, out = bundle(kind)
    config = config_of(out)
    assert [(output["name"], output["dims"]) for output in config["output"]] == outputs
    labels = out / "model_repository" / NAME / "labels.txt"
    assert labels.exists() == (kind in ("classification", "multilabel"))
    assert [output.get("label_filename") for output in config["output"]] == (
        ["labels.txt"] if labels.exists() else [None] * len(outputs)
    )
    assert not labels.exists() or labels.read_text().splitlines() == list(LABELS[kind])


def test_labels_that_are_no_lines_are_left_to_the_client(bundle) -> None:
    _, out = bundle(labels=AWKWARD)
    assert not (out / "model_repository" / NAME / "labels.txt").exists()
    assert "label_filename" not in config_of(out)["output"][0]
    assert json.loads((out / "client/model/model.json").read_text())["labels"] == list(AWKWARD)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_classifier_s(kind: str, bundle, predictor_at) -> None:
    artifact, out = bundle(kind, mates=False, task={"pairs": True})
    texts, pairs = question(kind, 40, pairs=True) if kind != "token-classification" else question(kind, 40)
    with serving(out / "model_repository") as (url, model):
        found = predictor_at(out, url).predict(texts, pairs)
    assert_same(found, said(artifact, texts, pairs), tolerance=1e-6)
    assert max(shape[0] for shape in model.shapes) == BATCH_SIZE
    assert {shape[1] for shape in model.shapes} <= {PAD_TO_MULTIPLE_OF, MAX_LENGTH}, "requests of like shape meet"


@pytest.mark.parametrize("measured", [{"invariance": {"int8": PER_TENSOR}}, {}])
def test_a_graph_that_its_batch_changes_is_sent_unpadded(measured: Any, bundle, predictor_at) -> None:
    artifact, out = bundle(graphs=("int8",), **measured)
    texts, _ = question("classification", 80)
    with serving(out / "model_repository") as (url, _):
        found = predictor_at(out, url).predict(texts)
    assert_same(found, said(artifact, texts, None), tolerance=1e-6)
    readme = " ".join((out / "README.md").read_text().split())
    assert "The int8 scales of activations are measured over the whole batch" in readme
    assert ("beside other rows (2.3% of them did at export)." in readme) == bool(measured)


@pytest.mark.parametrize("scales", ["fixed", "per-row"])
def test_a_graph_that_nothing_changes_is_padded(scales: str, bundle) -> None:
    _, out = bundle(graphs=("int8",), invariance={"int8": {"activation_scales": scales}})
    assert json.loads((out / "client/client.json").read_text())["pad_to_multiple_of"] == PAD_TO_MULTIPLE_OF
    assert "depends neither on padding nor on the rows" in (out / "README.md").read_text()


def test_the_client_s_command(bundle) -> None:
    artifact, out = bundle(mates=False)
    with serving(out / "model_repository") as (url, _):
        call = [sys.executable, out / "client/client.py", "--url", url + "/"]
        done = subprocess.run([*call, "the film"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert_same([json.loads(done.stdout)], said(artifact, ["the film"], None), tolerance=1e-6)
        (out / "client/client.json").write_text('{"name": "other", "pad_to_multiple_of": 1}')
        done = subprocess.run([*call, "the film"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "404, " in done.stderr
    done = subprocess.run([*call, "the film"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith(f"error: {url}")) == (1, True)
    assert "no answer" in done.stderr


def test_the_client_runs_no_graph(bundle) -> None:
    _, out = bundle()
    assert {path.name for path in (out / "client/model").iterdir()} == {"model.json", "tokenizer.json"}
    packages = {line.partition("=")[0] for line in (out / "client/requirements.txt").read_text().splitlines()[1:]}
    assert packages == {"numpy", "tokenizers"}
