"""Formats beside plain tables: CoNLL text, SQuAD's json, names kept in parquet; tables are tested through `load_data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bertemd_deploy.errors import DataError
from bertemd_deploy.readers import read_names, read_records

TOKENS = ("tokens", "", "tags")
QUESTIONS = ("question", "context", "answers")


def conll(folder: Path, text: str | bytes, *, suffix: str = "conll") -> list[tuple[str, dict[str, Any]]]:
    (folder / f"train.{suffix}").write_bytes(text.encode() if isinstance(text, str) else text)
    return read_records(folder, "train", kind="token-classification", columns=TOKENS)[1].rows


def squad(folder: Path, content: Any) -> list[tuple[str, dict[str, Any]]]:
    (folder / "dev.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_records(folder, "dev", kind="question-answering", columns=QUESTIONS)[1].rows


@pytest.mark.parametrize("suffix", ["conll", "txt"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_conll_is_a_token_and_its_tag_a_line(tmp_path: Path, suffix: str, newline: str) -> None:
    text = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\n"
    rows = conll(tmp_path, text.replace("\n", newline), suffix=suffix)
    path = tmp_path / f"train.{suffix}"
    assert rows == [
        (f"{path} line 3", {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}),
        (f"{path} line 7", {"tokens": ["Peter"], "tags": ["B-PER"]}),
    ]


def test_conll_with_tabs_may_have_blanks_in_tokens(tmp_path: Path) -> None:
    assert conll(tmp_path, "New York\tB-LOC\n \nof\tO")[0][1] == {"tokens": ["New York"], "tags": ["B-LOC"]}


def test_a_token_may_be_a_number_sign(tmp_path: Path) -> None:
    assert conll(tmp_path, "# O\na O\n")[0][1] == {"tokens": ["#", "a"], "tags": ["O", "O"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a O\nb\n", r"train\.conll line 2: needs a token and its tag, found 'b'\. A blank line stands between"),
        ("a\t\n", r"line 1: needs a token and its tag, found 'a'"),
        ("\n\n", r"train\.conll: the file is empty\. Each line is a token and its tag, such as: Paris B-LOC"),
        (
            "# sent_id = 1\na O\n",
            r"line 1: '# sent_id = 1' looks like a comment, which would be read as a token.*grep -v",
        ),
        ("# some words here\na O\n", r"line 1: '# some words here' looks like a comment"),
        ("# text = a\n1\ta\ta\tDET\tDT\t_\t2\tdet\t_\t_\n", r"line 2: this is CoNLL-U \(10 columns.*cut -f 2,4"),
        ("a O\rb O\r", r"train\.conll: its lines end in a carriage return alone"),
        (b"a O\n\xff O\n", r"train\.conll line 2: not UTF-8 \(byte 0xff\)"),
    ],
)
def test_conll_that_is_none(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        conll(tmp_path, text)


def test_squad_is_flattened(tmp_path: Path) -> None:
    asked = [
        {"id": "q1", "question": "Where?", "answers": [{"text": "Paris", "answer_start": 3}]},
        {"id": "q2", "question": "Who?", "is_impossible": True, "answers": [], "plausible_answers": [{}]},
    ]
    rows = squad(tmp_path, {"version": "v2.0", "data": [{"paragraphs": [{"context": "In Paris", "qas": asked}]}]})
    assert [where for where, _ in rows] == [
        f"{tmp_path / 'dev.json'} data[0].paragraphs[0].qas[{at}]" for at in range(2)
    ]
    answers = {"text": ["Paris"], "answer_start": [3]}
    assert rows[0][1] == {"id": "q1", "question": "Where?", "context": "In Paris", "answers": answers}
    assert rows[1][1]["answers"] == {"text": [], "answer_start": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"dev\.json: not valid JSON \(Expecting property name"),
        ("[" * 100_000, r"dev\.json: not valid JSON \(nested too deep"),
        ([], r"dev\.json: needs the list 'data' of a SQuAD file \(data, paragraphs, qas, answers\)"),
        ({"data": [{}]}, r"dev\.json data\[0\]: needs the list 'paragraphs'"),
        ({"data": [{"paragraphs": [{"context": "c"}]}]}, r"data\[0\]\.paragraphs\[0\]: needs the list 'qas'"),
        ({"data": [{"paragraphs": [{"qas": [{"id": "q"}]}]}]}, r"paragraphs\[0\]\.qas\[0\]: needs the list 'answers'"),
        ({"data": [{"paragraphs": [{"qas": [{"answers": ["x"]}]}]}]}, r"qas\[0\]: each of its answers is an object"),
        (
            {"data": [{"paragraphs": [{"qas": [{"is_impossible": True, "answers": [{}]}]}]}]},
            r"qas\[0\]: is_impossible is true, yet it has answers\. Remove one of the two",
        ),
        ({"data": []}, r"dev\.json: holds no questions"),
    ],
)
def test_squad_that_is_none(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        squad(tmp_path, content)


def test_a_table_is_no_format_of_words_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("tokens\ttags\na\tO\n")
    with pytest.raises(
        DataError, match=r"needs exactly one train file \(train\.jsonl\|parquet\|conll\|txt\), found none"
    ):
        read_records(tmp_path, "train", kind="token-classification", columns=TOKENS)
    (tmp_path / "dev.conll").write_text("a O\n")
    with pytest.raises(DataError, match=r"needs exactly one dev file \(dev\.tsv\|csv\|jsonl\|parquet\), found none"):
        read_records(tmp_path, "dev", kind="multilabel", columns=TOKENS)


def test_names_of_numbers_in_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = {
        "tags": {"feature": {"names": ["O", "B-X"], "_type": "ClassLabel"}, "_type": "List"},
        "kind": {"names": ["a", "b"], "_type": "ClassLabel"},
        "tokens": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    }
    table = pyarrow.table({"tokens": [["a", "b"]], "tags": [[1, 0]], "kind": [0]})
    for metadata, names in (
        (json.dumps({"info": {"features": features}}), {"tags": ("O", "B-X"), "kind": ("a", "b")}),
        ('{"info": 3}', {}),
        ("not JSON", {}),
    ):
        parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "train.parquet")
        _, records = read_records(tmp_path, "train", kind="token-classification", columns=TOKENS)
        assert records.names == names
    assert records.rows[0][1]["tags"] == [1, 0]


def test_labels_txt_is_a_name_a_line(tmp_path: Path) -> None:
    assert read_names(tmp_path) == ()
    (tmp_path / "labels.txt").write_text("O\r\nB-PER\n\nin two words \n")
    assert read_names(tmp_path) == ("O", "B-PER", "in two words")
    (tmp_path / "labels.txt").write_text("a\nb\na\n")
    with pytest.raises(DataError, match=r"labels\.txt: the label 'a' is there twice\. Give each label one line"):
        read_names(tmp_path)
