"""From start and end logits to answers, and SQuAD's exact match and F1 of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bertemd_deploy.answers import (
    LONGEST_ANSWER,
    Answers,
    answer_scores,
    best_answers,
    best_span,
    exact_match,
    normalized,
    token_f1,
)

# Two windows of one context: [CLS] question [SEP] In Paris . [SEP], and [CLS] question [SEP] Paris . Yes [SEP]
CONTEXT = "In Paris. Yes"
OUT = (-1, -1)
SPANS = np.array(
    [OUT, OUT, OUT, (0, 2), (3, 8), (8, 9), OUT, OUT, OUT, OUT, (3, 8), (8, 9), (10, 13), OUT], dtype=np.int32
)
OFFSETS = np.array([0, 7, 14])


def gold(*accepted: str) -> Answers:
    return Answers(np.array([0, 0], np.int32), SPANS, (CONTEXT,), (accepted,), ("q",))


def scores(*, null: float = -5.0, **at: tuple[float, float]) -> np.ndarray:
    logits = np.full((14, 2), -9.0, dtype=np.float32)
    logits[[0, 7]] = null / 2
    for token, pair in at.items():
        logits[int(token[1:])] = pair
    return logits


def test_the_best_span_of_all_windows_is_the_answer() -> None:
    (answer,) = best_answers(scores(t3=(1, -9), t4=(-9, 2), t12=(3, 3)), offsets=OFFSETS, gold=gold("x"))
    assert (answer.text, answer.start, answer.end, answer.score, answer.null_score) == ("Yes", 10, 13, 6.0, -5.0)
    (answer,) = best_answers(scores(t3=(1, -9), t4=(-9, 2)), offsets=OFFSETS, gold=gold("x"))
    assert (answer.text, answer.score) == ("In Paris", 3.0)


def test_tokens_outside_the_context_are_no_answer() -> None:
    (answer,) = best_answers(scores(t1=(9, 9), t6=(9, 9), t5=(1, 1)), offsets=OFFSETS, gold=gold("x"))
    assert answer.text == "."


def test_an_end_before_its_start_is_no_answer() -> None:
    (answer,) = best_answers(scores(t5=(5, -4), t3=(-4, 5)), offsets=OFFSETS, gold=gold("x"))
    assert answer.text in ("In", ".")


def test_no_answer_is_one_where_the_data_has_such() -> None:
    logits = scores(null=4.0, t4=(1, 1))
    assert best_answers(logits, offsets=OFFSETS, gold=gold())[0].text == ""
    assert best_answers(logits, offsets=OFFSETS, gold=gold("Paris"))[0].text == "Paris"
    assert best_answers(logits, offsets=OFFSETS, gold=gold("Paris"), null=True)[0].text == ""
    assert best_answers(logits, offsets=OFFSETS, gold=gold(), null=False)[0].text == "Paris"
    assert best_answers(scores(null=1.9, t4=(1, 1)), offsets=OFFSETS, gold=gold())[0].text == "Paris"


def test_no_answer_scores_what_its_surest_window_denies() -> None:
    logits = scores(null=4.0, t4=(1, 1))
    logits[7] = 0.5  # the second window says that there is one
    (answer,) = best_answers(logits, offsets=OFFSETS, gold=gold())
    assert (answer.text, answer.null_score) == ("Paris", 1.0)


def test_no_answer_is_one_where_the_rest_of_the_data_has_such() -> None:
    logits = scores(null=4.0, t4=(1, 1))
    for allowed, text in ((True, ""), (False, "Paris"), (None, "Paris")):
        part = replace(gold("Paris"), no_answer=allowed)
        assert best_answers(logits, offsets=OFFSETS, gold=part)[0].text == text
        assert part.select([0], offsets=OFFSETS).no_answer is allowed
        assert Answers.from_arrays(part.arrays()).no_answer is allowed
    assert not replace(gold(), no_answer=False).unanswerable


@pytest.mark.parametrize(
    ("context", "spans", "text"),
    [
        ("in Paris now", [(0, 2), (2, 8), (8, 12)], "Paris"),  # blanks belong to the token behind them
        ("in Paris now", [(0, 3), (3, 9), (9, 12)], "Paris"),
        ("in  Paris", [(0, 2), (2, 9), (2, 3)], "Paris"),
        ("le cafe\u0301 noir", [(0, 2), (3, 7), (9, 13)], "cafe\u0301"),
        ("le e\u0301a", [(0, 2), (4, 6), (0, 2)], "e\u0301a"),
        ("a \u0301b", [(0, 1), (2, 4), (0, 1)], "\u0301b"),
        ("caf\u0939\u093f x", [(0, 3), (3, 4), (6, 7)], "\u0939\u093f"),
    ],
)
def test_an_answer_has_whole_letters_and_no_blanks_at_its_ends(context: str, spans: list[Any], text: str) -> None:
    part = Answers(np.zeros(1, np.int32), np.array([OUT, *spans], np.int32), (context,), (("x",),), ("q",))
    logits = np.array([[0, 0], [0, 0], [5, 5], [0, 0]], dtype=np.float32)
    (answer,) = best_answers(logits, offsets=np.array([0, 4]), gold=part)
    assert (answer.text, context[answer.start : answer.end]) == (text, text)


def test_a_token_of_blanks_alone_neither_starts_nor_ends_an_answer() -> None:
    part = Answers(np.zeros(1, np.int32), np.array([(0, 1), (1, 2), (2, 3)], np.int32), ("a b",), (("x",),), ("q",))
    logits = np.array([[0, 0], [9, 9], [1, 1]], dtype=np.float32)
    (answer,) = best_answers(logits, offsets=np.array([0, 3]), gold=part)
    assert (answer.text, answer.score) == ("b", 2.0)


def test_an_empty_context_has_no_answer() -> None:
    empty = Answers(np.zeros(1, np.int32), np.full((3, 2), -1, np.int32), ("",), (("x",),), ("q",))
    (answer,) = best_answers(np.zeros((3, 2)), offsets=np.array([0, 3]), gold=empty)
    assert (answer.text, answer.start, answer.score) == ("", -1, -np.inf)


@pytest.mark.parametrize("seed", range(4))
def test_best_span_is_the_best_of_all_pairs(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits, inside = random.normal(size=(60, 2)), random.random(60) < 0.8
    pairs = {
        (first, last): logits[first, 0] + logits[last, 1]
        for first in range(60)
        for last in range(first, min(60, first + LONGEST_ANSWER))
        if inside[first] and inside[last]
    }
    score, first, last = best_span(logits, inside=inside)
    assert (first, last) == max(pairs, key=lambda pair: pairs[pair])
    assert score == pytest.approx(max(pairs.values()))


def test_longer_answers_are_not_considered() -> None:
    logits = np.zeros((LONGEST_ANSWER + 1, 2))
    logits[0, 0] = logits[-1, 1] = 10
    _, first, last = best_span(logits, inside=np.ones(len(logits), dtype=bool))
    assert last - first < LONGEST_ANSWER


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("A man, an apple; the end", "man apple end"),
        ("thermal", "thermal"),
        ("the", ""),
        ("1,000", "1000"),
    ],
)
def test_normalised_as_squad_does(text: str, expected: str) -> None:
    assert normalized(text) == expected


def test_scores_of_pairs_by_hand() -> None:
    assert exact_match("The Cat.", "cat") == 1.0
    assert exact_match("cats", "cat") == 0.0
    assert token_f1("a big cat", "big dog") == pytest.approx(2 * 1 / 4)
    assert token_f1("x x y", "x x") == pytest.approx(2 * 2 / 5)
    assert token_f1("cat", "dog") == 0.0
    assert token_f1("", "") == token_f1("the", "") == 1.0
    assert token_f1("cat", "") == token_f1("", "cat") == 0.0


def test_an_answer_counts_by_the_best_of_the_accepted_ones() -> None:
    found = answer_scores(["big cat", "", "cat", "x"], accepted=[("cat", "the big cat"), (), (), ("the", "x")])
    assert found == {"exact_match": 0.75, "f1_squad": 0.75}
    assert answer_scores(["cat food"], accepted=[("cat",)]) == {"exact_match": 0.0, "f1_squad": pytest.approx(2 / 3)}


def test_selected_rows_keep_their_examples() -> None:
    both = Answers(
        np.array([0, 0, 1], np.int32),
        np.concatenate([SPANS, SPANS[:7]]),
        (CONTEXT, "other"),
        (("Paris",), ()),
        ("q", "r"),
    )
    last = both.select([2], offsets=np.array([0, 7, 14, 21]))
    assert (last.example.tolist(), last.contexts, last.accepted, last.ids) == ([0], ("other",), ((),), ("r",))
    np.testing.assert_array_equal(last.spans, SPANS[:7])
    turned = both.select([2, 1], offsets=np.array([0, 7, 14, 21]))
    assert turned.example.tolist() == [1, 0]
    assert turned.ids == ("q", "r")
    assert both.unanswerable
    assert not turned.select([1], offsets=np.array([0, 7, 14])).unanswerable


def test_arrays_give_the_same_back_and_hold_each_context_once() -> None:
    example = np.array([0, 1], np.int32)
    part = Answers(example, SPANS, ("süß", "süß"), (("a", "b"), ()), ("q", "r"))
    arrays = part.arrays()
    assert arrays["text"].tobytes().decode().count("süß") == 1
    again = Answers.from_arrays(arrays)
    assert (again.contexts, again.accepted, again.ids) == (part.contexts, part.accepted, part.ids)
    np.testing.assert_array_equal(again.spans, SPANS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": b"[]"}, "the texts are not an object"),
        ({"text": b'{"contexts": [1], "context": [0], "accepted": [[]], "ids": ["q"]}'}, "not lists of text"),
        ({"text": b'{"contexts": ["c"], "context": [0], "accepted": [[1]], "ids": ["q"]}'}, "accepted answers are not"),
        ({"text": b'{"contexts": ["c"], "context": [0], "accepted": [], "ids": ["q"]}'}, "differ in number"),
        ({"text": b'{"contexts": ["c"], "context": [7], "accepted": [[]], "ids": ["q"]}'}, "not that of a context"),
        (
            {"text": b'{"contexts": ["c"], "context": [0], "accepted": [[]], "ids": ["q"], "no_answer": 1}'},
            "no_answer is neither",
        ),
        ({"example": np.array([0, 3], np.int32)}, "a row is a window of no example"),
        ({"spans": SPANS[:, 0]}, "character spans are not pairs"),
    ],
)
def test_arrays_that_are_no_answers_are_refused(change: dict, message: str) -> None:
    change = {
        key: np.frombuffer(value, dtype=np.uint8) if isinstance(value, bytes) else value
        for key, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        Answers.from_arrays(gold("x").arrays() | change)
