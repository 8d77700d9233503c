from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_words import write_tokenizer
from tokenizers import Tokenizer

from bertemd_deploy.artifact import NOT_SCORED, DataSlice
from bertemd_deploy.churn import LISTED, LONGEST_TEXT, Churn, find_churn
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.predictions import Prediction, answered
from bertemd_deploy.resampling import mcnemar
from bertemd_deploy.splits import QuestionSplit, TokenSplit

ROLES = ("teacher", "student", "int8")
TEXTS = ["good film", "bad song", "the film was fine", "a sad song", "lovely", "dull"]


@pytest.fixture
def encoder(tmp_path: Path) -> TextEncoder:
    write_tokenizer(tmp_path)
    return TextEncoder.load(tmp_path, max_length=32)


@pytest.fixture
def tokenizer(encoder: TextEncoder, tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def one_hot(decided: list[int], classes: int = 3) -> np.ndarray:
    """Return logits (n, classes) that decide so, with a probability of e / (e + classes - 1)."""
    return np.eye(classes, dtype=np.float32)[decided]


def step(found: Churn, before: str, after: str) -> dict:
    (entry,) = (one for one in found.record["steps"] if (one["from"], one["to"]) == (before, after))
    return entry


def counts(entry: dict) -> list[int]:
    names = (
        "changed",
        "right_to_right",
        "right_to_wrong",
        "wrong_to_right",
        "wrong_to_same_wrong",
        "wrong_to_other_wrong",
    )
    return [entry[name] for name in names]


@pytest.fixture
def classes(encoder: TextEncoder, tokenizer: Tokenizer) -> Churn:
    """Six rows, of three classes; the student loses row 1, gains row 4 and errs otherwise on row 5; int8 loses row 0."""
    part = DataSlice(encoder.encode(TEXTS, ["good"] * 6), np.array([0, 1, 2, 0, 1, 2]))
    return find_churn(
        {
            "teacher": one_hot([0, 1, 2, 1, 0, 0]),
            "student": one_hot([0, 0, 2, 1, 1, 1]),
            "int8": one_hot([2, 0, 2, 1, 1, 1]),
        },
        part=part,
        labels=["no", "yes", "perhaps"],
        metrics=["accuracy", "matthews"],
        tokenizer=tokenizer,
        resamples=200,
    )


def test_transitions_are_counted_for_every_step(classes: Churn) -> None:
    assert [(one["from"], one["to"]) for one in classes.record["steps"]] == [
        ("teacher", "student"),
        ("student", "int8"),
        ("teacher", "int8"),
    ]
    assert counts(step(classes, "teacher", "student")) == [3, 2, 1, 1, 1, 1]
    assert counts(step(classes, "student", "int8")) == [1, 2, 1, 0, 3, 0]
    assert counts(step(classes, "teacher", "int8")) == [4, 1, 2, 1, 1, 1]
    assert classes.record["right"] == {"teacher": 3, "student": 3, "int8": 2}
    assert (classes.record["examples"], classes.record["changed"], classes.record["unit"]) == (6, 4, "example")


def test_every_step_has_its_test_and_every_metric_its_interval(classes: Churn) -> None:
    for entry in classes.record["steps"]:
        assert entry["mcnemar_p"] == mcnemar(entry["right_to_wrong"], entry["wrong_to_right"])
        assert list(entry["metric_differences"]) == ["accuracy", "matthews"]
        for found in entry["metric_differences"].values():
            low, high = found["ci95"]
            assert low <= found["difference"] <= high
            assert low < high
    accuracy = step(classes, "teacher", "int8")["metric_differences"]["accuracy"]
    assert accuracy["difference"] == pytest.approx(2 / 6 - 3 / 6)
    assert classes.record["metrics"]["int8"]["accuracy"] == pytest.approx(2 / 6)


def test_every_example_has_a_line(classes: Churn) -> None:
    assert [line["index"] for line in classes.lines] == list(range(6))
    assert [line["changed"] for line in classes.lines] == [True, True, False, False, True, True]
    sure = pytest.approx(np.e / (np.e + 2))
    assert classes.lines[1] == {
        "index": 1,
        "text": "bad song",
        "text_pair": "good",
        "gold": "yes",
        "decisions": {"teacher": "yes", "student": "no", "int8": "no"},
        "scores": dict.fromkeys(ROLES, sure),
        "right": {"teacher": True, "student": False, "int8": False},
        "changed": True,
    }
    json.dumps([classes.record, classes.lines], allow_nan=False)


def test_what_the_last_model_lost_is_listed_first(classes: Churn) -> None:
    assert [line["index"] for line in classes.record["listed"]] == [0, 1, 4, 5]


def test_the_list_of_the_record_is_bounded_and_the_lines_are_not(encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    count = LISTED + 20
    part = DataSlice(
        TextEncoder(tokenizer, max_length=512, pad_id=0).encode(["film " * 100] * count), np.zeros(count, int)
    )
    found = find_churn(
        {"student": one_hot([0] * count, 2), "int8": one_hot([1] * count, 2)},
        part=part,
        labels=["no", "yes"],
        metrics=["accuracy"],
        tokenizer=tokenizer,
        resamples=2,
    )
    assert (len(found.record["listed"]), len(found.lines), found.record["changed"]) == (LISTED, count, count)
    assert found.record["listed"][0]["text"] == "film " * (LONGEST_TEXT // 5 - 1) + "film…"
    assert found.lines[0]["text"] == " ".join(["film"] * 100)
    assert step(found, "student", "int8")["mcnemar_p"] < 1e-60


def test_a_set_of_labels_is_right_as_a_whole(encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    gold = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=np.float32)
    student = np.where(gold > 0, 2.0, -2.0).astype(np.float32)
    other = student.copy()
    other[0, 0] = -1.0
    found = find_churn(
        {"student": student, "int8": other},
        part=DataSlice(encoder.encode(TEXTS), gold, "multilabel"),
        labels=["joy", "love", "fear"],
        metrics=["f1_micro", "f1_macro"],
        tokenizer=tokenizer,
        resamples=50,
    )
    assert counts(step(found, "student", "int8")) == [1, 5, 1, 0, 0, 0]
    (line,) = found.record["listed"]
    assert line["gold"] == ["joy", "fear"]
    assert line["decisions"] == {"student": ["joy", "fear"], "int8": ["fear"]}
    assert line["scores"]["int8"] == pytest.approx(1 / (1 + np.exp(-1)))
    assert found.lines[1]["decisions"]["student"] == []
    assert line["text_pair"] is None


def test_numbers_are_neither_right_nor_wrong(encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    gold = np.array([0, 1, 2, 3, 4, 5], dtype=np.float32)
    student = gold[:, None] + np.float32(0.1)
    moves = np.array([0.0, -0.2, 0.0, 0.5, -1.0, 0.3], dtype=np.float32)
    found = find_churn(
        {"student": student, "int8": student + moves[:, None]},
        part=DataSlice(encoder.encode(TEXTS), gold, "regression"),
        labels=[],
        metrics=["pearson", "spearman"],
        tokenizer=tokenizer,
        resamples=50,
    )
    entry = step(found, "student", "int8")
    assert found.record["changed_beyond"] == pytest.approx(0.25 * gold.std())  # 0.43
    assert entry["mcnemar_p"] is None
    assert "right_to_wrong" not in entry
    assert (entry["changed"], entry["changed_towards_gold"], entry["changed_away_from_gold"]) == (2, 0, 2)
    assert entry["mean_abs_move"] == pytest.approx(2 / 6)
    assert entry["max_abs_move"] == pytest.approx(1.0)
    assert [line["index"] for line in found.record["listed"]] == [4, 3]
    assert found.record["listed"][0]["right"] == {"student": None, "int8": None}
    assert found.record["listed"][0]["scores"] == {"student": None, "int8": None}
    assert found.record["right"] == {"student": None, "int8": None}
    low, high = entry["metric_differences"]["pearson"]["ci95"]
    assert low < entry["metric_differences"]["pearson"]["difference"] < 0
    assert low <= high <= 0


def test_a_sentence_is_right_where_all_of_its_tags_are(encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    words = [["good", "films", "today"], ["we", "saw", "it"], ["bad"]]
    tags = [[1, 2, 0], [0, 0, 0], [1]]
    part = TokenSplit(words, tags).encode(encoder)
    labels = ["O", "B-ART", "I-ART"]
    right = one_hot(np.where(part.labels == NOT_SCORED, 0, part.labels).tolist())
    scored = np.flatnonzero(part.labels != NOT_SCORED)
    student, other = right.copy(), right.copy()
    student[scored[4]] = [0, 1, 0]  # saw: O to B-ART
    other[scored[0]] = [1, 0, 0]  # good: B-ART to O
    other[scored[1]] = [0, 1, 0]  # films: I-ART to B-ART
    other[0] = [0, 0, 9]  # a token that no one scores
    found = find_churn(
        {"teacher": right, "student": student, "int8": other},
        part=part,
        labels=labels,
        metrics=["entity_f1"],
        tokenizer=tokenizer,
        resamples=50,
    )
    assert found.record["unit"] == "sentence"
    assert counts(step(found, "teacher", "student")) == [1, 2, 1, 0, 0, 0]
    assert counts(step(found, "student", "int8")) == [2, 1, 1, 1, 0, 0]
    line = found.lines[0]
    assert (line["text"], line["words"], line["gold"]) == ("good films today", ["good", "films"], ["B-ART", "I-ART"])
    assert line["decisions"]["int8"] == ["O", "B-ART"]
    assert line["right"] == {"teacher": True, "student": True, "int8": False}
    assert found.lines[1]["words"] == ["saw"]
    assert found.lines[2]["words"] == []


def answered_alone(part: DataSlice, logits: np.ndarray, number: int) -> Iterator[Prediction]:
    """Yield what a prediction says of one question."""
    alone, rows = part.select([number]), slice(*part.examples.offsets[number : number + 2])
    assert alone.gold is not None
    yield from answered(
        logits[rows],
        alone.examples,
        example=alone.gold.example,
        spans=alone.gold.spans,
        contexts=alone.gold.contexts,
        no_answer=False,
    )


def test_a_question_is_right_where_its_answer_is_accepted(encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    contexts = ["the film was good", "a song today"]
    split = QuestionSplit(
        ["a", "b"], ["was it good", "the song"], contexts, [[("film", 4)], [("song", 2)]], doc_stride=4
    )
    part = split.encode(encoder)
    assert part.gold is not None

    def answering(*words: str) -> np.ndarray:
        """Return logits that answer each question with one word of its context."""
        logits = np.zeros((len(part.examples.tokens), 2), dtype=np.float32)
        for row, word in enumerate(words):
            start = contexts[row].index(word)
            rows = slice(*part.examples.offsets[row : row + 2])
            logits[rows][(part.gold.spans[rows] == [start, start + len(word)]).all(axis=1)] = 3.0
        return logits

    found = find_churn(
        {"student": answering("film", "today"), "int8": answering("good", "song")},
        part=part,
        labels=[],
        metrics=["f1_squad", "exact_match"],
        tokenizer=tokenizer,
        resamples=50,
    )
    assert found.record["unit"] == "question"
    assert counts(step(found, "student", "int8")) == [2, 0, 1, 1, 0, 0]
    line = found.lines[0]
    assert (line["id"], line["text"], line["text_pair"]) == ("a", "was it good", "the film was good")
    assert line["gold"] == ["film"]
    assert line["decisions"] == {"student": "film", "int8": "good"}
    (asked,) = (one.score for one in answered_alone(part, answering("film", "today"), 0))
    assert line["scores"]["student"] == pytest.approx(asked)
    assert [one["index"] for one in found.record["listed"]] == [0, 1]


def test_equal_models_differ_in_nothing(encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    logits = one_hot([0, 1, 1, 0, 0, 1], 2)
    found = find_churn(
        {"student": logits, "int8": logits},
        part=DataSlice(encoder.encode(TEXTS), np.array([0, 1, 0, 1, 0, 1])),
        labels=["no", "yes"],
        metrics=["f1"],
        tokenizer=tokenizer,
        resamples=20,
    )
    entry = step(found, "student", "int8")
    assert (entry["changed"], entry["mcnemar_p"]) == (0, 1)
    assert entry["metric_differences"]["f1"] == {"difference": 0, "ci95": [0, 0]}
    assert found.record["listed"] == []


def test_one_model_and_broken_outputs_are_refused(encoder: TextEncoder, tokenizer: Tokenizer) -> None:
    part = DataSlice(encoder.encode(TEXTS), np.array([0, 1, 0, 1, 0, 1]))
    logits = one_hot([0, 1, 1, 0, 0, 1], 2)
    given = {"part": part, "labels": ["no", "yes"], "metrics": ["f1"], "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="one model has nothing to differ from"):
        find_churn({"student": logits}, **given)
    with pytest.raises(ValueError, match="6 of 6 outputs are not finite"):
        find_churn({"student": logits, "int8": logits * np.nan}, **given)
