from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bertemd_deploy
from bertemd_deploy.classifier import Classifier, Prediction, evaluate_artifact
from bertemd_deploy.config import DataSettings
from bertemd_deploy.errors import ArtifactError, DataError, ModelError
from bertemd_deploy.files import sha256_file

onnx = pytest.importorskip("onnx")
GOOD, BAD = "good", "bad"


def write_graph(path: Path, *, vocabulary: dict[str, int], outputs: int, second: float, value: float = 1.0) -> None:
    """Write a graph: class 1 (or the value) is the count of "good", class 0 of "bad"; second segments count `second`."""
    helper, numpy_helper, kinds = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    table = np.zeros((len(vocabulary), outputs), dtype=np.float32)
    table[vocabulary[GOOD], -1] = value
    table[vocabulary[BAD], 0] = value if outputs > 1 else -value
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=kinds.FLOAT),
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=kinds.FLOAT),
        helper.make_node("Mul", ["types", "second"], ["extra"]),
        helper.make_node("Add", ["extra", "one"], ["weights"]),
        helper.make_node("Mul", ["mask", "weights"], ["real"]),
        helper.make_node("Unsqueeze", ["real", "last"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "middle"], ["logits"], keepdims=0),
    ]
    constants = {
        "table": table,
        "second": np.float32(second),
        "one": np.float32(1),
        "last": np.array([2]),
        "middle": np.array([1]),
    }
    graph = helper.make_graph(
        nodes,
        "words",
        [
            helper.make_tensor_value_info(name, kinds.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        ],
        [helper.make_tensor_value_info("logits", kinds.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


@pytest.fixture
def build(tmp_path: Path, tiny_tokenizer) -> Callable[..., Path]:
    """Return a factory of tiny artifacts that count words."""

    def artifact(
        *,
        labels: tuple[str, ...] = ("negative", "positive"),
        outputs: int | None = None,
        task: str = "sst2",
        second: float = 0.0,
        graphs: tuple[str, ...] = ("model", "model_quantized"),
        value: float = 1.0,
    ) -> Path:
        folder = tmp_path / "artifact"
        tiny_tokenizer(folder)
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        for name in graphs:
            sizes = {"outputs": outputs or len(labels) or 1, "second": second, "value": value}
            write_graph(folder / "onnx" / f"{name}.onnx", vocabulary=vocabulary, **sizes)
        kind = "classification" if labels else "regression"
        metrics = ["accuracy"] if labels else ["pearson", "spearman"]
        manifest = {
            "schema_version": 1,
            "task": {"name": task, "kind": kind, "metrics": metrics},
            "labels": list(labels),
            "max_length": 24,
        }
        write_manifest(folder, manifest)
        return folder

    return artifact


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in folder.rglob("*")
        if path.is_file() and path.name != "bertemd.json"
    }
    (folder / "bertemd.json").write_text(json.dumps({"files": files} | manifest))


def test_labels_and_probabilities(build):
    classifier = Classifier.load(build(), threads=1)
    assert (classifier.graph, classifier.labels) == ("int8", ["negative", "positive"])
    first, second = classifier.predict(["good good film", "a BAD film"])
    lead = 1 / (1 + math.exp(-2))
    assert first.label == "positive"
    assert first.score == pytest.approx(lead)
    assert first.scores == pytest.approx({"negative": 1 - lead, "positive": lead})
    assert second.label == "negative"
    assert second.score == pytest.approx(1 / (1 + math.exp(-1)))


def test_package_offers_the_classifier(build):
    assert bertemd_deploy.Classifier is Classifier
    assert bertemd_deploy.Prediction is Prediction
    with pytest.raises(AttributeError, match="has no attribute 'Klassifier'"):
        _ = bertemd_deploy.Klassifier


def test_folder_may_be_given_as_text_and_the_graph_by_name(build):
    assert Classifier.load(str(build()), graph="fp32", threads=1).graph == "fp32"


def test_predicts_where_no_training_package_is_installed(build):
    code = """
import sys
for name in ("torch", "transformers", "datasets", "onnx", "scipy", "ot", "safetensors", "matplotlib"):
    sys.modules[name] = None
from bertemd_deploy import Classifier
print(*(prediction.label for prediction in Classifier.load(sys.argv[1], threads=1).predict(["good", "bad"])))
"""
    command = [sys.executable, "-c", code, str(build())]
    root = Path(__file__).resolve().parents[1]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert answer.stdout == "positive negative\n", answer.stderr


def test_scores_of_huge_logits_are_finite(build):
    (prediction,) = Classifier.load(build(value=1e30), threads=1).predict(["good"])
    assert prediction.scores == {"negative": 0.0, "positive": 1.0}


def test_pairs(build):
    """The second text weighs ten times the first, so the answer shows which went where."""
    classifier = Classifier.load(build(second=9.0), threads=1)
    predictions = classifier.predict(["bad bad", "good good"], pairs=["good", "bad"])
    assert [prediction.label for prediction in predictions] == ["positive", "negative"]
    assert predictions[0].score == pytest.approx(1 / (1 + math.exp(-8)))


def test_regression(build):
    classifier = Classifier.load(build(labels=(), task="regression"), threads=1)
    assert classifier.predict(["good good", "bad", "film"]) == [
        Prediction(None, 2.0, {}),
        Prediction(None, -1.0, {}),
        Prediction(None, 0.0, {}),
    ]


def test_nothing_in_nothing_out(build):
    assert Classifier.load(build(), threads=1).predict([]) == []


def test_pairs_of_another_count(build):
    with pytest.raises(ValueError, match="2 texts but 1 pairs"):
        Classifier.load(build(), threads=1).predict(["a", "b"], pairs=["c"])


def test_order_is_kept_over_a_stream_of_mixed_lengths(build):
    """3,000 rows, more than one window of 1,024 and many batches: each answers for its own text."""
    random = np.random.default_rng(0)
    counts = [(int(good), int(good + filler)) for good, filler in random.integers(0, 10, (3000, 2))]
    classifier = Classifier.load(build(labels=(), task="regression"), threads=1)
    taken = 0

    def rows():
        nonlocal taken
        for good, words in counts:
            taken += 1
            yield (" ".join(["good"] * good + ["film"] * (words - good)),)

    stream = classifier.stream(rows())
    first = next(stream)
    assert taken <= 1024  # lazily: a window at a time
    assert [first.score, *(prediction.score for prediction in stream)] == [float(good) for good, _ in counts]
    assert taken == 3000


def test_outputs_that_are_not_finite(build):
    classifier = Classifier.load(build(value=float("inf")), threads=1)
    with pytest.raises(ArtifactError, match=r"graph int8: it answered with values that are not finite\. Export"):
        classifier.predict(["good", "film"])


@pytest.mark.parametrize(("labels", "found"), [(("a", "b"), r"2 labels \(a, b\)"), ((), r"0 labels \(regression\)")])
def test_outputs_that_do_not_fit_the_labels(build, labels, found):
    classifier = Classifier.load(build(labels=labels, outputs=3), threads=1)
    with pytest.raises(ArtifactError, match=rf"graph int8: it has 3 outputs, the manifest names {found}\. Export"):
        classifier.predict(["good"])


# ---- damaged artifacts


def test_damaged_graph(build):
    folder = build()
    path = folder / "onnx" / "model_quantized.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"model_quantized\.onnx: its SHA-256 is .* truncated or was changed"):
        Classifier.load(folder)


def test_damaged_tokenizer(build):
    folder = build()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: its SHA-256 is"):
        Classifier.load(folder)


def test_tokenizer_that_was_never_one(build):
    folder = build()
    manifest = json.loads((folder / "bertemd.json").read_text())
    (folder / "tokenizer.json").write_text("{}")
    del manifest["files"]
    write_manifest(folder, manifest)
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a readable tokenizer"):
        Classifier.load(folder)


def test_damaged_manifest(build):
    folder = build()
    (folder / "bertemd.json").write_text('{"schema_version": 1, "files": {"onnx/mod')
    with pytest.raises(ArtifactError, match=r"bertemd\.json: the artifact's manifest cannot be read"):
        Classifier.load(folder)


def test_manifest_whose_graph_lies_outside(build, tmp_path: Path):
    folder = build()
    outside = tmp_path / "outside.onnx"
    (folder / "onnx" / "model.onnx").rename(outside)
    (folder / "onnx" / "model.onnx").symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"the file name 'onnx/model\.onnx' points outside the folder; refused"):
        Classifier.load(folder, graph="fp32")


def test_graph_it_does_not_have(build):
    with pytest.raises(ArtifactError, match="no graph 'fused'; this artifact has: fp32, int8"):
        Classifier.load(build(), graph="fused")


# ---- evaluation


def data_folder(tmp_path: Path, header: str, *lines: str) -> str:
    folder = tmp_path / "dev-only"
    folder.mkdir()
    (folder / "dev.tsv").write_text("\n".join([header, *lines]) + "\n")
    return str(folder)


def test_evaluate_needs_the_dev_split_only(build, tmp_path: Path):
    path = data_folder(tmp_path, "sentence\tlabel", "good\tpositive", "bad\tnegative", "good\t1", "good\tnegative")
    record = evaluate_artifact(build(), settings=DataSettings(path=path), graph="fp32")
    assert record == {"metrics": {"accuracy": 0.75}, "rows": 4, "backend": "onnxruntime fp32", "task": "sst2"}


def test_evaluate_takes_the_labels_in_the_artifacts_order(build, tmp_path: Path):
    path = data_folder(tmp_path, "text\tgold", "good\tpositive", "bad\tnegative")
    settings = DataSettings(path=path, task="classification", sentence1="text", label="gold")
    record = evaluate_artifact(build(labels=("positive", "negative")), settings=settings)
    assert record["metrics"] == {"accuracy": 0.0}


def test_evaluate_regression(build, tmp_path: Path):
    path = data_folder(tmp_path, "sentence\tlabel", "good good\t5", "bad\t1", "film\t3")
    record = evaluate_artifact(build(labels=(), task="regression"), settings=DataSettings(path=path))
    assert record["metrics"]["spearman"] == pytest.approx(1.0)


def test_evaluate_data_of_another_kind(build, tmp_path: Path):
    path = data_folder(tmp_path, "sentence\tlabel", "good\t1.5", "bad\t2.5")
    with pytest.raises(DataError, match="dev-only: the data is for regression, the artifact for classification"):
        evaluate_artifact(build(), settings=DataSettings(path=path, task="regression"))


def test_evaluate_label_the_artifact_lacks(build, tmp_path: Path):
    path = data_folder(tmp_path, "sentence\tlabel", "good\tgreat")
    with pytest.raises(DataError, match=r"dev\.tsv line 2: unknown label 'great'; .*negative, positive"):
        evaluate_artifact(build(), settings=DataSettings(path=path))


def test_evaluate_outputs_that_are_not_finite(build, tmp_path: Path):
    path = data_folder(tmp_path, "sentence\tlabel", "good\t1", "film\t0")
    with pytest.raises(ArtifactError, match=r"artifact: 1 of 2 outputs are not finite\. Export the student again"):
        evaluate_artifact(build(value=float("inf")), settings=DataSettings(path=path))
