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
from tiny_lookup import write_lookup
from typer.testing import CliRunner

import bertemd_deploy
from bertemd_deploy import predictions
from bertemd_deploy.artifact import Artifact
from bertemd_deploy.classifier import Classifier, Prediction, evaluate_artifact
from bertemd_deploy.cli import app
from bertemd_deploy.errors import ArtifactError, DataError, ModelError
from bertemd_deploy.files import sha256_file
from bertemd_deploy.settings import DataSettings

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
        kind: str | None = None,
        pairs: bool | None = None,
    ) -> Path:
        folder = tmp_path / "artifact"
        tiny_tokenizer(folder)
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        for name in graphs:
            sizes = {"outputs": outputs or len(labels) or 1, "second": second, "value": value}
            write_graph(folder / "onnx" / f"{name}.onnx", vocabulary=vocabulary, **sizes)
        kind = kind or ("classification" if labels else "regression")
        metrics = ["f1_micro"] if kind == "multilabel" else ["accuracy"] if labels else ["pearson", "spearman"]
        manifest = {
            "schema_version": 1,
            "task": {"name": task, "kind": kind, "metrics": metrics} | ({} if pairs is None else {"pairs": pairs}),
            "labels": list(labels),
            "max_length": 24,
        }
        write_manifest(folder, manifest)
        return folder

    return artifact


@pytest.fixture
def lookup(tmp_path: Path, tiny_tokenizer) -> Callable[..., Path]:
    """Return a factory of artifacts that decide by single words.

    For tags: "good" is B-PER, "fine" is I-PER, "bad" B-LOC, all else O, each with a logit of 2. For answers: "fine" starts
    and "today" ends one, with logits of 3; [CLS] has `null` for each.
    """

    def artifact(kind: str, *, labels: tuple[str, ...] = (), null: float = 0.0, **task: Any) -> Path:
        folder = tmp_path / "artifact"
        tiny_tokenizer(folder)
        words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        if kind == "token-classification":
            labels = labels or ("O", "B-PER", "I-PER", "B-LOC")
            table = np.zeros((len(words), len(labels)))
            table[:, 0] = 2
            for at, word in enumerate(("good", "fine", "bad"), 1):
                table[words[word], [0, at]] = 0, 2
            tables = {"logits": table}
        else:
            start, end = np.zeros(len(words)), np.zeros(len(words))
            start[words["fine"]] = end[words["today"]] = 3
            start[words["[CLS]"]] = end[words["[CLS]"]] = null
            tables = {"start_logits": start, "end_logits": end}
        write_lookup(folder / "onnx" / "model.onnx", tables)
        metrics = ["entity_f1"] if kind == "token-classification" else ["f1_squad", "exact_match"]
        task = {"name": kind, "kind": kind, "metrics": metrics} | task
        write_manifest(folder, {"schema_version": 1, "task": task, "labels": list(labels), "max_length": 12})
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
    assert {bertemd_deploy.Answer, bertemd_deploy.Entity} == {predictions.Answer, predictions.Entity}
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


def test_several_labels(build):
    classifier = Classifier.load(build(labels=("sad", "odd", "gay"), kind="multilabel"), threads=1)
    both, none = classifier.predict(["good bad good", "film"])
    one, two = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert (both.label, both.labels) == ("gay", ("gay", "sad"))
    assert both.scores == pytest.approx({"sad": one, "odd": 0.5, "gay": two})
    assert both.score == pytest.approx(two)
    assert (none.label, none.labels, none.score) == (None, (), 0.5)
    assert classifier.record(both)["labels"] == ("gay", "sad")


def test_entities_with_their_places(lookup):
    classifier = Classifier.load(lookup("token-classification"), threads=1)
    text = "  Good fine, the  (bad); fine"
    (found, nothing, empty) = classifier.predict([text, "the film", ""])
    sure = math.exp(2) / (math.exp(2) + 3)
    wanted = [("PER", "Good fine", 2, 11), ("LOC", "bad", 19, 22), ("PER", "fine", 25, 29)]
    assert [(entity.label, entity.text, entity.start, entity.end) for entity in found.entities] == wanted
    assert [entity.score for entity in found.entities] == pytest.approx([sure] * 3)
    assert all(text[entity.start : entity.end] == entity.text for entity in found.entities)
    assert (found.label, found.score, found.scores) == (None, pytest.approx(sure), {})
    assert (nothing.entities, empty.entities, empty.score) == ((), (), 1.0)
    assert classifier.record(nothing).keys() == {"entities", "score"}


