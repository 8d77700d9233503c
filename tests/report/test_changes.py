from __future__ import annotations

from typing import Any

import pytest

from bertemd_deploy.report import report
from bertemd_deploy.report.changes import LIST_SHOWN, change_list, change_sentences, change_table, probability, steps
from bertemd_deploy.report.records import Record


def made(record: dict[str, Any]) -> Record:
    return Record(record, "device")


def test_every_step_in_words(record) -> None:
    said = change_sentences(made(record))
    assert list(said) == ["Teacher → student", "Student → int8", "Teacher → int8"]
    assert said["Student → int8"] == (
        "Int8 decides 8 of 872 examples (0.9%) otherwise. It is right on 3 that the student misses and wrong on 5 that the "
        "student had: p = 0.73 by McNemar's exact test, no difference is shown. It changes accuracy by −0.2 points (95% "
        "interval −0.8 to +0.2, which covers 0)."
    )
    assert said["Teacher → student"].startswith("The student decides 44 of 872 examples (5.0%) otherwise.")
    assert "p < 0.001 by McNemar's exact test, a difference is shown." in said["Teacher → int8"]
    assert said["Teacher → int8"].endswith("accuracy by −1.2 points (95% interval −1.8 to −0.8).")


def test_nothing_lost_or_gained_needs_no_test(record) -> None:
    record["churn"]["steps"][1] |= {"right_to_wrong": 0, "wrong_to_right": 0, "mcnemar_p": 1.0}
    said = change_sentences(made(record))["Student → int8"]
    assert "What was right stays right, what was wrong stays wrong." in said
    assert "McNemar" not in said


def test_numbers_have_no_test(record) -> None:
    record["artifact"]["task"] = {"name": "stsb", "kind": "regression", "metrics": ["pearson"]}
    record["churn"] |= {"changed_beyond": 0.3751, "right": {"student": None, "int8": None}}
    record["churn"]["steps"] = [
        {
            "from": "student",
            "to": "int8",
            "changed": 20,
            "changed_towards_gold": 8,
            "changed_away_from_gold": 12,
            "mean_abs_move": 0.05,
            "max_abs_move": 0.9,
            "mcnemar_p": None,
            "metric_differences": {"pearson": {"difference": -0.004, "ci95": [-0.008, -0.002]}},
        }
    ]
    record["churn"]["listed"] = [
        {"index": 7, "text": "a", "text_pair": "b", "gold": 2.5, "decisions": {"student": 2.4, "int8": 3.3}}
        | {"scores": {"student": None, "int8": None}, "right": {"student": None, "int8": None}}
    ]
    record["churn"]["models"] = {"student": "one", "int8": "other"}
    assert change_sentences(made(record))["Student → int8"] == (
        "On 20 of 872 examples (2.3%) the number moves by more than 0.38 (a quarter of the labels' standard deviation), on 8 "
        "of them towards the label. A number is neither right nor wrong, so McNemar's test does not apply. It changes "
        "pearson by −0.4 points (95% interval −0.8 to −0.2)."
    )
    table = change_table(made(record))
    assert table is not None
    assert table.headings == ["Step", "Decided otherwise", "Towards the label", "pearson, points (95% interval)"]
    assert table.lines[0].cells == ["Student → int8", "20", "8", "−0.4 (−0.8 to −0.2)"]
    listed = change_list(made(record))
    assert listed is not None
    assert listed.lines[0].cells == ["7", "a / b", "2.50", "2.40", "3.30"]
    assert "the furthest moves first." in listed.caption


def test_the_table_counts_every_step(record) -> None:
    table = change_table(made(record))
    assert table is not None
    assert table.headings == [
        "Step",
        "Decided otherwise",
        "Right → wrong",
        "Wrong → right",
        "McNemar",
        "accuracy, points (95% interval)",
        "f1, points (95% interval)",
    ]
    assert table.lines[0].cells == [
        "Teacher → student",
        "44",
        "26",
        "18",
        "p = 0.29",
        "−0.9 (−1.5 to −0.5)",
        "−0.4 (−0.9 to +0.1)",
    ]
    assert "paired bootstrap over 1,000 resamples." in table.caption
    record["churn"]["steps"][0]["wrong_to_other_wrong"] = 2
    more = change_table(made(record))
    assert more is not None
    assert "Wrong → other wrong" in more.headings


