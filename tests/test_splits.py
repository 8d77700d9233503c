"""Rows with several labels, tagged words and questions: read from a folder, checked, and encoded with aligned labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import write_corpus

from bertemd_deploy.answers import best_answers
from bertemd_deploy.data import calibration_rows, load_data
from bertemd_deploy.encoding import TextEncoder
from bertemd_deploy.errors import DataError
from bertemd_deploy.splits import QuestionSplit, TokenSplit

TAGGED = {"tokens": ["we", "saw", "Films"], "tags": ["O", "O", "B-X"]}
CONTEXT = "the film was good . we saw it today"
ASKED = {"id": "q1", "question": "film", "context": CONTEXT, "answers": {"text": ["good"], "answer_start": [13]}}


def write(folder: Path, *rows: dict[str, Any], dev: list[dict[str, Any]] | None = None) -> str:
    folder.mkdir(exist_ok=True)
    for split, content in (("train", list(rows)), ("dev", dev or list(rows))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return str(folder)


@pytest.fixture
def model(tmp_path: Path, tiny_tokenizer) -> Path:
    tiny_tokenizer(tmp_path / "model")
    return tmp_path / "model"


# ---- several labels


@pytest.mark.parametrize("written", ["jsonl", "tsv", "csv"])
def test_several_labels_in_every_format(tmp_path: Path, written: str):
    if written == "jsonl":
        rows = [
            {"sentence": "x", "labels": ["b", "a"]},
            {"sentence": "y", "labels": []},
            {"sentence": "z", "labels": ["c"]},
        ]
        folder = write(tmp_path / "data", *rows)
    else:
        mark, line = ("|", "{}\t{}\n") if written == "tsv" else (", ", '{},"{}"\n')
        text = "".join(line.format(*row) for row in (("sentence", "labels"), ("x", f"b{mark}a"), ("y", ""), ("z", "c")))
        (tmp_path / "data").mkdir()
        for split in ("train", "dev"):
            (tmp_path / "data" / f"{split}.{written}").write_text(text)
        folder = str(tmp_path / "data")
    data = load_data(folder, task="multilabel")
    assert data.labels == ("a", "b", "c")
    assert data.outputs == 3
    assert data.splits["train"].labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert data.splits["train"].labels.dtype == np.float32


def test_several_labels_of_pairs_by_another_name(tmp_path: Path, model: Path):
    row = {"left": "good", "right": "bad", "topics": ["a"]}
    data = load_data(
        write(tmp_path / "data", row), task="multilabel", sentence1="left", sentence2="right", label="topics"
    )
    part = data.splits["dev"].encode(TextEncoder.load(model, max_length=16))
    assert part.kind == "multilabel"
    assert part.examples.types.tolist() == [0, 0, 0, 1, 1]
    assert data.labels == ("a",)


def test_labels_may_be_numbers_where_the_data_names_them(tmp_path: Path):
    folder = write(tmp_path / "data", {"sentence": "x", "labels": [2, 0]}, {"sentence": "y", "labels": ["b"]})
    with pytest.raises(
        DataError, match=r"train\.jsonl line 1: the label 2 is a number without a name\. Add labels\.txt"
    ):
        load_data(folder, task="multilabel")
    (tmp_path / "data" / "labels.txt").write_text("c\nb\na\n")
    data = load_data(folder, task="multilabel")
    assert data.labels == ("c", "b", "a")
    assert data.splits["train"].labels.tolist() == [[1, 0, 1], [0, 1, 0]]
    # A model's order decides the columns, the file's what a number means.
    other = load_data(folder, task="multilabel", label_names=["a", "b", "c"])
    assert other.splits["train"].labels.tolist() == [[1, 0, 1], [0, 1, 0]]
    turned = load_data(folder, task="multilabel", label_names=["b", "a", "c"])
    assert turned.splits["train"].labels.tolist() == [[0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (7, r"line 1: the labels should be a list of names \(or text with names parted by \| or ,\), found 7"),
        (None, r"line 1: nothing in column 'labels'"),
        ([""], r"line 1: a label should be a name, found ''"),
        ('["a", "b"]', r"line 1: the labels are text that looks like a list, str .* lists belong into a jsonl file"),
        ({"a": 1}, r"line 1: the labels should be a list of names .* found \{'a': 1\}"),
        ([True], r"line 1: a label should be a name, found True"),
        ([], r"no train row has a label; there is nothing to learn\. Fill the column 'labels'"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels: Any, message: str):
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path / "data", {"sentence": "x", "labels": labels}), task="multilabel")


@pytest.mark.parametrize("written", [["2", "0"], "2|0", "2, a", [2.0, 0]])
def test_numbers_as_text_get_the_names_of_labels_txt(tmp_path: Path, written: Any):
    folder = write(tmp_path / "data", {"sentence": "x", "labels": written}, {"sentence": "y", "labels": "b"})
    (tmp_path / "data" / "labels.txt").write_text("a\nb\nc\n")
    assert load_data(folder, task="multilabel").splits["train"].labels.tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("written", [[0, 1, 0], [1.0, 0.0, 0.0], "0|1|1"])
def test_a_mark_for_each_label_is_refused(tmp_path: Path, written: Any):
    folder = write(tmp_path / "data", {"sentence": "x", "labels": written})
    (tmp_path / "data" / "labels.txt").write_text("a\nb\nc\n")
    message = (
        r"line 1: the labels \[.*\] may be numbers of labels, or a 0 or 1 for each of the 3 .* such as \[\"c\"\]\."
    )
    with pytest.raises(DataError, match=message):
        load_data(folder, task="multilabel")


def test_a_dev_label_that_train_lacks(tmp_path: Path):
    folder = write(tmp_path / "data", {"sentence": "x", "labels": ["a"]}, dev=[{"sentence": "x", "labels": "a|c"}])
    with pytest.raises(
        DataError,
        match=r"dev\.jsonl line 1: unknown label 'c'; known from the train split or the task: a\. Correct the row, or list all",
    ):
        load_data(folder, task="multilabel")


# ---- tagged words


def test_tags_are_sorted_with_o_first_and_stand_at_first_pieces(tmp_path: Path, model: Path):
    rows = [TAGGED, {"tokens": ["goodly"], "tags": ["B-A"]}]
    data = load_data(write(tmp_path / "data", *rows), task="token-classification")
    assert data.labels == ("O", "B-A", "B-X")
    part = data.splits["train"].encode(TextEncoder.load(model, max_length=16))
    assert part.kind == "token-classification"
    assert part.labels.tolist() == [-100, 0, 0, 2, -100, -100, -100, 1, -100, -100]
    assert part.fault() is None


def test_words_beyond_the_maximum_length_have_no_label(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    data = load_data(write(tmp_path / "data", TAGGED), task="token-classification")
    part = data.splits["dev"].encode(TextEncoder.load(model, max_length=4))
    assert part.labels.tolist() == [-100, 0, 0, -100]
    assert (
        "data: 1 of 3 words are not scored: beyond data.max_length (4), or without a token" in capsys.readouterr().err
    )


def test_conll_text_gives_what_jsonl_gives(tmp_path: Path):
    write(tmp_path / "data", TAGGED, {"tokens": ["a"], "tags": ["O"]})
    expected = load_data(str(tmp_path / "data"), task="token-classification")
    for split in ("train", "dev"):
        (tmp_path / "data" / f"{split}.jsonl").unlink()
        (tmp_path / "data" / f"{split}.conll").write_text("we O\nsaw O\nFilms B-X\n\na O\n")
    found = load_data(str(tmp_path / "data"), task="token-classification")
    assert found.splits == expected.splits
    assert found.sha256 == expected.sha256
    named = load_data(str(tmp_path / "data"), task="token-classification", sentence1="words", label="ner")
    assert named.splits == expected.splits


def test_tag_numbers_have_the_names_of_labels_txt(tmp_path: Path):
    folder = write(tmp_path / "data", TAGGED | {"tags": [0, 0, 1]})
    with pytest.raises(DataError, match=r"line 1: the label 0 is a number without a name"):
        load_data(folder, task="token-classification")
    (tmp_path / "data" / "labels.txt").write_text("O\nB-X\n")
    data = load_data(folder, task="token-classification")
    assert data.labels == ("O", "B-X")
    assert data.splits["train"] == TokenSplit([TAGGED["tokens"]], [[0, 0, 1]])
    write(tmp_path / "data", TAGGED | {"tags": [0, 0, 2]})
    with pytest.raises(DataError, match=r"line 1: the label 2 is not one of 0 to 1"):
        load_data(folder, task="token-classification")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": ["O"]}, r"train\.jsonl line 1: 3 tokens but 1 tags\. Each token needs one"),
        ({"tags": "O O B-X"}, r"line 1: the tags should be a list with at least one item, found 'O O B-X'"),
        ({"tokens": []}, r"line 1: the tokens should be a list with at least one item, found \[\]"),
        ({"tokens": ["a", 1, "b"]}, r"line 1: each token should be text, found \['a', 1, 'b'\]"),
        ({"tags": ["O", "O", "NN"]}, r"line 1: 'NN' is no tag of an entity; .* set data\.task: tagging"),
        ({"tags": ["O", "O", "L-X"]}, r"line 1: 'L-X' is no tag of an entity; .* Write IOB2, .* L- is I- there"),
        ({"tags": ["O", "O", "B_X"]}, r"line 1: 'B_X' is no tag of an entity; .* with a hyphen and a capital"),
        ({"tokens": ["a", "b", "\ud800"]}, r"line 1: half a character \(the lone surrogate U\+D800\)"),
        ({"tags": ["O", "O", "O"]}, r"every train row has the label 'O'; a classifier needs at least two classes"),
        ({"tags": None}, r"line 1: nothing in column 'tags'"),
    ],
)
def test_tags_that_are_none(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path / "data", TAGGED | change), task="token-classification")


def test_a_dev_tag_that_train_lacks(tmp_path: Path):
    folder = write(tmp_path / "data", TAGGED, dev=[TAGGED | {"tags": ["O", "I-X", "O"]}])
    with pytest.raises(DataError, match=r"dev\.jsonl line 1: unknown label 'I-X'; known from the train split"):
        load_data(folder, task="token-classification")


def test_tags_that_mark_no_entities_are_a_task_of_their_own(tmp_path: Path):
    data = load_data(write(tmp_path / "data", TAGGED | {"tags": ["PRP", "VB", "NN"]}), task="tagging")
    assert data.labels == ("NN", "PRP", "VB")
    assert data.task.metrics == ("accuracy",)


# ---- questions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ["film"]}, r"line 1: the question should be text, found list \['film'\]"),
        ({"context": {"text": "a"}}, r"line 1: the context should be text, found dict"),
        ({"id": "\ud800"}, r"line 1: half a character"),
    ],
)
def test_questions_that_are_no_text(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path / "data", ASKED | change), task="question-answering")


def questions(folder: str, **options: Any) -> QuestionSplit:
    split = load_data(folder, task="question-answering", **options).splits["train"]
    assert isinstance(split, QuestionSplit)
    return split


def test_an_answer_is_found_in_the_windows_that_hold_it(tmp_path: Path, model: Path):
    split = questions(write(tmp_path / "data", ASKED), doc_stride=2)
    encoder = TextEncoder.load(
        model, max_length=9
    )  # room for 5 of the 9 tokens of the context: 0 1 2 3 4, 3 4 5 6 7, 6 7 8
    part = split.encode(encoder)
    assert part.labels.tolist() == [[6, 6], [3, 3], [0, 0]]
    assert part.gold is not None
    assert part.gold.example.tolist() == [0, 0, 0]
    assert (part.gold.accepted, part.gold.ids, part.gold.contexts) == ((("good",),), ("q1",), (CONTEXT,))
    for row, (first, last) in enumerate(part.labels[:2]):
        at = part.examples.offsets[row]
        assert CONTEXT[part.gold.spans[at + first, 0] : part.gold.spans[at + last, 1]] == "good"


def test_an_answer_cut_by_a_window_is_not_in_it(tmp_path: Path, model: Path):
    answers = {"text": ["was good . we"], "answer_start": [9]}  # tokens 2 3 4 5
    part = questions(write(tmp_path / "data", ASKED | {"answers": answers}), doc_stride=2).encode(
        TextEncoder.load(model, max_length=9)
    )
    assert part.labels.tolist() == [[0, 0]] * 3
    whole = questions(str(tmp_path / "data")).encode(TextEncoder.load(model, max_length=32))
    assert whole.labels.tolist() == [[5, 8]]


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [("films", 4, [4, 5]), (" films ", 3, [4, 5]), ("fil", 4, [4, 4]), ("was today!", 10, [6, 8])],
)
def test_answers_need_not_end_where_tokens_do(tmp_path: Path, model: Path, text: str, start: int, expected: list[int]):
    row = ASKED | {"context": "the films was today!", "answers": {"text": [text], "answer_start": [start]}}
    part = questions(write(tmp_path / "data", row)).encode(TextEncoder.load(model, max_length=32))
    assert part.labels.tolist() == [expected]


def test_a_question_without_an_answer(tmp_path: Path, model: Path):
    split = questions(write(tmp_path / "data", ASKED | {"answers": {"text": [], "answer_start": []}}))
    part = split.encode(TextEncoder.load(model, max_length=32))
    assert part.labels.tolist() == [[0, 0]]
    assert part.gold is not None
    assert part.gold.unanswerable


@pytest.mark.parametrize("of", ["train", "dev", "neither"])
def test_no_answer_is_possible_in_all_splits_if_one_has_such(tmp_path: Path, model: Path, of: str):
    without = ASKED | {"answers": {"text": [], "answer_start": []}}
    folder = write(tmp_path / "data", without if of == "train" else ASKED, dev=[without if of == "dev" else ASKED])
    for split in load_data(folder, task="question-answering").splits.values():
        part = split.select([0]).encode(TextEncoder.load(model, max_length=32))
        assert part.gold is not None
        assert part.gold.unanswerable is (of != "neither")
        logits = np.zeros((len(part.examples.tokens), 2))
        logits[0] = 1  # "no answer" is the likeliest
        answers = best_answers(logits, offsets=part.examples.offsets, gold=part.gold)
        assert (answers[0].text == "") is (of != "neither")


def test_squad_json_and_other_column_names_give_the_same(tmp_path: Path):
    expected = questions(write(tmp_path / "data", ASKED))
    nested = {"id": "q1", "question": "film", "answers": [{"text": "good", "answer_start": 13}]}
    content = {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [nested]}]}]}
    (tmp_path / "squad").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "squad" / f"{split}.json").write_text(json.dumps(content))
    assert questions(str(tmp_path / "squad")) == expected
    renamed = {"id": "q1", "q": "film", "text": CONTEXT, "gold": ASKED["answers"]}
    folder = write(tmp_path / "renamed", renamed)
    assert questions(folder, sentence1="q", sentence2="text", label="gold") == expected
    half = write(tmp_path / "half", {"id": "q1", "q": "film", "context": CONTEXT, "answers": ASKED["answers"]})
    assert questions(half, sentence1="q") == expected


def test_the_recipe_says_how_contexts_are_cut(tmp_path: Path):
    from bertemd_deploy.config import options_recipe
    from bertemd_deploy.pipeline import load_recipe_data

    folder = write(tmp_path / "data", ASKED)
    options = ["teacher.model=x", f"data.path={folder}", "data.task=question-answering", "student.name=4L"]
    for options_given, stride in ((options, 128), ([*options, "data.doc_stride=7"], 7)):
        data, length = load_recipe_data(options_recipe(options_given).data)
        assert isinstance(data.splits["train"], QuestionSplit)
        assert (data.splits["train"].doc_stride, length) == (stride, 384)


def test_a_question_without_an_id_is_called_by_its_place(tmp_path: Path):
    row = {key: value for key, value in ASKED.items() if key != "id"}
    assert questions(write(tmp_path / "data", row)).ids == [f"{tmp_path / 'data' / 'train.jsonl'} line 1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": {"text": ["good"], "answer_start": [12]}},
            r"train\.jsonl line 1: the answer 'good' does not stand at answer_start 12 of its context; there is ' goo'",
        ),
        ({"answers": {"text": ["good"], "answer_start": [-5]}}, r"does not stand at answer_start -5 .* there is ''"),
        ({"answers": {"text": ["good"], "answer_start": []}}, r"line 1: the answers should be .* of equal length"),
        ({"answers": "good"}, r"line 1: the answers should be \{\"text\": \[...\], \"answer_start\".* found 'good'"),
        (
            {"answers": {"text": [""], "answer_start": [0]}},
            r"an answer is a text and the number of its first character",
        ),
        ({"answers": {"text": ["the"], "answer_start": ["0"]}}, r"an answer is a text and .* found 'the', '0'"),
        ({"context": None}, r"line 1: nothing in column 'context'"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        questions(write(tmp_path / "data", ASKED | change))


def test_a_missing_column_names_the_setting(tmp_path: Path):
    row = {"id": "q", "ask": "film", "context": CONTEXT, "answers": ASKED["answers"]}
    with pytest.raises(
        DataError, match=r"needs the column\(s\) question, context; found: .*data\.sentence1, data\.sent"
    ):
        questions(write(tmp_path / "data", row))


# ---- every kind


@pytest.mark.parametrize("kind", ["multilabel", "token-classification", "question-answering"])
def test_subsets_take_their_labels_along(tmp_path: Path, model: Path, kind: str):
    folder = str(write_corpus(tmp_path / "data", kind, train=20, dev=4))
    whole, part = load_data(folder, task=kind), load_data(folder, task=kind, train_limit=7)
    assert (len(part.splits["train"]), len(part.splits["dev"])) == (7, 4)
    assert all(first in whole.splits["train"].content()[0] for first in part.splits["train"].content()[0])
    chosen = calibration_rows(whole.splits["train"], rows=7)
    assert chosen.content() == part.splits["train"].content()
    assert calibration_rows(whole.splits["train"], rows=50) is whole.splits["train"]
    encoder = TextEncoder.load(model, max_length=64)
    encoded, together = chosen.encode(encoder), whole.splits["train"].encode(encoder)
    texts = {tuple(together.select([row]).examples.tokens): together.select([row]).labels.tolist() for row in range(20)}
    for row in range(7):
        one = encoded.select([row])
        assert texts[tuple(one.examples.tokens)] == one.labels.tolist()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("multilabel", [{"labels": ["a"]}, {"sentence": "other"}]),
        ("token-classification", [{"tags": ["O", "B-X", "O"]}, {"tokens": ["we", "saw", "films"]}]),
        (
            "question-answering",
            [
                {"answers": {"text": [], "answer_start": []}},
                {"answers": {"text": ["good", "was good"], "answer_start": [13, 9]}},
                {"question": "song"},
                {"context": f"{CONTEXT} ."},
            ],
        ),
    ],
)
def test_the_hash_covers_what_training_depends_on(tmp_path: Path, kind: str, changes: list[dict[str, Any]]):
    row = {"multilabel": {"sentence": "x", "labels": ["a", "b"]}, "token-classification": TAGGED}.get(kind, ASKED)
    hashes = []
    for at, change in enumerate([{}, {}, *changes]):
        folder = write(tmp_path / str(at), row | change, row)
        hashes.append(load_data(folder, task=kind).sha256)
    hashes.append(load_data(folder, task=kind, train_limit=1).sha256)
    assert hashes[0] == hashes[1]
    if kind == "question-answering":
        hashes.append(load_data(folder, task=kind, doc_stride=64).sha256)
    assert len(set(hashes)) == len(hashes) - 1