def test_entities_of_a_text_that_is_far_too_long(lookup):
    """99 words and a window of 10: each is tagged, and an entity that a window ends in stays whole."""
    words = ["film"] * 99
    for at in (5, 30, 31, 60, 97):
        words[at] = "good"
    for at in (6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 61, 98):
        words[at] = "fine"
    words[40] = "\x01"  # has no token
    (found,) = Classifier.load(lookup("token-classification"), threads=1).predict([" ".join(words)])
    wanted = ["good" + " fine" * 10, "good", "good", "good fine", "good fine"]
    assert [entity.text for entity in found.entities] == wanted


def test_tags_that_name_no_entities_are_given_by_word(lookup):
    (found,) = Classifier.load(lookup("token-classification", labels=("NOUN", "ADJ", "ADV", "X")), threads=1).predict(
        ["good film"]
    )
    assert [(entity.label, entity.text) for entity in found.entities] == [("ADJ", "good"), ("NOUN", "film")]


def test_answers_in_their_context(lookup):
    classifier = Classifier.load(lookup("question-answering"), threads=1)
    contexts = ["We saw fine film Today.", "a film"]
    first, second = classifier.predict(["was it good?", "was it?"], contexts)
    assert first.answer is not None
    assert (first.answer.text, first.answer.start, first.answer.end) == ("fine film Today", 7, 22)
    # Twelve tokens: [CLS], four of the question, [SEP], the first five of the context, [SEP]; and the last five.
    assert first.score == first.answer.score
    assert 0 < first.score < 1
    assert second.answer is not None  # none is not allowed: the best of equals
    assert classifier.record(second).keys() == {"answer", "score"}


def test_an_answers_probability_is_over_all_tokens(lookup):
    (found,) = Classifier.load(lookup("question-answering"), threads=1).predict(["was it"], ["a fine film today"])
    likely = math.exp(3) / (math.exp(3) + 8)  # nine tokens, one with a logit of 3, eight with 0
    assert found.score == pytest.approx(likely**2)


def test_an_answer_far_in_a_long_context(lookup):
    context = "the film was sad . " * 20 + "fine song today" + " . it was dull" * 5
    (found,) = Classifier.load(lookup("question-answering", doc_stride=3), threads=1).predict(
        ["was it good"], [context]
    )
    assert found.answer is not None
    assert (found.answer.text, found.answer.start) == ("fine song today", context.index("fine"))


def test_no_answer_where_the_task_has_such(lookup):
    for allowed in (True, False):
        classifier = Classifier.load(lookup("question-answering", null=2.0, no_answer=allowed), threads=1)
        nothing, found = classifier.predict(["was it", "was it"], ["a film today", "a fine film today"])
        assert (nothing.answer is None) is allowed
        assert found.answer is not None


def test_question_answering_wants_contexts_and_tagging_does_not(lookup):
    with pytest.raises(DataError, match=r"needs a context beside every question: predict\(questions, contexts\)"):
        Classifier.load(lookup("question-answering"), threads=1).predict(["was it?"])
    with pytest.raises(DataError, match="takes one text at a time, not pairs"):
        Classifier.load(lookup("token-classification"), threads=1).predict(["a"], ["b"])
    with pytest.raises(
        DataError, match=r"question 1: it fills 15 of 12 tokens and leaves no room for its context\. Shorten it\.$"
    ):
        Classifier.load(lookup("question-answering"), threads=1).predict(["was it " * 6], ["film"])


def test_a_question_that_is_too_long_is_numbered_over_the_whole_stream(lookup):
    rows = [("was it", "film")] * 1100 + [("was it " * 6, "film")]
    with pytest.raises(DataError, match="question 1101: it fills 15 of 12 tokens"):
        list(Classifier.load(lookup("question-answering"), threads=1).stream(rows))


def test_words_are_what_the_model_was_trained_on(lookup):
    """Each word is one, whatever pieces it has: tagged once, by its first, as in training."""
    classifier = Classifier.load(lookup("token-classification", labels=("N", "A", "B", "C")), threads=1)
    words = ["U.S.", "O'Neil", ",", "3.5", "good.fine", "\u5317", "\u4eac", "film", "."]
    (found,) = classifier.predict(["U.S. O'Neil, 3.5 good.fine \u5317\u4eac" + "film."])
    assert [entity.text for entity in found.entities] == words
    (given,) = classifier.predict([words])
    assert [(entity.label, entity.text) for entity in given.entities] == [
        (entity.label, entity.text) for entity in found.entities
    ]