@pytest.mark.parametrize(
    ("kind", "unit", "said"),
    [
        ("classification", "example", "resamples."),
        ("multilabel", "example", "An example is right where all of its labels are."),
        ("token-classification", "sentence", "A sentence is right where all of its words' tags are."),
        ("question-answering", "question", "A question is right where its answer is an accepted one."),
    ],
)
def test_it_is_said_what_is_right(record, kind, unit, said) -> None:
    record["artifact"]["task"]["kind"] = kind
    record["churn"]["unit"] = unit
    table = change_table(made(record))
    assert table is not None
    assert table.caption.endswith(said)
    assert f"of 872 {unit}s" in change_sentences(made(record))["Student → int8"]


def test_the_list_shows_the_first_with_what_each_model_said(record) -> None:
    table = change_list(made(record))
    assert table is not None
    assert len(table.lines) == LIST_SHOWN < 160
    assert table.headings == ["Example", "Text", "Gold", "Teacher", "Student", "Int8"]
    assert table.lines[0].cells == [
        "3",
        "a film of 3 hours",
        "positive",
        "✓ positive 0.99",
        "✓ positive 0.81",
        "✗ negative 0.52",
    ]
    assert table.caption.startswith("The first 100 of 160. Examples by their place in the evaluation slice, from 0; ")
    assert table.caption.endswith("All examples: churn.jsonl beside the record.")


def test_tags_are_shown_with_their_words_and_no_answer_as_none(record) -> None:
    record["churn"]["listed"] = [
        {
            "index": 0,
            "text": "U.N. in Paris",
            "words": ["U.N.", "Paris"],
            "gold": ["B-ORG", "B-LOC"],
            "decisions": {"teacher": ["B-ORG", "B-LOC"], "student": ["O", "B-LOC"], "int8": []},
            "right": {"teacher": True, "student": False},
        },
        {"index": 1, "text": "who", "gold": [], "decisions": {"teacher": "", "student": "me", "int8": None}},
    ]
    table = change_list(made(record))
    assert table is not None
    first, second = (line.cells for line in table.lines)
    assert first[2:] == ["U.N. B-ORG, Paris B-LOC", "✓ U.N. B-ORG, Paris B-LOC", "✗ U.N. O, Paris B-LOC", "none"]
    assert second[2:] == ["none", "none", "me", "not measured"]


@pytest.mark.parametrize(
    ("p", "said"),
    [(1.0, "p = 1.00"), (0.7266, "p = 0.73"), (0.0432, "p = 0.043"), (0.0004, "p < 0.001"), (0.0, "p < 0.001")],
)
def test_probabilities(p, said) -> None:
    assert probability(p) == said


@pytest.mark.parametrize(
    "churn",
    [
        None,
        {},
        {"steps": "none"},
        {"steps": [None, 3]},
        {"steps": [{}], "listed": [None, {}], "models": {"int8": None}},
        {"steps": [{"metric_differences": {"f1": {"difference": None, "ci95": [1]}}, "changed": "3"}], "listed": 3},
    ],
)
def test_damaged_records_make_a_page_all_the_same(record, churn, save, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    record["churn"] = churn
    page = report([save(record)], out=tmp_path / "out")
    assert ("What changed" in page.read_text(encoding="utf-8")) == bool(steps(made(record)))


def test_page_and_summary_hold_the_section(record, save, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    page = report([save(record)], out=tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    assert "<li><strong>Student → int8:</strong> Int8 decides 8 of 872 examples" in text
    assert "p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0.73 by McNemar" in text
    folded = text[text.index("<details>") : text.index("</details>")]
    assert "Show the examples decided otherwise" in folded
    assert folded.count("<tr") == 1 + LIST_SHOWN
    summary = page.with_name("report.md").read_text(encoding="utf-8")
    assert "- **Student → int8:** Int8 decides 8 of 872 examples (0.9%) otherwise." in summary
    assert "<details><summary>The examples decided otherwise</summary>\n\n| Example |" in summary
    assert summary.count("a film of ") == 20
