from __future__ import annotations

import numpy as np

from bertemd_deploy.decisions import TIE, same_decisions

OFFSETS = np.array([0, 3, 5])


def test_classes_and_tags_are_compared_by_the_largest_logit():
    expected = np.array([[2.0, 1.0], [0.0, 1.0], [0.5, 0.5 + TIE / 2]])
    found = np.array([[1.0, 2.0], [0.0, 9.0], [0.6, 0.5]])
    for kind in ("classification", "token-classification"):
        same = same_decisions(kind, expected=expected, found=found, offsets=OFFSETS)
        assert same.tolist() == [False, True, True]  # the last is a tie


def test_labels_are_compared_by_the_sign_of_every_logit():
    expected = np.array([[2.0, -1.0], [0.1, -0.1], [TIE / 2, 1.0]])
    found = np.array([[0.1, -9.0], [0.1, 0.1], [-1.0, 1.0]])
    assert same_decisions("multilabel", expected=expected, found=found, offsets=OFFSETS).tolist() == [True, False, True]


def test_answers_are_compared_by_the_best_span_of_each_row():
    expected = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]])
    found = expected.copy()
    found[4] = 2.0, 2.0  # the second row answers with its other token
    assert same_decisions("question-answering", expected=expected, found=found, offsets=OFFSETS).tolist() == [
        True,
        False,
    ]
    found = np.array([[0.0, 3.0], [0.0, 0.0], [3.0, 0.0], [1.0, 1.0], [0.0, 0.0]])  # ends before it starts
    assert same_decisions("question-answering", expected=expected, found=found, offsets=OFFSETS).tolist() == [
        False,
        True,
    ]