def test_given_words_are_taken_as_they_are(lookup):
    classifier = Classifier.load(lookup("token-classification"), threads=1)
    texts = [["the", "good", "fine.", "", "bad", "film"], "a good", ()]
    found, text, empty = classifier.predict(texts)
    wanted = [("PER", "good fine.", 4, 14), ("LOC", "bad", 16, 19)]
    assert [(entity.label, entity.text, entity.start, entity.end) for entity in found.entities] == wanted
    assert [entity.text for entity in text.entities] == ["good"]
    assert empty.entities == ()


@pytest.mark.parametrize(
    ("texts", "pairs", "message"),
    [
        ("abc", None, r"^texts should be a list of texts, found a single one\. Write \[text\]\.$"),
        (["a"], "b", "^pairs should be a list of texts, found a single one"),
        (
            [["a", "b"]],
            None,
            r"^text 1 should be text, found list\. Second texts are an argument of their own: pairs\.$",
        ),
        (["a", None], None, r"^text 2 should be text, found NoneType\.$"),
        (["a"], [b"b"], r"^text 1 should be text, found bytes\.$"),
    ],
)
def test_what_is_no_text(build, texts, pairs, message):
    with pytest.raises(TypeError, match=message):
        Classifier.load(build(), threads=1).predict(texts, pairs)


def test_what_is_no_word_and_no_row(lookup):
    classifier = Classifier.load(lookup("token-classification"), threads=1)
    with pytest.raises(TypeError, match=r"^text 2 should be text or a list of words, found int among its words\.$"):
        classifier.predict(["a", ["b", 3]])
    with pytest.raises(TypeError, match=r"^text 1 should be text or a list of words, found NoneType\.$"):
        classifier.predict([None])
    with pytest.raises(TypeError, match=r"^row 1 should be \(text,\) or \(text, pair\), found str\.$"):
        list(classifier.stream(["abc"]))


def test_text_that_is_not_unicode(build, lookup):
    message = r"text 2 is not valid Unicode \(lone surrogate U\+DCFF at character 5\)\. Read or convert it as UTF-8"
    folder = build()
    for pairs in (None, ["a", "b"]):
        with pytest.raises(DataError, match=message):
            Classifier.load(folder, threads=1).predict(["good", "bad \udcff"], pairs)
    answer = CliRunner().invoke(app, ["predict", str(folder), "good", "bad \udcff"])
    assert (answer.exit_code, answer.stdout) == (3, "")
    assert "text 2 is not valid Unicode" in answer.stderr
    rows = [("a",)] * 1030 + [(["a", "\ud800"],)]
    with pytest.raises(DataError, match=r"text 1031 is not valid Unicode \(lone surrogate U\+D800 at character 1\)"):
        list(Classifier.load(lookup("token-classification"), graph="fp32", threads=1).stream(rows))


@pytest.mark.parametrize("pairs", [True, False])
def test_texts_come_as_the_model_was_trained(build, tmp_path: Path, pairs):
    folder = build(pairs=pairs)
    classifier = Classifier.load(folder, threads=1)
    given = (["good"], ["bad"] if pairs else None)
    assert len(classifier.predict(*given)) == 1
    other = (["good"], None if pairs else ["bad"])
    message = (
        r"trained on pairs of texts, and needs two: predict\(texts, pairs\), or `bertemd predict --pair`"
        if pairs
        else r"trained on single texts, not on pairs\. Leave out the second texts"
    )
    with pytest.raises(DataError, match=message):
        classifier.predict(*other)
    answer = CliRunner().invoke(app, ["predict", str(folder), *([] if pairs else ["--pair"]), "good\tbad"])
    assert (answer.exit_code, "--pair" in answer.stderr) == (3, True)
    header, line = ("sentence", "good") if pairs else ("sentence1\tsentence2", "good\tbad")
    path = data_folder(tmp_path, f"{header}\tlabel", f"{line}\tpositive", f"{line}\tnegative")
    with pytest.raises(DataError, match=r"dev-only: the data is (single|pairs).*Name its columns in data.sentence1"):
        evaluate_artifact(folder, settings=DataSettings(path=path, task="classification"))


def test_a_graph_of_another_kind_of_task(build, lookup):
    message = (
        r"model\.onnx: its inputs are input_ids, its outputs logits of 3 dimensions; classification needs .*logits of 2"
    )
    folder = lookup("token-classification")
    manifest = json.loads((folder / "bertemd.json").read_text())
    manifest["task"]["kind"] = "classification"
    (folder / "bertemd.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        Classifier.load(folder, threads=1)
    artifact = Artifact.load(folder)
    classifier = Classifier.of(artifact, lambda batch: np.zeros((1, 3, 4), np.float32), graph="fp32")
    with pytest.raises(ArtifactError, match="graph fp32: its logits have 3 dimensions, those of classification have 2"):
        classifier.predict(["good"])
    manifest["task"]["kind"], manifest["labels"] = "question-answering", []
    (folder / "bertemd.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ArtifactError, match=r"question-answering needs .* start_logits of 2 dimensions, end_logits of 2"
    ):
        Classifier.load(folder, threads=1)


def test_a_kind_of_a_later_version(lookup):
    folder = lookup("parsing")
    with pytest.raises(
        ArtifactError, match=r"bertemd.json: task.kind is 'parsing'; this bertemd knows classification, .*Update"
    ):
        Classifier.load(folder)


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


def test_evaluate_tags_and_answers(lookup, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"tokens": ["the", "good", "fine", "film"], "tags": ["O", "B-PER", "I-PER", "O"]},
        {"tokens": ["bad", "film"], "tags": ["O", "B-LOC"]},  # found elsewhere
    ]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = evaluate_artifact(lookup("token-classification"), settings=DataSettings(path=str(folder)))
    assert record == {
        "metrics": {"entity_f1": 0.5},
        "rows": 2,
        "backend": "onnxruntime fp32",
        "task": "token-classification",
    }
    contexts = ["a fine film today", "the film was sad . " * 5 + "we saw fine song today"]
    found = ["fine film today", "song today"]
    asked = [
        {"question": "was it", "context": context, "answers": {"text": [text], "answer_start": [context.index(text)]}}
        for context, text in zip(contexts, found, strict=True)
    ]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    record = evaluate_artifact(lookup("question-answering"), settings=DataSettings(path=str(folder)))
    assert (record["rows"], record["metrics"]) == (2, pytest.approx({"exact_match": 0.5, "f1_squad": 0.9}))


@pytest.mark.parametrize("allowed", [True, False])
def test_evaluate_gives_no_answer_where_predict_does(lookup, tmp_path: Path, allowed):
    """All questions of the data have an answer; whether "none" is possible is what the model was trained for."""
    folder = tmp_path / "data"
    folder.mkdir()
    row = {"question": "was it", "context": "a fine film today", "answers": {"text": ["fine"], "answer_start": [2]}}
    (folder / "dev.jsonl").write_text(json.dumps(row) + "\n")
    artifact = lookup("question-answering", no_answer=allowed, null=9.0)
    record = evaluate_artifact(artifact, settings=DataSettings(path=str(folder)))
    assert record["metrics"]["f1_squad"] == pytest.approx(0.0 if allowed else 0.5)


def test_evaluate_several_labels(build, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"sentence": "good", "labels": ["gay"]}, {"sentence": "bad good", "labels": ["gay"]}]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    artifact = build(labels=("sad", "odd", "gay"), kind="multilabel", task="multilabel")
    record = evaluate_artifact(artifact, settings=DataSettings(path=str(folder)))
    assert record["metrics"]["f1_micro"] == pytest.approx(4 / 5)


def test_the_command_prints_what_was_found(lookup):
    folder = str(lookup("question-answering", no_answer=True, null=2.0))
    pair = "was it\ta fine film today"
    answer = CliRunner().invoke(app, ["predict", folder, "--pair", pair, "was it\ta film"])
    first, second = answer.stdout.splitlines()
    assert first.split("\t")[0] == "fine film today"
    assert second.split("\t")[0] == "-"
    answer = CliRunner().invoke(app, ["predict", folder, "--pair", "--json", pair])
    assert json.loads(answer.stdout)["answer"]["start"] == 2
    answer = CliRunner().invoke(app, ["predict", folder, "was it"])
    assert (answer.exit_code, "needs a context beside every question" in answer.stderr) == (3, True)
    answer = CliRunner().invoke(app, ["predict", str(lookup("token-classification")), "a good fine film"])
    assert answer.stdout.startswith("PER good fine\t0.7")


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
